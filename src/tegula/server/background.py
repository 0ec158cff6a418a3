"""Work beside the requests: removing what was kept for long enough, and sending webhooks."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

from sqlalchemy import ColumnElement, Select, delete, exists, func, select
from sqlalchemy.orm import Session

from tegula.errors import FetchError, StorageError
from tegula.server.db import SWEEP_LOCK
from tegula.server.fetch import Answer, Fetcher
from tegula.server.log import log_context
from tegula.server.predictions import delete_rows, forget
from tegula.server.store import Store
from tegula.server.tables import FileRecord, IdempotencyKey, Prediction, WebhookMessage
from tegula.server.webhooks import JITTER, outcome, signed_headers

log = logging.getLogger(__name__)

KEYS_FOR = timedelta(hours=24)
MESSAGES_FOR = timedelta(days=7)
UNUSED_BLOBS_FOR = timedelta(hours=1)
_BATCH = 100
"""Rows that are removed in one transaction."""
_MOST_NAMES = 500
"""Names in one query; databases have limits."""


@dataclass(frozen=True)
class Swept:
    """How much a sweep removed."""

    predictions: int
    files: int
    blobs: int


class Sweeper:
    """Removes, every now and then: old predictions or their data, expired files, unused bytes.

    A shared prediction stays, with its data. Bytes stay for ``unused_for`` after they were last
    put, so that a file that is just being stored never loses them. Removals go in batches, of
    which each takes the lock to write once: requests wait for that lock, too.
    """

    def __init__(
        self, store: Store, *, every: float = 30.0, unused_for: timedelta = UNUSED_BLOBS_FOR
    ) -> None:
        self._store = store
        self._every = every
        self._unused_s = unused_for.total_seconds()
        self._list_at = 0.0
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
        """Remove what is due now; what all servers share, only if no other one is sweeping."""
        self._clean_spool()
        self._store.tiles.clean(self._used)
        self._store.blobs.clean(self._unused_s)
        with self._store.database.first_to(SWEEP_LOCK) as is_first:
            if not is_first:
                return Swept(0, 0, 0)
            predictions = self._forget_predictions() + self._delete_predictions()
            files = self._delete_files()
            self._delete_records()
            self._store.usage.add_up()
            return Swept(predictions, files, self._remove_blobs())

    def _forget_predictions(self) -> int:
        kept = Prediction.data_removed.is_(False)
        return self._remove(self._store.settings.retention_seconds, kept, forget)

    def _delete_predictions(self) -> int:
        """Remove old predictions for good, but those of which a webhook is still to be sent."""
        unsent = exists().where(
            WebhookMessage.prediction_id == Prediction.id, WebhookMessage.state == "pending"
        )
        return self._remove(self._store.settings.history_seconds, ~unsent, delete_rows)

    def _remove(
        self,
        seconds: int,
        where: ColumnElement[bool],
        remove: Callable[[Session, Collection[str]], None],
    ) -> int:
        """Remove something of all private predictions that ended so long ago; 0 is never."""
        if not seconds:
            return 0
        query = (
            select(Prediction.id)
            .where(Prediction.completed_at <= self._store.clock() - timedelta(seconds=seconds))
            .where(_PRIVATE, where)
            .limit(_BATCH)
        )
        removed = 0
        while not self._stopped.is_set():
            # Most of the time there is nothing, which reading alone tells.
            with self._store.database.read() as session:
                if session.scalar(query.limit(1)) is None:
                    break
            with self._store.database.write() as session:
                if ids := session.scalars(query).all():
                    remove(session, ids)
            removed += len(ids)
        return removed

    def _delete_files(self) -> int:
        due = FileRecord.expires_at <= self._store.clock()
        with self._store.database.write() as session:
            return len(
                session.scalars(delete(FileRecord).where(due).returning(FileRecord.id)).all()
            )

    def _delete_records(self) -> None:
        now = self._store.clock()
        old_keys = IdempotencyKey.created_at <= now - KEYS_FOR
        old_messages = WebhookMessage.finished_at <= now - MESSAGES_FOR
        with self._store.database.write() as session:
            session.execute(delete(IdempotencyKey).where(old_keys))
            session.execute(delete(WebhookMessage).where(old_messages))
        self._store.rates.delete_full(now.timestamp())

    def _clean_spool(self) -> None:
        """Remove the folders of runs whose process died."""
        settings = self._store.settings
        oldest = time.time() - settings.run_seconds - self._unused_s
        for folder in (settings.folder / "spool").glob("*"):
            # A run that ends meanwhile removes its folder itself.
            with contextlib.suppress(FileNotFoundError):
                if folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)

    def _remove_blobs(self) -> int:
        """Remove bytes that no file refers to any more.

        For nearly all blobs there is a file. The others are looked at again just before, and how
        old they are: whoever keeps a file puts its bytes first, so a blob that is about to get a
        file is new.
        """
        blobs, removed = self._store.blobs, 0
        if time.monotonic() < self._list_at:
            return 0
        try:
            found = blobs.names()
            while names := list(islice(found, _MOST_NAMES)):
                unused = sorted(set(names) - self._used(names))
                for start in range(0, len(unused), _BATCH):
                    batch = unused[start : start + _BATCH]
                    for name in sorted(set(batch) - self._used(batch)):
                        if blobs.age(name) >= self._unused_s:
                            blobs.remove(name)
                            removed += 1
        except StorageError as error:
            log.warning("Unused files stay for now: %s", error)
        self._list_at = time.monotonic() + blobs.listed_every
        return removed

    def _used(self, names: Collection[str]) -> set[str]:
        """Return those of some hashes that a file has."""
        used: set[str] = set()
        rest = iter(names)
        while some := list(islice(rest, _MOST_NAMES)):
            with self._store.database.read() as session:
                used.update(session.scalars(_rows_of(some)))
        return used

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                self.sweep()
            except Exception:  # noqa: PERF203
                log.exception("A sweep failed; trying again later.")


# Not "is None": SQLite would look for that in the unique index, where nearly all rows have it.
_PRIVATE = func.coalesce(Prediction.share_token, "") == ""


def _rows_of(names: Collection[str]) -> Select[str]:
    return select(FileRecord.sha256).where(FileRecord.sha256.in_(names))


_MESSAGE_BATCH = 32
_LOOK_EVERY_S = 1.0
_PUT_OFF_FOR = timedelta(milliseconds=500)
"""How long a message waits whose receiver has as many under way as it is sent at once."""


class WebhookSender:
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
        """Begin to send."""
        # Whoever changes a prediction sends the messages about it; others see what it left by
        # looking for themselves.
        self._unsubscribe = self._store.pubsub.subscribe(
            lambda _: self._wake.set(), on_gap=self._wake.set, own_only=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop once all that is due now is sent; the rest waits for the next start."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._unsubscribe()
            self._thread.join()
            self._look()
        self._executor.shutdown()

    def send_due(self) -> list[Future[None]]:
        """Begin to send what is due; return what is under way."""
        settings = self._store.settings
        most = settings.webhooks_per_receiver
        with self._lock:
            busy = [receiver for receiver, count in self._sending.items() if count >= most]
        hold = timedelta(seconds=2 * settings.webhook_seconds + 1)
        due = self._store.webhooks.due(_MESSAGE_BATCH, hold, busy)
        return [self._executor.submit(self._send, message) for message in self._reserve(due)]

    def _reserve(self, due: Iterable[WebhookMessage]) -> list[WebhookMessage]:
        """Return those that a receiver has room for; put the others off a little."""
        reserved = []
        for message in due:
            with self._lock:
                room = self._sending[message.receiver] < self._store.settings.webhooks_per_receiver
                self._sending[message.receiver] += room
            if room:
                reserved.append(message)
            else:
                self._store.webhooks.put_off(message.id, self._store.clock() + _PUT_OFF_FOR)
        return reserved

    def _send(self, message: WebhookMessage) -> None:
        with log_context(prediction=message.prediction_id, account=message.account_id):
            try:
                self._attempt(message)
            except Exception:
                log.exception("A webhook could not be noted as sent; it will be sent again.")
        with self._lock:
            self._sending[message.receiver] -= 1
            self._sending += Counter()  # drops receivers with nothing under way
        self._wake.set()

    def _attempt(self, message: WebhookMessage) -> None:
        store, body = self._store, message.body or ""
        secrets = store.webhooks.secrets(message.account_id)
        headers = signed_headers(secrets, message.id, store.clock(), body)
        answer: Answer | None = None
        error: str | None = None
        try:
            seconds = store.settings.webhook_seconds
            answer = self._fetcher.post(message.url, body.encode(), headers, seconds=seconds)
        except FetchError as failure:
            error = str(failure)
        jitter = random.uniform(-JITTER, JITTER)  # noqa: S311 - spreads load, hides nothing
        result = outcome(message, answer, store.clock(), jitter, error)
        if result.state == "failed":
            log.warning("A webhook about %s was given up", message.event)
        store.webhooks.finish_attempt(message.id, result)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            self._wake.wait(self._look())

    def _look(self) -> float:
        """Begin to send what is due; return the seconds until it is worth looking again.

        Every change of a prediction wakes the thread, and few come with a message. That none is
        due shows by reading alone, without the lock to write that taking messages needs.
        """
        pause = self._store.pubsub.pause(_LOOK_EVERY_S)
        try:
            due = self._store.webhooks.next_due()
            if due is None:
                return pause
            left = (due - self._store.clock()).total_seconds()
            if left > 0:
                return min(left, pause)
            # Nothing to begin with means that the receivers are busy; an end of those wakes us.
            return 0.0 if self.send_due() else _PUT_OFF_FOR.total_seconds()
        except Exception:
            log.exception("The webhooks cannot be read; they stay for later.")
            return _LOOK_EVERY_S
