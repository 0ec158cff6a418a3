"""Batches of static sizes, for networks that are compiled again for every new shape.

However many windows come, they are cut into runs of a few static sizes, and the last run is filled
up with copies of its last window, whose results are thrown away. Windows of more than a few shapes
are left to the plain denoiser.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from tegula.models.bundle import ControlImage, Denoiser, Features, SplitDenoiser, WindowBatch
from tegula.models.retry import WINDOW_DOES_NOT_FIT, until_it_fits

MOST_SHAPES = 3
"""Shapes of windows and texts that are compiled for."""
MOST_SIZES = 4
"""Numbers of rows that are compiled for: guided and unguided steps of two pictures."""
MOST_FILLED_UP = 1 / 8
"""Share of a batch that may be filling; one that would need more is compiled for itself."""


@dataclass(frozen=True)
class StaticRun:
    """``count`` rows from ``first`` on, computed as ``size`` rows."""

    first: int
    count: int
    size: int


def static_runs(count: int, sizes: Sequence[int]) -> list[StaticRun]:
    """Cut rows into runs of static sizes: as few rows computed as possible, then as few runs.

    Args:
        count: rows, at least 1.
        sizes: the static sizes, each at least 1.
    """
    runs, first = [], 0
    for size in _best_sizes(count, tuple(sizes)):
        runs.append(StaticRun(first, min(size, count - first), size))
        first += size
    return runs


@cache
def _best_sizes(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the runs for a number of rows, in order.

    The largest size is always a good choice at first. Of the last rows, where a smaller one
    may waste less, dynamic programming finds the best: whichever size the next run has, the
    best runs for the rows that it leaves are known by then.
    """
    largest = max(sizes)
    whole_runs = max(0, -(-count // largest) - 4)
    best: list[tuple[int, ...]] = [()]  # by the number of rows that are left
    for left in range(1, count - whole_runs * largest + 1):
        options = [(size, *best[max(0, left - size)]) for size in sizes]
        best.append(min(options, key=lambda runs: (sum(runs), len(runs))))
    return (largest,) * whole_runs + best[-1]


class StaticDenoiser:
    """A denoiser whose networks only ever see batches of static sizes.

    Args:
        denoiser: computes the batches.
        plain: the same, for any batch: it takes windows of further shapes.
        sizes: rows of a batch, the largest first; what does not fit into memory is dropped.
        grows_to: with so many sizes none is added. Below it the rows of a batch become a size
            of their own where the sizes that are there would waste too much.
    """

    def __init__(
        self, denoiser: Denoiser, plain: Denoiser, sizes: Sequence[int] = (), *, grows_to: int = 0
    ) -> None:
        self._denoiser = denoiser
        self._plain = plain
        self.sizes = tuple(sizes)
        self._grows_to = grows_to
        self._most_rows: int | None = None  # once memory ran out
        self._shapes: set[object] = set()
        self._lock = threading.Lock()

    def embed_control(self, control: ControlImage) -> Tensor:
        """Embed the control windows as they come."""
        return self._denoiser.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction, computed in runs of static sizes."""
        batch = replace(batch, timestep=batch.timesteps())
        if not self._is_static(batch):
            return self._plain(batch)
        sizes = self._sizes_for(len(batch.latents))
        prediction, fitting = until_it_fits(
            partial(self._predict, batch), sizes, _smaller_sizes, WINDOW_DOES_NOT_FIT
        )
        if fitting != sizes:
            with self._lock:
                self.sizes, self._most_rows = fitting, fitting[0]
        return prediction

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the plain denoiser in another precision, which takes any batch."""
        return self._plain.to_dtype(dtype)

    def _is_static(self, batch: WindowBatch) -> bool:
        """Tell whether windows and texts are of the first few shapes that came."""
        shape = (batch.latents.shape[1:], batch.text.shape[1:])
        with self._lock:
            if len(self._shapes) < MOST_SHAPES:
                self._shapes.add(shape)
            return shape in self._shapes

    def _sizes_for(self, rows: int) -> tuple[int, ...]:
        """Return the static sizes, with one for these rows where there is room for it."""
        with self._lock:
            own = rows if self._most_rows is None else min(rows, self._most_rows)
            if len(self.sizes) < self._grows_to and self._wastes(own):
                self.sizes = tuple(sorted({*self.sizes, own}, reverse=True))
            return self.sizes

    def _wastes(self, rows: int) -> bool:
        if not self.sizes:
            return True
        computed = sum(run.size for run in static_runs(rows, self.sizes))
        return computed - rows > MOST_FILLED_UP * rows or rows > self.sizes[0]

    def _predict(self, batch: WindowBatch, sizes: Sequence[int]) -> Tensor:
        # In guess mode the first half of the rows is without control, and the second half the
        # same windows with it: every run takes rows of both, so that its halves are alike.
        halves = 2 if batch.controlled.start else 1
        windows = len(batch.latents) // halves
        runs = static_runs(windows, [n // halves for n in sizes if n % halves == 0] or [1])
        device = batch.latents.device
        predictions: list[list[Tensor]] = [[] for _ in range(halves)]
        for run in runs:
            picked = torch.arange(run.first, run.first + run.size, device=device)
            picked = picked.clamp_max(windows - 1)
            rows = torch.cat([picked + half * windows for half in range(halves)])
            result = self._denoiser(_select(batch, rows, halves))
            for half, prediction in zip(predictions, result.chunk(halves), strict=True):
                # A copy: what is compiled may answer in memory that the next run overwrites.
                half.append(prediction[: run.count].clone())
        return torch.cat([prediction for half in predictions for prediction in half])


class StaticSplitDenoiser(StaticDenoiser):
    """A static denoiser in two halves, which take any batch and are not compiled."""

    def __init__(
        self,
        denoiser: Denoiser,
        plain: SplitDenoiser,
        sizes: Sequence[int] = (),
        *,
        grows_to: int = 0,
    ) -> None:
        super().__init__(denoiser, plain, sizes, grows_to=grows_to)
        self._halves = plain

    def encode(self, batch: WindowBatch) -> Features:
        """Run the first half."""
        return self._halves.encode(batch)

    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the second half."""
        return self._halves.decode(features, timestep, text)


def _smaller_sizes(sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return static sizes without the largest, for what did not fit into memory."""
    return sizes[1:] or ((sizes[0] // 2,) if sizes[0] > 1 else None)


def _select(batch: WindowBatch, rows: Tensor, halves: int) -> WindowBatch:
    return WindowBatch(
        batch.latents[rows],
        batch.timestep[rows],
        batch.text[rows],
        batch.control[rows],
        batch.control_scale,
        slice(len(rows) // 2 if halves == 2 else 0, len(rows)),
    )
