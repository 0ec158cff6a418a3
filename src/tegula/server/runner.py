"""The local engine and the process that it runs: one for each device, which may die without harm.

``LocalEngine`` lives in the server's process and talks over a pipe to ``main``, which lives in the
engine's process; ``engine.py`` says why they are two. Both sides are in this module because what
one sends is what the other receives.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

from tegula.errors import CancelledError, OutOfMemoryError, TegulaError
from tegula.progress import Cancelled
from tegula.server.engine import (
    Alive,
    Done,
    EngineEvent,
    Failed,
    Job,
    public_words,
)
from tegula.server.log import log_as_json, log_context

log = logging.getLogger(__name__)

Emit = Callable[[EngineEvent], None]
Runner = Callable[[Job, Emit, Cancelled], None]
"""Runs a job, emits what happens, and raises what goes wrong."""


# What goes over the pipe: these to the engine's process, ``Ready`` and engine events from it.


@dataclass(frozen=True)
class RunJob:
    """Asks for a job to be run."""

    job: Job


@dataclass(frozen=True)
class CancelJob:
    """Asks for a job to be ended."""

    job_id: str


@dataclass(frozen=True)
class Ready:
    """Says that the runner is loaded."""


@dataclass(frozen=True)
class RunnerSpec:
    """How the process gets its runner: it imports ``module:function`` and calls it.

    entry: ``module:function``.
    options: given to the function, after the device; plain values that can be pickled.
    """

    entry: str
    options: Mapping[str, Any]


# The server's side.

_LOOK_EVERY_S = 0.1
_FAREWELL_S = 2.0
"""How long a process that was killed, or died, may take until it is gone."""
_START_EVERY_S = 60.0
"""A process that fails while it loads is not started without a job sooner than this."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which a process is given up.

    load: silent while it loads a model.
    run: silent while it runs a job.
    cancel: still running after its job was cancelled, silent or not.
    """

    load: float = 900.0
    run: float = 300.0
    cancel: float = 15.0


@dataclass
class _Child:
    """The engine's process. ``closed``: the pipe is, and nothing more will come."""

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    closed: bool = False

    def send(self, message: RunJob | CancelJob) -> None:
        with contextlib.suppress(OSError):  # a dead process is found out by receiving
            self.pipe.send(message)

    def receive(self) -> list[EngineEvent]:
        """Return what the process sent, after waiting for a moment if it sent nothing."""
        events: list[EngineEvent] = []
        try:
            while self.pipe.poll(0 if events else _LOOK_EVERY_S):
                event = self.pipe.recv()
                self.ready = self.ready or isinstance(event, Ready)
                events.append(Alive() if isinstance(event, Ready) else event)
        except (EOFError, OSError):
            self.closed = True
        return events

    def has_died(self) -> bool:
        """Whether it is gone and everything that it sent has been received."""
        if self.closed or self.process.is_alive():
            return self.closed
        try:
            return not self.pipe.poll(0)
        except (EOFError, OSError):
            return True

    def kill(self) -> None:
        self.process.kill()
        self.process.join(_FAREWELL_S)
        self.pipe.close()


