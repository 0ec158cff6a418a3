"""The one place where a prediction changes its state, with all that belongs to it.

A change, its event, its webhook and its line in the usage ledger are one transaction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select, update

from tegula.predictions import tables
from tegula.predictions.mapping import file_ids, prediction_of
from tegula.predictions.outbox import Outbox
from tegula.predictions.records import Prediction
from tegula.predictions.states import State, Trigger, transition

NEVER_STARTED = "The deadline passed before the prediction started."
NEVER_FINISHED = "The deadline passed while the prediction was running."


@dataclass(frozen=True)
class Lifecycle:
    """Applies triggers to rows, within a transaction of the caller."""

    outbox: Outbox

    def change(
        self,
        connection: Connection,
        prediction_id: str,
        trigger: Trigger,
        now: datetime,
        *,
        attempt: int | None = None,
        error: str | None = None,
    ) -> Prediction | None:
        """Apply a trigger; return the changed row, or None where nothing changed.

        Args:
            connection: an open transaction that writes.
            prediction_id: which one.
            trigger: what happened.
            now: when.
            attempt: only if this is still the latest attempt.
            error: for the caller to read, where the prediction ends without a result.
        """
        before = lock(connection, prediction_id)
        if before is None or (attempt is not None and before.attempt != attempt):
            return None
        state = transition(before.status, trigger)
        if state is None:
            return None
        after = _AFTER[trigger](before, state, now, error)
        write(connection, before, after)
        self._announce(connection, before, after, trigger, now)
        return after

    def _announce(
        self,
        connection: Connection,
        before: Prediction,
        after: Prediction,
        trigger: Trigger,
        now: datetime,
    ) -> None:
        if trigger is Trigger.START:
            self.outbox.put(connection, after, "start", now)
        elif trigger is Trigger.REQUEUE and before.status is State.PROCESSING:
            files = tables.files
            connection.execute(delete(files).where(files.c.id.in_(list(file_ids(before.output)))))
            add_event(connection, after, "restart", None, now)
        if after.status.terminal:
            add_event(connection, after, "done", after.status.value, now)
            self.outbox.put(connection, after, "completed", now)
            if after.predict_seconds is not None:
                _enter_usage(connection, after)


def lock(connection: Connection, prediction_id: str) -> Prediction | None:
    """Return a row that nobody else can change until the transaction ends."""
    query = select(tables.predictions).where(tables.predictions.c.id == prediction_id)
    row = connection.execute(query.with_for_update()).one_or_none()
    return None if row is None else prediction_of(row)


def write(connection: Connection, before: Prediction, after: Prediction) -> None:
    """Write what differs."""
    changed = {
        field.name: getattr(after, field.name)
        for field in dataclasses.fields(after)
        if getattr(after, field.name) != getattr(before, field.name)
    }
    if changed:
        query = update(tables.predictions).where(tables.predictions.c.id == after.id)
        connection.execute(query.values(changed))


def add_event(
    connection: Connection, prediction: Prediction, kind: str, data: Any, now: datetime
) -> None:
    """Append to the events of a prediction."""
    connection.execute(
        tables.events.insert().values(
            prediction_id=prediction.id,
            attempt=prediction.attempt,
            kind=kind,
            data=data,
            at=now,
        )
    )


def _started(before: Prediction, state: State, now: datetime, _error: str | None) -> Prediction:
    return dataclasses.replace(before, status=state, started_at=max(now, before.created_at))


def _requeued(before: Prediction, state: State, _now: datetime, _error: str | None) -> Prediction:
    return dataclasses.replace(
        before,
        status=state,
        started_at=None,
        output=None,
        progress=0.0,
        worker=None,
        lease_until=None,
    )


def _ended(before: Prediction, state: State, now: datetime, error: str | None) -> Prediction:
    end = max(now, before.started_at or before.created_at)
    started = before.started_at
    return dataclasses.replace(
        before,
        status=state,
        completed_at=end,
        error=error,
        predict_seconds=None if started is None else (end - started).total_seconds(),
        progress=1.0 if state is State.SUCCEEDED else before.progress,
        worker=None,
        lease_until=None,
    )


def _expired(before: Prediction, state: State, now: datetime, _error: str | None) -> Prediction:
    never_started = before.status is State.STARTING
    return _ended(before, state, now, NEVER_STARTED if never_started else NEVER_FINISHED)


_After = Callable[[Prediction, State, datetime, "str | None"], Prediction]

_AFTER: Mapping[Trigger, _After] = {
    Trigger.START: _started,
    Trigger.REQUEUE: _requeued,
    Trigger.SUCCEED: _ended,
    Trigger.FAIL: _ended,
    Trigger.CANCEL: _ended,
    Trigger.EXPIRE: _expired,
}


def _enter_usage(connection: Connection, prediction: Prediction) -> None:
    connection.execute(
        tables.usage.insert().values(
            prediction_id=prediction.id,
            account_id=prediction.account_id,
            token_id=prediction.token_id,
            model=prediction.model,
            predict_seconds=prediction.predict_seconds,
            completed_at=prediction.completed_at,
        )
    )
