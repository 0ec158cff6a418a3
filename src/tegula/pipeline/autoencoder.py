"""The autoencoder on canvases of any size.

Small canvases go through it whole. Large ones go through it in overlapping tiles whose
GroupNorms all use the statistics of the whole canvas: otherwise every tile would be
normalised to its own content and drift in tone (the flaw of independent tiles). The
statistics are measured on the tiles themselves in a first pass, at full scale; measuring
them on a shrunk canvas, as Tiled VAE's fast mode does, washes colours out.

An autoencoder without GroupNorms, like mini's block transform, is local and never tiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from tegula.images.pixels import Size
from tegula.models.bundle import Autoencoder, Bundle, ControlImage, TileableAutoencoder
from tegula.models.device import free_memory, side_that_fits
from tegula.models.retry import first_finite, until_it_fits
from tegula.pipeline.shards import Helper, HelperNets, Shards, for_sending
from tegula.pipeline.windows import Window, WindowGrid, feather, grid_windows
from tegula.progress import SILENT, Cancel, Cancelled, StageProgress

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
    shards: Shards | None = None,
) -> Tensor:
    """Return the latents [1, channels, h, w] of a canvas [1, 3, height, width], fp32.

    With ``shards`` its tiles are spread over helpers.

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
            _Half(autoencoder, decodes=False, device=bundle.device, home=bundle.device),
            image,
            _grid(width, height, tiling, 1),
            _Scale(1, factor),
            progress,
            shards if autoencoder is bundle.autoencoder else None,
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
    shards: Shards | None = None,
) -> Tensor:
    """Return the canvas [1, 3, height, width] of its latents, fp32, not clamped.

    It lies where the control image does, which may be the host. With ``shards`` its tiles are
    spread over helpers.

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
            _Half(autoencoder, decodes=True, device=bundle.device, home=home),
            latents,
            _grid(latents.shape[-1], latents.shape[-2], tiling, factor),
            _Scale(factor, 1),
            progress,
            shards if autoencoder is bundle.autoencoder else None,
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


_OfATile = Callable[[Tensor], list[Tensor]]
"""What is made of a tile: the result alone, or the moments of each norm, [2, groups]."""


@dataclass(frozen=True)
class _Half:
    """One half of an autoencoder over tiles, whose norms are measured first and fixed then.

    decodes: it is the decoder.
    device: where it computes.
    home: where results go.
    """

    autoencoder: TileableAutoencoder
    decodes: bool
    device: torch.device
    home: torch.device

    @property
    def norms(self) -> list[nn.GroupNorm]:
        """Its norms, in the same order in every process."""
        half = self.autoencoder.decoder if self.decodes else self.autoencoder.encoder
        return [layer for layer in half.modules() if isinstance(layer, nn.GroupNorm)]

    # Each returns what is called for all tiles: a compiler compiles anew for every twin.

    def measuring(self) -> _OfATile:
        """Return what runs a tile normalised by itself, and returns the moments of each norm."""
        norms: dict[nn.Module, _MeasuringNorm] = {
            layer: _MeasuringNorm(layer) for layer in self.norms
        }
        twin = self.autoencoder.with_norms(norms)

        def measure(tile: Tensor) -> list[Tensor]:
            for norm in norms.values():
                norm.moments.zero_()
            self._run(twin, tile)
            return [norm.moments.clone() for norm in norms.values()]

        return measure

    def fixed(self, moments: Sequence[Tensor], tiles: int) -> _OfATile:
        """Return what runs a tile with the norms of the whole, and returns that in fp32.

        Args:
            moments: of each norm, added up over measured tiles.
            tiles: how many these were.
        """
        norms: dict[nn.Module, nn.Module] = {
            layer: _FixedNorm.of(layer, each.to(self.device) / tiles)
            for layer, each in zip(self.norms, moments, strict=True)
        }
        twin = self.autoencoder.with_norms(norms)
        return lambda tile: [self._run(twin, tile).float()]

    def _run(self, autoencoder: TileableAutoencoder, tile: Tensor) -> Tensor:
        # Laid out by itself: a compiler takes strides beyond the tile for another shape.
        tile = tile.to(self.device).contiguous()
        if not self.decodes:
            return autoencoder.encode_moments(tile)
        # The control image has no part in it.
        return autoencoder.decode(tile, ControlImage(tile, tile)).to(self.home)


@dataclass(frozen=True)
class CodingTask:
    """One tile of a half of the autoencoder for a helper.

    run_name: the same for all tiles that are measured, or run, together.
    tile: [1, channels, h, w]: pixels to encode, or latents to decode.
    moments: of every norm over all measured tiles; None measures those of this one.
    tiles: how many were measured.
    """

    run_name: str
    decodes: bool
    tile: Tensor
    moments: Sequence[Tensor] | None
    tiles: int

    def run(self, nets: HelperNets, cancel: Cancel) -> Sequence[Tensor]:
        """Return what becomes of the tile, or its moments for every norm.

        Raises:
            CancelledError: the sender wants it no more.
            RuntimeError: the tile does not fit into memory; the sender may try smaller ones.
        """
        cancel.check()
        if self.run_name not in nets.kept:
            device = nets.bundle.device
            autoencoder = cast("TileableAutoencoder", nets.bundle.autoencoder)
            half = _Half(autoencoder, self.decodes, device, device)
            nets.kept.clear()
            nets.kept[self.run_name] = (
                half.measuring() if self.moments is None else half.fixed(self.moments, self.tiles)
            )
        of_a_tile: _OfATile = nets.kept[self.run_name]
        return [for_sending(each) for each in of_a_tile(self.tile)]


def _over_tiles(
    half: _Half,
    canvas: Tensor,
    grid: WindowGrid,
    scale: _Scale,
    progress: StageProgress,
    shards: Shards | None,
) -> Tensor:
    """Run one half of an autoencoder over tiles: once to measure its norms, then with them fixed.

    Both are twins of the autoencoder, so other threads may run it meanwhile.
    """
    measured = _measured(grid)
    done, total = 0, len(measured) + len(grid)

    def spread(
        windows: Sequence[Window], of_a_tile: _OfATile, moments: Sequence[Tensor] | None
    ) -> Iterator[list[Tensor]]:
        nonlocal done
        name = uuid4().hex
        sent = None if moments is None else [for_sending(each) for each in moments]

        def here(number: int) -> list[Tensor]:
            progress.cancel.check()
            return of_a_tile(canvas[windows[number].index])

        def away(number: int, helper: Helper, given_up: Cancelled) -> list[Tensor]:
            tile = for_sending(canvas[windows[number].index])
            task = CodingTask(name, half.decodes, tile, sent, len(measured))
            return [each.to(half.home) for each in helper.run(task, given_up)]

        results: Iterator[list[Tensor]] = map(here, range(len(windows)))
        if shards is not None:
            results = shards.run(windows, here, away, progress.cancel)
        for result in results:
            done += 1
            progress.on_share(done / total)
            yield result

    moments: list[Tensor] = []
    for each in spread(measured, half.measuring(), None):
        # Added in the order of the tiles, whoever measured them.
        moments = (
            [a + b.to(a.device) for a, b in zip(moments, each, strict=True)] if moments else each
        )
    parts = spread(grid.windows, half.fixed(moments, len(measured)), moments)
    located = zip(map(scale.of, grid.windows), (part for (part,) in parts), strict=True)
    return _blend(located, grid, scale)


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


class _MeasuringNorm(nn.Module):
    """A GroupNorm that adds up the mean and the mean square of its groups, [2, groups]."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self._norm = norm
        self.moments = torch.zeros(2, norm.num_groups, device=norm.weight.device)

    def forward(self, values: Tensor) -> Tensor:
        """Normalise a tile [1, channels, ...] by itself."""
        grouped = values.float().reshape(self._norm.num_groups, -1)
        self.moments += torch.stack([grouped.mean(1), grouped.square().mean(1)])
        normalised: Tensor = self._norm(values)
        return normalised


class _FixedNorm(nn.Module):
    """A norm whose statistics are known: each channel times a number and plus another."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self._scale, self._shift = scale, shift

    @classmethod
    def of(cls, norm: nn.GroupNorm, moments: Tensor) -> nn.Module:
        """Return the norm of the whole, given the mean and the mean square of its groups."""
        mean, square = moments
        deviation = (square - mean.square() + norm.eps).clamp_min(0).sqrt()
        channels = norm.num_channels // norm.num_groups
        scale = norm.weight.float() / deviation.repeat_interleave(channels)
        return cls(scale, norm.bias.float() - mean.repeat_interleave(channels) * scale)

    def forward(self, values: Tensor) -> Tensor:
        """Normalise a tile [1, channels, ...]."""
        shape = (1, -1, *([1] * (values.ndim - 2)))
        scale, shift = (each.reshape(shape) for each in (self._scale, self._shift))
        return torch.addcmul(shift, values.float(), scale).to(values.dtype)


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
