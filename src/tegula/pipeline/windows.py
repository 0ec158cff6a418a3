"""Where the windows of a canvas lie and how they are weighed against each other.

Integers and numpy only. Coordinates are in the units of the canvas: latent pixels for
refine, image pixels for nets that work on pictures.

Windows are spread evenly, all of full size and all inside the canvas, as in Tiled
Diffusion's MultiDiffusion; what differs is the weight of a window, which falls off
towards its neighbours and sums with theirs to one, so that little overlap is enough.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tegula.errors import OptionError
from tegula.images.pixels import Float
from tegula.regions import PlacedRegion

if TYPE_CHECKING:
    from tegula.models.bundle import BundleFacts


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
    column_weights: Float
    row_weights: Float

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

    @property
    def layers(self) -> tuple[int, ...]:
        """A number for each window; windows of the same number do not overlap."""
        down = _distance_apart(self.rows, self.window_height)
        across = _distance_apart(self.columns, self.window_width)
        return tuple(
            row % down * across + column % across
            for row in range(len(self.rows))
            for column in range(len(self.columns))
        )

    def weights(self, index: int) -> Float:
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


def _distance_apart(starts: Sequence[int], window: int) -> int:
    """Return of how many starts one can be taken so that none of their windows overlap."""
    return next(
        every
        for every in range(1, len(starts) + 1)
        if all(right - left >= window for left, right in zip(starts, starts[every:], strict=False))
    )


def feather(starts: Sequence[int], window: int, length: int) -> Float:
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


@dataclass(frozen=True)
class Piece:
    """A part of a canvas that is diffused as one: all of it, or a tile of redraw mode.

    area: in pixels of the canvas.
    grid: its windows, in latent pixels of the part.
    """

    area: Window
    grid: WindowGrid

    def windows(self, factor: int) -> list[Window]:
        """Return the windows in pixels of the canvas; ``factor`` pixels a latent pixel."""
        return [
            dataclasses.replace(window, x=self.area.x + window.x, y=self.area.y + window.y)
            for window in (each.scaled(factor) for each in self.grid.windows)
        ]


def canvas_piece(facts: BundleFacts, width: int, height: int, window: int, overlap: float) -> Piece:
    """Return the canvas of a result of this size as one piece.

    Args:
        facts: what windows the model takes.
        width: of the result, in pixels.
        height: of the result, in pixels.
        window: side in pixels.
        overlap: least share of a window that neighbours have in common.

    Raises:
        OptionError: the window is too small for the model or no multiple of its step.
    """
    multiple, factor = facts.window_multiple, facts.latent_factor
    if window < facts.minimum_window or window % multiple:
        raise OptionError(
            f"A window of {window} px does not fit {facts.name}; it takes multiples of "
            f"{multiple} px from {facts.minimum_window} px up."
        )
    canvas = fit_canvas(
        width,
        height,
        window,
        minimum_window=facts.minimum_window,
        window_multiple=multiple,
        factor=factor,
    )
    grid = grid_windows(
        canvas.width // factor,
        canvas.height // factor,
        canvas.window_width // factor,
        canvas.window_height // factor,
        overlap,
    )
    return Piece(Window(0, 0, canvas.width, canvas.height), grid)


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


def _ceil_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def prompt_shares(boxes: Sequence[PlacedRegion], window: Window, factor: int) -> list[Float]:
    """Return the share of the common prompt and of each region's at every latent pixel.

    They sum to one. Regions have soft edges, and later ones lie over earlier ones.

    Args:
        boxes: from ``place_region``.
        window: in pixels of the result.
        factor: pixels per latent pixel.

    Returns:
        float32 [window height / factor, window width / factor] each.
    """
    xs = window.x + (np.arange(window.width // factor, dtype=np.float64) + 0.5) * factor
    ys = window.y + (np.arange(window.height // factor, dtype=np.float64) + 0.5) * factor
    shares: list[NDArray[np.float64]] = [np.ones((len(ys), len(xs)))]
    for box in boxes:
        over = np.outer(
            _rise(ys, box.top, box.bottom, box.feather),
            _rise(xs, box.left, box.right, box.feather),
        )
        shares = [share * (1 - over) for share in shares] + [over]
    return [share.astype(np.float32) for share in shares]


def count_places(regions: Sequence[PlacedRegion], windows: Sequence[Window], factor: int) -> int:
    """Return how often windows are evaluated in a step: once for each prompt with a share."""
    if not regions:
        return len(windows)
    return sum(bool(s.any()) for w in windows for s in prompt_shares(regions, w, factor))


def _rise(at: NDArray[np.float64], low: float, high: float, feather: float) -> NDArray[np.float64]:
    """Rise from the edges inwards as a squared sine; full at an edge that the result cuts."""
    inside = np.minimum(at - low if low > 0 else np.inf, high - at)
    return np.asarray(np.sin(np.clip(inside / feather, 0, 1) * np.pi / 2) ** 2)
