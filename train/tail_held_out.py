"""Held-out pairs of the tail, and what a tuned tail makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.quality.recipes import DEGRADATIONS, degrade
from tegula.models.prescalers.networks import RRDBNet
from tegula.pipeline.adjust import wavelet_lock
from train import photos
from train.degradation import Picture
from train.held_out import HeldOut, Verdict
from train.pairs import enlarge_by_lanczos, levels, to_image
from train.tail import run_tail
from train.tail_pairs import FACTOR, TailBatch

See = Callable[[Tensor], Tensor]


def make_tail_held_out(paths: Sequence[Path], see: See, side: int, path: Path) -> None:
    """Write a crop of every held-out photograph under each of the bench's degradations."""
    rng = np.random.default_rng(5)
    truths, smalls, seen = [], [], []
    for number, photograph in enumerate(paths):
        picture = photos.read(photograph)
        for name in DEGRADATIONS:
            truth = photos.plain_crop(picture, side, rng)
            small = degrade(truth, FACTOR, name, f"{number} {name}")
            truths.append(levels(truth))
            smalls.append(small)
            seen.append(see(to_image(small[None])).half().cpu().numpy()[0])
    np.savez(path, truth=np.stack(truths), small=np.stack(smalls), seen=np.stack(seen))


class TailHeldOut:
    """Held-out pairs, measured beside what the untuned tail makes of them."""

    def __init__(self, path: Path, untuned: RRDBNet) -> None:
        """Read the pairs that ``make_tail_held_out`` wrote."""
        content = np.load(path)
        self._truths, self._smalls, self._seen = (content[n] for n in ("truth", "small", "seen"))
        self._sources = [
            enlarge_by_lanczos(s.astype(np.float32) / 255, len(t))
            for s, t in zip(self._smalls, self._truths, strict=True)
        ]
        before = self.run(untuned)
        truths = self._truths.astype(np.float32) / np.float32(255)
        rows = [np.dstack(row) for row in zip(truths, before, self._sources, strict=True)]
        self._held_out = HeldOut(np.stack(rows))

    def judge(self, name: str, tail: RRDBNet) -> Verdict:
        """Return how a tail compares with the untuned one."""
        return self._held_out.compare(name, self.run(tail))

    def columns(self, tail: RRDBNet, rows: int) -> list[list[Picture]]:
        """Return truth, source, untuned and tuned pictures of the first pairs."""
        pairs = self._held_out.pairs[:rows]
        before = [list(pairs[..., channels]) for channels in (slice(3), slice(6, 9), slice(3, 6))]
        return [*before, self.run(tail, rows)]

    def run(self, tail: RRDBNet, rows: int | None = None) -> list[Picture]:
        """Return the pictures that a tail makes, colours held to the source."""
        found = []
        for small, seen, source in zip(
            self._smalls[:rows], self._seen[:rows], self._sources, strict=False
        ):
            picture = to_image(small[None])
            features = torch.from_numpy(seen[None]).float()
            with torch.inference_mode():
                made = run_tail(tail, TailBatch(picture, picture, features))
            pixels = made[0].clamp(0, 1).permute(1, 2, 0)
            found.append(wavelet_lock(pixels, torch.from_numpy(source)).numpy())
        return found
