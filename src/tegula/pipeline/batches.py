"""Batches of windows: in half precision, halved when memory runs out, shared by pictures."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from tegula.errors import NumericalError, OutOfMemoryError
from tegula.models.bundle import ControlImage, Denoiser, SplitDenoiser, WindowBatch
from tegula.models.compiled import per_row
from tegula.models.device import is_out_of_memory
from tegula.pipeline.windows import balanced_batch

# One safe evaluation of the denoiser on many equal windows.
#
# Half precision that yields NaN is run again in fp32, and a batch that does not fit into
# memory is halved, so that neither ever shows in the picture.

Level = tuple[Tensor, slice]
"""The timestep of a noise level and rows of a batch."""


class SafeDenoiser:
    """A denoiser that answers in finite fp32 numbers or raises.

    Raises:
        NumericalError: NaN or infinity in fp32 too.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        self._denoiser = denoiser
        self._dtype = dtype
        self.reruns = 0

    @property
    def splits(self) -> bool:
        """Tell whether ``ahead`` can be called."""
        return isinstance(self._denoiser, SplitDenoiser)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction for a batch, fp32, shaped like its latents."""
        return self._finite(lambda denoiser: [denoiser(batch)])[0]

    def ahead(self, batch: WindowBatch, levels: Sequence[Level]) -> Sequence[Tensor]:
        """Return the predictions at several noise levels from one run of the encoder.

        Args:
            batch: at the first of the levels.
            levels: timestep and the rows of the batch that are wanted there.
        """

        def run(denoiser: Denoiser) -> list[Tensor]:
            split = cast("SplitDenoiser", denoiser)
            features = split.encode(batch)
            return [
                split.decode(tuple(part[rows] for part in features), timestep, batch.text[rows])
                for timestep, rows in levels
            ]

        return self._finite(run)

    def _finite(self, run: Callable[[Denoiser], list[Tensor]]) -> list[Tensor]:
        predictions = [prediction.float() for prediction in run(self._denoiser)]
        if _are_finite(predictions):
            return predictions
        if self._dtype != torch.float32:
            self.reruns += 1
            whole = self._denoiser.to_dtype(torch.float32)
            predictions = [prediction.float() for prediction in run(whole)]
            if _are_finite(predictions):
                return predictions
        raise NumericalError(
            "The model returned NaN or infinity even in fp32; its weights are damaged, or a "
            "LoRA or the guidance scale is far too strong."
        )


def _are_finite(predictions: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(prediction).all()) for prediction in predictions)


class HalvingBatch:
    """A batch size that shrinks when memory runs out and never grows back."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, evaluate: Callable[[int, int], None], count: int) -> None:
        """Call ``evaluate(start, end)`` over ``count`` windows in equal runs of at most ``size``.

        Raises:
            OutOfMemoryError: a single window does not fit.
        """
        start = 0
        while start < count:
            end = start + balanced_batch(count - start, self.size)
            try:
                evaluate(start, end)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(end - start)
            else:
                start = end

    def _halve(self, failed: int) -> None:
        if failed == 1:
            raise OutOfMemoryError(
                "A single window does not fit into memory; choose a smaller window or a "
                "machine with more memory."
            )
        self.size = failed // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# One denoiser for several upscales at once: their windows go through it together.
#
# Every upscale runs in a thread of its own and knows nothing of the others. Batches that
# come while the denoiser is busy, or within a moment, are joined into one where their
# windows have the same shape and control; each row keeps its own noise level. A network is
# busier with one large batch than with several small ones.

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
        request = _Request(replace(batch, timestep=per_row(batch)))
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
        if request.prediction is None:
            assert request.error is not None  # noqa: S101 - it was answered
            raise request.error
        return request.prediction

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the denoiser inside in another precision, which is not shared."""
        return self._denoiser.to_dtype(dtype)

    def _run_next(self) -> None:
        """Run the oldest batch and those that go with it; called and left in turn."""
        group = self._group()
        self._waiting = [request for request in self._waiting if request not in group]
        self._busy = True
        self._turn.release()
        try:
            self._answer(group)
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
            # Together they may be too many for the memory, and a fault belongs to one.
            for request in group:
                self._answer([request])
            return
        for request, prediction in zip(group, predictions, strict=True):
            request.prediction = prediction


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
