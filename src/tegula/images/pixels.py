"""Pixels: conversion, resampling, wrapped patterns and transparency.

Everywhere in tegula a picture is a float32 array [height, width, 3] in 0..1, sRGB, and its
transparency a second array [height, width]. Bytes and Pillow images are made at the ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Float = NDArray[np.float32]

Size = tuple[int, int]
"""Width and height in pixels."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels, not necessarily whole."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (ITU-R BT.601), as Pillow takes them."""

OVERSHOOT = 0.5
"""Floats of a source beyond 0..1 by more than this are in another range, such as -1..1 or 0..255;
less is the overshoot of a resampling kernel, and is cut off."""

_ROUNDED_OFF = 1 / 255
"""Floats beyond 0..1 by less than this, a step of eight bits, are taken for rounding."""

_ROWS_PER_BAND = 1024


def bands(height: int) -> Iterator[slice]:
    """Yield slices of rows to work through, so that no temporary is as large as a picture."""
    for top in range(0, height, _ROWS_PER_BAND):
        yield slice(top, min(height, top + _ROWS_PER_BAND))


def float_remarks(values: NDArray[Any]) -> tuple[str, ...]:
    """Return sentences on floats of a source that are NaN, or are cut off to 0..1.

    Args:
        values: floats [height, width] or [height, width, channels], as the source has them.
    """
    remarks = []
    unknown = np.isnan(values)
    count = int(np.count_nonzero(unknown.any(axis=2) if values.ndim == 3 else unknown))
    if count:
        holders = "1 pixel" if count == 1 else f"{count:,} pixels"
        verb = "holds" if count == 1 else "hold"
        remarks.append(f"{holders} of the source {verb} NaN, not a number, which is read as black.")
    # These two pass over NaN.
    low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
    if low < -_ROUNDED_OFF or high > 1 + _ROUNDED_OFF:
        remarks.append(
            f"The source holds floats from {low:g} to {high:g}; what is beyond 0 to 1 is cut off."
        )
    return tuple(remarks)


def to_bytes(values: Float) -> NDArray[np.uint8]:
    """Round 0..1 to 0..255; values outside are clipped."""
    out = np.empty(values.shape, np.uint8)
    for rows in bands(values.shape[0]):
        band = np.clip(values[rows], 0, 1)
        band *= 255
        np.rint(band, out=band)
        out[rows] = band
    return out


def to_image(rgb: Float, alpha: Float | None = None) -> Image.Image:
    """Make a Pillow image, RGB or RGBA, of float32 [height, width, 3] in 0..1."""
    image = Image.fromarray(to_bytes(rgb))
    if alpha is not None:
        image.putalpha(Image.fromarray(to_bytes(alpha)))
    return image


# Resampling by Lanczos' windowed sinc.
#
# Pillow's, because it widens the kernel when it shrinks, takes a box with fractions and
# reads beyond that box. It does so for floats in images of one channel only.

LANCZOS_LOBES = 3
"""Samples that the kernel reaches to each side, in pixels of the coarser picture."""


def resample(values: Float, size: Size, box: Box, kernel: Image.Resampling) -> Float:
    """Resample a part of float32 [height, width] or [height, width, channels].

    The kernel may read pixels outside that part, and overshoot.
    """
    if values.ndim == 2:
        plane = Image.fromarray(np.ascontiguousarray(values))
        return np.array(plane.resize(size, kernel, box=box))
    result: Float = np.empty((size[1], size[0], values.shape[2]), np.float32)
    for channel in range(values.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(values[..., channel]))
        result[..., channel] = np.asarray(plane.resize(size, kernel, box=box))
    return result


# Patterns whose opposite edges meet: wrapped around before the work, joined after it.

_MARGIN = 1 / 8


def margins(width: int, height: int) -> Size:
    """Return how many pixels to repeat beyond each side of a pattern, across and down."""
    return max(1, round(width * _MARGIN)), max(1, round(height * _MARGIN))


def wrapped(image: Image.Image, across: int, down: int) -> Image.Image:
    """Repeat a pattern beyond its edges, by pixels to each side and above and below."""
    pixels = np.asarray(image)
    padding = ((down, down), (across, across), (0, 0))[: pixels.ndim]
    return Image.fromarray(np.pad(pixels, padding, mode="wrap"))


def unwrapped(image: Image.Image, across: int, down: int) -> Image.Image:
    """Cut the repeated margins off, faded into the edges that they repeat.

    Beyond its right edge the wide picture continues as the pattern begins on the left.
    Where both are mixed half and half at the edge, each side is as likely the one as the
    other, and so the two edges meet.
    """
    pixels: Float = np.asarray(image).astype(np.float32)
    pixels = _joined(_joined(pixels, down).swapaxes(0, 1), across).swapaxes(0, 1)
    return Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))


def _joined(pixels: Float, margin: int) -> Float:
    """Join along the first axis: half of each margin fades into the edge it repeats."""
    inner: Float = pixels[margin:-margin].copy()
    reach = min(margin, len(inner) // 2)
    rise = (np.arange(reach, dtype=np.float32) + 0.5) / reach / 2
    rise = rise.reshape(-1, *[1] * (pixels.ndim - 1))
    after_end = pixels[len(pixels) - margin : len(pixels) - margin + reach]
    before_start = pixels[margin - reach : margin]
    inner[:reach] = inner[:reach] * (0.5 + rise) + after_end * (0.5 - rise)
    inner[-reach:] = inner[-reach:] * (1 - rise) + before_start * rise
    return inner


# Transparency: no hidden colour may bleed, no edge may blur.

# Alpha from which a colour counts in full. Below it the eight bits of a colour that was
# multiplied by alpha leave too few tones to be believed, so its surroundings count more.
TRUSTED = 1 / 16

SPECK = 0.5 / 255
"""Alpha nearer than this to 0 or 1 is one of them: half a step of eight bits."""

_NOT_ZERO = np.float32(1e-6)


# Neighbours of which one is hidden and one visible differ by no more than this times what
# visible ones do, where the picture goes on under transparency.
_CONTINUES = 1.5

# Hidden neighbours differ by this share of what visible ones do, where there is structure.
_STRUCTURED = 0.25

_STEP = 1 / 255
_FEWEST_PAIRS = 64


def goes_on_hidden(rgb: Float, alpha: Float) -> bool:
    """Tell whether the picture goes on under full transparency, as textures of games do.

    There alpha is a mask of something else, and what it hides is wanted. In a cut-out what is
    hidden is flat, or ends where the visible part begins. Pairs of neighbours say which: those
    of two hidden pixels must have structure, and those across the edge no more than others.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        alpha: float32 [height, width], 0..1.
    """
    hidden = alpha < SPECK
    if not hidden.any():
        return False
    sums, counts = np.zeros(3), np.zeros(3)  # by how many of a pair are hidden
    for rows in bands(rgb.shape[0]):
        pixels, under = rgb[rows], hidden[rows].astype(np.uint8)
        for one, other in (
            (np.s_[:, 1:], np.s_[:, :-1]),
            (np.s_[1:], np.s_[:-1]),
        ):
            difference = np.abs(pixels[one] - pixels[other]).max(axis=2).ravel()
            kind = (under[one] + under[other]).ravel()
            sums += np.bincount(kind, difference, minlength=3)
            counts += np.bincount(kind, minlength=3)
    if counts.min() < _FEWEST_PAIRS:
        return False
    visible, across, beneath = sums / counts
    has_structure = beneath > max(2 * _STEP, _STRUCTURED * visible)
    return bool(has_structure and across < _CONTINUES * visible + _STEP)


def fill_hidden(rgb: Float, alpha: Float, trusted: float = TRUSTED) -> Float:
    """Give transparent pixels the colour of the visible ones around them.

    What lies under full transparency is arbitrary, often black, and every enlargement
    mixes neighbours: that is where dark fringes come from. Colours are averaged over ever
    larger cells, weighted by visibility, and the finest visible one fills the hole
    (push-pull, after Gortler et al., "The Lumigraph", 1996).

    Args:
        rgb: float32 [height, width, 3], 0..1, not multiplied by alpha.
        alpha: float32 [height, width], 0..1.
        trusted: alpha from which a colour counts in full.

    Returns:
        float32 [height, width, 3]; the same array when nothing is hidden, or everything.
    """
    visible = np.minimum(alpha * np.float32(1 / trusted), 1)
    if visible.min() >= 1 or visible.max() <= 0:
        return rgb
    return _pushed_and_pulled(rgb * visible[..., None], visible)


def _pushed_and_pulled(weighted: Float, weight: Float) -> Float:
    """Fill where the weight is below one from a picture of half the size, filled likewise.

    Args:
        weighted: float32 [height, width, 3], colours multiplied by their weight.
        weight: float32 [height, width] in 0..1.
    """
    height, width = weight.shape
    colour = np.asarray(weighted / np.maximum(weight, _NOT_ZERO)[..., None])
    if weight.min() >= 1 or (height == 1 and width == 1):
        return colour
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse_weight = np.asarray(cv2.resize(weight, half, interpolation=cv2.INTER_AREA))
    coarse_colour = np.asarray(cv2.resize(weighted, half, interpolation=cv2.INTER_AREA))
    # One visible pixel of the four in a cell is enough for the cell to be visible. The
    # colours are multiplied by the weight, so they grow by the same share.
    amplified = np.minimum(coarse_weight * 4, 1)
    share = amplified / np.maximum(coarse_weight, _NOT_ZERO)
    # OpenCV drops the last axis of a picture one pixel wide, and reshape restores it.
    coarse_colour = coarse_colour.reshape(half[1], half[0], 3) * share[..., None]
    filled = _pushed_and_pulled(coarse_colour, amplified)
    around = cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)
    around = around.reshape(height, width, 3)
    colour -= around
    colour *= weight[..., None]
    colour += around
    return colour
