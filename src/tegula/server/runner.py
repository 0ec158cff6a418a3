"""The local engine: one killable child process per device."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from tegula.catalog import Catalog, Output, run, validate
from tegula.errors import CancelledError, OutOfMemoryError, TegulaError
from tegula.options import UpscaleOptions
from tegula.progress import Cancelled, Progress
from tegula.server.engine import (
    Done,
    EngineEvent,
    Failed,
    FileMade,
    Job,
    Log,
    Progressed,
    Quiet,
    Started,
)
from tegula.server.settings import log_as_json, log_context

if TYPE_CHECKING:
    from tegula.upscaler import Upscaler


# The process that runs models: jobs come in over a pipe, events go out over it.
#
# It lives apart from the server, so that whatever a model does to it, the server lives on.

log = logging.getLogger(__name__)

Emit = Callable[[EngineEvent], None]
Runner = Callable[[Job, Emit, Cancelled], None]
"""Runs a job, tells what happens, and raises what goes wrong."""

_SIGN_OF_LIFE_EVERY_S = 1.0


@dataclass(frozen=True)
class RunnerSpec:
    """How the process gets its runner: it imports ``module:function`` and calls it.

    options: given to the function, with the device; plain values.
    """

    entry: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Asks for a job to be run."""

    job: Job


@dataclass(frozen=True)
class Cancel:
    """Asks for a job to be ended."""

    job_id: str


@dataclass(frozen=True)
class Ready:
    """Says that the runner is loaded."""


