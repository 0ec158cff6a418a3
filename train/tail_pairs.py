"""Pairs for tuning a prescaler's last layers: truth, damaged copy, and features between.

The layers that are not tuned run once over each pair, and what they hand on is kept. A
shard is ``tail-NNN.npz`` with ``truth`` [n, side, side, 3] and ``small`` [n, side/4,
side/4, 3], uint8, and ``seen`` [n, features, side/4, side/4], float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.models.prescalers.networks import RRDBNet
from train import photos
from train.batches import BatchSettings
from train.degradation import RECIPES, degrade
from train.pairs import levels, to_image, unit
from train.processes import made_ahead
from train.shards import OnShard, Shards, ignore_shard

FACTOR = 4
_SEEN_TOGETHER = 16
_MARGIN = 2
"""Features at the edge of a pair, which were made without surroundings, are not used."""


@dataclass(frozen=True)
class TailPairSettings:
    """How many pairs, of what; recipe_shares: shares of ``RECIPES``."""

    side: int = 256
    count: int = 520
    shard: int = 40
    recipe_shares: tuple[float, float, float] = (0.3, 0.5, 0.2)
    seed: int = 8


@dataclass(frozen=True)
class TailBatch:
    """Crops: truth [n, 3, h, w], small [n, 3, h/4, w/4], seen [n, features, h/4, w/4]."""

    truth: Tensor
    small: Tensor
    seen: Tensor

    def to(self, device: torch.device) -> TailBatch:
        """Return the batch on another device."""
        return TailBatch(*(x.to(device).float() for x in (self.truth, self.small, self.seen)))

    def rows(self, part: slice) -> TailBatch:
        """Return some rows of the batch."""
        return TailBatch(self.truth[part], self.small[part], self.seen[part])


def features_before(network: RRDBNet, small: Tensor, tuned_blocks: int) -> Tensor:
    """Return the features that reach the tuned blocks, [n, features, h, w]."""
    with torch.inference_mode():
        seen: Tensor = network.conv_first(small)
        for block in list(network.body)[: len(network.body) - tuned_blocks]:
            seen = block(seen)
    return seen


def make_tail_shards(
    paths: list[Path],
    folder: Path,
    settings: TailPairSettings,
    see: Callable[[Tensor], Tensor],
    on_shard: OnShard = ignore_shard,
    workers: int = 0,
) -> None:
    """Write all shards that are not there yet; each is seeded on its own.

    see: [n, 3, h, w] in 0..1 to the features that reach the tuned blocks. workers:
    processes that damage photographs meanwhile.
    """
    shards = Shards(folder, "tail-{:03d}.npz", settings.count, settings.shard)
    missing = shards.missing()
    if not missing:
        return
    pictures = photos.Photographs([levels(photos.read(p)) for p in paths])

    def draw(shard: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        rng = np.random.default_rng([settings.seed, shard])
        rows = list(_draw_pairs(pictures, settings, shards.pairs_in(shard), rng))
        truths, smalls = (np.stack(column) for column in zip(*rows, strict=True))
        return truths, smalls

    for shard, (truths, smalls) in zip(missing, made_ahead(draw, missing, workers), strict=True):
        groups = to_image(smalls).split(_SEEN_TOGETHER)  # type: ignore[no-untyped-call]
        seen = np.concatenate([see(group).half().cpu().numpy() for group in groups])
        shards.write(shard, partial(np.savez, truth=truths, small=smalls, seen=seen))
        on_shard(shard + 1, shards.total)


def _draw_pairs(
    pictures: photos.Photographs,
    settings: TailPairSettings,
    count: int,
    rng: np.random.Generator,
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    for _ in range(count):
        truth = photos.random_crop(unit(pictures.draw(rng)), settings.side, rng)
        recipe = RECIPES[int(rng.choice(len(RECIPES), p=settings.recipe_shares))]
        yield levels(truth), levels(degrade(truth, FACTOR, recipe, rng))


class TailSource:
    """All shards of a folder, in memory."""

    def __init__(self, folder: Path) -> None:
        """Read the shards below ``folder``."""
        paths = sorted(folder.glob("tail-*.npz"))
        if not paths:
            raise FileNotFoundError(f"No pairs in {folder}; run `python -m train prescaler` first.")
        shards = [np.load(path) for path in paths]
        self._truth, self._small, self._seen = (
            [row for shard in shards for row in shard[name]] for name in ("truth", "small", "seen")
        )

    def draw(self, settings: BatchSettings, rng: np.random.Generator) -> TailBatch:
        """Return random crops; the same state of ``rng`` gives the same."""
        side = settings.crop // FACTOR
        truths, smalls, seen = [], [], []
        for _ in range(settings.size):
            index = int(rng.integers(len(self._truth)))
            most = self._small[index].shape[0] - side - _MARGIN
            y, x = (int(v) for v in rng.integers(_MARGIN, most + 1, 2))
            large = (slice(y * FACTOR, (y + side) * FACTOR), slice(x * FACTOR, (x + side) * FACTOR))
            truths.append(self._truth[index][large])
            smalls.append(self._small[index][y : y + side, x : x + side])
            seen.append(self._seen[index][:, y : y + side, x : x + side])
        features = torch.from_numpy(np.stack(seen))
        return TailBatch(to_image(np.stack(truths)), to_image(np.stack(smalls)), features)
