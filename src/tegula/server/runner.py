"""Engines and the process that each runs, which may die without harm.

``WorkerEngine`` lives in the server's process and talks to ``serve_jobs``, which lives in the
engine's process; ``engine.py`` says why they are two. Both sides are in this module because what
one sends is what the other receives. What lies between is a ``Worker``: here a process of this
machine at the other end of a pipe; ``ray_engine.py`` has one in a cluster.
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Protocol

from tegula.errors import CancelledError, OutOfMemoryError, TegulaError
from tegula.folders import is_full
from tegula.progress import Cancelled
from tegula.server.engine import (
    NO_ROOM,
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


# What goes to the engine's process; ``Ready`` and engine events come from it.


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

LOOK_EVERY_S = 0.1
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


class Worker(Protocol):
    """The engine's process, as the server's side sees it. Used by one thread, but for ``alive``.

    ready: it has loaded its models.
    """

    ready: bool

    @property
    def alive(self) -> bool:
        """Whether it runs, or waits for its place, as far as is known."""

    @property
    def pid(self) -> int | None:
        """Its number, if it is known."""

    def send(self, message: RunJob | CancelJob) -> None:
        """Send a message; one to a worker that has died is lost."""

    def receive(self) -> list[EngineEvent]:
        """Return what it sent, after waiting for a moment if it sent nothing."""

    def death(self) -> str | None:
        """Return how it ended, once that is so and everything that it sent has been received."""

    def kill(self) -> None:
        """End it at once."""


class WorkerEngine(ABC):
    """Runs jobs one after the other in a process of its own on one device.

    The process is started for the first job and kept with what it has loaded. After a crash, a
    hang or running out of memory the next job gets a new one. Used by one thread at a time.
    """

    shares_blobs = False

    def __init__(self, device: str, timeouts: Timeouts) -> None:
        self.device = device
        self._timeouts = timeouts
        self._worker: Worker | None = None
        self._loaded: set[str] = set()
        self._started_at = -math.inf
        self._failed = False  # the last process ended before it had loaded its models

    @abstractmethod
    def _start(self) -> Worker:
        """Start a process, without waiting for it."""

    @property
    def loaded(self) -> Collection[str]:
        """Versions that ran in the present process."""
        return frozenset(self._loaded) if self.started else frozenset()

    @property
    def started(self) -> bool:
        """Whether there is a process."""
        return self._worker is not None and self._worker.alive

    @property
    def wants_help(self) -> bool:
        """Whether more engines would help with what it runs: here each runs its own."""
        return False

    @property
    def ready(self) -> bool:
        """Whether it can take a job: always, since it starts for its first one."""
        return True

    @property
    def pid(self) -> int | None:
        """The present process, if there is one."""
        worker = self._worker
        return worker.pid if worker is not None and worker.alive else None

    def load(self) -> None:
        """Start the process, which loads its models; one that fails is not tried again soon."""
        worker = self._worker
        failed = self._failed or (worker is not None and not worker.ready)
        soon = time.monotonic() - self._started_at < _START_EVERY_S
        if not self.started and not (failed and soon):
            self._living_worker()

    def run(self, job: Job, cancelled: Cancelled) -> Generator[EngineEvent, None, None]:
        """Run a job; the last event is ``Done`` or ``Failed``."""
        worker = self._living_worker()
        ended = False
        try:
            for event in self._events(worker, job, cancelled):
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
        worker, self._worker = self._worker, None
        self._loaded.clear()
        if worker is not None:
            self._failed = not worker.ready
            worker.kill()

    def close(self) -> None:
        """Stop for good, at once."""
        self.unload()

    def _events(self, worker: Worker, job: Job, cancelled: Cancelled) -> Iterator[EngineEvent]:
        """Follow a job from its start to ``Done`` or ``Failed``.

        Each turn of the loop takes a tenth of a second at most, and looks, in this order: does
        the caller want to cancel? what did the process send? has it died? is it overdue? The
        order matters. A process may send its last event and die at once, so what it sent is
        passed on before its death is noticed. A job that ends while it is being cancelled has
        ended. And a process is overdue only after it was given the chance to be heard.
        """
        worker.send(RunJob(job))
        heard_at = time.monotonic()
        cancelled_at: float | None = None
        while True:
            if cancelled_at is None and cancelled():
                cancelled_at = time.monotonic()
                worker.send(CancelJob(job.id))
            for event in worker.receive():
                heard_at = time.monotonic()
                yield event
                if isinstance(event, Done | Failed):
                    return
            if how := worker.death():
                yield Failed(how, lost=True)
                return
            if failure := self._overdue(worker, heard_at, cancelled_at):
                yield failure
                return
            yield Alive()

    def _overdue(
        self, worker: Worker, heard_at: float, cancelled_at: float | None
    ) -> Failed | None:
        now = time.monotonic()
        if cancelled_at is not None and now - cancelled_at > self._timeouts.cancel:
            self.unload()
            return Failed("It was cancelled and did not stop by itself.", cancelled=True)
        timeout = self._timeouts.run if worker.ready else self._timeouts.load
        if now - heard_at <= timeout:
            return None
        doing = "running" if worker.ready else "loading the model"
        return Failed(f"it was silent for {timeout:.0f} s while {doing}", lost=True)

    def _living_worker(self) -> Worker:
        """Return the present process, or a new one where there is none or it has died."""
        worker = self._worker
        if worker is not None and worker.alive:
            return worker
        self.unload()
        self._started_at, self._failed = time.monotonic(), False
        worker = self._worker = self._start()
        return worker


class LocalEngine(WorkerEngine):
    """Runs jobs in a process of this machine."""

    def __init__(self, spec: RunnerSpec, device: str, timeouts: Timeouts = Timeouts()) -> None:
        super().__init__(device, timeouts)
        self._spec = spec

    def _start(self) -> Worker:
        # Spawned: a fork would copy the server's threads' locks, and CUDA does not survive it.
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=main,
            args=(theirs, self._spec, self.device, logging.getLogger().level),
            name=f"tegula {self.device}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Process(process, ours)


@dataclass
class _Process:
    """A process of this machine. ``closed``: the pipe is, and nothing more will come."""

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    closed: bool = False

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def send(self, message: RunJob | CancelJob) -> None:
        with contextlib.suppress(OSError):  # a dead process is found out by receiving
            self.pipe.send(message)

    def receive(self) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        try:
            while self.pipe.poll(0 if events else LOOK_EVERY_S):
                event = self.pipe.recv()
                self.ready = self.ready or isinstance(event, Ready)
                events.append(Alive() if isinstance(event, Ready) else event)
        except (EOFError, OSError):
            self.closed = True
        return events

    def death(self) -> str | None:
        if not self._has_died():
            return None
        self.process.join(_FAREWELL_S)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return f"its process ended with {how}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join(_FAREWELL_S)
        self.pipe.close()

    def _has_died(self) -> bool:
        if self.closed or self.process.is_alive():
            return self.closed
        try:
            return not self.pipe.poll(0)
        except (EOFError, OSError):
            return True


# The engine's process: one thread runs jobs, another one takes what the server sends.

_SIGN_OF_LIFE_EVERY_S = 1.0

Messages = Callable[[], "RunJob | CancelJob"]
"""Waits for the next message of the server's side, and returns it."""
Files = Callable[[Job], AbstractContextManager[Job]]
"""Brings the files of a job to this machine for as long as it runs."""


