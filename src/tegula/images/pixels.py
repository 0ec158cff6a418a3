"""Pixels: arrays, resampling, alpha and patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Between Pillow's many modes and the two arrays that tegula works on.

Float = NDArray[np.float32]
_BAND = 1024
_EIGHT_BIT = 255
_SIXTEEN_BIT = 65_535
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY_MODES = ("1", "L", "LA", "La", "F")


def to_bytes(values: Float) -> NDArray[np.uint8]:
    """Round 0..1 to 0..255 in bands of rows, so that no large temporary is made."""
    out = np.empty(values.shape, np.uint8)
    for top in range(0, values.shape[0], _BAND):
        band = np.clip(values[top : top + _BAND], 0, 1)
        band *= 255
        np.rint(band, out=band)
        out[top : top + _BAND] = band
    return out


def to_image(rgb: Float, alpha: Float | None = None) -> Image.Image:
    """Make a Pillow image, RGB or RGBA, of float32 [height, width, 3] in 0..1."""
    image = Image.fromarray(to_bytes(rgb))
    if alpha is not None:
        image.putalpha(Image.fromarray(to_bytes(alpha)))
    return image


def to_floats(values: NDArray[np.generic], white: float) -> Float:
    """Scale numbers of any type so that ``white`` becomes 1; clip to 0..1, NaN to 0."""
    out: Float = np.asarray(values, np.float32) * np.float32(1 / white)
    if np.issubdtype(values.dtype, np.floating):
        np.nan_to_num(out, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    np.clip(out, 0, 1, out=out)
    return out


def as_rgb(grey: Float) -> Float:
    """Repeat one channel three times."""
    return np.repeat(grey[..., None], 3, axis=2)


def is_grey(image: Image.Image) -> bool:
    """Whether the mode, or every colour of the palette, has no colour."""
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY_MODES or image.mode.startswith("I")


def split(image: Image.Image, sample_bits: int | None = None) -> tuple[Float, Float | None]:
    """Return the pixels of a loaded image and its alpha.

    Args:
        image: any mode but CMYK and LAB, which need colour management first.
        sample_bits: bits of a sample in the file where it differs from the mode's.

    Returns:
        float32 [height, width, 3] and, when the image has transparency, float32
        [height, width]; both 0..1.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _split_deep(image)
    transparent = image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(transparent, int):
        return _split_keyed(image, transparent, sample_bits)
    if image.mode in _ALPHA_MODES or transparent is not None:
        straight = image.convert("LA") if image.mode == "La" else image
        pixels = np.asarray(straight.convert("RGBA"))
        return to_floats(pixels[..., :3], _EIGHT_BIT), to_floats(pixels[..., 3], _EIGHT_BIT)
    return to_floats(np.asarray(image.convert("RGB")), _EIGHT_BIT), None


def _split_deep(image: Image.Image) -> tuple[Float, Float | None]:
    values = np.asarray(image)
    if image.mode == "F":
        return as_rgb(to_floats(values, 1)), None
    deeper = image.mode == "I" and values.max(initial=0) > _SIXTEEN_BIT
    rgb = as_rgb(to_floats(values, 2**31 - 1 if deeper else _SIXTEEN_BIT))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        return rgb, (values != transparent).astype(np.float32)
    return rgb, None


def _split_keyed(
    image: Image.Image, transparent: int, sample_bits: int | None
) -> tuple[Float, Float | None]:
    values = np.asarray(image.convert("L"))
    largest = (1 << (sample_bits or 8)) - 1
    key = min(transparent, largest) * 255 // largest
    return as_rgb(to_floats(values, _EIGHT_BIT)), (values != key).astype(np.float32)


# Resampling of float pictures by Lanczos' windowed sinc.

Array = NDArray[np.float32]
Box = tuple[float, float, float, float]

LANCZOS_LOBES = 3
"""Samples that the kernel reaches to each side, in pixels of the coarser picture."""


def enlarge_lanczos(rgb: Array, size: tuple[int, int]) -> Array:
    """Resample a picture to exactly this size, larger or smaller.

    Args:
        rgb: float32 [height, width, channels] in 0..1.
        size: width and height of the result in pixels, at least 1.

    Returns:
        float32 [size[1], size[0], channels] in 0..1; overshoot of the kernel is cut off.
        A picture that has the size already is returned as a copy.
    """
    return resample_box(rgb, size, (0.0, 0.0, float(rgb.shape[1]), float(rgb.shape[0])))


