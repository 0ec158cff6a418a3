"""Refine, redraw mode: tiles diffused one by one and pasted, as Ultimate SD Upscale does."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tegula.pipeline.preview import canvas_watcher
from tegula.pipeline.redraw_plan import (
    RedrawPass,
    RedrawTile,
    evaluations_of,
    piece_of,
    redraw_plan,
    strength_of,
)
from tegula.pipeline.refine import Diffusion, RefineJob, as_picture
from tegula.pipeline.windows import Window
from tegula.progress import SILENT, StageProgress


@torch.inference_mode()
def refine_redraw(
    job: RefineJob, progress: StageProgress = SILENT, *, one_by_one: bool = False
) -> Tensor:
    """Add detail to a prescaled picture tile by tile.

    Every tile starts from the same noise. Tiles that do not read each other are computed
    together, which changes speed and nothing else.

    Args:
        job: tiles without any ``strength`` are skipped.
        progress: counts windows of all steps of all passes, is checked for cancel between
            batches and autoencoder tiles, and is shown the canvas as it is painted.
        one_by_one: compute every tile alone; slower, with the same result.

    Returns:
        A picture shaped like ``job.prescaled``, in 0..1.

    Raises:
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    facts, options = job.bundle.facts, job.options
    size = job.prescaled.shape[0], job.prescaled.shape[1]
    plan = redraw_plan(facts, options)
    diffusion = Diffusion(job, plan.width, plan.height)
    passes = plan.passes
    if diffusion.strength is not None:
        passes = tuple(_changing(tiles, diffusion.strength) for tiles in passes)
    steps = [len(diffusion.schedule(strength_of(tiles, options))) for tiles in passes]
    fronts = [
        (tiles, count, [tiles.tiles[index] for index in front])
        for tiles, count in zip(passes, steps, strict=True)
        for front in (tiles.one_by_one() if one_by_one else tiles.fronts())
    ]

    def windows(tiles: RedrawPass, some: Sequence[RedrawTile]) -> int:
        return sum(evaluations_of(tiles, tile, facts, options) for tile in some)

    done, total = 0, sum(count * windows(tiles, front) for tiles, count, front in fronts)
    canvas = diffusion.control.prescaled.clone(memory_format=torch.contiguous_format)
    watch = canvas_watcher(size, len(fronts), progress.on_picture)
    watch(canvas)
    for tiles, count, front in fronts:
        painted: dict[RedrawTile, Tensor] = {}
        for group in _of_one_size(front):
            units = count * windows(tiles, group)
            pictures = diffusion.run(
                canvas,
                [piece_of(tiles, tile, facts, options) for tile in group],
                strength_of(tiles, options),
                _part(progress, done, units, total),
            )
            painted.update(zip(group, pictures, strict=True))
            done += units
        # Later tiles lie over earlier ones, whatever groups they were computed in.
        for tile in front:
            _paste(canvas, tiles, tile, painted[tile], diffusion.weights(tile.painted, count))
        watch(canvas)
    return as_picture(canvas[..., : size[0], : size[1]])


def _changing(tiles: RedrawPass, strength: Tensor) -> RedrawPass:
    """Leave out the tiles in which nothing may change."""
    changing = tuple(tile for tile in tiles.tiles if strength[tile.painted.index].any())
    return dataclasses.replace(tiles, tiles=changing)


def _of_one_size(front: Sequence[RedrawTile]) -> Sequence[Sequence[RedrawTile]]:
    groups: dict[tuple[int, int], list[RedrawTile]] = defaultdict(list)
    for tile in front:
        groups[tile.crop.width, tile.crop.height].append(tile)
    return list(groups.values())


def _part(progress: StageProgress, before: int, units: int, total: int) -> StageProgress:
    """Return what one run of many reports to: it takes ``units`` of the ``total``.

    Windows that a mask leaves out count as done with the others.
    """

    def report(done: int, of: int) -> None:
        progress.on_unit(before + units * done // of, total)

    of_work = progress.part(before / total, (before + units) / total)
    return dataclasses.replace(of_work, on_unit=report)


def _paste(
    canvas: Tensor, tiles: RedrawPass, tile: RedrawTile, picture: Tensor, weights: Tensor | None
) -> None:
    crop, painted = tile.crop, tile.painted
    inner = Window(painted.x - crop.x, painted.y - crop.y, painted.width, painted.height)
    mask = torch.tensor(tiles.mask(tile)[inner.index], device=picture.device)
    if weights is not None:
        mask = mask * weights
    under = canvas[painted.index]
    canvas[painted.index] = torch.lerp(under, picture[inner.index].clamp(0, 1), mask)
