"""What the net for drawings is trained on: drawings and some photographs, damaged afresh.

A shard is ``line-NNN.npy``, uint8 [n, side, side, 3] of truths, each four times as large as what
the net will see. The small pictures are made when a batch is drawn, so that no two are the same:
shrunk by several kernels, half of them damaged as pictures on the web are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from train import photos
from train.batches import BatchSettings
from train.degradation import Picture
from train.drawings import draw
from train.pairs import levels, to_image, unit
from train.shards import OnShard, Shards, ignore_shard
from train.sketch import FACTOR, Face

_MARGIN = 4
"""Pixels of the small picture around a crop, so that damage at its edge is as inside."""


@dataclass(frozen=True)
class LinePairSettings:
    """How many truths, of what.

    photographs: share of photographs, so that the net does not break there.
    held_out: drawings by which a checkpoint is chosen.
    """

    side: int = 320
    count: int = 2000
    shard: int = 100
    photographs: float = 0.2
    held_out: int = 24
    seed: int = 151


@dataclass(frozen=True)
class LineBatch:
    """Crops: small [n, 3, h, w], truth [n, 3, 4h, 4w]."""

    small: Tensor
    truth: Tensor

    def to(self, device: torch.device) -> LineBatch:
        """Return the batch on another device."""
        return LineBatch(self.small.to(device), self.truth.to(device))

    def twice(self) -> LineBatch:
        """Return the batch for the head that enlarges 2x."""
        return LineBatch(self.small, functional.avg_pool2d(self.truth, FACTOR // 2))


def make_line_shards(
    paths: Sequence[Path],
    folder: Path,
    settings: LinePairSettings,
    faces: Sequence[Face],
    on_shard: OnShard = ignore_shard,
) -> None:
    """Write all shards that are not there yet; each is seeded on its own."""
    shards = Shards(folder, "line-{:03d}.npy", settings.count, settings.shard)
    missing = shards.missing()
    pictures = [levels(photos.read(path)) for path in paths] if missing else []
    for shard in missing:
        rng = np.random.default_rng([settings.seed, shard])
        rows = [_truth(pictures, settings, faces, rng) for _ in range(shards.pairs_in(shard))]
        shards.write(shard, partial(np.save, arr=np.stack(rows)))
        on_shard(shard + 1, shards.total)


def _truth(
    pictures: Sequence[NDArray[np.uint8]],
    settings: LinePairSettings,
    faces: Sequence[Face],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    if rng.random() >= settings.photographs:
        return draw(settings.side // FACTOR, rng, faces)
    picture = pictures[int(rng.integers(len(pictures)))]
    return levels(photos.random_crop(unit(picture), settings.side, rng))


class LineSource:
    """All shards of a folder, in memory."""

    def __init__(self, folder: Path) -> None:
        """Read the shards below ``folder``."""
        paths = sorted(folder.glob("line-*.npy"))
        if not paths:
            raise FileNotFoundError(f"No truths in {folder}; run `python -m train line` first.")
        self._truths = [row for path in paths for row in np.load(path)]

    def __len__(self) -> int:
        return len(self._truths)

    def draw(self, settings: BatchSettings, rng: np.random.Generator) -> LineBatch:
        """Return random crops, damaged; the same state of ``rng`` gives the same."""
        rows = [self._row(settings.crop, rng) for _ in range(settings.size)]
        small, truth = zip(*rows, strict=True)
        return LineBatch(to_image(np.stack(small)), to_image(np.stack(truth)))

    def _row(
        self, side: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        truth = self._truths[int(rng.integers(len(self._truths)))]
        # What programs draw begins at whole pixels, what is shrunk begins anywhere.
        step = FACTOR if rng.random() < 0.5 else 1
        whole, edge = side + 2 * _MARGIN * FACTOR, _MARGIN * FACTOR
        y, x = (int(v) * step for v in rng.integers(0, (len(truth) - whole) // step + 1, 2))
        crop = truth[y : y + whole, x : x + whole]
        small = damage(shrink(crop, FACTOR, rng), rng)[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
        inside = crop[edge:-edge, edge:-edge]
        # Letters mostly stand upright; a net that sees few learns them better that way.
        turns = int(rng.integers(4)) if rng.random() < 0.25 else 0
        direction = -1 if rng.random() < 0.15 else 1
        a, b = (np.rot90(p, turns)[:, ::direction] for p in (small, inside))
        return np.ascontiguousarray(a), np.ascontiguousarray(b)


def shrink(truth: NDArray[np.uint8], factor: int, rng: np.random.Generator) -> Picture:
    """Return a picture shrunk by one of several kernels, in 0..1."""
    size = (truth.shape[1] // factor, truth.shape[0] // factor)
    chosen = rng.random()
    if chosen < 0.5:
        return unit(np.asarray(cv2.resize(truth, size, interpolation=cv2.INTER_AREA)))
    if chosen < 0.62:  # without a low-pass first, as careless programs do
        kernel = cv2.INTER_CUBIC if rng.random() < 0.5 else cv2.INTER_LINEAR
        return unit(np.asarray(cv2.resize(truth, size, interpolation=kernel)))
    if chosen < 0.74:
        blurred = cv2.GaussianBlur(truth, (0, 0), factor * float(rng.uniform(0.2, 0.6)))
        return unit(np.asarray(cv2.resize(blurred, size, interpolation=cv2.INTER_AREA)))
    kernels = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    return unit(np.asarray(Image.fromarray(truth).resize(size, kernels[int(rng.integers(3))])))


_FULL, _QUARTER = (
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
)


def damage(small: Picture, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a small picture as it comes from the web: as it is half the time, else damaged."""
    if rng.random() < 0.5:
        return levels(small)
    if rng.random() < 0.35:
        channels = 1 if rng.random() < 0.4 else 3
        noise = rng.standard_normal((*small.shape[:2], channels), np.float32)
        small = small + noise * np.float32(rng.uniform(0.5, 6) / 255)
    if rng.random() < 0.15:  # colour at half the size, as in video
        height, width = small.shape[:2]
        luma, *chroma = cv2.split(cv2.cvtColor(np.clip(small, 0, 1), cv2.COLOR_RGB2YCrCb))
        chroma = [
            cv2.resize(cv2.resize(c, (width // 2, height // 2), interpolation=cv2.INTER_AREA),
                       (width, height), interpolation=cv2.INTER_LINEAR)
            for c in chroma
        ]  # fmt: skip
        small = np.asarray(cv2.cvtColor(cv2.merge([luma, *chroma]), cv2.COLOR_YCrCb2RGB))
    whole = levels(small)
    if rng.random() < 0.85:
        whole = _compress(whole, int(rng.integers(30, 96)), rng.random() < 0.6)
    return whole


def _compress(picture: NDArray[np.uint8], quality: int, subsampled: bool) -> NDArray[np.uint8]:  # noqa: FBT001
    options = [
        cv2.IMWRITE_JPEG_QUALITY, quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _QUARTER if subsampled else _FULL,
    ]  # fmt: skip
    data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    return np.asarray(cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
