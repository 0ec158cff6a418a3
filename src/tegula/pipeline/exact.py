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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tegula.images.pixels import Size
from tegula.pipeline.pictures import (
    BICUBIC,
    BOX,
    Kernel,
    lies_on_host,
    picture_work,
    resample_part,
    resize_area,
)

_STRIP = 32
"""Rows of the source whose part of the result is worked on at once."""

_SMOOTH_ROUNDS, _ROUNDS = 3, 12
_NEAR = 0.1 / 255
"""Nearer than this at the worst pixel, nothing is gained by another round; bytes round by more."""
_NOT_ZERO = 1e-6
_WHOLE = {torch.uint8: 255.0, torch.uint16: 65535.0}

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


def shrink(picture: Tensor, size: Size, alpha: Tensor | None = None) -> Tensor:
    """Shrink by averaging areas, edges of which may lie within pixels.

    Args:
        picture: [height, width, channels], floats in 0..1, or uint8 or uint16 of their full range.
        size: width and height of the result, no larger than those of the picture.
        alpha: [height, width, 1] of the same type, by which the channels are multiplied; it
            becomes one channel more.

    Returns:
        float32 [size[1], size[0], channels] in 0..1.
    """

    def floats(rows: slice) -> Tensor:
        strip = _as_floats(picture[rows])
        if alpha is None:
            return strip
        share = _as_floats(alpha[rows])
        return torch.cat([strip * share, share], 2)

    return average_areas(floats, picture.shape[0], size)


def average_areas(part: Callable[[slice], Tensor], larger: int, size: Size) -> Tensor:
    """Shrink a picture that is made in strips, by averaging areas.

    Args:
        part: returns some of its rows, float32 [rows, width, channels].
        larger: rows of the whole picture.
        size: width and height of the result, no larger than those of the picture.
    """
    width, height = size
    parts = []
    for small, large in _strips(height, larger):
        strip = part(large)
        across = resize_area(strip, (width, len(strip)))
        weights = _overlaps(small, large, larger / height).to(strip.device)
        parts.append((weights @ across.reshape(len(strip), -1)).reshape(-1, *across.shape[1:]))
    return torch.cat(parts)


def _as_floats(samples: Tensor) -> Tensor:
    whole = _WHOLE.get(samples.dtype)
    if whole is None:
        return samples.float()
    if lies_on_host(samples):  # where torch takes nearly twice as long for it as numpy
        return torch.from_numpy(samples.numpy().astype(np.float32)).div_(whole)
    return samples.float().div_(whole)


@picture_work
def consistency(
    picture: Tensor, source: Tensor, alpha: Tensor | None = None, source_alpha: Tensor | None = None
) -> Consistency:
    """Compare a result, shrunk again, with its source.

    Args:
        picture: uint8 or uint16 [height, width, channels], without alpha.
        source: float32 [rows, columns, channels] in 0..1, no larger.
        alpha: of the result, [height, width, 1] of the same type.
        source_alpha: of the source, float32 [rows, columns].
    """
    size = source.shape[1], source.shape[0]
    if source_alpha is not None:
        source = torch.cat([source * source_alpha[..., None], source_alpha[..., None]], 2)
    off = (shrink(picture, size, alpha) - source).abs_()
    return Consistency(255 * float(off.mean()), 255 * float(off.max()))


@picture_work
def hold_to_source(
    picture: Tensor, source: Tensor, ceiling: Tensor | None = None, *, rounds: int = _ROUNDS
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
    most = 1.0 if ceiling is None else shrink(ceiling, (width, height))
    strips, one = list(_strips(height, picture.shape[0])), picture.new_ones(())
    for number in range(rounds):
        mean = shrink(picture, (width, height))
        missing = source - mean
        if float(missing.abs().max()) <= _NEAR:
            return
        # Shares of what is below each pixel and of what is above it.
        lower = (-missing).clamp_(min=0) / mean.clamp(min=_NOT_ZERO)
        raise_by = missing.clamp(min=0) / (most - mean).clamp_(min=_NOT_ZERO)
        for small, _ in strips:
            first, last = (
                round(edge * picture.shape[0] / height) for edge in (small.start, small.stop)
            )
            rows = slice(first, last)
            part, top = picture[rows], None if ceiling is None else ceiling[rows]
            if number < _SMOOTH_ROUNDS:
                part += _enlarged(missing, picture, rows, BICUBIC)
            else:
                part.addcmul_(part, _enlarged(lower, picture, rows, BOX), value=-1)
                goal = one if top is None else top
                part.lerp_(goal.expand_as(part), _enlarged(raise_by, picture, rows, BOX))
            if top is None:
                part.clamp_(0, 1)
            else:
                torch.minimum(part.clamp_(min=0), top, out=part)


def _enlarged(small: Tensor, like: Tensor, rows: slice, kernel: Kernel) -> Tensor:
    """Enlarge a small picture to the size of another, of which some rows are wanted."""
    height, width = like.shape[:2]
    step = small.shape[0] / height
    box = (0.0, rows.start * step, float(small.shape[1]), rows.stop * step)
    return resample_part(small, (width, rows.stop - rows.start), box, kernel)


def _strips(height: int, larger: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows of a source, and the rows of the result that they cover, the last in part."""
    for top in range(0, height, _STRIP):
        bottom = min(height, top + _STRIP)
        yield slice(top, bottom), slice(top * larger // height, -(-bottom * larger // height))


def _overlaps(small: slice, large: slice, factor: float) -> Tensor:
    """Return the weight of each row of the result in each row of the source."""
    first = np.arange(small.start, small.stop)[:, None] * factor
    row = np.arange(large.start, large.stop)[None]
    shared = np.minimum(first + factor, row + 1) - np.maximum(first, row)
    return torch.from_numpy((shared.clip(0) / factor).astype(np.float32))