def main(pipe: Connection, spec: RunnerSpec, device: str, log_level: int) -> None:
    """Serve jobs until the pipe closes, which it does when the server is gone."""
    log_as_json(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    jobs: SimpleQueue[Job] = SimpleQueue()
    cancelled: set[str] = set()
    threading.Thread(target=_listen, args=(pipe, jobs, cancelled), daemon=True).start()

    talking = threading.Lock()

    def tell(event: EngineEvent | Ready) -> None:
        try:
            with talking:
                pipe.send(event)
        except OSError:
            os._exit(0)

    try:
        runner = _open(spec, device)
    except Exception as error:
        tell(_failure(error))
        os._exit(1)
    tell(Ready())
    while True:
        job = jobs.get()
        end = _ended(runner, job, tell, _Asked(job.id, cancelled, tell))
        cancelled.discard(job.id)  # once it is told, the next job of this name may be cancelled
        tell(end)


class _Asked:
    """Answers whether a job is cancelled; to ask is a sign of life, which it passes on.

    A net on a slow processor may take minutes from one report of progress to the next,
    and asks this all the while.
    """

    def __init__(self, job_id: str, cancelled: set[str], emit: Emit) -> None:
        self._job_id = job_id
        self._cancelled = cancelled
        self._emit = emit
        self._told = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._told >= _SIGN_OF_LIFE_EVERY_S:
            self._told = now
            self._emit(Quiet())
        return self._job_id in self._cancelled


def _listen(pipe: Connection, jobs: SimpleQueue[Job], cancelled: set[str]) -> None:
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        if isinstance(message, Run):
            jobs.put(message.job)
        elif isinstance(message, Cancel):
            cancelled.add(message.job_id)


def _open(spec: RunnerSpec, device: str) -> Runner:
    module, _, name = spec.entry.partition(":")
    runner: Runner = getattr(importlib.import_module(module), name)(device, spec.options)
    return runner


def _ended(runner: Runner, job: Job, emit: Emit, cancelled: Cancelled) -> EngineEvent:
    with log_context(prediction=job.id):
        try:
            runner(job, emit, cancelled)
        except Exception as error:
            return _failure(error)
    return Done()


def _failure(error: Exception) -> Failed:
    """Say what went wrong; only of our own errors are the words fit for strangers."""
    if isinstance(error, CancelledError):
        return Failed(str(error), cancelled=True)
    if isinstance(error, OutOfMemoryError | MemoryError):
        words = str(error) if isinstance(error, OutOfMemoryError) else "It ran out of memory."
        return Failed(words, lost=True)
    if isinstance(error, TegulaError):
        return Failed(str(error))
    log.exception("A prediction met an error that nobody expected.", exc_info=error)
    return Failed(f"The model failed with an internal error ({type(error).__name__}).")


# What runs in the engine's process: the catalogue over one loaded upscaler.

Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class RunnerOptions:
    """What a process loads and takes.

    bundle: name, folder or file of the weights.
    weights: their fingerprint, which is part of the ids of versions.
    max_pixels: the largest picture that is taken or made.
    backend, compile: as ``Upscaler.load`` takes them.
    """

    bundle: str
    weights: str
    max_pixels: int
    backend: str = "torch"
    compile: bool = False


def upscaling_spec(options: RunnerOptions) -> RunnerSpec:
    """Return how a process gets its runner."""
    return RunnerSpec(f"{__name__}:open_runner", dataclasses.asdict(options))


def open_runner(device: str, options: Mapping[str, Any]) -> UpscaleRunner:
    """Load the bundle; called in the process of an engine.

    Raises:
        ModelError: its weights are missing or broken.
    """
    return UpscaleRunner(device, RunnerOptions(**options))


class UpscaleRunner:
    """Runs versions of the catalogue with the upscaler that is loaded.

    One more upscaler, that with the LoRAs last asked for, is kept beside the plain one.
    """

    def __init__(self, device: str, options: RunnerOptions) -> None:
        self._device = device
        self._options = options
        self._catalog = Catalog(options.weights)
        self._limits = UpscaleOptions(max_pixels=options.max_pixels)
        self._plain = self._load(())
        self._other: tuple[Loras, Upscaler] | None = None

    def __call__(self, job: Job, emit: Emit, cancelled: Cancelled) -> None:
        """Run a job."""
        version = self._catalog.find(job.version)
        emit(Started())
        outputs = run(
            version,
            validate(version, job.input),
            self._provide,
            limits=self._limits,
            on_progress=lambda progress: emit(_progressed(progress)),
            on_log=lambda text: emit(Log(text)),
            cancelled=cancelled,
        )
        for output in outputs:
            emit(_written(output, job))

    def _provide(self, loras: Sequence[tuple[str, float]]) -> Upscaler:
        wanted = tuple(loras)
        if not wanted:
            return self._plain
        if self._other is None or self._other[0] != wanted:
            self._other = None
            self._other = (wanted, self._load(wanted))
        return self._other[1]

    def _load(self, loras: Loras) -> Upscaler:
        from tegula.upscaler import Upscaler

        options = self._options
        return Upscaler.load(
            options.bundle,
            loras=loras,
            device=self._device,
            backend=options.backend,
            compile=options.compile,
        )


def _progressed(progress: Progress) -> Progressed:
    return Progressed(progress.fraction, progress.seconds_left)


def _written(output: Output, job: Job) -> FileMade:
    path = job.folder / output.name
    path.write_bytes(output.data)
    return FileMade(path, output.name, output.media_type)


# The local engine: one process per device, which may die without harm and is replaced.

_LOOK_EVERY_S = 0.1
_FAREWELL_S = 2.0
_START_EVERY_S = 60.0


@dataclass(frozen=True)
class Patience:
    """Seconds after which a silent process is taken for dead.

    load: while it loads a model. run: while it runs a job. cancel: after a job was
    cancelled, whether or not it is silent.
    """

    load: float = 900.0
    run: float = 300.0
    cancel: float = 15.0


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    closed: bool = False

    def kill(self) -> None:
        self.process.kill()
        self.process.join(_FAREWELL_S)
        self.pipe.close()


class LocalEngine:
    """Runs jobs one after the other in a process of its own on one device.

    The process is started for the first job and kept with what it has loaded. After a
    death, a hang or an end of memory the next job gets a new one.
    """

    def __init__(self, spec: RunnerSpec, device: str, patience: Patience = Patience()) -> None:
        self.device = device
        self._spec = spec
        self._patience = patience
        self._child: _Child | None = None
        self._versions: set[str] = set()
        self._started = -math.inf

    @property
    def loaded(self) -> Collection[str]:
        """Versions that ran in the present process."""
        return frozenset(self._versions) if self._alive() else frozenset()

    @property
    def pid(self) -> int | None:
        """The present process, if there is one."""
        child = self._child
        return child.process.pid if child is not None and self._alive() else None

    def load(self) -> None:
        """Start the process, which loads its models; one that fails is not tried again soon."""
        now = time.monotonic()
        if not self._alive() and now - self._started >= _START_EVERY_S:
            self._get()

    def run(self, job: Job, cancelled: Cancelled) -> Generator[EngineEvent, None, None]:
        """Run a job; the last event is ``Done`` or ``Failed``."""
        child = self._get()
        ended = False
        try:
            for event in self._events(child, job, cancelled):
                ended = isinstance(event, Done) or (isinstance(event, Failed) and not event.lost)
                if isinstance(event, Done):
                    self._versions.add(job.version)
                yield event
        finally:
            # A process that is lost, or still at a job that nobody follows, is of no use.
            if not ended:
                self.unload()

    def unload(self) -> None:
        """End the process, and with it give back all memory."""
        child, self._child = self._child, None
        self._versions.clear()
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Stop for good, at once."""
        self.unload()

    def _events(self, child: _Child, job: Job, cancelled: Cancelled) -> Iterator[EngineEvent]:
        heard = time.monotonic()
        asked: float | None = None
        with contextlib.suppress(OSError):
            child.pipe.send(Run(job))
        while True:
            if asked is None and cancelled():
                asked = time.monotonic()
                with contextlib.suppress(OSError):
                    child.pipe.send(Cancel(job.id))
            for event in _received(child):
                heard = time.monotonic()
                yield event
                if isinstance(event, Done | Failed):
                    return
            if child.closed or not (child.process.is_alive() or _waiting(child)):
                yield self._lost(child)
                return
            if late := self._late(child, heard, asked):
                yield late
                return
            yield Quiet()

    def _late(self, child: _Child, heard: float, asked: float | None) -> Failed | None:
        now = time.monotonic()
        if asked is not None and now - asked > self._patience.cancel:
            self.unload()
            return Failed("It was cancelled and did not stop by itself.", cancelled=True)
        patience = self._patience.run if child.ready else self._patience.load
        if now - heard <= patience:
            return None
        doing = "running" if child.ready else "loading the model"
        return Failed(f"it was silent for {patience:.0f} s while {doing}", lost=True)

    def _lost(self, child: _Child) -> Failed:
        child.process.join(_FAREWELL_S)
        code = child.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return Failed(f"its process ended with {how}", lost=True)

    def _alive(self) -> bool:
        return self._child is not None and self._child.process.is_alive()

    def _get(self) -> _Child:
        child = self._child
        if child is None or not child.process.is_alive():
            self.unload()
            child = self._child = self._start()
        return child

    def _start(self) -> _Child:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=main,
            args=(theirs, self._spec, self.device, logging.getLogger().level),
            name=f"tegula {self.device}",
            daemon=True,
        )
        self._started = time.monotonic()
        process.start()
        theirs.close()
        return _Child(process, ours)


def _received(child: _Child) -> list[Any]:
    """Return what the process says, after waiting for a moment if it says nothing."""
    events: list[Any] = []
    try:
        while child.pipe.poll(0 if events else _LOOK_EVERY_S):
            event = child.pipe.recv()
            if isinstance(event, Ready):
                child.ready = True
                events.append(Quiet())
            else:
                events.append(event)
    except (EOFError, OSError):
        child.closed = True
    return events


def _waiting(child: _Child) -> bool:
    try:
        return child.pipe.poll(0)
    except (EOFError, OSError):
        return False
