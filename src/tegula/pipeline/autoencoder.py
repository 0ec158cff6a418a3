"""The autoencoder on canvases of any size.

Small canvases go through it whole. Large ones go through it in overlapping tiles whose
GroupNorms all use the statistics of the whole canvas: otherwise every tile would be
normalised to its own content and drift in tone (the flaw of independent tiles). The
statistics are measured on the tiles themselves in a first pass, at full scale; measuring
them on a shrunk canvas, as Tiled VAE's fast mode does, washes colours out.

An autoencoder without GroupNorms, like mini's block transform, is local and never tiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tegula.images.pixels import Size
from tegula.models.bundle import Autoencoder, Bundle, ControlImage, TileableAutoencoder
from tegula.models.device import free_memory, side_that_fits
from tegula.models.retry import first_finite, until_it_fits
from tegula.pipeline.windows import Window, WindowGrid, feather, grid_windows
from tegula.progress import SILENT, StageProgress

WHOLE_SIDE = 1280
"""Canvases of up to this side squared, in image pixels, are not tiled."""

TILE_SIDE = 1024
OVERLAP = 0.125
MEASURED_TILES = 9
"""At most this many tiles, spread over the canvas, are measured for the statistics."""


@dataclass(frozen=True)
class AutoencoderTiling:
    """Sides in image pixels; a tile's overlap as a share of its side."""

    whole_side: int = WHOLE_SIDE
    tile_side: int = TILE_SIDE
    overlap: float = OVERLAP


DEFAULT_TILING = AutoencoderTiling()
_PIXEL_BYTES = 2400
"""What a pixel of the canvas may take in the decoder, for each byte of its numbers."""
_GPU_SIDES = (1024, 3072)
"""The least and the largest side on a GPU."""
SMALLEST_TILE = 256