def resample_box(rgb: Array, size: tuple[int, int], box: Box) -> Array:
    """Resample a part of a picture; the kernel may read pixels outside that part.

    Tiles use this: with ``LANCZOS_LOBES`` coarse pixels of context around the box, the
    result equals that part of the whole picture resampled at once.

    Args:
        rgb: float32 [height, width, channels] in 0..1.
        size: width and height of the result in pixels.
        box: left, top, right and bottom of the part, in pixels of ``rgb``, not
            necessarily whole.

    Returns:
        float32 [size[1], size[0], channels] in 0..1.
    """
    result: Array = np.empty((size[1], size[0], rgb.shape[2]), np.float32)
    for channel in range(rgb.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(rgb[..., channel]))
        result[..., channel] = np.asarray(plane.resize(size, Image.Resampling.LANCZOS, box=box))
    return np.clip(result, 0.0, 1.0, out=result)


# Small pictures that are laid over a large one.


@dataclass(frozen=True, eq=False)
class Patch:
    """A piece of a picture.

    x, y: of its first pixel in the large picture.
    pixels: float32 [height, width, 3], wholly inside the large picture.
    weight: float32 [height, width] in 0..1; 0 leaves the large picture.
    """

    x: int
    y: int
    pixels: Float
    weight: Float


def paste(picture: Float, patches: Sequence[Patch]) -> Float:
    """Return a picture with patches over it, later ones above earlier ones.

    Args:
        picture: float32 [height, width, 3]; comes back itself when there are no patches.
        patches: what to lay over it.
    """
    if not patches:
        return picture
    result: Float = picture.copy()
    for patch in patches:
        height, width = patch.weight.shape
        below = result[patch.y : patch.y + height, patch.x : patch.x + width]
        below += (patch.pixels - below) * patch.weight[..., None]
    return result


# Transparency beside the picture: no hidden colour may bleed, no edge may blur.

_TRUSTED = 1 / 16
_SPECK = 0.5 / 255
_ROUNDING = 0.45
_STEEPNESS = 1.5


def fill_hidden(rgb: Float, alpha: Float) -> Float:
    """Give transparent pixels the colour of the visible ones around them.

    What lies under full transparency is arbitrary, often black, and every enlargement
    mixes neighbours: that is where dark fringes come from. Colours are averaged over ever
    larger cells, weighted by visibility, and the finest visible one fills the hole
    (push-pull, after Gortler et al., "The Lumigraph", 1996).

    Args:
        rgb: float32 [height, width, 3], 0..1, not multiplied by alpha.
        alpha: float32 [height, width], 0..1.

    Returns:
        float32 [height, width, 3]; the same array when nothing is hidden, or everything.
    """
    visible = np.minimum(alpha * np.float32(1 / _TRUSTED), 1)
    if visible.min() >= 1 or visible.max() <= 0:
        return rgb
    return _pushed_and_pulled(rgb * visible[..., None], visible)


def enlarge_alpha(alpha: Float, width: int, height: int) -> Float:
    """Scale alpha to a size; a cut-out of only 0 and 1 keeps edges about one pixel wide.

    Its outline is rounded a little, so that source pixels do not show as stairs; a
    single opaque pixel still survives.

    Returns:
        float32 [height, width], 0..1.
    """
    scale = min(width / alpha.shape[1], height / alpha.shape[0])
    scaled = enlarge_lanczos(alpha[..., None], (width, height))[..., 0]
    if scale > 1 and _is_cut_out(alpha):
        scaled = cv2.GaussianBlur(scaled, (0, 0), _ROUNDING * scale)
        scaled = (scaled - np.float32(0.5)) * np.float32(_STEEPNESS * scale) + np.float32(0.5)
    np.clip(scaled, 0, 1, out=scaled)
    return scaled


def _is_cut_out(alpha: Float) -> bool:
    return bool((np.minimum(alpha, 1 - alpha) < _SPECK).all())


def _pushed_and_pulled(weighted: Float, weight: Float) -> Float:
    """Fill where the weight is below one from the next coarser level."""
    height, width = weight.shape
    colour = np.asarray(weighted / np.maximum(weight, np.float32(1e-6))[..., None])
    if weight.min() >= 1 or (height == 1 and width == 1):
        return colour
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse_weight = np.asarray(cv2.resize(weight, half, interpolation=cv2.INTER_AREA))
    coarse_colour = np.asarray(cv2.resize(weighted, half, interpolation=cv2.INTER_AREA))
    amplified = np.minimum(coarse_weight * 4, 1)
    share = amplified / np.maximum(coarse_weight, np.float32(1e-6))
    filled = _pushed_and_pulled(
        coarse_colour.reshape(half[1], half[0], 3) * share[..., None], amplified
    )
    around = cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)
    around = around.reshape(height, width, 3)
    colour -= around
    colour *= weight[..., None]
    colour += around
    return colour
