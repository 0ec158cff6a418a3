"""What an upscale takes of memory beside its models, counted before it is done.

The terms are the arrays that the stages keep at once, so this follows the code of the
stages; a test holds the two together. Allocators and kernels take somewhat more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tegula.costs import BundleCost, prescaler_memory
from tegula.models.bundle import Bundle
from tegula.models.memory import home_of
from tegula.models.prescalers import Prescaler
from tegula.options import ResolvedOptions
from tegula.plan import Plan, autoencoder_areas, prescale_tiles, runs_of
from tegula.stages.refine_canvas import PICTURES, window_batch

_FLOAT = 4
_PIXEL = 3 * _FLOAT
_BANDS = 4 * 512
"""Rows of a picture that the colour lock takes at once, in all its arrays."""
_IMAGE = 3 + 4
"""Bytes of a pixel as it leaves: in an array, and as Pillow keeps it."""
_LATENTS = 5
"""Latent canvases at once: the current one, its prediction, and what a solver makes."""
_ROWS = 2
"""Of a window in a batch that is guided."""


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
    host = {
        "prescale": source + picture + max(0 if apart else tile, picture + bands),
        "finish": source + 3 * picture + plan.width * plan.height * _IMAGE,
    }
    if not plan.windows:
        return Memory(host, {"prescale": tile} if apart else {})
    refine = _refine_bytes(bundle, cost, options)
    if not apart:
        sampled = 2 * picture + refine.kept + refine.sampling
        host["refine"] = source + max(sampled, 2 * picture + refine.result + refine.coding)
        return Memory(host, {})
    host["refine"] = source + PICTURES * picture
    working = max(refine.sampling, refine.coding)
    for size in (refine.kept, PICTURES * picture):
        working += size if home_of(size, bundle.device) == bundle.device else 0
    return Memory(host, {"prescale": tile, "refine": working})


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
    largest, factor = max(tiles), prescaler.facts.factor or 1
    return round(prescaler_memory(prescaler).of(largest) + 2 * largest * factor**2 * _PIXEL)


def _refine_bytes(bundle: Bundle, cost: BundleCost, options: ResolvedOptions) -> _Refine:
    run, facts = runs_of(bundle, options)[0], bundle.facts
    rows = min(run.windows, window_batch(bundle, options).size)
    rows *= _ROWS if options.guidance_scale > 1 else 1
    pixels = run.canvas[0] * run.canvas[1]
    latents = pixels // facts.latent_factor**2 * facts.latent_channels * _FLOAT
    areas = autoencoder_areas(bundle, run.canvas)
    coding = max(cost.encoder.memory.of(max(areas)), cost.autodecoder.memory.of(max(areas)))
    return _Refine(
        round(run.windows * cost.embedded.of(run.window)),
        round(rows * cost.denoiser.memory.of(run.window) + _LATENTS * latents),
        round(latents + coding),
        pixels * _PIXEL if len(areas) > 1 else 0,
    )
