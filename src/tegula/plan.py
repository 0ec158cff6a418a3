"""The work and the memory of an upscale, counted before it is done.

Both follow from what the stages themselves plan, so that the two cannot drift apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tegula.images.pixels import Size
from tegula.models.bundle import Bundle, SplitDenoiser
from tegula.models.costs import BundleCost, Cost, prescaler_memory
from tegula.models.device import home_of
from tegula.models.prescalers import Prescaler, PrescalerFacts
from tegula.options import ResolvedOptions
from tegula.pipeline.autoencoder import coded_at_once, passed_areas
from tegula.pipeline.evaluate import BatchSize
from tegula.pipeline.prescale_plan import DEFAULT_TILE, padding, plan_sizes, plan_tiles
from tegula.pipeline.redraw_plan import evaluations_of, piece_of, redraw_plan, strength_of
from tegula.pipeline.refine import PICTURES
from tegula.pipeline.schedulers import schedule_of
from tegula.pipeline.steps import Guidance, Rows, rows_of
from tegula.pipeline.windows import Piece, canvas_piece, count_places

_FIXED_SHARE = 0.05
"""Share of the whole work that preparing and finishing take, where no times are known."""


@dataclass(frozen=True)
class Plan:
    """What one upscale computes, unless a mask or ``flat_skip`` saves some of it.

    source: width and height of what is enlarged.
    prescaler: its name.
    tiles: of the prescaler, in all passes; 0 when it is plain resampling.
    windows: of the latent canvas, or of all tiles of all passes in redraw mode, once for
        each prompt that holds in them; 0 when nothing is refined.
    steps: those that are run, with both evaluations of a Heun step; in redraw mode those
        of the longest pass.
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
    steps: int
    evaluations: int
    prescale_flops: int
    denoise_flops: int
    autoencoder_flops: int

    @property
    def size(self) -> Size:
        """Width and height of the result."""
        return self.width, self.height

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
    """Of the two models that an upscale runs; ``prescaler`` is its FLOPs by its heads' factors."""

    bundle: BundleCost
    prescaler: Mapping[int | None, Cost]


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
    runs = list(runs_of(bundle, options)) if options.refines else []
    return Plan(
        *size,
        source=source,
        prescaler=prescaler.name,
        tiles=len(tiles),
        windows=sum(run.windows for run in runs),
        steps=max((run.steps for run in runs), default=0),
        evaluations=sum(run.windows * run.rows.decoder for run in runs),
        prescale_flops=round(sum(costs.prescaler[t.factor].of(t.pixels) for t in tiles)),
        denoise_flops=round(sum(_denoise_flops(run, costs.bundle) for run in runs)),
        autoencoder_flops=round(sum(_autoencoder_flops(run, bundle, costs.bundle) for run in runs)),
    )


@dataclass(frozen=True)
class PrescaleTile:
    """Source pixels of one tile, and the factor of the head that enlarges it."""

    pixels: int
    factor: int | None


def prescale_tiles(prescaler: PrescalerFacts, source: Size, target: Size) -> list[PrescaleTile]:
    """Return every tile of every pass."""
    sizes = [source, *plan_sizes(source, target, prescaler.factor)]
    return [
        PrescaleTile(
            math.prod(s.stop - s.start + 2 * padding(s.stop - s.start, facts) for s in (y, x)),
            facts.factor,
        )
        for pair in itertools.pairwise(sizes)
        for facts in [prescaler.reaching(*pair)]
        for y, x in plan_tiles(*pair, facts)
    ]


@dataclass(frozen=True)
class Run:
    """Equal windows that go through one schedule on one canvas.

    window: image pixels of one. rows: evaluations of one over all steps.
    canvas: width and height of what goes through the autoencoder.
    """

    windows: int
    window: int
    steps: int
    rows: Rows
    canvas: Size


def runs_of(bundle: Bundle, options: ResolvedOptions) -> Iterator[Run]:
    """Yield what refine runs."""
    facts, factor = bundle.facts, bundle.facts.latent_factor
    if options.mode == "canvas":
        size = options.width, options.height
        piece = canvas_piece(facts, *size, options.window, options.overlap)
        windows = count_places(options.placed_regions, piece.windows(factor), factor)
        yield _run(bundle, options, _steps(bundle, options, options.creativity), piece, windows)
        return
    for tiles in redraw_plan(facts, options).passes:
        # Once for all tiles: some schedulers take a fifth of a second to make.
        steps = _steps(bundle, options, strength_of(tiles, options))
        for tile in tiles.tiles:
            piece = piece_of(tiles, tile, facts, options)
            windows = evaluations_of(tiles, tile, facts, options)
            yield _run(bundle, options, steps, piece, windows)


def _steps(bundle: Bundle, options: ResolvedOptions, strength: float) -> int:
    return len(schedule_of(bundle.scheduler, options, strength))


def _run(bundle: Bundle, options: ResolvedOptions, steps: int, piece: Piece, windows: int) -> Run:
    every = options.feature_reuse if isinstance(bundle.denoiser, SplitDenoiser) else 1
    return Run(
        windows,
        piece.grid.window_width * piece.grid.window_height * bundle.facts.latent_factor**2,
        steps,
        rows_of(Guidance.of(options), steps, every),
        (piece.area.width, piece.area.height),
    )


