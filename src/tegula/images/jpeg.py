"""What JPEG compression did to a picture, and undoing a little of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from tegula.images.pixels import Float, to_bytes

_SHIFTS = ((0, 0), (1, 4), (2, 2), (3, 6), (4, 1), (5, 5), (6, 3), (7, 7))
_BLOCK = 8
_MARGIN = 16
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

    Exact for files of the Independent JPEG Group's library and its kin; for cameras and
    editors with tables of their own it is the nearest in coarseness.
    """
    table = np.asarray((tables or {}).get(0, ()))
    if table.shape != _LUMINANCE.shape:
        return None
    qualities = np.arange(1, 101)
    percent = np.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    candidates = np.clip((_LUMINANCE * percent[:, None] + 50) // 100, 1, 255)
    distance = np.abs(np.log(candidates) - np.log(np.maximum(table, 1))).sum(axis=1)
    return int(qualities[distance.argmin()])


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
    border = ((_BLOCK, _MARGIN), (_BLOCK, _MARGIN), (0, 0))
    padded = np.pad(to_bytes(rgb), border, "symmetric")
    mean = np.zeros_like(rgb)
    for down, right in _SHIFTS:
        shifted = padded[_BLOCK - down :, _BLOCK - right :]
        again = _compressed(shifted[: height + _BLOCK, : width + _BLOCK], quality)
        mean += again[down : down + height, right : right + width]
    mean *= np.float32(0.5 / (255 * len(_SHIFTS)))
    mean += 0.5 * rgb
    return mean


def _compressed(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], quality: int) -> Float:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"), np.float32)
