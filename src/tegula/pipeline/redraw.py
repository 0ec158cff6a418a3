"""Refine, redraw mode: tiles diffused one by one and pasted, as Ultimate SD Upscale does."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.models.bundle import Bundle, BundleFacts, ControlImage
from tegula.options import ResolvedOptions
from tegula.pipeline import autoencoder as tiled_autoencoder
from tegula.pipeline.batches import SafeDenoiser
from tegula.pipeline.redraw_plan import CropRule, RedrawPass, RedrawPlan, RedrawTile, plan_redraw
from tegula.pipeline.refine import (
    RefineJob,
    canvas_watcher,
    conditioning_of,
    crop_control,
    embed_windows,
    guidance_of,
    schedule_of,
    to_array,
    to_tensor,
    window_batch,
)
from tegula.pipeline.sampler import (
    CanvasSampler,
    Hold,
    Place,
    blend_weights,
    first_steps,
    places_of,
)
from tegula.pipeline.schedulers import NoiseSchedule
from tegula.pipeline.windows import (
    CanvasSize,
    Window,
    WindowGrid,
    count_told,
    grid_windows,
    pad_to_canvas,
    prompt_shares,
)
from tegula.progress import SILENT, StageProgress


@torch.inference_mode()
def refine_redraw(
    job: RefineJob, progress: StageProgress = SILENT, *, one_by_one: bool = False
) -> NDArray[np.float32]:
    """Add detail to a prescaled picture tile by tile.

    Every tile starts from the same noise. Tiles that do not read each other are computed
    together, which changes speed and nothing else.

    Args:
        job: tiles without any ``strength`` are skipped.
        progress: counts windows of all steps of all passes, is checked for cancel between
            batches and autoencoder tiles, and is shown the canvas as it is painted.
        one_by_one: compute every tile alone; slower, with the same result.

    Returns:
        A picture shaped like ``prescaled``, in 0..1.

    Raises:
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    bundle, options = job.bundle, job.options
    height, width = job.prescaled.shape[:2]
    plan = redraw_plan(bundle.facts, options)
    canvas = CanvasSize(plan.width, plan.height, plan.width, plan.height)
    control = ControlImage(
        to_tensor(pad_to_canvas(job.prescaled, canvas), bundle.device),
        to_tensor(pad_to_canvas(job.source, canvas), bundle.device),
    )
    share = None
    if job.strength is not None:
        share = to_tensor(pad_to_canvas(job.strength[..., None], canvas), bundle.device)
        plan = dataclasses.replace(plan, passes=tuple(_moving(p, share) for p in plan.passes))
    redrawer = _Redrawer(bundle, control, share, options, plan, progress)
    fronts = [
        (tiles, [tiles.tiles[index] for index in front])
        for tiles in plan.passes
        for front in _fronts(tiles, one_by_one=one_by_one)
    ]
    watch = canvas_watcher((height, width), len(fronts), progress.on_picture)
    watch(redrawer.canvas)
    for tiles, front in fronts:
        redrawer.paint(tiles, front)
        watch(redrawer.canvas)
    return to_array(redrawer.canvas[..., :height, :width])


def _fronts(tiles: RedrawPass, *, one_by_one: bool) -> Iterable[Sequence[int]]:
    return [(index,) for index in range(len(tiles.tiles))] if one_by_one else tiles.fronts()


def redraw_plan(facts: BundleFacts, options: ResolvedOptions) -> RedrawPlan:
    """Return the passes over a result of this size, with crops that the model takes."""
    rule = CropRule(facts.minimum_window, facts.window_multiple)
    return plan_redraw(options.width, options.height, options, rule)


def strength_of(tiles: RedrawPass, options: ResolvedOptions) -> float:
    """Return the denoise strength of a pass."""
    return options.seam_fix_denoise if tiles.seam_fix else options.creativity


def windows_of(
    tiles: RedrawPass, crop: Window, facts: BundleFacts, options: ResolvedOptions
) -> WindowGrid:
    """Return the latent windows of a crop: one, but for bands longer than a tile.

    Bands reach over the whole picture; in windows they need no more memory than tiles.
    """
    factor = facts.latent_factor
    width, height = crop.width // factor, crop.height // factor
    side = max(width, height)
    if tiles.seam_fix and options.seam_fix == "band":
        rule = CropRule(facts.minimum_window, facts.window_multiple)
        side = rule.fit(max(options.tile_width, options.tile_height)) // factor
    return grid_windows(width, height, side, side, options.overlap)


def _moving(tiles: RedrawPass, strength: Tensor) -> RedrawPass:
    """Leave out the tiles that may change nothing."""
    moving = tuple(tile for tile in tiles.tiles if strength[tile.painted.index].any())
    return dataclasses.replace(tiles, tiles=moving)


def pixel_windows(
    tiles: RedrawPass, crop: Window, facts: BundleFacts, options: ResolvedOptions
) -> list[Window]:
    """Return the windows of a crop in pixels of the canvas."""
    inner = windows_of(tiles, crop, facts, options).windows
    scaled = [window.scaled(facts.latent_factor) for window in inner]
    return [Window(crop.x + w.x, crop.y + w.y, w.width, w.height) for w in scaled]


