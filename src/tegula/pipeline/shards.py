"""One large picture on several machines: its windows and tiles are spread, its canvas stays.

A helper is another process with the same nets. A task goes to it, such as some windows of one
step or a tile of the prescaler, and what the nets made of it comes back. All else stays where the
picture is: which windows there are, the order in which predictions are added, the scheduler, the
seams of tiles. So the result is that of one machine, up to what rounding differs between batches.

This process takes tasks itself, and does not depend on its helpers. One that refuses, fails or
dies gives its task back, and one that is silent for long is not waited for: the task is then done
here. That is why nothing can wait in a circle, and why a picture without helpers is only slower.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tegula.models.bundle import Bundle
from tegula.models.prescalers import Prescaler
from tegula.progress import Cancel, Cancelled

T = TypeVar("T")

_HERE = ""
"""The name of this process among its helpers."""
_PATIENCE_S = 10.0
_SLOWER = 3.0
"""A task of a helper is done here, too, when this process has waited for it without anything else
to do for ``_PATIENCE_S``, and for so many times as long as the slowest task has taken so far."""
_LOOK_EVERY_S = 0.1


@dataclass
class HelperNets:
    """What tasks run with in the process of a helper.

    prescaler: returns one by its name, with a share of its tuning if it has any.
    kept: what the tasks of one run have in common, by the name of the run; only the last is kept.
    """

    bundle: Bundle
    prescaler: Callable[[str, float | None], Prescaler]
    kept: dict[str, Any] = field(default_factory=dict)


def kind_of(bundle: Bundle) -> object:
    """Return what has to be the same of two bundles for their predictions to be."""
    return bundle.device.type, str(bundle.dtype), bundle.int8, bundle.facts.fingerprint


class Task(Protocol):
    """Work for a helper. It can be pickled, and its tensors lie on the host."""

    def run(self, nets: HelperNets, cancel: Cancel) -> Sequence[Tensor]:
        """Do the work and return tensors on the host.

        Raises:
            CancelledError: whoever sent the task wants it no more.
            Exception: the helper cannot do it; another one, or the sender, will.
        """
        ...


class Helper(Protocol):
    """Another process with the same nets.

    name: tells it from all others, also from the one before it in its place.
    """

    name: str

    def run(self, task: Task, given_up: Cancelled) -> Sequence[Tensor]:
        """Have a task done and return its tensors, on the host.

        Args:
            task: what is to be done.
            given_up: asked several times a second; once it is True the result is of no use.

        Raises:
            Exception: there is no result: the helper is busy, has failed, or is gone.
        """
        ...


@torch.inference_mode()
def run_task(task: Task, nets: HelperNets, cancel: Cancel) -> Sequence[Tensor]:
    """Do a task in the process of a helper."""
    return task.run(nets, cancel)


def for_sending(tensor: Tensor) -> Tensor:
    """Return a copy on the host. Pickled, a view would take all that it is a view of along."""
    return tensor.detach().to("cpu", copy=True)


class Shards:
    """Spreads the tasks of one picture over this process and its helpers.

    Args:
        helpers: returns those that are free at present, at once.
    """

    def __init__(self, helpers: Callable[[], Sequence[Helper]]) -> None:
        self._helpers = helpers
        self._last: dict[Hashable, str] = {}

    @property
    def width(self) -> int:
        """How many processes there are to spread over at present, this one included."""
        return 1 + len(self._helpers())

    def run(
        self,
        keys: Sequence[Hashable],
        here: Callable[[int], T],
        away: Callable[[int, Helper, Cancelled], T],
        cancel: Cancel,
    ) -> Iterator[T]:
        """Yield the results of tasks in their order.

        Args:
            keys: name the tasks. One that is run again under its name, at the next step, goes to
                where it ran before if that is free, since its constants are there.
            here: does the task of a number in this thread.
            away: has it done by a helper; called in other threads.
            cancel: checked several times a second while this thread waits.

        Raises:
            CancelledError: the caller wants to stop. Helpers are told so, and not waited for.
            Exception: what ``here`` raises.
        """
        board: _Board[T] = _Board(keys, self._last)
        threads: dict[str, threading.Thread] = {}
        try:
            for number in range(len(keys)):
                while not board.has(number):
                    # Whoever becomes free in the middle of a long pass of the prescaler joins in.
                    self._recruit(board, threads, away)
                    task = board.take(_HERE)
                    if task is None:
                        task = board.overdue(number, cancel)
                    if task is not None:
                        began = time.monotonic()
                        result = here(task)
                        board.put(task, result, _HERE, time.monotonic() - began)
                yield board.pop(number)
        finally:
            board.close()
            for thread in threads.values():
                thread.join()

    def _recruit(
        self,
        board: _Board[T],
        threads: dict[str, threading.Thread],
        away: Callable[[int, Helper, Cancelled], T],
    ) -> None:
        if board.is_empty:
            return
        for helper in self._helpers():
            if helper.name not in threads:
                thread = threading.Thread(
                    target=_help, args=(helper, board, away), name="helper", daemon=True
                )
                threads[helper.name] = thread
                thread.start()


@dataclass(frozen=True)
class Spread:
    """Which pictures are spread, and over whom.

    above: megapixels of the result; larger ones are.
    helpers: returns those that are free at present, at once, with LoRAs, by file and weight,
        merged into their networks.
    """

    above: float
    helpers: Callable[[tuple[tuple[str, float], ...]], Sequence[Helper]]

    def shards(self, pixels: int, loras: Sequence[tuple[str, float]] = ()) -> Shards | None:
        """Return what spreads a picture whose result has so many pixels; None if nothing does."""
        merged = tuple(loras)
        return Shards(lambda: self.helpers(merged)) if pixels > self.above * 1e6 else None


@torch.inference_mode()
def _help(helper: Helper, board: _Board[T], away: Callable[[int, Helper, Cancelled], T]) -> None:
    """Have tasks done by a helper until there are none, or until it fails at one."""
    while (task := board.take(helper.name)) is not None:
        began = time.monotonic()
        try:
            result = away(task, helper, board.is_closed)
        except Exception:  # whatever it is: if the task itself is at fault, it fails here, too
            board.give_back(task)
            return
        board.put(task, result, helper.name, time.monotonic() - began)


class _Board(Generic[T]):
    """The tasks of one run: which wait, which are done, and who did what before."""

    def __init__(self, keys: Sequence[Hashable], last: dict[Hashable, str]) -> None:
        self._keys = keys
        self._last = last
        self._waiting = list(range(len(keys)))
        self._results: dict[int, T] = {}
        self._yielded: set[int] = set()
        self._slowest = 0.0
        self._closed = False
        self._turn = threading.Condition()

    @property
    def is_empty(self) -> bool:
        """Whether no task waits for anybody to take it."""
        return not self._waiting

    def is_closed(self) -> bool:
        """Tell whether nobody wants results any more."""
        return self._closed

    def close(self) -> None:
        """Want no more results."""
        with self._turn:
            self._closed = True

    def has(self, task: int) -> bool:
        """Tell whether a task is done."""
        with self._turn:
            return task in self._results

    def pop(self, task: int) -> T:
        """Return the result of a task that is done, and keep it no longer."""
        with self._turn:
            self._yielded.add(task)
            return self._results.pop(task)

    def take(self, who: str) -> int | None:
        """Return a task that nobody has begun, None if there is none."""
        with self._turn:
            if self._closed or not self._waiting:
                return None
            task = self._best(who)
            self._waiting.remove(task)
            return task

    def _best(self, who: str) -> int:
        """Return what somebody did before, else what nobody did, else anything.

        This process begins at the front and helpers at the end, so that they meet in the middle
        and results are ready in about the order in which they are wanted.
        """
        known = [(self._last.get(self._keys[task]), task) for task in self._waiting]
        own = [task for last, task in known if last == who]
        fresh = [task for last, task in known if last is None]
        wanted = own or fresh or self._waiting
        return wanted[0] if who == _HERE else wanted[-1]

    def put(self, task: int, result: T, who: str, seconds: float) -> None:
        """Take a result; the second one of a task that was done twice is dropped."""
        with self._turn:
            self._slowest = max(self._slowest, seconds)
            if task not in self._yielded and task not in self._results:
                self._results[task] = result
                self._last[self._keys[task]] = who
            self._turn.notify_all()

    def give_back(self, task: int) -> None:
        """Let somebody else do a task."""
        with self._turn:
            self._last.pop(self._keys[task], None)
            if task not in self._yielded and task not in self._results:
                self._waiting.insert(0, task)
            self._turn.notify_all()

    def overdue(self, task: int, cancel: Cancel) -> int | None:
        """Wait until a task is done or given back; return it if that takes too long."""
        began = time.monotonic()
        while True:
            cancel.check()
            with self._turn:
                if task in self._results or self._waiting:
                    return None
                patience = max(_PATIENCE_S, _SLOWER * self._slowest)
                if time.monotonic() - began > patience:
                    return task
                self._turn.wait(_LOOK_EVERY_S)
