"""The work of an upscale, counted before it is done.

FLOPs are those of the nets alone, two for a multiply-add. The cost of a pixel is counted
by torch on one small forward pass, once per bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tegula.models.bundle import Bundle, ControlImage, ControlScale, WindowBatch
from tegula.models.prescalers import Prescaler
from tegula.options import ResolvedOptions
from tegula.stages.prescale import plan_sizes
from tegula.stages.refine_canvas import canvas_for, guidance_of, latent_grid, schedule_of
from tegula.stages.refine_redraw import evaluations_of, redraw_plan, strength_of, windows_of
from tegula.tiling.regions import count_told

_FIXED_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    """What one upscale computes, unless a mask or ``flat_skip`` saves some of it.

    windows: of the latent canvas, or of all tiles of all passes in redraw mode, once for
        each prompt that holds in them; 0 when nothing is refined.
    levels: noise levels that are evaluated, with both evaluations of a Heun step; in
        redraw mode those of the longest pass.
    evaluations: forward passes of the denoiser, in windows; guidance counts twice.
    prescale_flops, denoise_flops, autoencoder_flops: of the nets.
    """

    width: int
    height: int
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
    def shares(self) -> Mapping[str, float]:
        """Share of the whole work by stage, for progress."""
        nets = 1 - _FIXED_SHARE
        prescale, refine = self.prescale_flops, self.refine_flops
        total = max(1, prescale + refine)
        return {"prescale": nets * prescale / total, "refine": nets * refine / total}


@dataclass(frozen=True)
class PixelCost:
    """FLOPs per image pixel: one evaluation of the denoiser, one way there and back."""

    denoiser: float
    autoencoder: float


def make_plan(
    bundle: Bundle,
    cost: PixelCost,
    prescaler: Prescaler,
    source: tuple[int, int],
    options: ResolvedOptions,
) -> Plan:
    """Count the work of an upscale.

    Args:
        bundle: the diffusion model.
        cost: of that model, from ``pixel_cost``.
        prescaler: the prescaler.
        source: width and height of what is enlarged.
        options: the settings.

    Raises:
        OptionError: the window does not fit the model.
    """
    size = options.width, options.height
    prescale_flops = _prescale_flops(prescaler, source, size)
    runs = _runs(bundle, options) if options.refines else ()
    evaluations = [run.windows * run.rows for run in runs]
    pixels = [run.windows * run.rows * run.window_pixels for run in runs]
    return Plan(
        *size,
        windows=sum(run.windows for run in runs),
        levels=max((run.levels for run in runs), default=0),
        evaluations=sum(evaluations),
        prescale_flops=prescale_flops,
        denoise_flops=round(sum(pixels) * cost.denoiser),
        autoencoder_flops=round(sum(run.coded_pixels for run in runs) * cost.autoencoder),
    )


@dataclass(frozen=True)
class _Run:
    """Equal windows that go through one schedule.

    rows: evaluations of one window over all levels; coded_pixels: through the autoencoder.
    """

    windows: int
    window_pixels: int
    levels: int
    rows: int
    coded_pixels: int


def _runs(bundle: Bundle, options: ResolvedOptions) -> Sequence[_Run]:
    if options.mode == "redraw":
        return _redraw_runs(bundle, options)
    canvas = canvas_for(bundle.facts, options.width, options.height, options.window)
    grid = latent_grid(bundle.facts, canvas, options.overlap)
    window = canvas.window_width * canvas.window_height
    levels, rows = _levels(bundle, options, options.creativity)
    factor = bundle.facts.latent_factor
    told = count_told(options.regions, [w.scaled(factor) for w in grid.windows], factor)
    return (_Run(told, window, levels, rows, canvas.width * canvas.height),)


def _redraw_runs(bundle: Bundle, options: ResolvedOptions) -> Sequence[_Run]:
    runs = []
    for tiles in redraw_plan(bundle.facts, options).passes:
        levels, rows = _levels(bundle, options, strength_of(tiles, options))
        for tile in tiles.tiles:
            grid = windows_of(tiles, tile.crop, bundle.facts, options)
            window = grid.window_width * grid.window_height * bundle.facts.latent_factor**2
            coded = tile.crop.width * tile.crop.height
            told = evaluations_of(tiles, tile.crop, bundle.facts, options)
            runs.append(_Run(told, window, levels, rows, coded))
    return runs


def _levels(bundle: Bundle, options: ResolvedOptions, strength: float) -> tuple[int, int]:
    """Return the noise levels of a denoise strength, and their evaluations per window."""
    guidance, levels = guidance_of(options), len(schedule_of(bundle, options, strength))
    return levels, sum(2 if guidance.guided(level, levels) else 1 for level in range(levels))


def pixel_cost(bundle: Bundle) -> PixelCost:
    """Count the FLOPs of a bundle on its smallest window.

    Attention grows with the square of a window, so the cost of a large one is somewhat
    higher: by 8% for Stable Diffusion 1.5 between 256 and 512 px.
    """
    facts, device = bundle.facts, bundle.device
    side = facts.minimum_window
    picture = torch.zeros(1, 3, side, side, device=device)
    control = ControlImage(picture, picture)
    with torch.inference_mode(), FlopCounterMode(display=False) as autoencoder:
        latents = bundle.autoencoder.encode(picture, control, torch.Generator())
        bundle.autoencoder.decode(latents, control)
    batch = WindowBatch(
        latents,
        torch.tensor(1, device=device),
        bundle.text.encode([""]),
        bundle.denoiser.embed_control(control),
        ControlScale(1.0),
        slice(0, 1),
    )
    with torch.inference_mode(), FlopCounterMode(display=False) as denoiser:
        bundle.denoiser(batch)
    return PixelCost(denoiser.get_total_flops() / side**2, autoencoder.get_total_flops() / side**2)


def _prescale_flops(prescaler: Prescaler, source: tuple[int, int], target: tuple[int, int]) -> int:
    if prescaler.network is None:
        return 0
    # These nets convolve at the size of the source nearly throughout, so every parameter
    # is used once per source pixel; what follows their enlargement is a few percent.
    per_pixel = 2 * sum(parameter.numel() for parameter in prescaler.network.parameters())
    sizes = [source, *plan_sizes(source, target, prescaler.facts.factor)]
    return per_pixel * sum(width * height for width, height in sizes[:-1])
