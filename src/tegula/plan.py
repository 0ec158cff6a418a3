"""The work of an upscale, counted before it is done, from what the stages themselves plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tegula.costs import BundleCost, Cost
from tegula.diffusion.reuse import Rows, rows_of
from tegula.diffusion.tiled_autoencoder import MEASURED_TILES, tiling_of
from tegula.models.bundle import Bundle, SplitDenoiser, TileableAutoencoder
from tegula.models.prescalers import PrescalerFacts
from tegula.options import ResolvedOptions
from tegula.stages.prescale import padding, plan_sizes, plan_tiles
from tegula.stages.refine_canvas import canvas_for, guidance_of, latent_grid, schedule_of
from tegula.stages.refine_redraw import evaluations_of, redraw_plan, strength_of, windows_of
from tegula.tiling.regions import count_told
from tegula.tiling.windows import grid_windows

_FIXED_SHARE = 0.05
Size = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What one upscale computes, unless a mask or ``flat_skip`` saves some of it.

    source: width and height of what is enlarged.
    prescaler: its name.
    tiles: of the prescaler, in all passes; 0 when it is no net.
    windows: of the latent canvas, or of all tiles of all passes in redraw mode, once for
        each prompt that holds in them; 0 when nothing is refined.
    levels: noise levels that are evaluated, with both evaluations of a Heun step; in
        redraw mode those of the longest pass.
    evaluations: forward passes of the denoiser, in windows; guidance counts twice.
    prescale_flops, denoise_flops, autoencoder_flops: of the nets alone, two for a
        multiply-add.
    """

    width: int
    height: int
    source: Size
    prescaler: str
    tiles: int
    windows: int
    levels: int
    evaluations: int
    prescale_flops: int
    denoise_flops: int
    autoencoder_flops: int

    @property
    def refine_flops(self) -> int:
        """Denoiser and autoencoder together."""
        return self.denoise_flops + self.autoencoder_flops

    @property
    def flops(self) -> int:
        """All nets together."""
        return self.prescale_flops + self.refine_flops

    @property
    def shares(self) -> Mapping[str, float]:
        """Share of the whole work by stage, for progress, where no times are known."""
        nets, total = 1 - _FIXED_SHARE, max(1, self.flops)
        return {
            "prescale": nets * self.prescale_flops / total,
            "refine": nets * self.refine_flops / total,
        }


@dataclass(frozen=True)
class Costs:
    """Of the two models that an upscale runs; ``prescaler`` is its FLOPs."""

    bundle: BundleCost
    prescaler: Cost


def make_plan(
    bundle: Bundle, prescaler: PrescalerFacts, costs: Costs, source: Size, options: ResolvedOptions
) -> Plan:
    """Count the work of an upscale.

    Args:
        bundle: the diffusion model.
        prescaler: the net that enlarges first.
        costs: of the two.
        source: width and height of what is enlarged.
        options: the settings.

    Raises:
        OptionError: the window does not fit the model.
    """
    size = options.width, options.height
    tiles = prescale_tiles(prescaler, source, size)
    runs = runs_of(bundle, options) if options.refines else ()
    return Plan(
        *size,
        source=source,
        prescaler=prescaler.name,
        tiles=len(tiles),
        windows=sum(run.windows for run in runs),
        levels=max((run.levels for run in runs), default=0),
        evaluations=sum(run.windows * run.rows.decoder for run in runs),
        prescale_flops=round(sum(costs.prescaler.of(pixels) for pixels in tiles)),
        denoise_flops=round(sum(_denoise_flops(run, costs.bundle) for run in runs)),
        autoencoder_flops=round(sum(_autoencoder_flops(run, bundle, costs.bundle) for run in runs)),
    )


def prescale_tiles(prescaler: PrescalerFacts, source: Size, target: Size) -> list[int]:
    """Return the source pixels of every tile of every pass."""
    sizes = [source, *plan_sizes(source, target, prescaler.factor)]
    return [
        math.prod(s.stop - s.start + 2 * padding(s.stop - s.start, prescaler) for s in (y, x))
        for before, after in itertools.pairwise(sizes)
        for y, x in plan_tiles(before, after, prescaler)
    ]


@dataclass(frozen=True)
class Run:
    """Equal windows that go through one schedule on one canvas.

    window: image pixels of one. rows: evaluations of one over all levels.
    canvas: width and height of what goes through the autoencoder.
    """

    windows: int
    window: int
    levels: int
    rows: Rows
    canvas: Size


def runs_of(bundle: Bundle, options: ResolvedOptions) -> Sequence[Run]:
    """Return what refine runs."""
    if options.mode == "redraw":
        return list(_redraw_runs(bundle, options))
    canvas = canvas_for(bundle.facts, options.width, options.height, options.window)
    grid = latent_grid(bundle.facts, canvas, options.overlap)
    factor = bundle.facts.latent_factor
    told = count_told(options.regions, [w.scaled(factor) for w in grid.windows], factor)
    levels, rows = _levels(bundle, options, options.creativity)
    window = canvas.window_width * canvas.window_height
    return (Run(told, window, levels, rows, (canvas.width, canvas.height)),)


def _redraw_runs(bundle: Bundle, options: ResolvedOptions) -> Iterator[Run]:
    for tiles in redraw_plan(bundle.facts, options).passes:
        levels, rows = _levels(bundle, options, strength_of(tiles, options))
        for tile in tiles.tiles:
            grid = windows_of(tiles, tile.crop, bundle.facts, options)
            window = grid.window_width * grid.window_height * bundle.facts.latent_factor**2
            told = evaluations_of(tiles, tile.crop, bundle.facts, options)
            yield Run(told, window, levels, rows, (tile.crop.width, tile.crop.height))


def _levels(bundle: Bundle, options: ResolvedOptions, strength: float) -> tuple[int, Rows]:
    """Return the noise levels of a denoise strength, and their evaluations per window."""
    levels = len(schedule_of(bundle, options, strength))
    every = options.feature_reuse if isinstance(bundle.denoiser, SplitDenoiser) else 1
    return levels, rows_of(guidance_of(options), levels, every)


def _denoise_flops(run: Run, cost: BundleCost) -> float:
    whole = run.rows.encoder * cost.denoiser.flops.of(run.window)
    later = run.rows.decoder - run.rows.encoder
    if later and cost.decoder is not None:
        whole += later * cost.decoder.flops.of(run.window)
    return run.windows * (whole + cost.control.flops.of(run.window))


def _autoencoder_flops(run: Run, bundle: Bundle, cost: BundleCost) -> float:
    areas = autoencoder_areas(bundle, run.canvas)
    return sum(cost.encoder.flops.of(area) + cost.autodecoder.flops.of(area) for area in areas)


def autoencoder_areas(bundle: Bundle, canvas: Size) -> Sequence[int]:
    """Return the pixels of everything that goes through the autoencoder one way.

    Tiles that are measured for the statistics of the whole go through it twice.
    """
    width, height = canvas
    tiling = tiling_of(bundle)
    tileable = isinstance(bundle.autoencoder, TileableAutoencoder)
    if not tileable or width * height <= tiling.whole_side**2:
        return (width * height,)
    grid = grid_windows(width, height, tiling.tile_side, tiling.tile_side, tiling.overlap)
    measured = len(grid.windows[:: -(-len(grid) // MEASURED_TILES)])
    return (grid.window_width * grid.window_height,) * (len(grid) + measured)