def evaluations_of(
    tiles: RedrawPass, crop: Window, facts: BundleFacts, options: ResolvedOptions
) -> int:
    """Return how many windows a crop takes at one level, one for each prompt in it."""
    windows = pixel_windows(tiles, crop, facts, options)
    return count_told(options.placed_regions, windows, facts.latent_factor)


class _Redrawer:
    """Paints fronts of tiles onto one canvas."""

    def __init__(
        self,
        bundle: Bundle,
        control: ControlImage,
        strength: Tensor | None,
        options: ResolvedOptions,
        plan: RedrawPlan,
        progress: StageProgress,
    ) -> None:
        self.canvas = control.prescaled.clone(memory_format=torch.contiguous_format)
        self._bundle = bundle
        self._control = control
        self._strength = strength
        self._options = options
        self._denoiser = SafeDenoiser(bundle.denoiser, bundle.dtype)
        self._told = conditioning_of(bundle, options, torch.empty(0))
        self._batch = window_batch(bundle, options)
        self._progress = progress
        self._done = 0
        self._total = sum(
            len(self._schedule(tiles))
            * sum(evaluations_of(tiles, tile.crop, bundle.facts, options) for tile in tiles.tiles)
            for tiles in plan.passes
        )

    def paint(self, tiles: RedrawPass, front: Sequence[RedrawTile]) -> None:
        """Read the crops of a front, denoise them, and paste them in order."""
        groups: dict[tuple[int, int], list[RedrawTile]] = defaultdict(list)
        for tile in front:
            groups[tile.crop.width, tile.crop.height].append(tile)
        painted: dict[RedrawTile, Tensor] = {}
        for group in groups.values():
            painted.update(zip(group, self._redrawn(tiles, group), strict=True))
        for tile in front:
            self._paste(tiles, tile, painted[tile])

    def _redrawn(self, tiles: RedrawPass, group: Sequence[RedrawTile]) -> Iterator[Tensor]:
        bundle, crops = self._bundle, [tile.crop for tile in group]
        cancel = self._progress.cancel
        generators = [torch.Generator("cpu").manual_seed(self._options.seed) for _ in group]
        controls = [crop_control(self._control, crop) for crop in crops]
        initial = torch.cat(
            [
                tiled_autoencoder.encode(
                    bundle,
                    self.canvas[crop.index],
                    control,
                    generator,
                    cancel=cancel,
                )
                for crop, control, generator in zip(crops, controls, generators, strict=True)
            ]
        )
        drawn = [torch.randn(initial[:1].shape, generator=each) for each in generators]
        noise, schedule = torch.cat(drawn).to(bundle.device), self._schedule(tiles)
        sampler = self._sampler(tiles, crops)
        latents = sampler.sample(
            schedule.add_noise(initial, noise),
            schedule,
            generators,
            self._counting(len(schedule) * len(sampler)),
            self._hold(initial, noise, crops, len(schedule)),
        )
        for row, control in enumerate(controls):
            yield tiled_autoencoder.decode(bundle, latents[row : row + 1], control, cancel=cancel)

    def _sampler(self, tiles: RedrawPass, crops: Sequence[Window]) -> CanvasSampler:
        facts, options = self._bundle.facts, self._options
        windows = [w for crop in crops for w in pixel_windows(tiles, crop, facts, options)]
        embedded = embed_windows(self._bundle, self._control, windows, self._batch)
        return CanvasSampler(
            self._denoiser,
            [p for row, crop in enumerate(crops) for p in self._places(tiles, crop, row)],
            dataclasses.replace(self._told, control=embedded),
            guidance_of(options),
            self._batch,
            options.feature_reuse,
        )

    def _places(self, tiles: RedrawPass, crop: Window, row: int) -> list[Place]:
        facts = self._bundle.facts
        grid = windows_of(tiles, crop, facts, self._options)
        shares = [
            prompt_shares(self._options.placed_regions, window, facts.latent_factor)
            for window in pixel_windows(tiles, crop, facts, self._options)
        ]
        return places_of(grid, self._bundle.device, shares, row)

    def _hold(
        self, initial: Tensor, noise: Tensor, crops: Sequence[Window], steps: int
    ) -> Hold | None:
        if self._strength is None:
            return None
        strength = torch.cat([self._strength[crop.index] for crop in crops])
        return Hold(initial, noise, first_steps(strength, steps, self._bundle.facts.latent_factor))

    def _schedule(self, tiles: RedrawPass) -> NoiseSchedule:
        return schedule_of(self._bundle, self._options, strength_of(tiles, self._options))

    def _counting(self, units: int) -> StageProgress:
        """Return the progress of one run of the sampler, as part of the whole."""
        before = self._done
        self._done += units

        def report(done: int, _total: int) -> None:
            self._progress.on_unit(before + done, self._total)

        return dataclasses.replace(self._progress, on_unit=report)

    def _paste(self, tiles: RedrawPass, tile: RedrawTile, image: Tensor) -> None:
        crop, painted = tile.crop, tile.painted
        inner = Window(painted.x - crop.x, painted.y - crop.y, painted.width, painted.height)
        mask = torch.tensor(tiles.mask(tile)[inner.index], device=image.device)
        if self._strength is not None:
            steps = len(self._schedule(tiles))
            mask = mask * blend_weights(self._strength[painted.index], steps)
        under = self.canvas[painted.index]
        self.canvas[painted.index] = torch.lerp(under, image[inner.index].clamp(0, 1), mask)
