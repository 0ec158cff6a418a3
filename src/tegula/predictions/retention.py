"""Removes what has been kept for long enough."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, exists, or_, select

from tegula.predictions import tables
from tegula.predictions.rows import forget
from tegula.predictions.store import Store

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