class LocalEngine:
    """Runs jobs one after the other in a process of its own on one device.

    The process is started for the first job and kept with what it has loaded. After a crash, a
    hang or running out of memory the next job gets a new one. Used by one thread at a time.
    """

    def __init__(self, spec: RunnerSpec, device: str, timeouts: Timeouts = Timeouts()) -> None:
        self.device = device
        self._spec = spec
        self._timeouts = timeouts
        self._child: _Child | None = None
        self._loaded: set[str] = set()
        self._started_at = -math.inf

    @property
    def loaded(self) -> Collection[str]:
        """Versions that ran in the present process."""
        return frozenset(self._loaded) if self._is_alive() else frozenset()

    @property
    def pid(self) -> int | None:
        """The present process, if there is one."""
        child = self._child
        return child.process.pid if child is not None and self._is_alive() else None

    def load(self) -> None:
        """Start the process, which loads its models; one that fails is not tried again soon."""
        if not self._is_alive() and time.monotonic() - self._started_at >= _START_EVERY_S:
            self._living_child()

    def run(self, job: Job, cancelled: Cancelled) -> Generator[EngineEvent, None, None]:
        """Run a job; the last event is ``Done`` or ``Failed``."""
        child = self._living_child()
        ended = False
        try:
            for event in self._events(child, job, cancelled):
                ended = isinstance(event, Done) or (isinstance(event, Failed) and not event.lost)
                if isinstance(event, Done):
                    self._loaded.add(job.version)
                yield event
        finally:
            # The job may have ended by an error of ours, by a lost process, or by a caller that
            # closed this generator. In the last two cases the process is dead or still busy with
            # a job that nobody follows, and the next job needs another one.
            if not ended:
                self.unload()

    def unload(self) -> None:
        """End the process, which gives back all memory."""
        child, self._child = self._child, None
        self._loaded.clear()
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Stop for good, at once."""
        self.unload()

    def _events(self, child: _Child, job: Job, cancelled: Cancelled) -> Iterator[EngineEvent]:
        """Follow a job from its start to ``Done`` or ``Failed``.

        Each turn of the loop takes a tenth of a second at most, and looks, in this order: does
        the caller want to cancel? what did the process send? has it died? is it overdue? The
        order matters. A process may send its last event and die at once, so what it sent is
        passed on before its death is noticed. A job that ends while it is being cancelled has
        ended. And a process is overdue only after it was given the chance to be heard.
        """
        child.send(RunJob(job))
        heard_at = time.monotonic()
        cancelled_at: float | None = None
        while True:
            if cancelled_at is None and cancelled():
                cancelled_at = time.monotonic()
                child.send(CancelJob(job.id))
            for event in child.receive():
                heard_at = time.monotonic()
                yield event
                if isinstance(event, Done | Failed):
                    return
            if child.has_died():
                yield self._death(child)
                return
            if failure := self._overdue(child, heard_at, cancelled_at):
                yield failure
                return
            yield Alive()

    def _overdue(self, child: _Child, heard_at: float, cancelled_at: float | None) -> Failed | None:
        now = time.monotonic()
        if cancelled_at is not None and now - cancelled_at > self._timeouts.cancel:
            self.unload()
            return Failed("It was cancelled and did not stop by itself.", cancelled=True)
        timeout = self._timeouts.run if child.ready else self._timeouts.load
        if now - heard_at <= timeout:
            return None
        doing = "running" if child.ready else "loading the model"
        return Failed(f"it was silent for {timeout:.0f} s while {doing}", lost=True)

    def _death(self, child: _Child) -> Failed:
        child.process.join(_FAREWELL_S)
        code = child.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return Failed(f"its process ended with {how}", lost=True)

    def _is_alive(self) -> bool:
        return self._child is not None and self._child.process.is_alive()

    def _living_child(self) -> _Child:
        """Return the present process, or a new one where there is none or it has died."""
        child = self._child
        if child is not None and child.process.is_alive():
            return child
        self.unload()
        # Spawned: a fork would copy the server's threads' locks, and CUDA does not survive it.
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=main,
            args=(theirs, self._spec, self.device, logging.getLogger().level),
            name=f"tegula {self.device}",
            daemon=True,
        )
        self._started_at = time.monotonic()
        process.start()
        theirs.close()
        child = self._child = _Child(process, ours)
        return child


# The engine's process: its main thread runs jobs, another one reads the pipe.

_SIGN_OF_LIFE_EVERY_S = 1.0


def main(pipe: Connection, spec: RunnerSpec, device: str, log_level: int) -> None:
    """Serve jobs until the pipe closes, which it does when the server is gone."""
    log_as_json(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the server decides
    jobs: SimpleQueue[Job] = SimpleQueue()
    cancelled: set[str] = set()
    threading.Thread(target=_read_pipe, args=(pipe, jobs, cancelled), daemon=True).start()

    sending = threading.Lock()  # models may report progress from threads of their own

    def emit(event: EngineEvent | Ready) -> None:
        try:
            with sending:
                pipe.send(event)
        except OSError:
            os._exit(0)

    try:
        module, _, name = spec.entry.partition(":")
        runner: Runner = getattr(importlib.import_module(module), name)(device, spec.options)
    except Exception as error:
        emit(_failure(error))
        os._exit(1)
    emit(Ready())
    while True:
        job = jobs.get()
        end: EngineEvent = Done()
        with log_context(prediction=job.id):
            try:
                runner(job, emit, _CancelCheck(job.id, cancelled, emit))
            except Exception as error:
                end = _failure(error, job.input)
        # Forgotten before the end is sent: the same prediction may be the next job, and then a
        # new cancellation of it may come at once.
        cancelled.discard(job.id)
        emit(end)


def _read_pipe(pipe: Connection, jobs: SimpleQueue[Job], cancelled: set[str]) -> None:
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        if isinstance(message, RunJob):
            jobs.put(message.job)
        elif isinstance(message, CancelJob):
            cancelled.add(message.job_id)


class _CancelCheck:
    """Answers whether a job is cancelled, and sends a sign of life when it is called.

    A net on a slow CPU may take minutes between two reports of progress, and calls this all the
    while. A net that hangs does not.
    """

    def __init__(self, job_id: str, cancelled: set[str], emit: Emit) -> None:
        self._job_id = job_id
        self._cancelled = cancelled
        self._emit = emit
        self._sent_at = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._sent_at >= _SIGN_OF_LIFE_EVERY_S:
            self._sent_at = now
            self._emit(Alive())
        return self._job_id in self._cancelled


def _failure(error: Exception, inputs: Mapping[str, Any] | None = None) -> Failed:
    """Return how a job ended; only the words of our own errors are fit for its caller."""
    words = public_words(str(error), inputs)
    if words != str(error):
        log.warning("%s", error)  # the operator needs the path
    if isinstance(error, CancelledError):
        return Failed(words, cancelled=True)
    if isinstance(error, OutOfMemoryError | MemoryError):
        words = words if isinstance(error, OutOfMemoryError) else "It ran out of memory."
        return Failed(words, lost=True)
    if isinstance(error, TegulaError):
        return Failed(words)
    log.exception("A prediction met an error that nobody expected.", exc_info=error)
    return Failed(f"The model failed with an internal error ({type(error).__name__}).")
