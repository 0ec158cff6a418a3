"""What JPEG compression does: its quality, by tables and by pixels, and undoing a little of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tegula.images.pixels import LUMA, Float, to_bytes

_BLOCK = 8

# Traces of JPEG in pixels.

_PLACES = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0), (2, 2))
"""Frequencies that photographs have enough of for steps to be seen at most qualities."""
_TRACED = tuple(range(5, 96))
"""Qualities with a step that shows: above them it is as small as the error of rounding."""
_FEWEST = 40
"""Coefficients off zero that a frequency needs before its step is believed."""
_EVIDENT = 0.55
"""Mean agreement of coefficients with the steps of a quality from which it counts as found."""


def trace_jpeg(luma: Float) -> int | None:
    """Return the quality at which a picture was compressed as JPEG, by its pixels alone.

    A decoded block has coefficients at whole multiples of the steps of its table, give or
    take what rounding to whole levels adds. The picture may have been cropped since, not
    resized: so the grid is found first, by the differences across its borders.

    Args:
        luma: float32 [height, width], 0..255.
    """
    if min(luma.shape) < 8 * _BLOCK:
        return None
    top, left = (_grid_of(np.abs(np.diff(luma, axis=axis)), axis) for axis in (0, 1))
    height, width = ((n - at) // _BLOCK for n, at in zip(luma.shape, (top, left), strict=True))
    cut = luma[top : top + height * _BLOCK, left : left + width * _BLOCK]
    blocks = cut.reshape(height, _BLOCK, width, _BLOCK).transpose(0, 2, 1, 3)
    basis = _cosines()
    agreements = []
    qualities = np.array(_TRACED)
    for down, across in _PLACES:
        found = np.einsum("yxij,i,j->yx", blocks, basis[down], basis[across], optimize=True)
        steps = quantisation_tables(qualities)[:, _BLOCK * down + across].astype(np.float32)
        agreements.append(_agreement(found.ravel(), steps))
    with np.errstate(invalid="ignore"):
        known = ~np.isnan(agreements)
        enough = known.sum(axis=0) >= 3
        score = np.where(
            enough, np.nansum(agreements, axis=0) / np.maximum(known.sum(axis=0), 1), 0
        )
    best = float(score.max(initial=0))
    if best < _EVIDENT:
        return None
    # A step that divides the true one agrees as well, so the coarsest that does is it.
    first = int(np.nonzero(score >= 0.92 * best)[0][0])
    return int(qualities[first + int(np.argmax(score[first : first + 3]))])


def _grid_of(differences: Float, axis: int) -> int:
    """Return where the first block begins along an axis, 0..7, by differences along it."""
    along = np.minimum(differences, 24).mean(axis=1 - axis)
    curved = along[1:-1] - (along[:-2] + along[2:]) / 2
    phases = [float(np.median(curved[phase::_BLOCK])) for phase in range(_BLOCK)]
    # curved[k] is of the difference between pixels k + 1 and k + 2.
    return (int(np.argmax(phases)) + 2) % _BLOCK


def _cosines() -> Float:
    """Return the orthonormal DCT of eight values."""
    k = np.arange(_BLOCK)
    rows = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / (2 * _BLOCK)) / 2
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


def _agreement(found: Float, steps: Float) -> Float:
    """Return how well coefficients lie at multiples of each step: 1 exactly, 0 anywhere.

    Those near zero agree with every step; NaN where too few are further off.
    """
    result = np.full(len(steps), np.nan, np.float32)
    for index, step in enumerate(steps):
        if index and step == steps[index - 1]:
            result[index] = result[index - 1]
            continue
        off_zero = found[np.abs(found) > step / 2]
        if len(off_zero) >= _FEWEST and step >= 2:
            result[index] = np.cos(2 * np.pi * off_zero / step).mean()
    return result


_MOST_CURVED = 8.0
"""Levels from which a bend is an edge, and counts no more than others."""
_BORDERS = 4.0
"""Standard errors, of both axes together; 85% of the photographs without compression stay below."""


def shows_blocks(luma: Float) -> bool:
    """Tell whether the borders of blocks show, however weakly, of any size that divides eight.

    So they do after JPEG of up to about 95, and after WebP, whose quality nothing else tells. It
    sees more than ``trace_jpeg`` does, and is wrong about one clean picture in seven.

    Args:
        luma: float32 [height, width], 0..255.
    """
    if min(luma.shape) < 4 * _BLOCK:
        return False
    errors = 0.0
    for axis in (0, 1):
        steps = np.diff(np.moveaxis(luma, axis, 0), axis=0)
        bends = np.abs(steps[1:-1] - (steps[:-2] + steps[2:]) / 2)
        lines = np.minimum(bends, _MOST_CURVED).mean(axis=1)
        phases = lines[: len(lines) - len(lines) % _BLOCK].reshape(-1, _BLOCK)
        most = int(phases.mean(axis=0).argmax())
        excess = phases[:, most] - np.delete(phases, most, axis=1).mean(axis=1)
        errors += float(excess.mean() / (excess.std() / len(excess) ** 0.5 + 1e-6))
    return errors > _BORDERS


# Undoing a little of what JPEG compression did.

_MARGIN = 2 * _BLOCK
# Eight of the 64 shifts, each row and each column of a block once and spread over both.
_SHIFTS = ((0, 0), (1, 4), (2, 2), (3, 6), (4, 1), (5, 5), (6, 3), (7, 7))


def soften_blocks(rgb: Float, quality: int) -> Float:
    """Reduce blocks and ringing by compressing shifted copies again and averaging.

    Re-application of JPEG (A. Nosratinia, "Enhancement of JPEG-compressed images by
    re-application of JPEG", 2001): each shifted copy has its block borders elsewhere, so
    that the mean keeps what all agree on. Half of the source is mixed in, which measured
    better than the mean alone at every quality.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        quality: 1..100, as estimated from the file.

    Returns:
        float32 of the same shape, 0..1.
    """
    height, width = rgb.shape[:2]
    # Above and left is room for the shifts; below and right are pixels that complete the
    # last blocks.
    border = ((_BLOCK, _MARGIN), (_BLOCK, _MARGIN), (0, 0))
    padded = np.pad(to_bytes(rgb), border, "symmetric")
    mean = np.zeros_like(rgb)
    for down, right in _SHIFTS:
        shifted = padded[_BLOCK - down :, _BLOCK - right :]
        shifted = np.ascontiguousarray(shifted[: height + _BLOCK, : width + _BLOCK])
        file = io.BytesIO()
        Image.fromarray(shifted).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            again = np.asarray(image.convert("RGB"), np.float32)
        mean += again[down : down + height, right : right + width]
    mean *= np.float32(0.5 / (255 * len(_SHIFTS)))
    mean += 0.5 * rgb
    return mean


_CHROMA_STEP = 18
"""Step of the lowest frequencies of colour at quality 50, in the tables of the JPEG library."""
_COARSE = 20
"""Quality below which blocks are mended from further away.

By the squared error of colour, on thirteen photographs: a reach of 2 leaves 0.87 to 0.89 of it at
qualities 20 to 70, and a reach of 4 leaves 0.84 at 10 and all of it at 50."""


def smooth_chroma(rgb: Float, quality: int) -> Float:
    """Spread colour evenly between edges of brightness, where JPEG left it in blocks.

    Compression keeps brightness several times finer than colour, of which low qualities keep
    one value for a block of sixteen pixels. So each difference of colour becomes, around
    every place, the straight function of brightness that fits it best (K. He, J. Sun and
    X. Tang, "Guided image filtering", 2013); contrasts of brightness that are small beside the
    steps of the compression count for less. Brightness stays as it is.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        quality: 1..100.

    Returns:
        float32 of the same shape, 0..1.
    """
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    least = np.float32((_CHROMA_STEP * percent / 100 / 255 / 16) ** 2)
    side = (9, 9) if quality < _COARSE else (5, 5)

    def mean(plane: Float) -> Float:
        return np.asarray(cv2.blur(plane, side, borderType=cv2.BORDER_REFLECT_101))

    luma = np.ascontiguousarray(rgb @ LUMA)
    tone = mean(luma)
    contrast = mean(np.square(luma)) - np.square(tone) + least
    red_blue = []
    for channel in (0, 2):
        colour = rgb[..., channel] - luma
        level = mean(colour)
        slope = (mean(luma * colour) - tone * level) / contrast
        red_blue.append(luma + mean(slope) * luma + mean(level - slope * tone))
    red, blue = red_blue
    green = (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
    return np.asarray(np.clip(np.stack([red, green, blue], axis=2), 0, 1), np.float32)


# The luminance table of the JPEG standard (ITU-T T.81, table K.1), row by row.
# fmt: off
_LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
])
# fmt: on


def estimate_quality(tables: Mapping[int, Sequence[int]] | None) -> int | None:
    """Return the quality, 1..100, whose standard luminance table is nearest to the file's.

    The scale is that of the Independent JPEG Group's library (``jpeg_quality_scaling``),
    and for files of that library and its kin the quality is exact. For cameras and editors
    with tables of their own it is the nearest in coarseness, compared by ratios.
    """
    table = np.asarray((tables or {}).get(0, ()))
    if table.shape != _LUMINANCE.shape:
        return None
    qualities = np.arange(1, 101)
    candidates = quantisation_tables(qualities)
    distance = np.abs(np.log(candidates) - np.log(np.maximum(table, 1))).sum(axis=1)
    return int(qualities[distance.argmin()])


def quantisation_tables(qualities: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Return the luminance tables [n, 64] of qualities 1..100, row by row."""
    percent = np.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    return np.asarray(np.clip((_LUMINANCE * percent[:, None] + 50) // 100, 1, 255))
