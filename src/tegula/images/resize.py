"""Resampling of float pictures by Lanczos' windowed sinc."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
