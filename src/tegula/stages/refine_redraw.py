"""Refine, redraw mode: tiles diffused one by one and pasted, as Ultimate SD Upscale does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.diffusion import tiled_autoencoder
from tegula.diffusion.canvas import CanvasSampler, Conditioning, places_of
from tegula.diffusion.prediction import SafeDenoiser
from tegula.diffusion.schedulers import NoiseSchedule
from tegula.models.bundle import Bundle, BundleFacts, ControlImage
from tegula.options import ResolvedOptions
from tegula.progress import Cancelled, OnUnit, ignore_units, never_cancelled
from tegula.stages.refine_canvas import (
    crop_control,
    embed_windows,
    guidance_of,
    schedule_of,
    to_array,
    to_tensor,
    window_batch,
)
from tegula.tiling.canvas import CanvasSize, pad_to_canvas
from tegula.tiling.redraw import CropRule, RedrawPass, RedrawPlan, RedrawTile, plan_redraw
from tegula.tiling.windows import Window, WindowGrid, grid_windows


@torch.inference_mode()
def refine_redraw(
    bundle: Bundle,
    prescaled: NDArray[np.float32],
    source: NDArray[np.float32],
    options: ResolvedOptions,
    on_unit: OnUnit = ignore_units,
    cancelled: Cancelled = never_cancelled,
    *,
    one_by_one: bool = False,
) -> NDArray[np.float32]:
    """Add detail to a prescaled picture tile by tile.

    Every tile starts from the same noise. Tiles that do not read each other are computed
    together, which changes speed and nothing else.

    Args:
        bundle: the diffusion model.
        prescaled: [height, width, 3] in 0..1; first canvas and control image.
        source: the source enlarged by Lanczos to the same size.
        options: ``redraw`` and what holds for canvas mode too.
        on_unit: told (windows done, windows in all steps of all passes).
        cancelled: asked between batches and autoencoder tiles.
        one_by_one: compute every tile alone; slower, with the same result.

    Returns:
        A picture shaped like ``prescaled``, in 0..1.

    Raises:
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    height, width = prescaled.shape[:2]
    plan = redraw_plan(bundle.facts, options)
    canvas = CanvasSize(plan.width, plan.height, plan.width, plan.height)
    control = ControlImage(
        to_tensor(pad_to_canvas(prescaled, canvas), bundle),
        to_tensor(pad_to_canvas(source, canvas), bundle),
    )
    redrawer = _Redrawer(bundle, control, options, plan, on_unit, cancelled)
    for tiles in plan.passes:
        alone = tuple((index,) for index in range(len(tiles.tiles)))
        for front in alone if one_by_one else tiles.fronts():
            redrawer.paint(tiles, [tiles.tiles[index] for index in front])
    return to_array(redrawer.canvas[..., :height, :width])


def redraw_plan(facts: BundleFacts, options: ResolvedOptions) -> RedrawPlan:
    """Return the passes over a result of this size, with crops that the model takes."""
    rule = CropRule(facts.minimum_window, facts.window_multiple)
    return plan_redraw(options.width, options.height, options.redraw, rule)


def strength_of(tiles: RedrawPass, options: ResolvedOptions) -> float:
    """Return the denoise strength of a pass."""
    return options.redraw.seam_fix_denoise if tiles.seam_fix else options.creativity


def windows_of(
    tiles: RedrawPass, crop: Window, facts: BundleFacts, options: ResolvedOptions
) -> WindowGrid:
    """Return the latent windows of a crop: one, but for bands longer than a tile.

    Bands reach over the whole picture; in windows they need no more memory than tiles.
    """
    factor, redraw = facts.latent_factor, options.redraw
    width, height = crop.width // factor, crop.height // factor
    side = max(width, height)
    if tiles.seam_fix and redraw.seam_fix == "band":
        rule = CropRule(facts.minimum_window, facts.window_multiple)
        side = rule.fit(max(redraw.tile_width, redraw.tile_height)) // factor
    return grid_windows(width, height, side, side, options.overlap)


class _Redrawer:
    """Paints fronts of tiles onto one canvas."""

    def __init__(
        self,
        bundle: Bundle,
        control: ControlImage,
        options: ResolvedOptions,
        plan: RedrawPlan,
        on_unit: OnUnit,
        cancelled: Cancelled,
    ) -> None:
        self.canvas = control.prescaled.clone()
        self._bundle = bundle
        self._control = control
        self._options = options
        self._denoiser = SafeDenoiser(bundle.denoiser, bundle.dtype)
        self._text = bundle.text.encode([options.negative_prompt, options.prompt])
        self._batch = window_batch(bundle, options)
        self._on_unit = on_unit
        self._cancelled = cancelled
        self._done = 0
        self._total = sum(
            len(self._schedule(tiles)) * len(windows_of(tiles, tile.crop, bundle.facts, options))
            for tiles in plan.passes
            for tile in tiles.tiles
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
        generators = [torch.Generator("cpu").manual_seed(self._options.seed) for _ in group]
        controls = [crop_control(self._control, crop) for crop in crops]
        initial = torch.cat(
            [
                tiled_autoencoder.encode(
                    bundle, self.canvas[crop.index], control, generator, cancelled=self._cancelled
                )
                for crop, control, generator in zip(crops, controls, generators, strict=True)
            ]
        )
        noise = [torch.randn(initial[:1].shape, generator=each) for each in generators]
        schedule = self._schedule(tiles)
        start = schedule.add_noise(initial, torch.cat(noise).to(bundle.device))
        sampler = self._sampler(tiles, crops)
        report = self._reporter(len(schedule) * len(sampler))
        latents = sampler.sample(start, schedule, generators, report, self._cancelled)
        for row, control in enumerate(controls):
            yield tiled_autoencoder.decode(
                bundle, latents[row : row + 1], control, cancelled=self._cancelled
            )

    def _sampler(self, tiles: RedrawPass, crops: Sequence[Window]) -> CanvasSampler:
        facts = self._bundle.facts
        grid = windows_of(tiles, crops[0], facts, self._options)
        windows = [
            Window(crop.x + window.x, crop.y + window.y, window.width, window.height)
            for crop in crops
            for window in (latent.scaled(facts.latent_factor) for latent in grid.windows)
        ]
        embedded = embed_windows(self._bundle, self._control, windows, self._batch)
        return CanvasSampler(
            self._denoiser,
            places_of(grid, self._bundle.device, len(crops)),
            Conditioning(self._text[1:], self._text[:1], embedded),
            guidance_of(self._options),
            self._batch,
        )

    def _schedule(self, tiles: RedrawPass) -> NoiseSchedule:
        return schedule_of(self._bundle, self._options, strength_of(tiles, self._options))

    def _reporter(self, units: int) -> OnUnit:
        before = self._done
        self._done += units

        def report(done: int, _total: int) -> None:
            self._on_unit(before + done, self._total)

        return report

    def _paste(self, tiles: RedrawPass, tile: RedrawTile, image: Tensor) -> None:
        crop, painted = tile.crop, tile.painted
        inner = Window(painted.x - crop.x, painted.y - crop.y, painted.width, painted.height)
        mask = torch.tensor(tiles.mask(tile)[inner.index], device=image.device)
        under = self.canvas[painted.index]
        self.canvas[painted.index] = torch.lerp(under, image[inner.index].clamp(0, 1), mask)
