"""Training pairs: a sharp crop, what prescale makes of its damaged copy, and the source.

Each pair is one row [side, side, 9] of uint8: truth, prescaled and source (the damaged
copy enlarged by Lanczos), three channels each. Rows lie in ``pairs-NNN.npy`` shards that
training maps into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tegula.pipeline.adjust import wavelet_lock
from train import photos
from train.degradation import RECIPES, Picture, degrade
from train.processes import made_ahead
from train.shards import OnShard, Shards, ignore_shard

PHOTO = "tegula-photo"
SWIFT = "tegula-swift"
FOUR = "tegula-swift-4x"
TWICE = "tegula-swift-2x"
COMPRESSED = "tegula-swift-jpeg"
LINE = "tegula-line"
_BATCH = 16
Prescale = Callable[[Tensor], Tensor]
"""[n, 3, h, w] in 0..1 to [n, 3, 4h, 4w]."""


@dataclass(frozen=True)
class PairSettings:
    """How many pairs, of what.

    recipe_shares: shares of ``RECIPES``.
    prescale_shares: shares by prescaler; ``mixed`` blends ``PHOTO`` with Lanczos.
    twice: share of pairs enlarged 2x instead of 4x.
    """

    side: int = 256
    count: int = 4000
    shard: int = 500
    recipe_shares: tuple[float, float, float] = (0.3, 0.4, 0.3)
    prescale_shares: tuple[tuple[str, float], ...] = (
        (PHOTO, 0.50),
        ("realesrgan-x4plus", 0.12),
        ("realesrgan-x4plus-anime", 0.08),
        ("realesrgan-animevideov3", 0.12),
        ("lanczos", 0.08),
        ("mixed", 0.10),
    )
    twice: float = 0.1
    seed: int = 1


@dataclass(frozen=True)
class _Job:
    """What a pair is made of, as 8-bit levels; ``source`` is ``small``, enlarged."""

    truth: NDArray[np.uint8]
    small: NDArray[np.uint8]
    source: NDArray[np.uint8]
    prescaler: str
    blend: float


def make_shards(
    paths: list[Path],
    folder: Path,
    settings: PairSettings,
    prescalers: Mapping[str, Prescale],
    on_shard: OnShard = ignore_shard,
    workers: int = 0,
) -> None:
    """Write all shards that are not there yet; each is seeded on its own.

    workers: processes that damage photographs meanwhile.
    """
    shards = Shards(folder, "pairs-{:03d}.npy", settings.count, settings.shard)
    missing = shards.missing()
    if not missing:
        return
    pictures = photos.Photographs([levels(photos.read(p)) for p in paths])

    def draw(shard: int) -> list[_Job]:
        rng = np.random.default_rng((settings.seed, shard))
        return [_draw_job(pictures, settings, rng) for _ in range(settings.shard)]

    for shard, jobs in zip(missing, made_ahead(draw, missing, workers), strict=True):
        shards.write(shard, partial(np.save, arr=_make_rows(jobs, settings.side, prescalers)))
        on_shard(shard + 1, shards.total)


def _make_rows(
    jobs: list[_Job], side: int, prescalers: Mapping[str, Prescale]
) -> NDArray[np.uint8]:
    rows = np.empty((len(jobs), side, side, 9), np.uint8)
    for name, size in sorted({(j.prescaler, j.small.shape[0]) for j in jobs}):
        chosen = [i for i, j in enumerate(jobs) if (j.prescaler, j.small.shape[0]) == (name, size)]
        batch = _BATCH if size * 4 == side else _BATCH // 4
        for start in range(0, len(chosen), batch):
            group = chosen[start : start + batch]
            for index, row in zip(group, _rows([jobs[i] for i in group], prescalers), strict=True):
                rows[index] = row
    return rows


def _draw_job(
    pictures: photos.Photographs, settings: PairSettings, rng: np.random.Generator
) -> _Job:
    truth = photos.random_crop(unit(pictures.draw(rng)), settings.side, rng)
    recipe = RECIPES[int(rng.choice(3, p=settings.recipe_shares))]
    names, shares = zip(*settings.prescale_shares, strict=True)
    factor = 2 if rng.random() < settings.twice else 4
    small = degrade(truth, factor, recipe, rng)
    source = enlarge_by_lanczos(small, settings.side)
    return _Job(
        levels(truth), levels(small), levels(source),
        str(rng.choice(names, p=shares)), float(rng.uniform(0.3, 0.8)),
    )  # fmt: skip


def _rows(jobs: list[_Job], prescalers: Mapping[str, Prescale]) -> list[NDArray[np.uint8]]:
    sources = [unit(j.source) for j in jobs]
    prescaled = sources
    name = PHOTO if jobs[0].prescaler == "mixed" else jobs[0].prescaler
    if name != "lanczos":
        prescaled = run_prescaler(prescalers[name], [unit(j.small) for j in jobs], sources)
    if jobs[0].prescaler == "mixed":
        prescaled = [
            p * np.float32(j.blend) + s * np.float32(1 - j.blend)
            for p, s, j in zip(prescaled, sources, jobs, strict=True)
        ]
    return [np.dstack([j.truth, levels(p), j.source]) for j, p in zip(jobs, prescaled, strict=True)]


def levels(picture: Picture) -> NDArray[np.uint8]:
    """Return whole 8-bit levels."""
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def unit(picture: NDArray[np.uint8]) -> Picture:
    """Return 8-bit levels in 0..1."""
    return picture.astype(np.float32) / np.float32(255)  # type: ignore[no-any-return]


def to_image(crops: NDArray[np.uint8]) -> Tensor:
    """Return 8-bit crops [n, h, w, 3] as [n, 3, h, w] in 0..1."""
    return torch.from_numpy(crops.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


def enlarge_by_lanczos(small: Picture, side: int) -> Picture:
    """Return an 8-bit picture enlarged to ``side`` squared."""
    image = Image.fromarray(np.rint(small * 255).astype(np.uint8))
    large = image.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(large, np.float32) / np.float32(255)  # type: ignore[no-any-return]


def run_prescaler(
    prescale: Prescale, smalls: list[Picture], sources: list[Picture]
) -> list[Picture]:
    """Enlarge pictures of one size 4x by a net, to the size and colours of ``sources``."""
    batch = torch.from_numpy(np.stack(smalls)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        large = prescale(batch).float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_like, large, sources))


def _like(large: Picture, source: Picture) -> Picture:
    side = source.shape[0]
    if large.shape[0] != side:
        large = cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    # Refine gets pictures whose colours are locked to the source, so training does too.
    locked: Picture = wavelet_lock(torch.from_numpy(large), torch.from_numpy(source)).numpy()
    return locked
