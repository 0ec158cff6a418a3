"""Pictures as tensors: onto the device, resampled and blurred there, and off it again.

From prescale to finish a picture is a float32 tensor [height, width, channels] in 0..1, sRGB, and
a plane, such as alpha, is [height, width]. It comes onto the device once, by ``on_device``, and
leaves it once, by ``on_host``, when its samples are those of the file.

Each filter has two forms that give the same numbers. Where a tensor lies on the host, Pillow and
OpenCV read its memory: there they are faster than torch. Elsewhere torch applies the same weights.
``lies_on_host`` decides, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tegula.images.pixels import LUMA, SPECK, Box, Float, Size, bands, resample

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
Places = NDArray[np.int64]
Border = Literal["edge", "mirrored", "mirrored at the middle"]
"""How a picture goes on beyond its edge: by its last pixel, by all of them mirrored (b a | a b), or
mirrored around the last one (c b | a b c)."""


def picture_work(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Run a function of pictures without gradients, and on the host in one thread.

    Its steps are short and wait for memory. Where other programs keep the cores busy, threads
    that wait for each other at every step took two to three times the processor's time of one.
    """

    @wraps(function)
    def run(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        threads = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                return function(*given, **named)
        finally:
            if threads > 1:
                torch.set_num_threads(threads)

    return run


def lies_on_host(picture: Tensor) -> bool:
    """Tell whether Pillow and OpenCV can read a tensor where it lies."""
    return picture.device.type == "cpu"


def on_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor; on the host the two share their memory if it is writable."""
    contiguous = np.ascontiguousarray(values)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else values.copy()).to(device)


def on_host(picture: Tensor) -> NDArray[Any]:
    """Return a tensor as an array; on the host the two share their memory."""
    array: NDArray[Any] = picture.cpu().numpy()
    return array


def brightness(rgb: Tensor) -> Tensor:
    """Return [height, width] of [height, width, 3]."""
    return rgb @ torch.from_numpy(LUMA).to(rgb.device)


# Filters that work along one side after the other.


@dataclass(frozen=True)
class _Taps:
    """The pixels of the source that make each pixel along one side of the result.

    places: [pixels, taps] of the source.
    weights: their shares, of the same shape.
    """

    places: Places
    weights: Float


def _filtered(picture: Tensor, across: _Taps | None, down: _Taps | None) -> Tensor:
    """Apply taps along rows, then along columns; None leaves that side as it is."""
    if across is not None:
        picture = _along(picture, 1, across, slice(None))
    if down is None:
        return picture
    height = len(down.places)
    result = picture.new_empty((height, *picture.shape[1:]))
    for rows in bands(height):
        result[rows] = _along(picture, 0, down, rows)
    return result


def _along(picture: Tensor, axis: int, taps: _Taps, pixels: slice) -> Tensor:
    places = torch.from_numpy(taps.places[pixels]).to(picture.device)
    weights = torch.from_numpy(taps.weights[pixels]).to(picture.device)
    shape = [-1 if side == axis else 1 for side in range(picture.ndim)]
    total = picture.index_select(axis, places[:, 0]) * weights[:, 0].reshape(shape)
    for tap in range(1, places.shape[1]):
        part = picture.index_select(axis, places[:, tap])
        total.addcmul_(part, weights[:, tap].reshape(shape))
    return total


def _with_border(places: Places, length: int, border: Border) -> Places:
    """Bring places outside of a side back into it."""
    if border == "edge":
        return places.clip(0, length - 1)
    if border == "mirrored":
        places = places % (2 * length)
        return np.minimum(places, 2 * length - 1 - places)
    if length == 1:
        return np.zeros_like(places)
    places = places % (2 * length - 2)
    return np.minimum(places, 2 * length - 2 - places)


# Pillow's kernels: wider where they shrink, normalised, and cut off at the edges of the picture.


@dataclass(frozen=True)
class Kernel:
    """One of Pillow's.

    reach: in pixels of the coarser picture.
    value: its height at distances from the middle.
    """

    name: Image.Resampling
    reach: float
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(x) < 3, np.asarray(np.sinc(x) * np.sinc(x / 3)), 0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.maximum(1 - np.abs(x), 0))


def _box(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


LANCZOS = Kernel(Image.Resampling.LANCZOS, 3, _lanczos)
BICUBIC = Kernel(Image.Resampling.BICUBIC, 2, _bicubic)
BILINEAR = Kernel(Image.Resampling.BILINEAR, 1, _triangle)
BOX = Kernel(Image.Resampling.BOX, 0.5, _box)


@picture_work
def resample_part(picture: Tensor, size: Size, box: Box, kernel: Kernel = LANCZOS) -> Tensor:
    """Resample a part of a picture; the kernel may read pixels outside that part.

    Args:
        picture: float32 [height, width] or [height, width, channels].
        size: width and height of the result in pixels.
        box: the part, in pixels of ``picture``.
        kernel: of Pillow.

    Returns:
        float32 [size[1], size[0], ...]; the kernel may overshoot.
    """
    if lies_on_host(picture):
        return torch.from_numpy(resample(picture.numpy(), size, box, kernel.name))
    height, width = picture.shape[:2]
    sides = (width, box[0], box[2], size[0]), (height, box[1], box[3], size[1])
    across, down = (
        None if (length, start, stop) == (pixels, 0, pixels) else _taps_of(kernel, *side)
        for side in sides
        for length, start, stop, pixels in [side]
    )
    resampled = _filtered(picture, across, down)
    return resampled.clone() if resampled is picture else resampled


@lru_cache(maxsize=8)
def _taps_of(kernel: Kernel, length: int, start: float, stop: float, pixels: int) -> _Taps:
    step = (stop - start) / pixels
    wider = max(step, 1.0)
    middles = start + (np.arange(pixels) + 0.5) * step
    first = np.maximum((middles - kernel.reach * wider + 0.5).astype(np.int64), 0)
    last = np.minimum((middles + kernel.reach * wider + 0.5).astype(np.int64), length)
    places = first[:, None] + np.arange((last - first).max())
    weights = kernel.value((places - middles[:, None] + 0.5) / wider)
    weights *= places < last[:, None]
    weights /= weights.sum(1, keepdims=True)
    return _Taps(places.clip(0, length - 1), weights.astype(np.float32))


@picture_work
def resample_box(picture: Tensor, size: Size, box: Box) -> Tensor:
    """Resample a part of a picture by Lanczos' kernel, cut to 0..1.

    Tiles use this: with ``LANCZOS_LOBES`` coarse pixels of context around the box, the
    result equals that part of the whole picture resampled at once.
    """
    return resample_part(picture, size, box).clamp_(0, 1)


@picture_work
def enlarge_lanczos(picture: Tensor, size: Size) -> Tensor:
    """Resample a whole picture to exactly this size, larger or smaller, cut to 0..1."""
    return resample_box(picture, size, (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0])))


# OpenCV's resizing: by areas where it shrinks, else between the middles of neighbours.


def resize_area(picture: Tensor, size: Size) -> Tensor:
    """Shrink by averaging areas, edges of which may lie within pixels."""
    return _resized(picture, size, cv2.INTER_AREA, _taps_of_areas)


def resize_linear(picture: Tensor, size: Size) -> Tensor:
    """Resize by mixing the two nearest pixels of each side."""
    return _resized(picture, size, cv2.INTER_LINEAR, _linear_taps)


def resize_cubic(picture: Tensor, size: Size) -> Tensor:
    """Resize by the four nearest pixels of each side."""
    return _resized(picture, size, cv2.INTER_CUBIC, _cubic_taps)


def _resized(picture: Tensor, size: Size, method: int, taps: Callable[[int, int], _Taps]) -> Tensor:
    if lies_on_host(picture):
        resized = cv2.resize(np.ascontiguousarray(picture.numpy()), size, interpolation=method)
        # OpenCV drops the last axis of a single channel.
        return torch.from_numpy(resized.reshape(size[1], size[0], *picture.shape[2:]))
    height, width = picture.shape[:2]
    across = None if width == size[0] else taps(width, size[0])
    return _filtered(picture, across, None if height == size[1] else taps(height, size[1]))


@lru_cache(maxsize=8)
def _taps_of_areas(length: int, pixels: int) -> _Taps:
    ends = np.arange(pixels + 1) * (length / pixels)
    first = np.floor(ends[:-1] + 1e-9).astype(np.int64)
    places = first[:, None] + np.arange(int(np.ceil(length / pixels)) + 1)
    covered = np.minimum(ends[1:, None], places + 1) - np.maximum(ends[:-1, None], places)
    weights = covered.clip(0)
    weights /= weights.sum(1, keepdims=True)
    return _Taps(places.clip(0, length - 1), weights.astype(np.float32))


def _between(length: int, pixels: int) -> tuple[Places, NDArray[np.float64]]:
    middles = (np.arange(pixels) + 0.5) * (length / pixels) - 0.5
    first = np.floor(middles).astype(np.int64)
    return first, middles - first


@lru_cache(maxsize=8)
def _linear_taps(length: int, pixels: int) -> _Taps:
    first, share = _between(length, pixels)
    places = _with_border(first[:, None] + np.arange(2), length, "edge")
    return _Taps(places, np.stack([1 - share, share], 1).astype(np.float32))


@lru_cache(maxsize=8)
def _cubic_taps(length: int, pixels: int) -> _Taps:
    first, share = _between(length, pixels)
    a = -0.75  # OpenCV's
    x = np.abs(share[:, None] - np.arange(-1, 3))
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    places = _with_border(first[:, None] + np.arange(-1, 3), length, "edge")
    return _Taps(places, np.where(x < 1, near, far).astype(np.float32))


# Neighbourhoods of every pixel.


def extend(
    picture: Tensor, rows: tuple[int, int], columns: tuple[int, int], border: Border
) -> Tensor:
    """Continue a picture beyond its edges; it comes back itself where nothing is wanted.

    Args:
        picture: [height, width] or [height, width, channels].
        rows: pixels above and below it.
        columns: pixels to its left and right.
        border: what is there.
    """
    for axis, (before, after) in enumerate((rows, columns)):
        if before or after:
            length = picture.shape[axis]
            places = _with_border(np.arange(-before, length + after), length, border)
            picture = picture.index_select(axis, torch.from_numpy(places).to(picture.device))
    return picture


def mean_around(picture: Tensor, side: int) -> Tensor:
    """Return the mean of the square of an odd side around each pixel."""
    if lies_on_host(picture):
        blurred = cv2.blur(np.ascontiguousarray(picture.numpy()), (side, side))
        return torch.from_numpy(blurred.reshape(picture.shape))
    reach = side // 2, side // 2
    around = extend(picture, reach, reach, "mirrored at the middle")
    return _means(around, side)


def _means(picture: Tensor, side: int) -> Tensor:
    """Return the means of all squares that lie wholly inside a picture."""
    planes = picture[None, None] if picture.ndim == 2 else picture.permute(2, 0, 1)[None]
    for kernel in ((1, side), (side, 1)):
        planes = functional.avg_pool2d(planes, kernel, stride=1)
    return planes[0, 0] if picture.ndim == 2 else planes[0].permute(1, 2, 0)


def tent(picture: Tensor, side: int) -> Tensor:
    """Convolve with a tent of half-width ``side``: two running means, edges continued.

    A mean over an even number of pixels lies half a pixel off its middle. One is taken half
    a pixel to the left and up, the other to the right and down, so the tent is symmetric.
    """
    if not lies_on_host(picture):
        reach = side - 1, side - 1
        around = extend(picture, reach, reach, "edge")
        return _means(_means(around, side), side)
    values = np.ascontiguousarray(picture.numpy())
    padded = cv2.copyMakeBorder(values, side, side, side, side, cv2.BORDER_REPLICATE)
    left, right = side // 2 - 1, side // 2
    once = cv2.blur(padded, (side, side), anchor=(left, left))
    twice = cv2.blur(once, (side, side), anchor=(right, right))
    return torch.from_numpy(twice[side:-side, side:-side]).reshape(picture.shape)


def gaussian(picture: Tensor, side: int | None = None, deviation: float = 0.0) -> Tensor:
    """Blur by a Gaussian of this side, or of this standard deviation, in pixels."""
    if lies_on_host(picture):
        values, sides = np.ascontiguousarray(picture.numpy()), (side or 0, side or 0)
        blurred = cv2.GaussianBlur(values, sides, deviation)
        return torch.from_numpy(blurred.reshape(picture.shape))
    side = side or round(deviation * 8 + 1) | 1  # OpenCV's, for floats
    weights = cv2.getGaussianKernel(side, deviation, cv2.CV_32F)[:, 0]
    across, down = (
        _Taps(
            _with_border(
                np.arange(length)[:, None] + np.arange(side) - side // 2,
                length,
                "mirrored at the middle",
            ),
            np.broadcast_to(weights, (length, side)).copy(),
        )
        for length in (picture.shape[1], picture.shape[0])
    )
    return _filtered(picture, across, down)


def largest_around(plane: Tensor, side: int) -> Tensor:
    """Return the largest value of the square of an odd side around each pixel of a plane."""
    if lies_on_host(plane):
        return torch.from_numpy(cv2.dilate(plane.numpy(), np.ones((side, side), np.uint8)))
    found, reach = plane[None, None], side // 2
    for kernel, padding in (((1, side), (0, reach)), ((side, 1), (reach, 0))):
        found = functional.max_pool2d(found, kernel, stride=1, padding=padding)
    return found[0, 0]


# Alpha.

# Alpha that differs by this much between neighbours is an outline; a shadow falls off slower.
_OUTLINE = 0.4
_NEAR_OUTLINE, _BESIDE_OUTLINE = 7, 5  # sides in pixels: whole, and faded out

# An enlarged outline is blurred by this share of the scale, which rounds the stairs of the
# source's pixels, and then made steeper by this factor times the scale around one half,
# which brings it back to a width of about one pixel.
_ROUNDING = 0.45
_STEEPNESS = 1.5


@picture_work
def enlarge_alpha(alpha: Tensor, width: int, height: int) -> Tensor:
    """Scale alpha [height, width]; a cut-out of only 0 and 1 keeps edges about one pixel wide.

    Its outline is rounded a little, so that source pixels do not show as stairs; a
    single opaque pixel still survives.

    Returns:
        float32 [height, width] in 0..1.
    """
    scale = min(width / alpha.shape[1], height / alpha.shape[0])
    scaled = enlarge_lanczos(alpha, (width, height))
    if scale > 1 and _is_cut_out(alpha):
        scaled = gaussian(scaled, deviation=_ROUNDING * scale)
        scaled.sub_(0.5).mul_(_STEEPNESS * scale).add_(0.5)
    return scaled.clamp_(0, 1)


@picture_work
def outlines(alpha: Tensor) -> Tensor | None:
    """Return where alpha has outlines that a net should enlarge, as an icon's.

    Shadows and glows fall off too slowly to count. Of a cut-out of only 0 and 1 a net would
    keep the stairs; ``enlarge_alpha`` rounds them.

    Args:
        alpha: float32 [height, width], 0..1.

    Returns:
        float32 [height, width] in 0..1, 1 on outlines and fading beside them; None if there are
        none.
    """
    if _is_cut_out(alpha):
        return None
    hard = (largest_around(alpha, 3) + largest_around(-alpha, 3) > _OUTLINE).float()
    if not bool(hard.any()):
        return None
    return mean_around(largest_around(hard, _NEAR_OUTLINE), _BESIDE_OUTLINE)


def _is_cut_out(alpha: Tensor) -> bool:
    """Tell whether alpha is 0 or 1 everywhere."""
    return bool((torch.minimum(alpha, 1 - alpha) < SPECK).all())


# Small pictures over a large one.


@dataclass(frozen=True, eq=False)
class Patch:
    """A small picture that is laid over a large one.

    x, y: of its first pixel in the large picture.
    pixels: float32 [height, width, 3], wholly inside the large picture.
    weight: float32 [height, width] in 0..1; 0 leaves the large picture.
    """

    x: int
    y: int
    pixels: Float
    weight: Float


@picture_work
def paste(picture: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return a picture with patches over it, later ones above earlier ones.

    Args:
        picture: float32 [height, width, 3]; comes back itself when there are no patches.
        patches: what to lay over it.
    """
    if not patches:
        return picture
    result = picture.clone()
    for patch in patches:
        height, width = patch.weight.shape
        below = result[patch.y : patch.y + height, patch.x : patch.x + width]
        pixels, weight = (on_device(each, picture.device) for each in (patch.pixels, patch.weight))
        below.lerp_(pixels, weight[..., None])
    return result
