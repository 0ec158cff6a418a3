"""The process that runs models: jobs come in over a pipe, events go out over it.

It lives apart from the server, so that whatever a model does to it, the server lives on.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from tegula.engines.engine import Done, EngineEvent, Failed, Job, Quiet
from tegula.errors import CancelledError, OutOfMemoryError, TegulaError
from tegula.predictions.logs import about, log_as_json

log = logging.getLogger(__name__)

Emit = Callable[[EngineEvent], None]
Runner = Callable[[Job, Emit, Callable[[], bool]], None]
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


def _ended(runner: Runner, job: Job, emit: Emit, cancelled: Callable[[], bool]) -> EngineEvent:
    with about(prediction=job.id):
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
