"""Batches of a few fixed sizes, for networks that are compiled for the shapes they see.

A compiled network is compiled again for every new shape, which costs more than it saves.
Here whatever number of windows comes is cut into runs of one to three static sizes, and
the last run is filled up with copies of its last window, whose results are thrown away.
Windows of more than a few shapes run on a twin that is not compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from tegula.models.bundle import ControlImage, Denoiser, Features, SplitDenoiser, WindowBatch
from tegula.models.devices import is_out_of_memory

MOST_SHAPES = 3
"""Shapes of windows and texts that are compiled for."""

Bypass = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StaticRun:
    """``count`` rows from ``first`` on, computed as ``size`` rows."""

    first: int
    count: int
    size: int


def static_sizes(window_batch: int) -> tuple[int, ...]:
    """Return the batch sizes for a window batch, the largest first.

    Guidance doubles the rows of a batch, so the largest is twice the window batch; the
    smallest keeps what is filled up below a quarter of a window batch.
    """
    sizes = {2 * window_batch, window_batch, max(1, window_batch // 4)}
    return tuple(sorted(sizes, reverse=True))


def static_runs(count: int, sizes: Sequence[int]) -> list[StaticRun]:
    """Cut rows into runs of static sizes: as few rows computed as can be, then as few runs.

    Args:
        count: rows, at least 1.
        sizes: the static sizes, each at least 1.
    """

    @cache
    def best(left: int) -> tuple[int, tuple[int, ...]]:
        if left <= 0:
            return 0, ()
        options = []
        for size in sizes:
            rows, later = best(left - size)
            options.append((size + rows, (size, *later)))
        return min(options, key=lambda option: (option[0], len(option[1])))

    largest, runs, first = max(sizes), [], 0
    while first < count:
        left = count - first
        size = largest if left > 4 * largest else best(left)[1][0]
        runs.append(StaticRun(first, min(size, left), size))
        first += size
    return runs


def whole_again(runs: Sequence[StaticRun], results: Sequence[Tensor]) -> Tensor:
    """Join the results of runs without the rows that only filled them up."""
    return torch.cat([result[: run.count] for run, result in zip(runs, results, strict=True)])


class StaticDenoiser:
    """A denoiser whose networks only ever see batches of static sizes.

    Args:
        denoiser: computes the batches.
        sizes: rows of a batch; those that do not fit into memory are given up.
        bypass: a context in which the denoiser runs without being compiled, for windows
            of further shapes.
    """

    def __init__(
        self, denoiser: Denoiser, sizes: Sequence[int], bypass: Bypass = contextlib.nullcontext
    ) -> None:
        self._denoiser = denoiser
        self.sizes = tuple(sizes)
        self._bypass = bypass
        self._shapes: set[object] = set()
        self._lock = threading.Lock()

    def embed_control(self, control: ControlImage) -> Tensor:
        """Encode the control windows as they come."""
        return self._denoiser.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction, computed in runs of static sizes."""
        batch = replace(batch, timestep=per_row(batch))
        if not self._takes(batch):
            with self._bypass():
                return self._denoiser(batch)
        halves = 2 if batch.controlled.start else 1
        sizes = [size // halves for size in self.sizes if size % halves == 0] or [1]
        windows = len(batch.latents) // halves
        runs = static_runs(windows, sizes)
        predictions = [self._predict(batch, run, halves) for run in runs]
        parts = [prediction.chunk(halves) for prediction in predictions]
        return torch.cat([whole_again(runs, half) for half in zip(*parts, strict=True)])

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the denoiser inside in another precision, which takes any batch."""
        return self._denoiser.to_dtype(dtype)

    def _takes(self, batch: WindowBatch) -> bool:
        shape = (batch.latents.shape[1:], batch.text.shape[1:])
        with self._lock:
            if len(self._shapes) < MOST_SHAPES:
                self._shapes.add(shape)
            return shape in self._shapes

    def _predict(self, batch: WindowBatch, run: StaticRun, halves: int) -> Tensor:
        windows = len(batch.latents) // halves
        picked = torch.arange(run.first, run.first + run.size).clamp_max(windows - 1)
        rows = torch.cat([picked + half * windows for half in range(halves)])
        try:
            # The memory that the result lies in belongs to the network's graph, which
            # writes the next one there.
            return self._denoiser(_picked(batch, rows, halves)).clone()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self._give_up(run.size * halves)
            raise

    def _give_up(self, size: int) -> None:
        smaller = tuple(each for each in self.sizes if each < size)
        self.sizes = smaller or (max(1, size // 2),)


class StaticSplitDenoiser(StaticDenoiser):
    """One whose halves are there too; they take any batch and are not compiled."""

    def __init__(
        self, denoiser: SplitDenoiser, sizes: Sequence[int], bypass: Bypass = contextlib.nullcontext
    ) -> None:
        super().__init__(denoiser, sizes, bypass)
        self._halves = denoiser

    def encode(self, batch: WindowBatch) -> Features:
        """Run the first half."""
        with self._bypass():
            return self._halves.encode(batch)

    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the second half."""
        with self._bypass():
            return self._halves.decode(features, timestep, text)


def made_static(denoiser: Denoiser, sizes: Sequence[int], bypass: Bypass) -> StaticDenoiser:
    """Return a denoiser in static sizes, with halves where the one inside has them."""
    if isinstance(denoiser, SplitDenoiser):
        return StaticSplitDenoiser(denoiser, sizes, bypass)
    return StaticDenoiser(denoiser, sizes, bypass)


def per_row(batch: WindowBatch) -> Tensor:
    """Return the timestep of every row, float32 [n], on the device of the latents."""
    timestep = batch.timestep.to(batch.latents.device, torch.float32)
    return timestep.expand(len(batch.latents))


def _picked(batch: WindowBatch, rows: Tensor, halves: int) -> WindowBatch:
    rows = rows.to(batch.latents.device)
    first = len(rows) // 2 if halves == 2 else 0
    return WindowBatch(
        batch.latents[rows],
        batch.timestep[rows],
        batch.text[rows],
        batch.control[rows],
        batch.control_scale,
        slice(first, len(rows)),
    )
