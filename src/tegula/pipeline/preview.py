"""Small pictures of an upscale that is under way.

Nothing here draws a random number or changes what it is shown, so that a run with
previews gives the same result as one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional

from tegula.images.pixels import Float, Size
from tegula.models.bundle import Bundle, ControlImage, TileableAutoencoder
from tegula.pipeline.pictures import on_host, resample_box
from tegula.pipeline.sampler import Watch
from tegula.progress import OnPicture

PREVIEWS = 8
"""About as many are shown of one run."""

SIDE = 512
"""Longest side of a preview in pixels, at most."""

HEAVY_SIDE = 256
"""The same where the bundle's own autoencoder has to decode it."""

_STRIP = 16
"""Latent rows that are decoded at once, for each time that the preview is smaller."""


def latents_watcher(
    bundle: Bundle, control: ControlImage, size: tuple[int, int], steps: int, show: OnPicture
) -> Watch:
    """Return what shows previews of latents, at about ``PREVIEWS`` of the steps.

    Args:
        bundle: decodes them, with its light autoencoder where it has one.
        control: of the whole canvas.
        size: height and width of the picture on the canvas.
        steps: of the run.
        show: is given the previews.
    """
    return _seldom(steps - 1, lambda latents: show(_decoded(bundle, latents, control, size)))


def canvas_watcher(size: tuple[int, int], offers: int, show: OnPicture | None) -> Watch:
    """Return what shows previews of a canvas of pixels, the first and about ``PREVIEWS`` more.

    Args:
        size: height and width of the picture on the canvas.
        offers: how many canvases follow the first.
        show: is given the previews; None leaves them all out.
    """
    if show is None:
        return lambda _canvas: None
    height, width = size
    return _seldom(offers, lambda canvas: show(small_picture(canvas[..., :height, :width])), 0)


class PastedPreview:
    """Shows a picture that a net enlarges: the source, and over it the tiles that are ready.

    Args:
        source: float32 [height, width, 3] in 0..1, shown at once.
        target: width and height of the result.
        show: is given the previews, about ``PREVIEWS`` of the tiles; None shows none.
    """

    def __init__(self, source: Tensor, target: Size, show: OnPicture | None) -> None:
        self._show, self._target, self._pasted = show, target, 0
        if show is None:
            return
        self._times = _shrink_factor(target, SIDE)
        small = -(-target[0] // self._times), -(-target[1] // self._times)
        self._canvas = resample_box(source, small, (0, 0, source.shape[1], source.shape[0]))
        self._show_canvas(show)

    def paste(self, result: Tensor, y: tuple[int, int], x: tuple[int, int], tiles: int) -> None:
        """Paste a tile; those above it and to its left are in the result already.

        Args:
            result: float32 [height, width, 3], of the target's size.
            y: first row of the tile, and that after its last.
            x: the same of its columns.
            tiles: of the whole result.
        """
        if self._show is None:
            return
        (top, bottom), (left, right) = (
            (first // self._times, -(-last // self._times) if last == side else last // self._times)
            for (first, last), side in zip((y, x), self._target[::-1], strict=True)
        )
        rows, columns = (
            slice(first * self._times, last * self._times)
            for first, last in ((top, bottom), (left, right))
        )
        tile = result[rows, columns].permute(2, 0, 1)[None]
        self._canvas[top:bottom, left:right] = _shrunk(tile, self._times)[0].permute(1, 2, 0)
        self._pasted += 1
        if self._pasted % -(-tiles // PREVIEWS) == 0:
            self._show_canvas(self._show)

    def _show_canvas(self, show: OnPicture) -> None:
        show(on_host(self._canvas.clone()))


def _seldom(offers: int, take: Watch, first: int = 1) -> Watch:
    """Return what hands on about ``PREVIEWS`` of what it is offered, evenly spread.

    The first offer has the number ``first``; number 0 is always handed on.
    """
    every, numbers = max(1, -(-offers // PREVIEWS)), count(first)

    def offer(tensor: Tensor) -> None:
        if next(numbers) % every == 0:
            take(tensor)

    return offer


def small_picture(image: Tensor) -> Float:
    """Return a canvas [1, 3, height, width] as a picture of at most ``SIDE``, in 0..1."""
    small = _shrunk(image, _shrink_factor(image.shape[-2:], SIDE))
    return on_host(small[0].float().clamp(0, 1).permute(1, 2, 0))


def _decoded(
    bundle: Bundle, latents: Tensor, control: ControlImage, size: tuple[int, int]
) -> Float:
    height, width = size
    if not isinstance(bundle.autoencoder, TileableAutoencoder):
        return small_picture(_decoded_in_strips(bundle, latents, control, size))
    factor, light = bundle.facts.latent_factor, bundle.light_autoencoder
    side = HEAVY_SIDE if light is None else SIDE
    shown = latents[..., : -(-height // factor), : -(-width // factor)]
    shrunk = _shrunk(shown, _shrink_factor(shown.shape[-2:], side // factor))
    return small_picture((light or bundle.autoencoder).decode(shrunk, control))


def _decoded_in_strips(
    bundle: Bundle, latents: Tensor, control: ControlImage, size: tuple[int, int]
) -> Tensor:
    """Decode latents that mean nothing without their control image, and shrink the picture."""
    (height, width), factor = size, bundle.facts.latent_factor
    times = _shrink_factor(size, SIDE)
    strips, step = [], times * _STRIP
    for top in range(0, -(-height // factor), step):
        rows = slice(top * factor, (top + step) * factor)
        part = ControlImage(control.prescaled[..., rows, :], control.source[..., rows, :])
        picture = bundle.autoencoder.decode(latents[..., top : top + step, :], part)
        strips.append(_shrunk(picture, times))
    return torch.cat(strips, dim=2)[..., : -(-height // times), : -(-width // times)]


def _shrink_factor(size: Sequence[int], side: int) -> int:
    """Return the whole factor by which a size is divided to fit into a square of this side."""
    return max(1, -(-max(size) // side))


def _shrunk(values: Tensor, times: int) -> Tensor:
    return functional.avg_pool2d(values.float(), times, ceil_mode=True) if times > 1 else values
