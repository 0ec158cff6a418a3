"""Everything that works in the background of a server, wired from its store."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tegula.catalog import Catalog
from tegula.server.db import Prediction
from tegula.server.engine import Engine
from tegula.server.fetch import Fetcher
from tegula.server.runner import LocalEngine, Patience, RunnerOptions, upscaling_spec
from tegula.server.settings import ServerSettings, log_context
from tegula.server.store import Store
from tegula.server.work import (
    CatalogResolver,
    Checker,
    InputReader,
    Resolver,
    Running,
    allow_all,
    open_checker,
)

# Brings predictions and engines together: claim, run, record, and watch over it all.

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


@dataclass
class _Hold:
    """A prediction that a worker of ours holds; ``lost`` once it is ours no more."""

    prediction: Prediction
    since: float = field(default_factory=time.monotonic)
    lost: threading.Event = field(default_factory=threading.Event)


class Supervisor:
    """One thread for each engine, and one that keeps leases, deadlines and lost workers.

    Several may work on one store, in one process or in many.
    """

    def __init__(
        self,
        store: Store,
        engines: Sequence[Engine],
        resolver: Resolver,
        inputs: InputReader,
        unsafe: Checker = allow_all,
    ) -> None:
        self._store = store
        self._engines = engines
        self._running = Running(store, resolver, inputs, unsafe)
        self._holds: dict[str, _Hold] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._giving_up = threading.Event()
        self._ended = threading.Event()
        self._wakes = [threading.Event() for _ in engines]
        self._workers = [
            threading.Thread(
                target=self._work, args=(engine, wake), name=f"engine {engine.device}", daemon=True
            )
            for engine, wake in zip(engines, self._wakes, strict=True)
        ]
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._forget = self._store.changes.subscribe(self._told)
        for thread in (*self._workers, self._keeper):
            thread.start()

    def stop(self, grace: float = 0.0) -> bool:
        """Claim nothing more; hand back what does not end within ``grace`` seconds.

        Returns whether everything ended by itself.
        """
        self._stopping.set()
        for wake in self._wakes:
            wake.set()
        end = time.monotonic() + grace
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))
        clean = not any(worker.is_alive() for worker in self._workers)
        self._giving_up.set()
        for worker in self._workers:
            worker.join()
        self._ended.set()
        self._keeper.join()
        self._forget()
        for engine in self._engines:
            engine.close()
        return clean

    @property
    def busy(self) -> int:
        """How many predictions run now."""
        return len(self._holds)

    def _work(self, engine: Engine, wake: threading.Event) -> None:
        used = time.monotonic()
        while not self._stopping.is_set():
            wake.clear()
            try:
                if self._run_next(engine):
                    used = time.monotonic()
                    continue
                self._rest(engine, time.monotonic() - used)
            except Exception:
                log.exception("Nothing could be claimed; trying again.")
            wake.wait(_LOOK_EVERY_S)

    def _run_next(self, engine: Engine) -> bool:
        worker = f"{socket.gethostname()}:{os.getpid()}:{engine.device}"
        claimed = self._store.queue.claim(worker, engine.loaded)
        if claimed is None:
            return False
        hold = _Hold(claimed)
        with self._lock:
            self._holds[claimed.id] = hold
        try:
            with log_context(prediction=claimed.id, account=claimed.account_id):
                self._run(hold, engine)
        finally:
            with self._lock:
                del self._holds[claimed.id]
        return True

    def _run(self, hold: _Hold, engine: Engine) -> None:
        claimed, store = hold.prediction, self._store
        log.info("Attempt %d on %s", claimed.attempt, engine.device)
        try:
            self._running.run(claimed, engine, lambda: self._unwanted(hold))
        except Exception:
            log.exception("An engine met an error that nobody expected; it goes on.")
        if self._giving_up.is_set():
            store.queue.release(claimed.id, claimed.attempt)
        ended = store.predictions.get(claimed.id)
        log.info("Now %s", ended.status.value, extra={"seconds": ended.predict_seconds})

    def _unwanted(self, hold: _Hold) -> bool:
        return hold.lost.is_set() or self._giving_up.is_set()

    def _rest(self, engine: Engine, idle: float) -> None:
        """Unload what nobody used for long, unless a deployment wants it kept."""
        most = self._store.settings.idle_unload_seconds
        if any(known.min_instances for known in self._store.deployments.all()):
            engine.load()
        elif most and idle > most:
            engine.unload()

    def _told(self, prediction_id: str) -> None:
        if hold := self._holds.get(prediction_id):
            self._look_at(hold)
            return
        for wake in self._wakes:
            wake.set()

    def _look_at(self, hold: _Hold) -> None:
        now = self._store.predictions.get(hold.prediction.id)
        if now.attempt != hold.prediction.attempt or now.status.terminal:
            hold.lost.set()

    def _keep(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                due = time.monotonic() - renewed > self._store.settings.lease_seconds / 3
                renewed = time.monotonic() if due else renewed
                self._keep_holds(renew=due)
                self._store.queue.expire()
                for name in self._store.queue.rescue():
                    log.warning("Its worker fell silent", extra={"prediction": name})
            except Exception:  # noqa: PERF203
                log.exception("Leases and deadlines could not be kept; trying again.")

    def _keep_holds(self, *, renew: bool) -> None:
        with self._lock:
            holds = list(self._holds.values())
        queue, most = self._store.queue, self._store.settings.run_seconds
        for hold in holds:
            prediction = hold.prediction
            if time.monotonic() - hold.since > most:
                about = f"The prediction ran for more than {most:.0f} seconds."
                queue.fail(prediction.id, prediction.attempt, about)
            if renew and not queue.report(prediction.id, prediction.attempt):
                hold.lost.set()
            elif not renew:
                self._look_at(hold)


# Everything that works in the background of a server, wired from its store.


def local_engines(
    settings: ServerSettings, catalog: Catalog, devices: Sequence[str]
) -> list[Engine]:
    """Return one engine for each device; none of them has started anything yet."""
    options = RunnerOptions(
        settings.bundle, catalog.weights, settings.max_pixels, settings.backend, settings.compile
    )
    spec = upscaling_spec(options)
    patience = Patience(settings.load_seconds, settings.hang_seconds, settings.cancel_seconds)
    return [LocalEngine(spec, device, patience) for device in devices]


def open_supervisor(
    store: Store, catalog: Catalog, engines: Sequence[Engine], fetcher: Fetcher
) -> Supervisor:
    """Return what runs the predictions of a store on these engines, once started.

    Raises:
        MissingExtraError: the safety checker is wanted and not installed.
    """
    settings = store.settings
    inputs = InputReader(store.files, fetcher, settings.max_fetch_bytes, settings.fetch_seconds)
    resolver = CatalogResolver(catalog, store.models)
    return Supervisor(store, engines, resolver, inputs, open_checker(settings))
