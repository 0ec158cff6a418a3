"""Work beside the requests: retention and webhook delivery."""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus

from sqlalchemy import delete, exists, or_, select

from tegula.errors import FetchError
from tegula.server import db as tables
from tegula.server.db import WebhookDelivery
from tegula.server.fetch import Answer, Fetcher
from tegula.server.queue import forget
from tegula.server.settings import log_context
from tegula.server.store import Store
from tegula.server.webhooks import signed_headers

# Removes what has been kept for long enough.

log = logging.getLogger(__name__)

KEYS_FOR = timedelta(hours=24)
MESSAGES_FOR = timedelta(days=7)
UNUSED_BLOBS_FOR = timedelta(hours=1)
_BATCH = 100


@dataclass(frozen=True)
class Swept:
    """How much a sweep removed."""

    predictions: int
    files: int
    blobs: int


class Sweeper:
    """Sweeps now and then: data of old predictions, expired files, bytes nobody names.

    A shared prediction keeps its data. Bytes stay for ``unused_for`` after they were last
    put, so that a file which is just being made never loses them.
    """

    def __init__(
        self, store: Store, *, every: float = 30.0, unused_for: timedelta = UNUSED_BLOBS_FOR
    ) -> None:
        self._store = store
        self._every = every
        self._unused_for = unused_for
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Begin to sweep."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the present sweep."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def sweep(self) -> Swept:
        """Remove what is due now."""
        predictions = self._forget_predictions() if self._store.settings.retention_seconds else 0
        files = self._delete_files()
        self._delete_records()
        self._clean_spool()
        return Swept(predictions, files, self._remove_blobs())

    def _forget_predictions(self) -> int:
        table = tables.predictions
        age = timedelta(seconds=self._store.settings.retention_seconds)
        query = (
            select(table.c.id)
            .where(table.c.completed_at <= self._store.clock() - age)
            .where(table.c.data_removed.is_(False), table.c.share_token.is_(None))
            .limit(_BATCH)
        )
        forgotten = 0
        while not self._stopped.is_set():
            with self._store.database.write() as connection:
                names = connection.execute(query).scalars().all()
                for name in names:
                    forget(connection, name)
            forgotten += len(names)
            if len(names) < _BATCH:
                break
        return forgotten

    def _delete_files(self) -> int:
        """Delete expired files, and those a worker still made of a prediction without data."""
        files, predictions = tables.files, tables.predictions
        owner = predictions.c.id == files.c.prediction_id
        orphaned = exists().where(owner, predictions.c.data_removed.is_(True))
        due = or_(files.c.expires_at <= self._store.clock(), orphaned)
        with self._store.database.write() as connection:
            return connection.execute(delete(files).where(due)).rowcount

    def _delete_records(self) -> None:
        now = self._store.clock()
        keys, messages = tables.idempotency_keys, tables.webhooks
        with self._store.database.write() as connection:
            connection.execute(delete(keys).where(keys.c.created_at <= now - KEYS_FOR))
            connection.execute(delete(messages).where(messages.c.finished_at <= now - MESSAGES_FOR))

    def _clean_spool(self) -> None:
        """Remove the folders of runs whose process died."""
        settings = self._store.settings
        oldest = time.time() - settings.run_seconds - self._unused_for.total_seconds()
        for folder in (settings.folder / "spool").glob("*"):
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_blobs(self) -> int:
        table, removed = tables.files, 0
        self._store.blobs.clean(self._unused_for.total_seconds())
        for name in list(self._store.blobs.names()):
            if self._store.blobs.age(name) < self._unused_for.total_seconds():
                continue
            with self._store.database.write() as connection:
                used = connection.execute(select(table.c.id).where(table.c.sha256 == name)).first()
                if used is None:
                    self._store.blobs.remove(name)
                    removed += 1
        return removed

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                self.sweep()
            except Exception:  # noqa: PERF203
                log.exception("A sweep failed; trying again later.")


# Sends the webhooks of the outbox, beside all other work and never in its way.

HOUR = 3600
SCHEDULE = (5, 300, 1800, 2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 20 * HOUR, 24 * HOUR)
"""Seconds between the attempts for a terminal message; the others are sent once."""

JITTER = 0.1
_LONGEST_PAUSE = HOUR
_DELIVERY_BATCH = 32
_LOOK_EVERY_S = 1.0
_DEFER = timedelta(milliseconds=500)


@dataclass(frozen=True)
class Outcome:
    """What follows from one attempt: a state, and when to try again if it is pending."""

    state: str
    next_at: datetime


