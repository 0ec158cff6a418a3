"""Random batches from the pair shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.models.bundle import ControlImage
from tegula.models.mini.bundle import VOCABULARY, VOCABULARY_SIZE
from tegula.models.mini.network import luma
from train.describe import DAMAGES, damage, describe, draw_words, luma_of

_CLEAN, _DAMAGED = np.float32(1), np.float32(0)


@dataclass(frozen=True)
class Batch:
    """Crops as tensors.

    target: what to predict, [n, 1, h, w] luma. truth_is_clean: rows whose target is the
    undamaged truth. words: [n, vocabulary]. seen: [n, 1, 1, 1], 0 where the control is hidden.
    """

    target: Tensor
    control: ControlImage
    words: Tensor
    truth_is_clean: Tensor
    seen: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        control = ControlImage(self.control.prescaled.to(device), self.control.source.to(device))
        return Batch(
            self.target.to(device), control, self.words.to(device),
            self.truth_is_clean.to(device), self.seen.to(device),
        )  # fmt: skip

    def rows(self, part: slice) -> Batch:
        """Return some rows of the batch."""
        control = ControlImage(self.control.prescaled[part], self.control.source[part])
        return Batch(
            self.target[part], control, self.words[part], self.truth_is_clean[part],
            self.seen[part],
        )  # fmt: skip


@dataclass(frozen=True)
class BatchSettings:
    """crop: side in pixels. damaged: share of damaged targets. hidden: share without control.

    parts: threads that a batch is spread over on the CPU, 1 or 2.
    """

    size: int = 12
    crop: int = 128
    damaged: float = 0.15
    hidden: float = 0.05
    parts: int = 2


class PairSource:
    """All shards of a folder, mapped into memory."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        """Open the shards below ``folder``, at most ``most`` pairs of them."""
        paths = sorted(folder.glob("pairs-*.npy"))
        if not paths:
            raise FileNotFoundError(f"No pairs in {folder}; run `python -m train pairs` first.")
        self._shards = [np.load(path, mmap_mode="r") for path in paths]
        self._places = [(s, i) for s, rows in enumerate(self._shards) for i in range(len(rows))]
        if most is not None:
            self._places = self._places[:most]

    def __len__(self) -> int:
        return len(self._places)

    def draw(self, settings: BatchSettings, rng: np.random.Generator) -> Batch:
        """Return a random batch; the same state of ``rng`` gives the same batch."""
        rows = [self._draw_row(settings, rng) for _ in range(settings.size)]
        targets, prescaled, sources, words, clean = zip(*rows, strict=True)
        seen = (rng.random(settings.size) >= settings.hidden).astype(np.float32)
        return Batch(
            torch.from_numpy(np.stack(targets))[:, None],
            ControlImage(_images(prescaled), _images(sources)),
            torch.from_numpy(np.stack(words)),
            torch.from_numpy(np.stack(clean)) > 0,
            torch.from_numpy(seen).view(-1, 1, 1, 1),
        )

    def _draw_row(
        self, settings: BatchSettings, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32] | np.float32, ...]:
        shard, index = self._places[int(rng.integers(len(self._places)))]
        crop = _turned(_cut(self._shards[shard][index], settings.crop, rng), rng)
        truth, prescaled, source = crop[..., :3], crop[..., 3:6], crop[..., 6:]
        target = luma_of(truth)
        described = describe(truth, prescaled)
        if rng.random() >= settings.damaged:
            return target, prescaled, source, draw_words(described, rng), _CLEAN
        word = str(rng.choice(DAMAGES))
        words = np.zeros(VOCABULARY_SIZE, np.float32)
        words[VOCABULARY.index(word)] = 1.0
        return damage(target, word, rng), prescaled, source, words, _DAMAGED


def _cut(row: NDArray[np.uint8], side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    # The outer pixels were prescaled without their surroundings, so crops avoid them.
    margin = 4 if row.shape[0] >= side + 8 else 0
    top, left = (int(rng.integers(margin, row.shape[0] - side - margin + 1)) for _ in range(2))
    return row[top : top + side, left : left + side].astype(np.float32) / np.float32(255)  # type: ignore[no-any-return]


def _turned(crop: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    crop = np.rot90(crop, int(rng.integers(4)))
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def _images(crops: tuple[NDArray[np.float32], ...]) -> Tensor:
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def luma_difference(batch: Batch) -> Tensor:
    """Return target luma minus prescaled luma, [n, 1, h, w]."""
    return batch.target - luma(batch.control.prescaled)
