"""Where the windows of a canvas lie and how they are weighed against each other.

Integers and numpy only. Coordinates are in the units of the canvas: latent pixels for
refine, image pixels for nets that work on pictures.

Windows are spread evenly, all of full size and all inside the canvas, as in Tiled
Diffusion's MultiDiffusion; what differs is the weight of a window, which falls off
towards its neighbours and sums with theirs to one, so that little overlap is enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """A rectangle of the canvas: left, top, width and height."""

    x: int
    y: int
    width: int
    height: int

    @property
    def index(self) -> tuple[EllipsisType, slice, slice]:
        """What cuts this window out of an array [..., height, width]."""
        return ..., slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)

    def scaled(self, factor: int) -> Window:
        """Return the same rectangle in units ``factor`` times as fine."""
        return Window(self.x * factor, self.y * factor, self.width * factor, self.height * factor)


@dataclass(frozen=True)
class WindowGrid:
    """Equal windows that cover a canvas, row by row.

    columns, rows: left and top edges of the windows.
    column_weights: [len(columns), window width]; row_weights: [len(rows), window height].
    The weight of a window is the outer product of its row's and its column's weights;
    at every point of the canvas the weights of all windows sum to one.
    """

    width: int
    height: int
    window_width: int
    window_height: int
    columns: tuple[int, ...]
    rows: tuple[int, ...]
    column_weights: NDArray[np.float32]
    row_weights: NDArray[np.float32]

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows, row by row."""
        return tuple(
            Window(x, y, self.window_width, self.window_height)
            for y in self.rows
            for x in self.columns
        )

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def weights(self, index: int) -> NDArray[np.float32]:
        """Return [window height, window width] of the window with this index."""
        row, column = divmod(index, len(self.columns))
        return np.outer(self.row_weights[row], self.column_weights[column])


def grid_windows(
    width: int, height: int, window_width: int, window_height: int, overlap: float
) -> WindowGrid:
    """Cover a canvas with equal windows.

    Args:
        width: canvas width, at least 1.
        height: canvas height, at least 1.
        window_width: at least 1; cut to the canvas when larger.
        window_height: at least 1; cut to the canvas when larger.
        overlap: least share of a window that neighbours have in common, 0 <= overlap < 1.
    """
    window_width, window_height = min(window_width, width), min(window_height, height)
    columns = spread(width, window_width, math.ceil(window_width * overlap))
    rows = spread(height, window_height, math.ceil(window_height * overlap))
    return WindowGrid(
        width,
        height,
        window_width,
        window_height,
        columns,
        rows,
        feather(columns, window_width, width),
        feather(rows, window_height, height),
    )


def spread(length: int, window: int, overlap: int) -> tuple[int, ...]:
    """Return the starts of the fewest equal windows that cover ``length`` evenly.

    Neighbours share at least ``overlap`` (capped at ``window`` - 1) units.
    """
    if window >= length:
        return (0,)
    overlap = min(overlap, window - 1)
    count = math.ceil((length - overlap) / (window - overlap))
    return tuple(i * (length - window) // (count - 1) for i in range(count))


def feather(starts: Sequence[int], window: int, length: int) -> NDArray[np.float32]:
    """Return [len(starts), window] weights along one axis that sum to one everywhere.

    Inside an overlap the weight rises as a squared sine, so that it and its slope are
    continuous; at the edge of the canvas it stays flat.
    """
    raw = np.ones((len(starts), window), np.float64)
    for i, (left, right) in enumerate(itertools.pairwise(starts)):
        shared = left + window - right
        ramp = np.sin((np.arange(shared) + 0.5) / shared * np.pi / 2) ** 2
        raw[i, window - shared :] *= ramp[::-1]
        raw[i + 1, :shared] *= ramp
    total = np.zeros(length)
    for start, weights in zip(starts, raw, strict=True):
        total[start : start + window] += weights
    for start, weights in zip(starts, raw, strict=True):
        weights /= total[start : start + window]
    return raw.astype(np.float32)


def balanced_batch(remaining: int, largest: int) -> int:
    """Return the size of the next of the fewest batches that share ``remaining`` equally."""
    return math.ceil(remaining / math.ceil(remaining / largest))