def outcome(
    delivery: WebhookDelivery, answer: Answer | None, now: datetime, jitter: float
) -> Outcome:
    """Return what follows from an answer, or from none.

    Only 2xx is success; redirects are failures, and 410 asks never to be called again.

    Args:
        delivery: the message, its attempts counted with this one.
        answer: None if the receiver could not be reached.
        now: when.
        jitter: share by which the pause is longer or shorter, -0.1..0.1.
    """
    if answer is not None and 200 <= answer.status < 300:
        return Outcome("delivered", now)
    gone = answer is not None and answer.status == HTTPStatus.GONE
    if gone or delivery.event != "completed" or delivery.attempts > len(SCHEDULE):
        return Outcome("failed", now)
    pause = SCHEDULE[delivery.attempts - 1] * (1 + jitter)
    asked = (answer.retry_after if answer else None) or 0
    return Outcome("pending", now + timedelta(seconds=max(pause, min(asked, _LONGEST_PAUSE))))


class Deliverer:
    """Takes due messages from the store and sends them, some at a time.

    No receiver is sent to more than a few times at once, so that a slow one holds up
    nobody but itself.
    """

    def __init__(self, store: Store, fetcher: Fetcher, *, workers: int = 16) -> None:
        self._store = store
        self._fetcher = fetcher
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="webhook")
        self._sending: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._forget = self._store.changes.subscribe(lambda _: self._wake.set())
        self._thread.start()

    def stop(self) -> None:
        """Stop after what is being sent and what is due now; the rest is the next start's."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._forget()
            self._thread.join()
            self._look()
        self._executor.shutdown()

    def step(self) -> list[Future[None]]:
        """Begin to send what is due; return what is under way."""
        settings = self._store.settings
        most = settings.webhooks_per_receiver
        with self._lock:
            busy = [receiver for receiver, count in self._sending.items() if count >= most]
        hold = timedelta(seconds=2 * settings.webhook_seconds + 1)
        due = self._store.webhooks.due(_DELIVERY_BATCH, hold, busy)
        return [self._executor.submit(self._send, item) for item in self._reserve(due)]

    def _reserve(self, due: Iterable[WebhookDelivery]) -> list[WebhookDelivery]:
        """Return those that a receiver has room for; put the others off a little."""
        reserved = []
        for delivery in due:
            with self._lock:
                room = self._sending[delivery.receiver] < self._store.settings.webhooks_per_receiver
                self._sending[delivery.receiver] += room
            if room:
                reserved.append(delivery)
            else:
                later = self._store.clock() + _DEFER
                attempts = delivery.attempts - 1
                self._store.webhooks.settle(delivery.id, next_at=later, attempts=attempts)
        return reserved

    def _send(self, delivery: WebhookDelivery) -> None:
        with log_context(prediction=delivery.prediction_id, account=delivery.account_id):
            try:
                self._attempt(delivery)
            except Exception:
                log.exception("A webhook could not be noted as sent; it will be sent again.")
        with self._lock:
            self._sending[delivery.receiver] -= 1
            self._sending += Counter()  # drops receivers with nothing under way
        self._wake.set()

    def _attempt(self, delivery: WebhookDelivery) -> None:
        store, body = self._store, delivery.body or ""
        secrets = store.webhooks.secrets(delivery.account_id)
        headers = signed_headers(secrets, delivery.id, int(store.clock().timestamp()), body)
        answer, error = None, None
        try:
            seconds = store.settings.webhook_seconds
            answer = self._fetcher.post(delivery.url, body.encode(), headers, seconds=seconds)
        except FetchError as failure:
            error = str(failure)
        now = store.clock()
        jitter = random.uniform(-JITTER, JITTER)  # noqa: S311 - spreads load, hides nothing
        result = outcome(delivery, answer, now, jitter)
        if result.state == "failed":
            log.warning("A webhook about %s was given up", delivery.event)
        store.webhooks.settle(
            delivery.id,
            state=result.state,
            next_at=result.next_at,
            finished_at=None if result.state == "pending" else now,
            last_status=answer.status if answer else None,
            last_error=error,
        )

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            if not self._look():
                self._wake.wait(self._pause())

    def _look(self) -> bool:
        """Begin to send what is due, if anything is."""
        try:
            return bool(self.step())
        except Exception:
            log.exception("The outbox cannot be read; what is in it stays for later.")
            return False

    def _pause(self) -> float:
        """Return seconds to sleep: until the next message, a second at most."""
        due = self._store.webhooks.next_due()
        if due is None:
            return _LOOK_EVERY_S
        left = (due - self._store.clock()).total_seconds()
        return min(max(left, 0.02), _LOOK_EVERY_S)