def tiling_of(bundle: Bundle) -> AutoencoderTiling:
    """Return the largest canvas that goes through whole: on CUDA, what fits into free memory."""
    free = free_memory(bundle.device)
    if free is None:
        return DEFAULT_TILING
    side = side_that_fits(free, _PIXEL_BYTES * bundle.dtype.itemsize, _GPU_SIDES, TILE_SIDE // 4)
    return AutoencoderTiling(whole_side=side)


def passed_areas(bundle: Bundle, canvas: Size) -> Sequence[int]:
    """Return the pixels of everything that goes through the autoencoder one way.

    Tiles that are measured for the statistics of the whole go through it twice.

    Args:
        bundle: its autoencoder and its device decide whether there are tiles.
        canvas: width and height in image pixels.
    """
    (width, height), tiling = canvas, tiling_of(bundle)
    whole = not isinstance(bundle.autoencoder, TileableAutoencoder)
    if whole or _fits(width, height, tiling):
        return (width * height,)
    grid = _grid(width, height, tiling, 1)
    count = len(grid) + len(_measured(grid))
    return (grid.window_width * grid.window_height,) * count


def coded_at_once(bundle: Bundle, canvas: Size) -> int:
    """Return how many canvases of a size go through together: no more pixels than one may have.

    An autoencoder that is never tiled is so light that it takes them one by one.
    """
    if not isinstance(bundle.autoencoder, TileableAutoencoder):
        return 1
    return max(1, tiling_of(bundle).whole_side ** 2 // (canvas[0] * canvas[1]))


def _smaller(tiling: AutoencoderTiling) -> AutoencoderTiling | None:
    """Return the tiling to try where memory ran out: tiles in place of the whole, then halves."""
    if tiling.whole_side:
        return AutoencoderTiling(0, tiling.tile_side, tiling.overlap)
    if tiling.tile_side <= SMALLEST_TILE:
        return None
    return AutoencoderTiling(0, tiling.tile_side // 2, tiling.overlap)


def encode(
    bundle: Bundle,
    image: Tensor,
    control: ControlImage,
    generator: torch.Generator,
    progress: StageProgress = SILENT,
) -> Tensor:
    """Return the latents [1, channels, h, w] of a canvas [1, 3, height, width], fp32.

    Raises:
        CancelledError: the caller wants to stop, which is checked between tiles.
        NumericalError: the autoencoder is not finite in fp32 either.
        OutOfMemoryError: not even the smallest tile fits.
    """
    factor, fresh = bundle.facts.latent_factor, generator.get_state()

    def run(autoencoder: Autoencoder, tiling: AutoencoderTiling) -> Tensor:
        # A run that failed may have drawn already; the next one draws the same again.
        generator.set_state(fresh)
        if not isinstance(autoencoder, TileableAutoencoder):
            return autoencoder.encode(image, control, generator)
        width, height = image.shape[-1], image.shape[-2]
        if _fits(width, height, tiling):
            return autoencoder.encode(image.to(bundle.device).contiguous(), control, generator)
        moments = _over_tiles(
            autoencoder.encoder,
            _grid(width, height, tiling, 1),
            lambda window: autoencoder.encode_moments(
                image[window.index].to(bundle.device).contiguous()
            ),
            _Scale(1, factor),
            progress,
        )
        return autoencoder.draw(moments, generator)

    coded = _safely(bundle, run)
    progress.on_share(1.0)
    return coded


def decode(
    bundle: Bundle,
    latents: Tensor,
    control: ControlImage,
    progress: StageProgress = SILENT,
) -> Tensor:
    """Return the canvas [1, 3, height, width] of its latents, fp32, not clamped.

    It lies where the control image does, which may be the host.

    Raises:
        CancelledError: the caller wants to stop, which is checked between tiles.
        NumericalError: the autoencoder is not finite in fp32 either.
        OutOfMemoryError: not even the smallest tile fits.
    """
    factor, home = bundle.facts.latent_factor, control.prescaled.device

    def run(autoencoder: Autoencoder, tiling: AutoencoderTiling) -> Tensor:
        width, height = control.prescaled.shape[-1], control.prescaled.shape[-2]
        if not isinstance(autoencoder, TileableAutoencoder) or _fits(width, height, tiling):
            return autoencoder.decode(latents, control).to(home)
        return _over_tiles(
            autoencoder.decoder,
            _grid(latents.shape[-1], latents.shape[-2], tiling, factor),
            lambda window: autoencoder.decode(latents[window.index], control).to(home),
            _Scale(factor, 1),
            progress,
        )

    coded = _safely(bundle, run)
    progress.on_share(1.0)
    return coded


def encode_together(
    bundle: Bundle, images: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return the latents of canvases [n, 3, height, width] that ``coded_at_once`` allows.

    Args:
        bundle: with an autoencoder that can be tiled, but is not here.
        images: on any device.
        generators: one for each canvas.

    Raises:
        NumericalError: the autoencoder is not finite in fp32 either.
        RuntimeError: they do not fit into memory together.
    """
    fresh = [generator.get_state() for generator in generators]

    def run(autoencoder: Autoencoder) -> Tensor:
        tileable = cast("TileableAutoencoder", autoencoder)
        moments = tileable.encode_moments(images.to(bundle.device).contiguous())
        drawn = []
        for row, (generator, state) in enumerate(zip(generators, fresh, strict=True)):
            generator.set_state(state)
            drawn.append(tileable.draw(moments[row : row + 1], generator))
        return torch.cat(drawn)

    return _finite(bundle, run)


def decode_together(bundle: Bundle, latents: Tensor, control: ControlImage) -> Tensor:
    """Return the canvases of latents [n, ...], where the control image lies, not clamped.

    Raises:
        NumericalError: the autoencoder is not finite in fp32 either.
        RuntimeError: they do not fit into memory together.
    """
    home = control.prescaled.device
    return _finite(bundle, lambda autoencoder: autoencoder.decode(latents, control).to(home))


@dataclass(frozen=True)
class _Scale:
    """Output pixels per input pixel, as a fraction."""

    times: int
    over: int

    def of(self, window: Window) -> Window:
        return Window(
            *(
                side * self.times // self.over
                for side in (window.x, window.y, window.width, window.height)
            )
        )


def _fits(width: int, height: int, tiling: AutoencoderTiling) -> bool:
    return width * height <= tiling.whole_side**2


def _grid(width: int, height: int, tiling: AutoencoderTiling, factor: int) -> WindowGrid:
    side = tiling.tile_side // factor
    return grid_windows(width, height, side, side, tiling.overlap)


def _measured(grid: WindowGrid) -> Sequence[Window]:
    """Return the tiles that the statistics of the whole are measured on."""
    return grid.windows[:: -(-len(grid) // MEASURED_TILES)]


def _over_tiles(
    network: nn.Module,
    grid: WindowGrid,
    run: Callable[[Window], Tensor],
    scale: _Scale,
    progress: StageProgress,
) -> Tensor:
    done, total = 0, len(_measured(grid)) + len(grid)

    def tile(window: Window) -> Tensor:
        nonlocal done
        progress.cancel.check()
        coded = run(window).float()
        done += 1
        progress.on_share(done / total)
        return coded

    with _measured_group_norms(network) as statistics:
        for window in _measured(grid):
            tile(window)
    with _fixed_group_norms(statistics):
        parts = ((scale.of(window), tile(window)) for window in grid.windows)
        return _blend(parts, grid, scale)


def _blend(parts: Iterable[tuple[Window, Tensor]], grid: WindowGrid, scale: _Scale) -> Tensor:
    out = scale.of(Window(0, 0, grid.width, grid.height))
    tile = scale.of(grid.windows[0])
    columns = [x * scale.times // scale.over for x in grid.columns]
    rows = [y * scale.times // scale.over for y in grid.rows]
    column_weights = feather(columns, tile.width, out.width)
    row_weights = feather(rows, tile.height, out.height)
    canvas: Tensor | None = None
    for index, (window, part) in enumerate(parts):
        row, column = divmod(index, len(columns))
        weights = torch.from_numpy(np.outer(row_weights[row], column_weights[column]))
        if canvas is None:
            canvas = part.new_zeros(1, part.shape[1], out.height, out.width)
        canvas[window.index] += part * weights.to(part.device)
    assert canvas is not None  # noqa: S101 - a grid holds at least one window
    return canvas


@dataclass
class _GroupStatistics:
    """Mean and mean square of each group of one GroupNorm, summed over tiles."""

    mean: Tensor | None = None
    square: Tensor | None = None
    tiles: int = 0

    def add(self, values: Tensor, groups: int) -> None:
        grouped = values.float().reshape(groups, -1)
        mean, square = grouped.mean(1), grouped.square().mean(1)
        self.mean = mean if self.mean is None else self.mean + mean
        self.square = square if self.square is None else self.square + square
        self.tiles += 1

    def normalise(self, values: Tensor, norm: nn.GroupNorm) -> Tensor:
        assert self.mean is not None  # noqa: S101 - the measuring pass ran every norm
        assert self.square is not None  # noqa: S101
        mean = self.mean / self.tiles
        deviation = (self.square / self.tiles - mean.square() + norm.eps).clamp_min(0).sqrt()
        channels = values.shape[1] // norm.num_groups
        shape = (1, -1, *([1] * (values.ndim - 2)))
        scale = norm.weight.float() / deviation.repeat_interleave(channels)
        shift = norm.bias.float() - mean.repeat_interleave(channels) * scale
        return torch.addcmul(shift.reshape(shape), values.float(), scale.reshape(shape)).to(
            values.dtype
        )


_Measured = Mapping[nn.GroupNorm, _GroupStatistics]


@contextmanager
def _measured_group_norms(network: nn.Module) -> Iterator[_Measured]:
    statistics = {m: _GroupStatistics() for m in network.modules() if isinstance(m, nn.GroupNorm)}
    caller = threading.get_ident()

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.GroupNorm)  # noqa: S101 - hooked on GroupNorms only
        if threading.get_ident() != caller:
            return  # another upscale runs the same network
        statistics[norm].add(inputs[0], norm.num_groups)

    hooks = [norm.register_forward_pre_hook(measure) for norm in statistics]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _fixed_group_norms(measured: _Measured) -> Iterator[None]:
    caller = threading.get_ident()

    def fixed(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(norm, nn.GroupNorm)  # noqa: S101 - hooked on GroupNorms only
        if threading.get_ident() != caller:
            return output
        return measured[norm].normalise(inputs[0], norm)

    hooks = [norm.register_forward_hook(fixed) for norm in measured]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _safely(bundle: Bundle, run: Callable[[Autoencoder, AutoencoderTiling], Tensor]) -> Tensor:
    """Run in tiles that fit into memory, and again in fp32 where the result is not finite."""
    room = tiling_of(bundle)

    def fitting(autoencoder: Autoencoder) -> Tensor:
        result, _ = until_it_fits(
            lambda tiling: run(autoencoder, tiling),
            room,
            _smaller,
            "A single tile of the autoencoder does not fit into memory; free some, or "
            "compute on a machine with more.",
        )
        return result

    return _finite(bundle, fitting)


def _finite(bundle: Bundle, run: Callable[[Autoencoder], Tensor]) -> Tensor:
    """Run, and again in fp32 where the result is not finite."""

    def attempt(dtype: torch.dtype) -> list[Tensor]:
        autoencoder = bundle.autoencoder
        return [run(autoencoder if dtype == bundle.dtype else autoencoder.to_dtype(dtype))]

    (result,) = first_finite(
        [partial(attempt, dtype) for dtype in dict.fromkeys((bundle.dtype, torch.float32))],
        "The autoencoder returned NaN or infinity even in fp32; its weights are damaged.",
    )
    return result