def _denoise_flops(run: Run, cost: BundleCost) -> float:
    whole = run.rows.encoder * cost.denoiser.flops.of(run.window)
    later = run.rows.decoder - run.rows.encoder
    if later and cost.second_half is not None:
        whole += later * cost.second_half.flops.of(run.window)
    return run.windows * (whole + cost.control.flops.of(run.window))


def _autoencoder_flops(run: Run, bundle: Bundle, cost: BundleCost) -> float:
    areas = passed_areas(bundle, run.canvas)
    return sum(cost.encode.flops.of(area) + cost.decode.flops.of(area) for area in areas)


# What an upscale takes of memory beside its models, counted before it is done.
#
# The terms are the arrays that the stages keep at once, so this follows the code of the
# stages; a test holds the two together. Allocators and kernels take somewhat more.

_FLOAT = 4
_PIXEL = 3 * _FLOAT
_BANDS = 4 * 512
"""Rows of a picture that the colour lock takes at once, in all its arrays."""
_IMAGE = 3 + 4
"""Bytes of a pixel as it leaves: in an array, and as Pillow keeps it."""
_LATENTS = 5
"""Latent canvases at once: the current one, its prediction, and what a solver makes."""
_ROWS = 2
"""Rows of a window in a batch that is guided."""


@dataclass(frozen=True)
class Memory:
    """Expected peaks in bytes beside the loaded models, by stage.

    host: of the machine. device: of a GPU; empty where the host computes.
    """

    host: Mapping[str, int]
    device: Mapping[str, int]


def expected_memory(
    bundle: Bundle, cost: BundleCost, prescaler: Prescaler, plan: Plan, options: ResolvedOptions
) -> Memory:
    """Return what an upscale takes; ``cost`` is that which the plan was made with."""
    apart = bundle.device.type != "cpu"
    source = plan.source[0] * plan.source[1] * _PIXEL
    picture = plan.width * plan.height * _PIXEL
    tile = _tile_bytes(prescaler, plan)
    bands = min(plan.height, _BANDS) * plan.width * _PIXEL
    image = plan.width * plan.height * _IMAGE
    if apart and home_of(PICTURES * picture, bundle.device) == bundle.device:
        return _memory_on_device(bundle, cost, plan, options, (source, picture, image, tile, bands))
    host = {
        "prescale": source + picture + max(0 if apart else tile, picture + bands),
        "finish": source + 3 * picture + image,
    }
    if not plan.windows:
        return Memory(host, {"prescale": tile} if apart else {})
    refine = _refine_bytes(bundle, cost, options)
    if not apart:
        sampled = 2 * picture + refine.kept + refine.sampling
        host["refine"] = source + max(sampled, 2 * picture + refine.result + refine.coding)
        return Memory(host, {})
    host["refine"] = source + PICTURES * picture
    return Memory(host, {"prescale": tile, "refine": _working(refine, bundle)})


def _memory_on_device(
    bundle: Bundle,
    cost: BundleCost,
    plan: Plan,
    options: ResolvedOptions,
    sizes: tuple[int, int, int, int, int],
) -> Memory:
    """Return the memory where pictures lie on the device: the host has the source and the image."""
    source, picture, image, tile, bands = sizes
    host = {"prescale": source, "finish": source + image}
    device = {
        "prescale": source + picture + max(tile, picture + bands),
        "finish": source + 3 * picture + image,
    }
    if plan.windows:
        host["refine"] = source
        refine = _refine_bytes(bundle, cost, options)
        device["refine"] = source + PICTURES * picture + _working(refine, bundle)
    return Memory(host, device)


def _working(refine: _Refine, bundle: Bundle) -> int:
    """Return what sampling and coding take of a device, without pictures."""
    kept = refine.kept if home_of(refine.kept, bundle.device) == bundle.device else 0
    return max(refine.sampling, refine.coding) + kept


@dataclass(frozen=True)
class _Refine:
    """Bytes: the embedded control, what sampling and coding work with, and the result.

    A result that the autoencoder makes whole is part of ``coding``.
    """

    kept: int
    sampling: int
    coding: int
    result: int


def _tile_bytes(prescaler: Prescaler, plan: Plan) -> int:
    tiles = prescale_tiles(prescaler.facts, plan.source, (plan.width, plan.height))
    if not tiles:
        return 0
    memory = prescaler_memory(prescaler, DEFAULT_TILE)
    return round(
        max(
            memory.of(tile.pixels) + 2 * tile.pixels * (tile.factor or 1) ** 2 * _PIXEL
            for tile in tiles
        )
    )


def _refine_bytes(bundle: Bundle, cost: BundleCost, options: ResolvedOptions) -> _Refine:
    run, facts = next(runs_of(bundle, options)), bundle.facts
    rows = min(run.windows, BatchSize.of(bundle, options).windows)
    rows *= _ROWS if options.guidance_scale > 1 else 1
    pixels = run.canvas[0] * run.canvas[1]
    latents = pixels // facts.latent_factor**2 * facts.latent_channels * _FLOAT
    areas = passed_areas(bundle, run.canvas)
    coded = max(areas)
    if options.mode == "redraw":
        coded *= min(coded_at_once(bundle, run.canvas), sum(1 for _ in runs_of(bundle, options)))
    coding = max(cost.encode.memory.of(coded), cost.decode.memory.of(coded))
    return _Refine(
        round(run.windows * cost.embedded.of(run.window)),
        round(rows * cost.denoiser.memory.of(run.window) + _LATENTS * latents),
        round(latents + coding),
        pixels * _PIXEL if len(areas) > 1 else 0,
    )
