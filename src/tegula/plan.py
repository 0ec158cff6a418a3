"""The work and the memory of an upscale, counted before it is done."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tegula.models.bundle import (
    Bundle,
    ControlImage,
    ControlScale,
    SplitDenoiser,
    TileableAutoencoder,
    WindowBatch,
)
from tegula.models.compiled import uncompiled
from tegula.models.device import home_of
from tegula.models.prescalers import Prescaler, PrescalerFacts
from tegula.models.prescalers.networks import RRDBNet, SRVGGNetCompact
from tegula.options import ResolvedOptions
from tegula.pipeline.autoencoder import MEASURED_TILES, tiling_of
from tegula.pipeline.prescale import DEFAULT_TILE, padding, plan_sizes, plan_tiles
from tegula.pipeline.redraw import evaluations_of, redraw_plan, strength_of, windows_of
from tegula.pipeline.refine import (
    PICTURES,
    canvas_for,
    guidance_of,
    latent_grid,
    schedule_of,
    window_batch,
)
from tegula.pipeline.sampler import Rows, rows_of
from tegula.pipeline.windows import count_told, grid_windows

# What nets take, by the size of what they see: FLOPs and memory, counted by torch.
#
# Each net runs once on three tiny areas, and a parabola goes through the three counts:
# convolutions grow with the area, attention with its square, and what is done once a row
# does not grow. FLOPs are two for a multiply-add.

T = TypeVar("T")
_AREAS = ((1, 1), (1, 2), (2, 2))
_SMALL_TILE = 16


@dataclass(frozen=True)
class Cost:
    """A count that depends on pixels: ``fixed + linear * pixels + quadratic * pixels**2``."""

    fixed: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def of(self, pixels: float) -> float:
        """Return the count for an area."""
        return self.fixed + pixels * (self.linear + pixels * self.quadratic)


@dataclass(frozen=True)
class NetCost:
    """FLOPs, and bytes that are alive at once beside the input and the weights."""

    flops: Cost = Cost()
    memory: Cost = Cost()


@dataclass(frozen=True)
class BundleCost:
    """What the nets of a bundle take, by image pixels.

    denoiser: one row of a batch. decoder: of its second half, where it has two.
    control: embedding one control window. embedded: bytes of what comes out, for keeps.
    encoder, autodecoder: the autoencoder's two ways, on one picture.
    """

    denoiser: NetCost
    control: NetCost
    encoder: NetCost
    autodecoder: NetCost
    embedded: Cost = Cost()
    decoder: NetCost | None = None


def bundle_cost(bundle: Bundle) -> BundleCost:
    """Count a bundle; a tenth of the work of a window."""
    side = bundle.facts.window_multiple
    shapes = [(side * down, side * across) for down, across in _AREAS]
    with uncompiled():
        counts = [_counts(bundle, *shape) for shape in shapes]
    pixels = [height * width for height, width in shapes]

    def fitted(net: str) -> NetCost:
        flops, memory = zip(*(count[net] for count in counts), strict=True)
        return NetCost(_parabola(pixels, flops), _line(pixels, memory))

    return BundleCost(
        fitted("denoiser"),
        fitted("control"),
        fitted("encoder"),
        fitted("autodecoder"),
        fitted("embedded").memory,
        fitted("decoder") if "decoder" in counts[0] else None,
    )


def prescaler_flops(prescaler: Prescaler) -> Cost:
    """Count the FLOPs of a prescaler by source pixels."""
    network = prescaler.network
    if network is None:
        return Cost()
    if not isinstance(network, RRDBNet | SRVGGNetCompact):
        # Nets of others convolve at the size of the source nearly throughout.
        return Cost(linear=2 * sum(parameter.numel() for parameter in network.parameters()))
    picture = torch.zeros(1, 3, _SMALL_TILE, _SMALL_TILE, device=prescaler.device)
    flops, _ = _counted(lambda: network(picture))[1]
    return Cost(linear=flops / _SMALL_TILE**2)


def prescaler_memory(prescaler: Prescaler) -> Cost:
    """Count the bytes of a prescaler by source pixels, without computing anything."""
    network = prescaler.network
    if not isinstance(network, RRDBNet | SRVGGNetCompact):
        return Cost()
    # torch takes a second to get ready for weights that are not there.
    weights = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in network.state_dict().items()
    }
    picture = torch.empty(1, 3, DEFAULT_TILE, DEFAULT_TILE, device="meta")
    _, memory = _counted(lambda: functional_call(network, weights, (picture,)))[1]
    return Cost(linear=memory / DEFAULT_TILE**2)


def _counts(bundle: Bundle, height: int, width: int) -> Mapping[str, tuple[int, int]]:
    """Return FLOPs and peak bytes of each net on an area."""
    device = bundle.device
    # Compiled and converted denoisers hand out the plain one, whose work is the same.
    denoiser = bundle.denoiser.to_dtype(bundle.dtype)
    picture = torch.zeros(1, 3, height, width, device=device)
    control = ControlImage(picture, picture)
    latents, encoder = _counted(
        lambda: bundle.autoencoder.encode(picture, control, torch.Generator())
    )
    _, autodecoder = _counted(lambda: bundle.autoencoder.decode(latents, control))
    embedded, embedding = _counted(lambda: denoiser.embed_control(control))
    text, timestep = bundle.text.encode([""]), torch.tensor(1, device=device)
    scale = ControlScale(1.0)
    batch = WindowBatch(latents, timestep, text, embedded, scale, slice(0, 1))
    counts = {
        "encoder": encoder,
        "autodecoder": autodecoder,
        "control": embedding,
        "embedded": (0, embedded.numel() * embedded.element_size()),
        "denoiser": _counted(lambda: denoiser(batch))[1],
    }
    if isinstance(denoiser, SplitDenoiser):
        features = denoiser.encode(batch)
        counts["decoder"] = _counted(lambda: denoiser.decode(features, timestep, text))[1]
    return counts


def _counted(run: Callable[[], T]) -> tuple[T, tuple[int, int]]:
    with torch.no_grad(), Counter() as counter:
        result = run()
    return result, (counter.flops, counter.peak)


def _attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    rows = math.prod(query.shape[:-1])
    return 2 * rows * key.shape[-2] * (key.shape[-1] + value.shape[-1])


_FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's own table lacks it.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs, and the bytes of tensors made inside that are alive at once.

    What kernels allocate and free within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.now = 0
        self.peak = 0
        self._known: dict[int, object] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler only to tell it to stay away."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, in its parts where it has some, and count."""
        named = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                whole = func.decompose(*args, **named)
            if whole is not NotImplemented:
                return whole
        given = {_address(tensor) for tensor in _tensors((args, named))}
        result = func(*args, **named)
        if formula is not None:
            self.flops += formula(*args, **named, out_val=result)
        for tensor in _tensors(result):
            if _address(tensor) not in given and _address(tensor) not in self._known:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.now += size
        self._known[address] = weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _parabola(pixels: Sequence[int], counts: Sequence[int]) -> Cost:
    powers = np.vander(np.asarray(pixels, np.float64), 3, increasing=True)
    return Cost(*(float(part) for part in np.linalg.solve(powers, np.asarray(counts, np.float64))))


def _line(pixels: Sequence[int], counts: Sequence[int]) -> Cost:
    """Go through the first and the last: peaks may lie elsewhere in between."""
    slope = (counts[-1] - counts[0]) / (pixels[-1] - pixels[0])
    return Cost(counts[0] - slope * pixels[0], slope)


# The work of an upscale, counted before it is done, from what the stages themselves plan.

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
    told = count_told(options.placed_regions, [w.scaled(factor) for w in grid.windows], factor)
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
