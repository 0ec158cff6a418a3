"""Brings predictions and engines together: claim, run, renew leases, keep deadlines.

All threads here are of the server's process; ``engine.py`` says which process runs what.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tegula.catalog import Catalog
from tegula.server.engine import Engine
from tegula.server.fetch import Fetcher
from tegula.server.runner import LocalEngine, Timeouts
from tegula.server.settings import ServerSettings, log_context
from tegula.server.store import Store
from tegula.server.tables import Prediction
from tegula.server.upscaling import RunnerOptions, upscaling_spec
from tegula.server.work import (
    CatalogResolver,
    Checker,
    InputReader,
    PredictionRunner,
    Resolver,
    allow_all,
    open_checker,
)

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


@dataclass
class _Claim:
    """A prediction that an engine of this supervisor runs.

    lost: set once it is no longer ours: it ended, was cancelled, or another worker has it.
    """

    prediction: Prediction
    since: float = field(default_factory=time.monotonic)
    lost: threading.Event = field(default_factory=threading.Event)


class Supervisor:
    """One thread for each engine, and one that keeps leases and deadlines.

    An engine's thread claims the next prediction, runs it to its end, and claims again. While
    there is none it sleeps, and is woken by any change of a prediction, which may be a new one;
    it also looks twice a second, since other processes on the same database wake nobody here.

    Several supervisors may work on one store, in one process or in many: a claim is a lease that
    runs out unless it is renewed, and what a worker writes after it lost a claim is ignored.
    """

    def __init__(
        self,
        store: Store,
        engines: Sequence[Engine],
        resolver: Resolver,
        inputs: InputReader,
        is_unsafe: Checker = allow_all,
    ) -> None:
        self._store = store
        self._engines = engines
        self._runner = PredictionRunner(store, resolver, inputs, is_unsafe)
        self._claims: dict[str, _Claim] = {}
        self._lock = threading.Lock()
        # Stopping goes in three steps: claim nothing more; hand back what still runs; end.
        self._stopping = threading.Event()
        self._handing_back = threading.Event()
        self._ended = threading.Event()
        self._wakes = [threading.Event() for _ in engines]
        self._workers = [
            threading.Thread(
                target=self._work, args=(engine, wake), name=f"engine {engine.device}", daemon=True
            )
            for engine, wake in zip(engines, self._wakes, strict=True)
        ]
        self._keeper = threading.Thread(target=self._keep_leases, name="leases", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._unsubscribe = self._store.pubsub.subscribe(self._on_change)
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
        self._handing_back.set()
        for worker in self._workers:
            worker.join()
        # Leases are kept until here: what runs within the grace must not go to another worker.
        self._ended.set()
        self._keeper.join()
        self._unsubscribe()
        for engine in self._engines:
            engine.close()
        return clean

    @property
    def busy(self) -> int:
        """How many predictions run now."""
        return len(self._claims)

    # The thread of an engine.

    def _work(self, engine: Engine, wake: threading.Event) -> None:
        worker = f"{socket.gethostname()}:{os.getpid()}:{engine.device}"
        last_used = time.monotonic()
        while not self._stopping.is_set():
            wake.clear()  # before the look: a prediction that comes meanwhile sets it again
            try:
                prediction = self._store.queue.claim(worker, engine.loaded)
                if prediction is not None:
                    self._run(prediction, engine)
                    last_used = time.monotonic()
                    continue
                self._rest(engine, time.monotonic() - last_used)
            except Exception:
                log.exception("Nothing could be claimed; trying again.")
            wake.wait(_LOOK_EVERY_S)

    def _run(self, prediction: Prediction, engine: Engine) -> None:
        claim = _Claim(prediction)
        with self._lock:
            self._claims[prediction.id] = claim
        try:
            with log_context(prediction=prediction.id, account=prediction.account_id):
                log.info("Attempt %d on %s", prediction.attempt, engine.device)
                try:
                    self._runner.run(
                        prediction,
                        engine,
                        lambda: claim.lost.is_set() or self._handing_back.is_set(),
                    )
                except Exception:
                    log.exception("An engine met an error that nobody expected; it goes on.")
                if self._handing_back.is_set():
                    self._store.queue.release(prediction.id, prediction.attempt)
                now = self._store.predictions.get(prediction.id)
                log.info("Now %s", now.status.value, extra={"seconds": now.predict_seconds})
        finally:
            with self._lock:
                del self._claims[prediction.id]

    def _rest(self, engine: Engine, idle: float) -> None:
        """Unload models that nobody used for long, unless a deployment wants them kept."""
        longest = self._store.settings.idle_unload_seconds
        if self._store.deployments.any_stay_loaded():
            engine.load()
        elif longest and idle > longest:
            engine.unload()

    # Changes of predictions, in the thread that made them.

    def _on_change(self, prediction_id: str) -> None:
        if claim := self._claims.get(prediction_id):
            self._check(claim)
            return
        for wake in self._wakes:
            wake.set()

    def _check(self, claim: _Claim) -> None:
        now = self._store.predictions.get(claim.prediction.id)
        if now.attempt != claim.prediction.attempt or now.status.terminal:
            claim.lost.set()

    # The thread that keeps leases and deadlines.

    def _keep_leases(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                # A third of a lease leaves two more tries before it runs out.
                due = time.monotonic() - renewed > self._store.settings.lease_seconds / 3
                renewed = time.monotonic() if due else renewed
                with self._lock:
                    claims = list(self._claims.values())
                for claim in claims:
                    self._keep(claim, renew=due)
                self._store.queue.expire()
                for prediction_id in self._store.queue.rescue():
                    log.warning("Its worker fell silent", extra={"prediction": prediction_id})
            except Exception:  # noqa: PERF203
                log.exception("Leases and deadlines could not be kept; trying again.")

    def _keep(self, claim: _Claim, *, renew: bool) -> None:
        """End a prediction that runs for too long, and renew the lease or see that it is ours."""
        prediction, queue = claim.prediction, self._store.queue
        longest = self._store.settings.run_seconds
        if time.monotonic() - claim.since > longest:
            reason = f"The prediction ran for more than {longest:.0f} seconds."
            queue.fail(prediction.id, prediction.attempt, reason)
        if not renew:
            self._check(claim)
        elif not queue.report(prediction.id, prediction.attempt):
            claim.lost.set()


# Wiring.


def local_engines(
    settings: ServerSettings, catalog: Catalog, devices: Sequence[str]
) -> list[Engine]:
    """Return one engine for each device; none has started its process yet."""
    options = RunnerOptions(
        settings.models,
        catalog.weights,
        settings.max_pixels,
        settings.backend,
        settings.compile,
        settings.bundles,
        settings.idle_unload_seconds,
    )
    spec = upscaling_spec(options)
    timeouts = Timeouts(settings.load_seconds, settings.hang_seconds, settings.cancel_seconds)
    return [LocalEngine(spec, device, timeouts) for device in devices]


def open_supervisor(
    store: Store, catalog: Catalog, engines: Sequence[Engine], fetcher: Fetcher
) -> Supervisor:
    """Return the supervisor of these engines, not started yet.

    Raises:
        MissingExtraError: the safety checker is switched on and not installed.
    """
    settings = store.settings
    inputs = InputReader(store.files, fetcher, settings.max_fetch_bytes, settings.fetch_seconds)
    resolver = CatalogResolver(catalog, store.models)
    return Supervisor(store, engines, resolver, inputs, open_checker(settings))
