"""Patterns whose opposite edges meet: wrapped around before the work, joined after it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tegula.images.pixels import Float

_MARGIN = 1 / 8


def margins(width: int, height: int) -> tuple[int, int]:
    """Return how many pixels of a picture are repeated beyond each side, across and down."""
    return max(1, round(width * _MARGIN)), max(1, round(height * _MARGIN))


def wrapped(image: Image.Image, across: int, down: int) -> Image.Image:
    """Repeat a picture beyond its edges by so many pixels on each side."""
    pixels = np.asarray(image)
    padding = ((down, down), (across, across), (0, 0))[: pixels.ndim]
    return Image.fromarray(np.pad(pixels, padding, mode="wrap"))


def unwrapped(image: Image.Image, across: int, down: int) -> Image.Image:
    """Cut the repeated margins off, faded into the edges that they repeat.

    Each edge is reached from outside just as the opposite one goes on, so both meet.
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
