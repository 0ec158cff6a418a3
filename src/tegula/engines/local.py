"""The local engine: one process per device, which may die without harm and is replaced."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tegula.engines.child import Cancel, Ready, Run, RunnerSpec, main
from tegula.engines.engine import Cancelled, Done, EngineEvent, Failed, Job, Quiet

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
