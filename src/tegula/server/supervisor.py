"""Brings predictions and engines together: fetch inputs, run, renew leases, keep deadlines.

All threads here are of the server's process; ``engine.py`` says which process runs what.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy.exc import OperationalError

from tegula.catalog import Catalog
from tegula.errors import CancelledError
from tegula.server.engine import Engine
from tegula.server.fetch import CancelToken, Fetcher
from tegula.server.log import log_context
from tegula.server.ray_engine import Place, ray_engines
from tegula.server.runner import LocalEngine, Timeouts
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Prediction
from tegula.server.upscaling import RunnerOptions, upscaling_spec
from tegula.server.work import (
    CatalogResolver,
    Checker,
    InputFiles,
    PredictionRunner,
    Resolver,
    allow_all,
    open_checker,
)

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_NEAREST_DEADLINE_S = 5.0
"""No prediction is accepted with a deadline sooner than this, so none passes between two looks."""
_HEARTBEATS = 2
"""A lease lasts so many: one that comes late by less than the time to the next loses nothing."""
_MOST_FETCHES = 32
"""Inputs fetched at the same time, of all accounts and from all hosts."""
_FAREWELL_S = 1.0
"""How long the threads of fetches that were cut off may take until they have ended."""


@dataclass(eq=False)
class _Claim:
    """A prediction that this supervisor has claimed, to run it or to fetch an input of it.

    lost: cancelled once it is no longer ours: it ended, was cancelled, or another worker has it.
    host: where it fetches from at present, or is to as soon as it need not wait any more; a
        redirect leads to another.
    """

    prediction: Prediction
    since: float = field(default_factory=time.monotonic)
    lost: CancelToken = field(default_factory=CancelToken)
    host: str = ""
    waits: bool = False

    def __post_init__(self) -> None:
        self.host = self.prediction.fetch_host or ""

    @property
    def runs(self) -> bool:
        """Whether it is run on an engine, because no input is to be fetched."""
        return self.prediction.fetch_host is None


@dataclass(frozen=True)
class _Demand:
    """How many engines are to be started: those kept whatever waits, and those for what waits."""

    kept: int
    used: int
    since: float = field(default_factory=time.monotonic)


class Supervisor:
    """One thread for each engine, one for each fetch, and one that keeps leases and deadlines.

    An engine's thread claims the next prediction, runs it to its end, and claims again. While
    there is none it sleeps, and is woken by any change of a prediction, which may be a new one;
    it also looks twice a second, or seldom where other processes on the same database are heard.
    An engine that cannot take a job before it has a place in a cluster claims nothing until then;
    as many of these are started as predictions wait, and what is idle for long is given back.

    Inputs are fetched before that, so that no slow address keeps an engine waiting. One thread
    claims what is to be fetched and starts a thread for each, within limits for each account and
    host, which count a fetch where a redirect has led it. A fetch that was cancelled while its host
    was being looked up, or connected to, counts until that has ended, too: else an account could
    fill the process with such threads.

    Several supervisors may work on one store, in one process or in many: a claim is a lease that
    runs out unless it is renewed, and what a worker writes after it lost a claim is ignored.
    """

    def __init__(
        self,
        store: Store,
        engines: Sequence[Engine],
        resolver: Resolver,
        inputs: InputFiles,
        is_unsafe: Checker = allow_all,
    ) -> None:
        self._store = store
        self._engines = engines
        self._runner = PredictionRunner(store, resolver, inputs, is_unsafe)
        self._claims: dict[str, _Claim] = {}
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._demand = _Demand(0, 0, -math.inf)
        self._fetches: dict[_Claim, threading.Thread] = {}
        self._turns = threading.Condition(self._lock)  # a fetch ended, was lost or moved on
        # Stopping goes in three steps: claim nothing more; hand back what still runs; end.
        self._stopping = threading.Event()
        self._handing_back = threading.Event()
        self._missed = threading.Event()  # changes of claims may have gone unheard
        self._ended = threading.Event()
        self._wakes = [threading.Event() for _ in engines]
        self._workers = [
            threading.Thread(
                target=self._work, args=(engine, wake), name=f"engine {engine.device}", daemon=True
            )
            for engine, wake in zip(engines, self._wakes, strict=True)
        ]
        self._fetch_wake = threading.Event()
        self._fetcher = threading.Thread(target=self._start_fetches, name="fetches", daemon=True)
        self._keeper = threading.Thread(target=self._keep_leases, name="leases", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._unsubscribe = self._store.pubsub.subscribe(self._on_change, on_gap=self._on_gap)
        for thread in (*self._workers, self._fetcher, self._keeper):
            thread.start()

    def stop(self, grace: float = 0.0) -> bool:
        """Claim nothing more; hand back what does not end within ``grace`` seconds.

        What is being fetched is handed back at once: it would not be run here any more.

        Returns whether everything that ran ended by itself.
        """
        self._stopping.set()
        self._wake()
        self._hand_back_fetches()
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

    # The thread of an engine.

    def _work(self, engine: Engine, wake: threading.Event) -> None:
        worker = f"{socket.gethostname()}:{os.getpid()}:{engine.device}"
        last_used = time.monotonic()
        while not self._stopping.is_set():
            wake.clear()  # before the look: a prediction that comes meanwhile sets it again
            try:
                if engine.ready and (prediction := self._store.queue.claim(worker, engine.loaded)):
                    self._run(prediction, engine)
                    last_used = time.monotonic()
                    continue
                if self._while_idle(engine, time.monotonic() - last_used):
                    last_used = time.monotonic()
            except Exception:
                log.exception("Nothing could be claimed; trying again.")
            # What a cluster does wakes nobody: where an actor is to start, it is looked for often.
            waits = engine.started and not engine.ready
            wake.wait(_LOOK_EVERY_S if waits else self._store.pubsub.pause(_LOOK_EVERY_S))

    def _run(self, prediction: Prediction, engine: Engine) -> None:
        claim = _Claim(prediction)
        with self._keeping(claim):
            log.info("Attempt %d on %s", prediction.attempt, engine.device)
            try:
                self._runner.run(
                    prediction,
                    engine,
                    lambda: claim.lost.cancelled or self._handing_back.is_set(),
                )
            except OperationalError:
                # No fault of the prediction's: it may be begun again as often as that happens.
                log.exception("The database was lost while a prediction ran.")
                self._store.queue.release(prediction.id, prediction.attempt)
            except Exception:
                log.exception("An engine met an error that nobody expected; it goes on.")
                self._store.queue.lose(prediction.id, prediction.attempt, "it met an error")
            if self._handing_back.is_set():
                self._store.queue.release(prediction.id, prediction.attempt)
            now = self._store.predictions.get(prediction.id)
            log.info("Now %s", now.status.value, extra={"seconds": now.predict_seconds})

    @contextmanager
    def _keeping(self, claim: _Claim) -> Iterator[None]:
        """Renew the lease of a claim, and learn when it is lost, within the block."""
        prediction = claim.prediction
        with self._lock:
            self._claims[prediction.id] = claim
        try:
            with log_context(prediction=prediction.id, account=prediction.account_id):
                yield
        finally:
            with self._lock:
                # What has been fetched may be running already, under a claim of its own.
                if self._claims.get(prediction.id) is claim:
                    del self._claims[prediction.id]

    def _while_idle(self, engine: Engine, idle: float) -> bool:
        """Start an engine that is wanted, or give one back that nobody used for long.

        Returns whether it was started.
        """
        longest = self._store.settings.idle_unload_seconds
        with self._starting:  # two that look at once would both count as the one that lacks
            demand = self._present_demand()
            started = sum(each.started for each in self._engines)
            if engine.started:
                if longest and idle > longest and started > demand.kept:
                    engine.unload()
                return False
            # Those that start with their first job need nobody to start them for what waits.
            if started < (demand.kept if engine.ready else demand.used):
                engine.load()
            return engine.started

    def _present_demand(self) -> _Demand:
        """Return the demand, read from the database at most once in half a second."""
        if time.monotonic() - self._demand.since > _LOOK_EVERY_S:
            settings, most = self._store.settings, len(self._engines)
            own = settings.ray_min_actors if settings.engine == "ray" else 0
            kept = min(most, max(own, self._store.deployments.stay_loaded()))
            if any(engine.wants_help for engine in self._engines):
                kept = most  # each is of use to a large picture, also those that idle otherwise
            with self._lock:
                running = sum(claim.runs for claim in self._claims.values())
            used = min(most, max(kept, running + self._store.queue.waiting()))
            self._demand = _Demand(kept, used)
        return self._demand

    # The thread that starts fetches, and theirs.

    def _start_fetches(self) -> None:
        worker = f"{socket.gethostname()}:{os.getpid()}:fetch"
        while not self._stopping.is_set():
            self._fetch_wake.clear()  # before the look, as engines do
            try:
                if (prediction := self._claim_fetch(worker)) is not None:
                    claim = _Claim(prediction)
                    thread = threading.Thread(
                        target=self._fetch, args=(claim,), name="fetch", daemon=True
                    )
                    with self._lock:
                        self._fetches[claim] = thread
                    thread.start()
                    continue
            except Exception:
                log.exception("Nothing could be fetched; trying again.")
            self._fetch_wake.wait(self._store.pubsub.pause(_LOOK_EVERY_S))

    def _claim_fetch(self, worker: str) -> Prediction | None:
        with self._lock:
            for claim, thread in list(self._fetches.items()):
                if not thread.is_alive():  # what was left behind
                    self._forget(claim)
            fetches = list(self._fetches)
        if len(fetches) >= _MOST_FETCHES:
            return None
        accounts = Counter(claim.prediction.account_id for claim in fetches)
        # Whoever waits for a host counts as well, so that it comes before new fetches.
        hosts = Counter(claim.host for claim in fetches)
        settings = self._store.settings
        return self._store.queue.claim_fetch(
            worker,
            [name for name, count in accounts.items() if count >= settings.fetches_per_account],
            [name for name, count in hosts.items() if count >= settings.fetches_per_host],
        )

    def _fetch(self, claim: _Claim) -> None:
        try:
            with self._keeping(claim):
                self._runner.fetch(
                    claim.prediction, claim.lost, lambda host: self._move_on(claim, host)
                )
        except Exception:
            log.exception("A fetch met an error that nobody expected; its lease runs out.")
        finally:
            with self._lock:
                if (left_behind := claim.lost.left_behind) is not None:
                    self._fetches[claim] = left_behind
                else:
                    self._forget(claim)
            self._fetch_wake.set()

    def _forget(self, claim: _Claim) -> None:
        del self._fetches[claim]
        self._turns.notify_all()

    def _move_on(self, claim: _Claim, host: str) -> None:
        """Count a fetch at the host that a redirect leads to, once that has room for one more.

        Raises:
            CancelledError: the claim was lost meanwhile.
        """
        most = self._store.settings.fetches_per_host

        def may_go_on() -> bool:
            there = sum(each.host == host and not each.waits for each in self._fetches)
            return claim.lost.cancelled or there < most

        with self._turns:
            claim.host, claim.waits = host, True
            self._turns.notify_all()  # the host before has one less
            self._turns.wait_for(may_go_on)
            claim.waits = False
        if claim.lost.cancelled:
            raise CancelledError

    def _give_up(self, claim: _Claim) -> None:
        claim.lost.cancel()
        with self._turns:
            self._turns.notify_all()

    def _hand_back_fetches(self) -> None:
        self._fetcher.join()  # it claims no more
        with self._lock:
            fetches = dict(self._fetches)
        for claim in fetches:
            self._give_up(claim)
            try:
                self._store.queue.release(claim.prediction.id, claim.prediction.attempt)
            except Exception:
                log.exception("A fetch could not be handed back; its lease runs out.")
        end = time.monotonic() + _FAREWELL_S
        for thread in fetches.values():
            thread.join(max(0.0, end - time.monotonic()))

    # Changes of predictions, in the thread that made them or heard of them.

    def _on_change(self, prediction_id: str) -> None:
        claim = self._claims.get(prediction_id)
        if claim is not None:
            try:
                self._check(claim)
            except OperationalError:  # whose thread this is has nothing to do with it
                self._missed.set()
        if claim is None or not claim.runs:
            self._wake()

    def _on_gap(self) -> None:
        self._missed.set()
        self._wake()

    def _wake(self) -> None:
        self._demand = _Demand(0, 0, -math.inf)  # read again: what waits may have changed
        for wake in (*self._wakes, self._fetch_wake):
            wake.set()

    def _check(self, claim: _Claim) -> None:
        now = self._store.predictions.get(claim.prediction.id)
        if now.attempt != claim.prediction.attempt or now.status.terminal:
            self._give_up(claim)

    # The thread that keeps leases and deadlines.

    def _keep_leases(self) -> None:
        renewed = look_at = time.monotonic()
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                check = self._missed.is_set() or not self._store.pubsub.hears_others
                self._missed.clear()
                heartbeat = self._store.settings.lease_seconds / _HEARTBEATS
                # At the next look it would be late.
                due = time.monotonic() - renewed > heartbeat - _LOOK_EVERY_S
                renewed = time.monotonic() if due else renewed
                with self._lock:
                    claims = list(self._claims.values())
                for claim in claims:
                    self._keep(claim, renew=due, check=check)
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + self._end_what_is_due()
            except Exception:  # noqa: PERF203
                log.exception("Leases and deadlines could not be kept; trying again.")

    def _end_what_is_due(self) -> float:
        """End and rescue predictions; return the seconds until more may be due."""
        store = self._store
        store.queue.expire()
        for prediction_id in store.queue.rescue():
            log.warning("Its worker fell silent", extra={"prediction": prediction_id})
        if not store.pubsub.hears_others:
            return 0.0
        due = store.queue.next_due()
        left = _NEAREST_DEADLINE_S if due is None else (due - store.clock()).total_seconds()
        return min(left, _NEAREST_DEADLINE_S, store.settings.lease_seconds / _HEARTBEATS)

    def _keep(self, claim: _Claim, *, renew: bool, check: bool) -> None:
        """End a prediction that runs for too long, and renew the lease or see that it is ours."""
        prediction, queue = claim.prediction, self._store.queue
        longest = self._store.settings.run_seconds
        if claim.runs and time.monotonic() - claim.since > longest:
            reason = f"The prediction ran for more than {longest:.0f} seconds."
            queue.fail(prediction.id, prediction.attempt, reason)
        if renew:
            if not queue.report(prediction.id, prediction.attempt):
                self._give_up(claim)
        elif check:
            self._check(claim)


# Wiring.


def open_engines(
    settings: ServerSettings, catalog: Catalog, where: Sequence[str] | Place
) -> list[Engine]:
    """Return the engines of a server, none of which has started its process yet.

    Args:
        settings: of the server.
        catalog: of the models.
        where: the devices of this machine, one for each engine, or a place in a cluster.
    """
    options = RunnerOptions(
        settings.models,
        catalog.weights,
        settings.max_pixels,
        settings.backend,
        settings.compile,
        settings.bundles,
        settings.idle_unload_seconds,
        settings.ray_shard_above,
    )
    spec = upscaling_spec(options)
    timeouts = Timeouts(settings.load_seconds, settings.hang_seconds, settings.cancel_seconds)
    if isinstance(where, Place):
        return [*ray_engines(settings, where, spec, timeouts)]
    return [LocalEngine(spec, device, timeouts) for device in where]


def open_supervisor(
    store: Store, catalog: Catalog, engines: Sequence[Engine], fetcher: Fetcher
) -> Supervisor:
    """Return the supervisor of these engines, not started yet.

    Raises:
        MissingExtraError: the safety checker is switched on and not installed.
    """
    settings = store.settings
    inputs = InputFiles(store.files, fetcher, settings.max_fetch_bytes, settings.fetch_seconds)
    resolver = CatalogResolver(catalog, store.models)
    return Supervisor(store, engines, resolver, inputs, open_checker(settings))
