"""Predictions: accepted, claimed, ended."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError

from tegula.errors import BusyError, ConflictError, NotFoundError
from tegula.server import db as tables
from tegula.server.db import (
    ACTIVE,
    Clock,
    Created,
    Database,
    Event,
    NewPrediction,
    Page,
    Prediction,
    State,
    Trigger,
    columns_of,
    file_ids,
    new_id,
    new_secret,
    prediction_of,
    read_page,
    record,
    transition,
)
from tegula.server.webhooks import Outbox

# Word of changed predictions to whoever waits for them in this process.

Listener = Callable[[str], None]


class Changes:
    """Tells listeners the id of each prediction after a change of it is durable.

    Listeners are called from the thread that made the change and return at once. They
    hear nothing of other processes on the same database, which only asking again shows.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Add a listener; call what is returned to remove it."""
        with self._lock:
            self._listeners = [*self._listeners, listener]

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = [other for other in self._listeners if other is not listener]

        return unsubscribe

    def tell(self, prediction_id: str) -> None:
        """Tell every listener that this prediction changed."""
        for listener in self._listeners:
            listener(prediction_id)


# Whether a prediction is let in: room in the queue, and keys that were used before.

_ACTIVE = tuple(state.value for state in ACTIVE)


@dataclass(frozen=True)
class Waiting:
    """The work that was accepted and is not done: predictions, and estimated seconds."""

    count: int
    seconds: float


def read_waiting(connection: Connection) -> Waiting:
    """Return the work that is not done."""
    table = tables.predictions
    query = select(func.count(), func.coalesce(func.sum(table.c.estimated_seconds), 0.0))
    count, seconds = connection.execute(query.where(table.c.status.in_(_ACTIVE))).one()
    return Waiting(count, float(seconds))


def admit(waiting: Waiting, new: NewPrediction, most: int, most_seconds: float) -> None:
    """Let a prediction in.

    Raises:
        BusyError: so many predictions, or so many seconds of work, wait already.
    """
    full = waiting.count >= most
    after = waiting.seconds + new.estimated_seconds
    # A prediction that is too much by itself may still run on an idle server.
    if full or (waiting.count and after > most_seconds):
        each = waiting.seconds / max(waiting.count, 1)
        raise BusyError(
            f"{waiting.count} predictions are waiting already, about "
            f"{waiting.seconds:.0f} seconds of work; try again later.",
            retry_after=min(max(1, round(each)), 600),
        )


def replay(
    connection: Connection, new: NewPrediction, key: str | None, request_hash: str
) -> Created | None:
    """Return what an earlier request of the account with this key made, if there was one.

    Raises:
        ConflictError: that was another request.
    """
    if key is None:
        return None
    keys = tables.idempotency_keys
    query = select(keys).where(keys.c.account_id == new.account_id, keys.c.key == key)
    used = connection.execute(query).one_or_none()
    if used is None:
        return None
    if used.request_hash != request_hash:
        raise ConflictError("This Idempotency-Key was used for a different request.")
    earlier = select(tables.predictions).where(tables.predictions.c.id == used.prediction_id)
    return Created(prediction_of(connection.execute(earlier).one()), replayed=True)


# The one place where a prediction changes its state, with all that belongs to it.
#
# A change, its event, its webhook and its line in the usage ledger are one transaction.

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


# Predictions as workers see them: claim by lease, report, finish; rescue of what is lost.
#
# Each claim gets a new attempt number. Whatever a worker writes carries that number, and
# nothing is written once a later attempt, or the end of the prediction, came before it.

MOST_LOSSES = 2
"""A prediction over which so many workers died or hung is not run again."""

PREFER_LOADED = timedelta(seconds=30)
"""A prediction that waits for longer goes first, whatever model is loaded."""

LOST = "The worker that ran this prediction died or hung, twice."


@dataclass(frozen=True)
class Report:
    """What a worker has to say since its last report.

    logs: whole lines, or empty.
    outputs: new items of the output.
    append: whether the items form a list; else the last one is the output.
    progress: share of the work that is done, 0..1.
    """

    logs: str = ""
    outputs: Sequence[Any] = ()
    append: bool = True
    progress: float | None = None


@dataclass(frozen=True)
class Queue:
    """Hands predictions to workers and takes their reports."""

    database: Database
    clock: Clock
    lifecycle: Lifecycle
    changes: Changes
    lease: timedelta

    def claim(self, worker: str, loaded: Collection[str] = ()) -> Prediction | None:
        """Give the next prediction to a worker, or None if there is nothing to do.

        Those of a version that is ``loaded`` go first, unless another waits for long.
        Deployments never run more at once than they allow.
        """
        with self.database.write(alone=True) as connection:
            now = self.clock()
            chosen = self._choose(connection, loaded, now)
            if chosen is None:
                return None
            claimed = dataclasses.replace(
                chosen,
                attempt=chosen.attempt + 1,
                worker=worker,
                lease_until=now + self.lease,
            )
            write(connection, chosen, claimed)
        return claimed

    def start(self, prediction_id: str, attempt: int) -> bool:
        """Note that the worker began; False if the prediction is no longer its own."""
        return self._change(prediction_id, attempt, Trigger.START)

    def report(self, prediction_id: str, attempt: int, report: Report | None = None) -> bool:
        """Renew the lease and note what happened; False if it is no longer the worker's."""
        report = report or Report()
        with self.database.write() as connection:
            done = self._report(connection, prediction_id, attempt, report)
        if done and report != Report():
            self.changes.tell(prediction_id)
        return done

    def succeed(self, prediction_id: str, attempt: int, report: Report | None = None) -> bool:
        """End a prediction, after a last report, with the output it has by then.

        Returns False if it is no longer the worker's.
        """
        with self.database.write() as connection:
            reported = self._report(connection, prediction_id, attempt, report or Report())
            done = reported and self.lifecycle.change(
                connection, prediction_id, Trigger.SUCCEED, self.clock()
            )
        self.changes.tell(prediction_id)
        return bool(done)

    def fail(self, prediction_id: str, attempt: int, error: str) -> bool:
        """End a prediction without success; False if it is no longer the worker's."""
        return self._change(prediction_id, attempt, Trigger.FAIL, error)

    def release(self, prediction_id: str, attempt: int) -> bool:
        """Hand a prediction back, through no fault of its own, to be run again."""
        return self._change(prediction_id, attempt, Trigger.REQUEUE)

    def lose(self, prediction_id: str, attempt: int, reason: str) -> bool:
        """Note that the worker died or hung: run again, or after the second time fail."""
        with self.database.write() as connection:
            done = self._lose(connection, prediction_id, attempt, reason, self.clock())
        self.changes.tell(prediction_id)
        return done

    def rescue(self) -> tuple[str, ...]:
        """Take back what workers hold that have been silent for too long."""
        table, now = tables.predictions, self.clock()
        query = select(table.c.id, table.c.attempt).where(
            table.c.status.in_([state.value for state in ACTIVE]), table.c.lease_until < now
        )
        with self.database.read() as connection:
            silent = connection.execute(query).all()
        for name, attempt in silent:
            with self.database.write() as connection:
                held = lock(connection, name)
                if held is not None and held.lease_until and held.lease_until < self.clock():
                    self._lose(connection, name, attempt, "it fell silent", now)
            self.changes.tell(name)
        return tuple(row.id for row in silent)

    def expire(self) -> tuple[str, ...]:
        """End every prediction whose deadline has passed."""
        table, now = tables.predictions, self.clock()
        query = select(table.c.id).where(
            table.c.status.in_([state.value for state in ACTIVE]), table.c.deadline <= now
        )
        with self.database.read() as connection:
            late = connection.execute(query).scalars().all()
        for name in late:
            with self.database.write() as connection:
                self.lifecycle.change(connection, name, Trigger.EXPIRE, now)
            self.changes.tell(name)
        return tuple(late)

    def _change(
        self, prediction_id: str, attempt: int, trigger: Trigger, error: str | None = None
    ) -> bool:
        with self.database.write() as connection:
            changed = self.lifecycle.change(
                connection, prediction_id, trigger, self.clock(), attempt=attempt, error=error
            )
        self.changes.tell(prediction_id)
        return changed is not None

    def _report(
        self, connection: Connection, prediction_id: str, attempt: int, report: Report
    ) -> bool:
        now, before = self.clock(), lock(connection, prediction_id)
        if before is None or before.attempt != attempt or before.status.terminal:
            return False
        after = dataclasses.replace(
            before,
            lease_until=now + self.lease,
            logs=before.logs + report.logs,
            output=_grown(before.output, report),
            progress=max(before.progress, report.progress or 0.0),
        )
        write(connection, before, after)
        self._tell_events(connection, after, report, now)
        return True

    def _lose(
        self, connection: Connection, prediction_id: str, attempt: int, reason: str, now: datetime
    ) -> bool:
        before = lock(connection, prediction_id)
        if before is None or before.attempt != attempt or before.status.terminal:
            return False
        line = f"The worker was lost: {reason}.\n"
        after = dataclasses.replace(before, losses=before.losses + 1, logs=before.logs + line)
        write(connection, before, after)
        self._tell_events(connection, after, Report(logs=line), now)
        last = after.losses >= MOST_LOSSES
        self.lifecycle.change(
            connection,
            prediction_id,
            Trigger.FAIL if last else Trigger.REQUEUE,
            now,
            error=f"{LOST[:-1]}: {reason}." if last else None,
        )
        return True

    def _tell_events(
        self, connection: Connection, prediction: Prediction, report: Report, now: datetime
    ) -> None:
        if report.logs:
            add_event(connection, prediction, "logs", report.logs, now)
            self.lifecycle.outbox.put(connection, prediction, "logs", now)
        for item in report.outputs:
            add_event(connection, prediction, "output", item, now)
        if report.outputs:
            self.lifecycle.outbox.put(connection, prediction, "output", now)

    def _choose(
        self, connection: Connection, loaded: Collection[str], now: datetime
    ) -> Prediction | None:
        table = tables.predictions
        query = select(table).where(
            table.c.status == State.STARTING.value,
            table.c.lease_until.is_(None),
            or_(table.c.deadline.is_(None), table.c.deadline > now),
        )
        if busy := _busy_deployments(connection):
            query = query.where(or_(table.c.deployment.is_(None), table.c.deployment.not_in(busy)))
        first = or_(table.c.created_at < now - PREFER_LOADED, table.c.version.in_(loaded))
        query = query.order_by(first.desc(), table.c.created_at, table.c.id).limit(1)
        row = connection.execute(query.with_for_update(skip_locked=True)).one_or_none()
        return None if row is None else prediction_of(row)


def _grown(output: Any, report: Report) -> Any:
    if not report.outputs:
        return output
    return [*(output or []), *report.outputs] if report.append else report.outputs[-1]


def _busy_deployments(connection: Connection) -> list[str]:
    """Return the deployments that run as much as they allow."""
    table, deployments = tables.predictions, tables.deployments
    name = deployments.c.owner + "/" + deployments.c.name
    running = and_(table.c.deployment == name, table.c.lease_until.is_not(None))
    query = (
        select(name)
        .select_from(deployments.outerjoin(table, running))
        .group_by(deployments.c.owner, deployments.c.name, deployments.c.max_instances)
        .having(func.count(table.c.id) >= deployments.c.max_instances)
    )
    return list(connection.execute(query).scalars())


# Predictions as their owners see them: accept, get, list, cancel, share, remove.

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
