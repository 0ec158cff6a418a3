"""The canvas: the picture padded until windows fit it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CanvasSize:
    """Canvas and window sides in image pixels.

    The canvas is at least as large as the picture, which lies in its top left corner.
    """

    width: int
    height: int
    window_width: int
    window_height: int


def fit_canvas(
    width: int, height: int, window: int, *, minimum_window: int, window_multiple: int, factor: int
) -> CanvasSize:
    """Choose canvas and window sides for a picture.

    A side longer than the window is padded to the latent factor alone. A shorter one
    becomes a single window, padded to what the net can take.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        window: wanted window side, a multiple of ``window_multiple``.
        minimum_window: smallest side that the net takes.
        window_multiple: the net takes multiples of this.
        factor: image pixels per latent pixel.
    """

    def fit(side: int) -> tuple[int, int]:
        if side > window:
            return _ceil_to(side, factor), window
        only = max(minimum_window, _ceil_to(side, window_multiple))
        return only, only

    canvas_width, window_width = fit(width)
    canvas_height, window_height = fit(height)
    return CanvasSize(canvas_width, canvas_height, window_width, window_height)


def pad_to_canvas(picture: NDArray[np.float32], canvas: CanvasSize) -> NDArray[np.float32]:
    """Extend [height, width, channels] to the canvas by mirroring its right and bottom edges."""
    height, width = picture.shape[:2]
    if (width, height) == (canvas.width, canvas.height):
        return picture
    padding = ((0, canvas.height - height), (0, canvas.width - width), (0, 0))
    return np.pad(picture, padding, mode="symmetric")


def _ceil_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
