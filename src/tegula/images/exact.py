"""Shrinking a result again: how far it then is from its source, and holding it to that.

To shrink is to average areas: each pixel of the source is the mean of what became of it. A
result that shrinks to its source has invented no tone of any place; all that was added is how
a pixel's tone is spread within the pixel.

A result is brought there by back-projection (Irani and Peleg, "Improving Resolution by Image
Registration", 1991): what is missing in the small picture is enlarged and added to the large
one, again and again. The first rounds add it smoothly, so that no pixel of the source shows as a
square. They end short of the goal where a tone is at the end of its range; the rounds after
them move each pixel by a share of the room that it has left, which never leaves the range and
is exact at once where the factor is whole. At other factors neighbours share pixels of the
result, and where black meets white no pixel in the range can serve both: there is no exact
result then, and the rounds end near the best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tegula.images.pixels import Float, Size

_STRIP = 32
"""Rows of the source whose part of the result is worked on at once."""

_SMOOTH_ROUNDS, _ROUNDS = 3, 12
_NEAR = 0.1 / 255
"""Nearer than this at the worst pixel, nothing is gained by another round; bytes round by more."""
_NOT_ZERO = np.float32(1e-6)

PROMISED_MEAN, PROMISED_WORST = 1.0, 4.0
"""Levels of 255: how far an exact result may be from its source when it is shrunk again."""


@dataclass(frozen=True)
class Consistency:
    """How far a result, shrunk again, is from its source, in levels of 255.

    mean: over all pixels and channels, premultiplied where there is alpha, which counts too.
    worst: of the worst of them.
    """

    mean: float
    worst: float

    @property
    def is_exact(self) -> bool:
        """Whether it is as near as an exact result is promised to be."""
        return self.mean <= PROMISED_MEAN and self.worst <= PROMISED_WORST


def is_enlarged(size: Size, source: Size) -> bool:
    """Tell whether a result is as large as its source on both sides, so that it can be shrunk."""
    return size[0] >= source[0] and size[1] >= source[1]


def shrink(picture: NDArray[Any], size: Size, *, premultiply: bool = False) -> Float:
    """Shrink by averaging areas, edges of which may lie within pixels.

    Args:
        picture: [height, width, channels], floats in 0..1 or unsigned integers of their full range.
        size: width and height of the result, no larger than those of the picture.
        premultiply: multiplies the channels by the last of them, which is alpha.

    Returns:
        float32 [size[1], size[0], channels] in 0..1.
    """
    whole = 1.0 if picture.dtype.kind == "f" else float(np.iinfo(picture.dtype).max)
    width, height = size
    out: Float = np.empty((height, width, picture.shape[2]), np.float32)
    for small, large in _strips(height, picture.shape[0]):
        strip = np.asarray(picture[large], np.float32)
        strip = strip if whole == 1 else strip / np.float32(whole)
        if premultiply:
            strip = np.dstack([strip[..., :-1] * strip[..., -1:], strip[..., -1]])
        across = cv2.resize(strip, (width, strip.shape[0]), interpolation=cv2.INTER_AREA)
        weights = _overlaps(small, large, picture.shape[0] / height)
        out[small] = np.tensordot(weights, across.reshape(len(strip), width, -1), 1)
    return out


def consistency(picture: NDArray[Any], source: Float, alpha: Float | None = None) -> Consistency:
    """Compare a result, shrunk again, with its source.

    Args:
        picture: uint8 or uint16 [height, width, channels], the last of them alpha where
            ``alpha`` is given.
        source: float32 [height, width, channels] in 0..1, no larger, without alpha.
        alpha: of the source, float32 [height, width].
    """
    size = source.shape[1], source.shape[0]
    if alpha is not None:
        source = np.dstack([source * alpha[..., None], alpha])
    off = np.abs(shrink(picture, size, premultiply=alpha is not None) - source)
    return Consistency(255 * float(off.mean(dtype=np.float64)), 255 * float(off.max()))


def hold_to_source(
    picture: Float, source: Float, ceiling: Float | None = None, *, rounds: int = _ROUNDS
) -> None:
    """Change a picture, as little as it takes, so that it shrinks to its source.

    Args:
        picture: float32 [height, width, channels] in 0..1, changed in place.
        source: float32 [height, width, channels] in 0..1, no larger on either side.
        ceiling: float32 [height, width, 1], the most that each pixel may be; 1 everywhere if
            None. Of premultiplied pictures it is alpha.
        rounds: at most; fewer leave more where the factor is not whole.
    """
    width, height = source.shape[1], source.shape[0]
    most: Float | np.float32 = np.float32(1)
    if ceiling is not None:
        most = shrink(ceiling, (width, height))
    strips = list(_strips(height, picture.shape[0]))
    for number in range(rounds):
        mean = shrink(picture, (width, height))
        missing = source - mean
        if np.abs(missing).max() <= _NEAR:
            return
        # Shares of what is below each pixel and of what is above it.
        lower = np.where(missing < 0, -missing / np.maximum(mean, _NOT_ZERO), 0)
        raise_by = np.where(missing > 0, missing / np.maximum(most - mean, _NOT_ZERO), 0)
        for small, _ in strips:
            first, last = (
                round(edge * picture.shape[0] / height) for edge in (small.start, small.stop)
            )
            rows = slice(first, last)
            part = picture[rows]
            top: Float | np.float32 = np.float32(1) if ceiling is None else ceiling[rows]
            if number < _SMOOTH_ROUNDS:
                part += _enlarged(missing, picture, rows, Image.Resampling.BICUBIC)
            else:
                part -= part * _enlarged(lower, picture, rows, Image.Resampling.BOX)
                part += (top - part) * _enlarged(raise_by, picture, rows, Image.Resampling.BOX)
            np.clip(part, 0, top, out=part)


def _enlarged(small: Float, like: Float, rows: slice, kernel: Image.Resampling) -> Float:
    """Enlarge a small picture to the size of another, of which some rows are wanted."""
    height, width = like.shape[:2]
    step = small.shape[0] / height
    box = (0.0, rows.start * step, float(small.shape[1]), rows.stop * step)
    size = width, rows.stop - rows.start
    planes = (
        Image.fromarray(np.ascontiguousarray(c, np.float32)) for c in np.moveaxis(small, 2, 0)
    )
    return np.dstack([np.asarray(plane.resize(size, kernel, box=box)) for plane in planes])


def _strips(height: int, larger: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows of a source, and the rows of the result that they cover, the last in part."""
    for top in range(0, height, _STRIP):
        bottom = min(height, top + _STRIP)
        yield slice(top, bottom), slice(top * larger // height, -(-bottom * larger // height))


def _overlaps(small: slice, large: slice, factor: float) -> Float:
    """Return the weight of each row of the result in each row of the source."""
    first = np.arange(small.start, small.stop)[:, None] * factor
    row = np.arange(large.start, large.stop)[None]
    shared = np.minimum(first + factor, row + 1) - np.maximum(first, row)
    weights: Float = (shared.clip(0) / factor).astype(np.float32)
    return weights
