"""Predictions as their owners see them: accept, get, list, cancel, share, remove."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, select, update
from sqlalchemy.exc import IntegrityError

from tegula.errors import NotFoundError
from tegula.predictions import tables
from tegula.predictions.admission import Waiting, admit, read_waiting, replay
from tegula.predictions.changes import Changes
from tegula.predictions.clock import Clock
from tegula.predictions.database import Database
from tegula.predictions.ids import new_id, new_secret
from tegula.predictions.lifecycle import Lifecycle, lock, write
from tegula.predictions.mapping import columns_of, file_ids, prediction_of, record
from tegula.predictions.paging import read_page
from tegula.predictions.records import (
    Created,
    Event,
    NewPrediction,
    Page,
    Prediction,
)
from tegula.predictions.states import State, Trigger

_BY_ID = select(tables.predictions).where(tables.predictions.c.id == bindparam("id"))


@dataclass(frozen=True)
class Predictions:
    """The predictions of all accounts; ``account_id`` hides those of the others.

    max_waiting, max_waiting_seconds: work beyond which none is accepted.
    """

    database: Database
    clock: Clock
    lifecycle: Lifecycle
    changes: Changes
    max_waiting: int
    max_waiting_seconds: float

    def create(
        self,
        new: NewPrediction,
        *,
        idempotency_key: str | None = None,
        request_hash: str = "",
    ) -> Created:
        """Accept a prediction; it is on the disk when this returns.

        A key that an earlier request of the account used returns that one's prediction, as
        it is now, whether or not there would be room for another.

        Raises:
            BusyError: too much work is waiting.
            ConflictError: the key was used for another request.
        """
        try:
            with self.database.write() as connection:
                created = replay(connection, new, idempotency_key, request_hash)
                if created is None:
                    created = self._insert(connection, new, idempotency_key, request_hash)
        except IntegrityError:
            # On PostgreSQL a twin with the same key may win between look and insert.
            with self.database.write() as connection:
                created = replay(connection, new, idempotency_key, request_hash)
            if created is None:
                raise
        if not created.replayed:
            self.changes.tell(created.prediction.id)
        return created

    def get(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Return a prediction.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.read() as connection:
            row = connection.execute(_BY_ID, {"id": prediction_id}).one_or_none()
        if row is None or account_id not in (None, row.account_id):
            raise NotFoundError("There is no such prediction.")
        return prediction_of(row)

    def cancel(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """End a prediction at once; whoever runs it learns so and stops. Else do nothing.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        self.get(prediction_id, account_id)
        with self.database.write() as connection:
            self.lifecycle.change(connection, prediction_id, Trigger.CANCEL, self.clock())
        self.changes.tell(prediction_id)
        return self.get(prediction_id)

    def page(
        self,
        account_id: str | None,
        *,
        cursor: str | None = None,
        limit: int = 100,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        source: str | None = None,
        model: str | None = None,
    ) -> Page[Prediction]:
        """Return predictions, newest first, made from the first time and before the second.

        Raises:
            OptionError: the cursor is none of ours.
        """
        table = tables.predictions
        filters = {table.c.account_id: account_id, table.c.source: source, table.c.model: model}
        query = select(table)
        for column, value in filters.items():
            query = query if value is None else query.where(column == value)
        if created_after is not None:
            query = query.where(table.c.created_at >= created_after)
        if created_before is not None:
            query = query.where(table.c.created_at < created_before)
        with self.database.read() as connection:
            return read_page(connection, table, query, prediction_of, cursor=cursor, limit=limit)

    def events(self, prediction_id: str, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Return what happened to a prediction after an event, oldest first."""
        table = tables.events
        query = (
            select(table)
            .where(table.c.prediction_id == prediction_id, table.c.seq > after)
            .order_by(table.c.seq)
            .limit(limit)
        )
        with self.database.read() as connection:
            return tuple(record(Event, row) for row in connection.execute(query))

    def share(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Give a prediction a token that opens its page to everybody; keep its data.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        return self._edit(
            prediction_id,
            account_id,
            lambda p: p if p.share_token else dataclasses.replace(p, share_token=new_secret()),
        )

    def unshare(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Take the token back.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        return self._edit(
            prediction_id, account_id, lambda p: dataclasses.replace(p, share_token=None)
        )

    def shared(self, share_token: str) -> Prediction:
        """Return the prediction that a share token opens.

        Raises:
            NotFoundError: there is none, or its token was taken back.
        """
        query = select(tables.predictions).where(tables.predictions.c.share_token == share_token)
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("There is no such shared prediction.")
        return prediction_of(row)

    def shared_page(
        self, model: str, *, cursor: str | None = None, limit: int = 100
    ) -> Page[Prediction]:
        """Return the shared predictions of a model that succeeded, newest first.

        Raises:
            OptionError: the cursor is none of ours.
        """
        table = tables.predictions
        query = select(table).where(
            table.c.model == model,
            table.c.share_token.is_not(None),
            table.c.status == State.SUCCEEDED.value,
        )
        with self.database.read() as connection:
            return read_page(connection, table, query, prediction_of, cursor=cursor, limit=limit)

    def remove(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Remove the data of a prediction now, ending it first if it is not done.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        self.cancel(prediction_id, account_id)
        with self.database.write() as connection:
            forget(connection, prediction_id)
        self.changes.tell(prediction_id)
        return self.get(prediction_id)

    def run_counts(self) -> Mapping[str, int]:
        """Return how many predictions each model was asked for."""
        table = tables.predictions
        query = select(table.c.model, func.count().label("asked")).group_by(table.c.model)
        with self.database.read() as connection:
            return {row.model: row.asked for row in connection.execute(query)}

    def waiting(self) -> Waiting:
        """Return the work that is not done."""
        with self.database.read() as connection:
            return read_waiting(connection)

    def _edit(
        self,
        prediction_id: str,
        account_id: str | None,
        edit: Callable[[Prediction], Prediction],
    ) -> Prediction:
        self.get(prediction_id, account_id)
        with self.database.write() as connection:
            before = lock(connection, prediction_id)
            if before is not None:
                write(connection, before, edit(before))
        return self.get(prediction_id)

    def _insert(
        self, connection: Connection, new: NewPrediction, key: str | None, request_hash: str
    ) -> Created:
        admit(read_waiting(connection), new, self.max_waiting, self.max_waiting_seconds)
        now = self.clock()
        asked = {field.name: getattr(new, field.name) for field in dataclasses.fields(new)}
        prediction = Prediction(id=new_id(now), created_at=now, **asked)
        connection.execute(tables.predictions.insert().values(columns_of(prediction)))
        _take_files(connection, prediction)
        if key is not None:
            used = {
                "account_id": new.account_id,
                "key": key,
                "request_hash": request_hash,
                "prediction_id": prediction.id,
                "created_at": now,
            }
            connection.execute(tables.idempotency_keys.insert().values(used))
        return Created(prediction)


def _take_files(connection: Connection, prediction: Prediction) -> None:
    """From now on the files inside the input live and die with the prediction."""
    names = list(file_ids(prediction.input))
    if names:
        table = tables.files
        query = update(table).where(
            table.c.id.in_(names),
            table.c.account_id == prediction.account_id,
            table.c.prediction_id.is_(None),
        )
        connection.execute(query.values(prediction_id=prediction.id, expires_at=None))


def forget(connection: Connection, prediction_id: str) -> None:
    """Remove input, output, logs, events and files of a prediction; the row itself stays."""
    removed: dict[str, Any] = {
        "input": {},
        "output": None,
        "logs": "",
        "share_token": None,
        "data_removed": True,
    }
    table = tables.predictions
    connection.execute(update(table).where(table.c.id == prediction_id).values(removed))
    for owned in (tables.events, tables.files):
        connection.execute(delete(owned).where(owned.c.prediction_id == prediction_id))
