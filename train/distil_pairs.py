"""Pairs for distilling a small prescaler: truth, damaged copy, and what the teacher makes of it.

The teacher runs once over each pair. Its weights lie on the straight line from x4plus to
``tegula-photo``, and how far along depends on the damage: what is right for a clean shrink
keeps the noise and the blocks of a damaged one (docs/decisions/0005).

A shard is ``distil-NNN.npz`` with ``truth`` and ``taught`` [n, side, side, 3] and ``small``
[n, side/4, side/4, 3], uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from train import photos
from train.batches import BatchSettings
from train.degradation import RECIPES, degrade
from train.pairs import levels, to_image, unit
from train.shards import OnShard, Shards, ignore_shard

FACTOR = 4
_TEACHER_BATCH = 8
_MARGIN = 6
"""The teacher saw no surroundings at the edge of a pair; so many source pixels are not used."""

Teach = Callable[[Tensor], Tensor]
"""[n, 3, h, w] in 0..1 to [n, 3, 4h, 4w]."""


@dataclass(frozen=True)
class DistilPairSettings:
    """How many pairs, of what.

    recipe_shares: shares of ``RECIPES``.
    teacher_shares: for each of ``RECIPES``, how far its teacher lies from x4plus (0)
        towards what was tuned (1).
    """

    side: int = 256
    count: int = 600
    shard: int = 40
    recipe_shares: tuple[float, float, float] = (0.25, 0.4, 0.35)
    teacher_shares: tuple[float, float, float] = (0.65, 0.35, 0.35)
    seed: int = 15


@dataclass(frozen=True)
class DistilBatch:
    """Crops: small [n, 3, h, w]; truth and what the teacher made, [n, 3, 4h, 4w]."""

    small: Tensor
    truth: Tensor
    taught: Tensor

    def to(self, device: torch.device) -> DistilBatch:
        """Return the batch on another device."""
        return DistilBatch(*(x.to(device) for x in (self.small, self.truth, self.taught)))

    def twice(self) -> DistilBatch:
        """Return the batch for the head that enlarges 2x: its goals shrunk to half."""
        goals = (functional.avg_pool2d(x, FACTOR // 2) for x in (self.truth, self.taught))
        return DistilBatch(self.small, *goals)


def make_distil_shards(
    paths: list[Path],
    folder: Path,
    settings: DistilPairSettings,
    teachers: Mapping[str, Teach],
    on_shard: OnShard = ignore_shard,
) -> None:
    """Write all shards that are not there yet; each is seeded on its own.

    teachers: for each of ``RECIPES``.
    """
    shards = Shards(folder, "distil-{:03d}.npz", settings.count, settings.shard)
    missing = shards.missing()
    if not missing:
        return
    pictures = photos.Photographs([levels(photos.read(p)) for p in paths])
    for shard in missing:
        rng = np.random.default_rng([settings.seed, shard])
        count = shards.pairs_in(shard)
        truth, small, taught = make_rows(pictures, settings, teachers, count, rng)
        shards.write(shard, partial(np.savez, truth=truth, small=small, taught=taught))
        on_shard(shard + 1, shards.total)


def make_rows(
    pictures: photos.Photographs,
    settings: DistilPairSettings,
    teachers: Mapping[str, Teach],
    count: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the truths of so many pairs, their damaged copies, and what teachers made of these."""
    truths, smalls = [], []
    recipes = rng.choice(len(RECIPES), count, p=settings.recipe_shares)
    for recipe in recipes:
        truth = photos.random_crop(unit(pictures.draw(rng)), settings.side, rng)
        truths.append(levels(truth))
        smalls.append(levels(degrade(truth, FACTOR, RECIPES[int(recipe)], rng)))
    small = np.stack(smalls)
    taught = np.empty((count, settings.side, settings.side, 3), np.uint8)
    for number, name in enumerate(RECIPES):
        rows = np.flatnonzero(recipes == number)
        for group in np.split(rows, range(_TEACHER_BATCH, len(rows), _TEACHER_BATCH)):
            if len(group):
                made = teachers[name](to_image(small[group])).clamp(0, 1)
                taught[group] = levels(made.permute(0, 2, 3, 1).float().cpu().numpy())
    return np.stack(truths), small, taught


class DistilSource:
    """All shards of a folder, in memory."""

    def __init__(self, folder: Path) -> None:
        """Read the shards below ``folder``."""
        paths = sorted(folder.glob("distil-*.npz"))
        if not paths:
            raise FileNotFoundError(f"No pairs in {folder}; run `python -m train distil` first.")
        shards = [dict(np.load(path)) for path in paths]
        self._truth, self._small, self._taught = (
            [row for shard in shards for row in shard[name]]
            for name in ("truth", "small", "taught")
        )

    def __len__(self) -> int:
        return len(self._small)

    def draw(self, settings: BatchSettings, rng: np.random.Generator) -> DistilBatch:
        """Return random crops, turned; the same state of ``rng`` gives the same."""
        side = settings.crop // FACTOR
        rows = []
        for _ in range(settings.size):
            index = int(rng.integers(len(self._small)))
            most = self._small[index].shape[0] - side - _MARGIN
            y, x = (int(v) for v in rng.integers(_MARGIN, most + 1, 2))
            turns, direction = int(rng.integers(4)), int(rng.choice((-1, 1)))
            large = (slice(y * FACTOR, (y + side) * FACTOR), slice(x * FACTOR, (x + side) * FACTOR))
            rows.append(
                [
                    _turned(crop, turns, direction)
                    for crop in (
                        self._small[index][y : y + side, x : x + side],
                        self._truth[index][large],
                        self._taught[index][large],
                    )
                ]
            )
        return DistilBatch(*(to_image(np.stack(column)) for column in zip(*rows, strict=True)))


def _turned(crop: NDArray[np.uint8], turns: int, direction: int) -> NDArray[np.uint8]:
    return np.rot90(crop, turns)[:, ::direction]
