"""One denoiser for several upscales at once: their windows go through it together.

Every upscale runs in a thread of its own and knows nothing of the others. Batches that
come while the denoiser is busy, or within a moment, are joined into one where their
windows have the same shape and control; each row keeps its own timestep. A network is
busier with one large batch than with several small ones.

There is no thread of the denoiser's own: one of the callers computes for all. A caller
queues its batch and sleeps while another computes; while nobody does, it sleeps until
every member has queued a batch, or until its own patience, counted from its arrival, is
over. Then it takes the oldest batch and all that go with it, releases the lock while it
computes, and wakes everybody when it is done: those whose batches are answered leave, and
of the others the first to get the lock goes on. A new batch and a member that leaves wake
everybody too, since either may complete the group that the others are waiting for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from tegula.models.bundle import ControlImage, Denoiser, Features, SplitDenoiser, WindowBatch

A = TypeVar("A")
B = TypeVar("B")
PATIENCE_S = 0.01
"""How long a batch waits for those of the other upscales; a forward pass takes longer."""


@dataclass(eq=False)
class _Request:
    """A batch that waits for its prediction."""

    batch: WindowBatch
    prediction: Tensor | None = None
    error: BaseException | None = None

    @property
    def answered(self) -> bool:
        return self.prediction is not None or self.error is not None

    @property
    def halves(self) -> int:
        """Negative rows without control before as many with it, or rows all alike."""
        return 2 if self.batch.controlled.start else 1

    @property
    def kind(self) -> object:
        """What must be equal for two batches to be joined."""
        batch = self.batch
        tensors = (batch.latents, batch.text, batch.control)
        shapes = tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors)
        return shapes, batch.control_scale, self.halves


def shared(denoiser: Denoiser, most_rows: int) -> SharedDenoiser:
    """Return a denoiser for several threads, with halves where the one inside has them."""
    if isinstance(denoiser, SplitDenoiser):
        return SharedSplitDenoiser(denoiser, most_rows)
    return SharedDenoiser(denoiser, most_rows)


class SharedDenoiser:
    """A denoiser that joins the batches of several threads.

    Args:
        denoiser: computes one batch at a time.
        most_rows: batches are joined up to this many rows.
        patience: seconds that a batch waits while other members have none waiting.
    """

    def __init__(self, denoiser: Denoiser, most_rows: int, patience: float = PATIENCE_S) -> None:
        self._denoiser = denoiser
        self._most_rows = most_rows
        self._patience = patience
        self._turn = threading.Condition()
        self._waiting: list[_Request] = []
        self._members = 0
        self._busy = False

    @contextmanager
    def member(self) -> Iterator[None]:
        """Count this thread among those whose batches are waited for."""
        with self._turn:
            self._members += 1
        try:
            yield
        finally:
            with self._turn:
                self._members -= 1
                self._turn.notify_all()

    def embed_control(self, control: ControlImage) -> Tensor:
        """Encode the control windows of one upscale."""
        return self._denoiser.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction for a batch, which may be computed with others.

        Raises:
            Exception: what the denoiser raises for this batch, alone.
        """
        request = _Request(replace(batch, timestep=batch.timesteps()))
        until = time.monotonic() + self._patience
        with self._turn:
            self._waiting.append(request)
            self._turn.notify_all()
            while not request.answered:
                left = until - time.monotonic()
                if self._busy:
                    self._turn.wait()
                elif len(self._waiting) < self._members and left > 0:
                    self._turn.wait(left)
                else:
                    self._run_next()
        if request.error is not None:
            # The traceback of an error holds this frame, the frame its request, and the
            # request the error: a circle that would keep the tensors of a batch that did not
            # fit into memory beyond the moment in which a smaller one is tried.
            error, request.error = request.error, None
            try:
                raise error
            finally:
                del error
        assert request.prediction is not None  # noqa: S101 - it was answered
        return request.prediction

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the denoiser inside in another precision, which is not shared."""
        return self._denoiser.to_dtype(dtype)

    def _run_next(self) -> None:
        """Run the oldest batch and those that go with it, with the lock held before and after."""
        group = self._group()
        self._waiting = [request for request in self._waiting if request not in group]
        with self._computing():
            self._answer(group)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Keep the denoiser, but not the lock, for what is done inside."""
        self._busy = True
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            self._busy = False
            self._turn.notify_all()

    def _group(self) -> list[_Request]:
        first, rows = self._waiting[0], 0
        group = []
        for request in self._waiting:
            count = len(request.batch.latents)
            if request is first or (request.kind == first.kind and rows + count <= self._most_rows):
                group.append(request)
                rows += count
        return group

    def _answer(self, group: Sequence[_Request]) -> None:
        try:
            predictions = _parted(self._denoiser(_joined(group)), group)
        except BaseException as error:
            if len(group) == 1:
                group[0].error = error
                return
        else:
            for request, prediction in zip(group, predictions, strict=True):
                request.prediction = prediction
            return
        # Together they may be too many for the memory, and a fault belongs to one. This is
        # outside the except block, which would keep the tensors of the failed run.
        for request in group:
            self._answer([request])


class SharedSplitDenoiser(SharedDenoiser):
    """One whose halves are there too; they run batch by batch, in turn with what is joined."""

    def __init__(
        self, denoiser: SplitDenoiser, most_rows: int, patience: float = PATIENCE_S
    ) -> None:
        super().__init__(denoiser, most_rows, patience)
        self._halves = denoiser

    def encode(self, batch: WindowBatch) -> Features:
        """Run the first half."""
        with self._alone():
            return self._halves.encode(batch)

    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the second half."""
        with self._alone():
            return self._halves.decode(features, timestep, text)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._turn:
            while self._busy:
                self._turn.wait()
            with self._computing():
                yield


def _joined(group: Sequence[_Request]) -> WindowBatch:
    if len(group) == 1:
        return group[0].batch
    batches, halves = [request.batch for request in group], group[0].halves

    def join(tensors: Sequence[Tensor]) -> Tensor:
        parts = [tensor.chunk(halves) for tensor in tensors]
        return torch.cat([part[half] for half in range(halves) for part in parts])

    latents = join([batch.latents for batch in batches])
    return WindowBatch(
        latents,
        join([batch.timestep for batch in batches]),
        join([batch.text for batch in batches]),
        join([batch.control for batch in batches]),
        batches[0].control_scale,
        slice(len(latents) // 2 if halves == 2 else 0, len(latents)),
    )


def _parted(prediction: Tensor, group: Sequence[_Request]) -> Sequence[Tensor]:
    halves = group[0].halves
    counts = [len(request.batch.latents) // halves for request in group]
    parts = [torch.split(half, counts) for half in prediction.chunk(halves)]
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def in_order(
    pool: ThreadPoolExecutor, run: Callable[[A], B], items: Iterable[A], at_once: int
) -> Iterator[B]:
    """Yield what ``run`` makes of items, in their order, with at most ``at_once`` begun."""
    begun: deque[Future[B]] = deque()
    for item in items:
        begun.append(pool.submit(run, item))
        if len(begun) == at_once:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
