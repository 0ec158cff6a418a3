"""What can be told of a picture by looking at its pixels, before anything is done to it.

All is measured on at most ``_SEEN`` pixels, so that a look takes a few tenths of a second
whatever the size of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tegula.images.metadata import quantisation_tables
from tegula.images.pixels import Float

_SEEN = 1_500_000
"""Pixels: enough for every measure here, and few enough for all of them in a moment."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BLOCK = 8


@dataclass(frozen=True)
class Damage:
    """What compression and sensors left in a picture.

    jpeg_quality: 1..100 on the scale of the Independent JPEG Group's library, by the tables of a
        JPEG file or, where the pixels show a coarser compression before, by those; None
        where there is no trace of JPEG.
    noise: standard deviation a channel, in levels of 255.
    """

    jpeg_quality: int | None
    noise: float


def find_damage(rgb: Float, file_quality: int | None = None) -> Damage:
    """Measure the damage of a picture.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        file_quality: what the quantisation tables of its file say; None unless JPEG.
    """
    levels = _middle(rgb) * np.float32(255)
    traced = trace_jpeg(levels @ _LUMA)
    found = [quality for quality in (file_quality, traced) if quality is not None]
    return Damage(min(found, default=None), measure_noise(levels))


def _middle(rgb: Float) -> Float:
    """Return the middle of a picture, cut where blocks of JPEG have their corners."""
    height, width = rgb.shape[:2]
    share = min(1.0, (_SEEN / (height * width)) ** 0.5)
    rows, columns = (max(1, round(side * share)) for side in (height, width))
    top, left = ((whole - part) // 2 for whole, part in ((height, rows), (width, columns)))
    top, left = top - top % _BLOCK, left - left % _BLOCK
    return rgb[top : top + rows, left : left + columns]


# Noise.

_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6
"""The difference of two Laplacians, which sees no plane and no edge along an axis; of white
noise it keeps the deviation (J. Immerkaer, "Fast noise variance estimation", 1996)."""

_CALM = 0.1
"""Share of the blocks, the calmest, that noise is measured in: texture is noise to the kernel."""
_BLACK = 16
"""Levels from black and from white within which noise is cut off."""
_FEWEST_BLOCKS = 16
_CALMEST_OF_NOISE = 0.8
"""What the deviation at that place in the order is of the true one, by seeded noise."""


def measure_noise(levels: Float) -> float:
    """Return the standard deviation of the noise of a channel, in the unit of the picture.

    Blocks that are one colour throughout say nothing, as do those that are cut off at black
    or white.

    Args:
        levels: float32 [height, width, channels], 0..255.
    """
    if min(levels.shape[:2]) < 4 * _BLOCK:
        return 0.0
    fine = _calm_energy(levels)
    half = levels.shape[1] // 2, levels.shape[0] // 2
    coarse = _calm_energy(cv2.resize(levels, half, interpolation=cv2.INTER_AREA))
    # At half size a quarter of the energy of noise is left, and about all that of texture.
    return float(np.sqrt(max(0.0, fine - coarse) * 4 / 3)) / _CALMEST_OF_NOISE


def _calm_energy(levels: Float) -> float:
    """Return the energy of what the kernel sees in the calm blocks of a picture."""
    height, width = (side - side % _BLOCK for side in levels.shape[:2])
    cut = np.ascontiguousarray(levels[:height, :width])
    response = np.square(cv2.filter2D(cut, -1, _KERNEL, borderType=cv2.BORDER_REFLECT_101))
    shape = (height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK, levels.shape[2])
    energy = response.reshape(shape).mean(axis=(1, 3))
    tone = cut.reshape(shape).mean(axis=(1, 3))
    counts = (energy > 0) & (tone > _BLACK) & (tone < 255 - _BLACK)
    return float(np.quantile(energy[counts], _CALM)) if counts.sum() >= _FEWEST_BLOCKS else 0.0


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