def main(pipe: Connection, spec: RunnerSpec, device: str, log_level: int) -> None:
    """Serve jobs until the pipe closes, which it does when the server is gone."""
    log_as_json(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the server decides
    sending = threading.Lock()  # models may report progress from threads of their own

    def send(event: EngineEvent | Ready) -> None:
        try:
            with sending:
                pipe.send(event)
        except OSError:
            os._exit(0)

    def receive() -> RunJob | CancelJob:
        try:
            message: RunJob | CancelJob = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        return message

    serve_jobs(receive, send, spec, device)
    os._exit(1)


def serve_jobs(
    receive: Messages,
    send: Callable[[EngineEvent | Ready], None],
    spec: RunnerSpec,
    device: str,
    files: Files = nullcontext,
    loaded: Callable[[Runner], None] = lambda _runner: None,
) -> None:
    """Load a runner and run jobs with it for good; returns only where it cannot be loaded.

    Args:
        receive: waits for jobs and cancellations; called from a thread of its own.
        send: takes what happens; called from any thread.
        spec: how to get the runner.
        device: what it runs on.
        files: brings files to where it runs.
        loaded: given the runner before the first job.
    """
    jobs: SimpleQueue[Job] = SimpleQueue()
    cancelled: set[str] = set()

    def sort_messages() -> None:
        while True:
            message = receive()
            if isinstance(message, RunJob):
                jobs.put(message.job)
            else:
                cancelled.add(message.job_id)

    threading.Thread(target=sort_messages, name="messages", daemon=True).start()
    try:
        module, _, name = spec.entry.partition(":")
        runner: Runner = getattr(importlib.import_module(module), name)(device, spec.options)
    except Exception as error:
        send(_failure(error))
        return
    loaded(runner)
    send(Ready())
    while True:
        job = jobs.get()
        end: EngineEvent = Done()
        with log_context(prediction=job.id):
            try:
                with files(job) as here:
                    job = here  # errors call its paths by the names of the inputs
                    runner(here, send, _CancelCheck(here.id, cancelled, send))
            except Exception as error:
                end = _failure(error, job.input)
        # Forgotten before the end is sent: the same prediction may be the next job, and then a
        # new cancellation of it may come at once.
        cancelled.discard(job.id)
        send(end)


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
    if is_full(error):
        log.warning("%s", error)
        return Failed(NO_ROOM)
    log.exception("A prediction met an error that nobody expected.", exc_info=error)
    return Failed(f"The model failed with an internal error ({type(error).__name__}).")
