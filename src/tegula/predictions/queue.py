"""Predictions as workers see them: claim by lease, report, finish; rescue of what is lost.

Each claim gets a new attempt number. Whatever a worker writes carries that number, and
nothing is written once a later attempt, or the end of the prediction, came before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select

from tegula.predictions import tables
from tegula.predictions.changes import Changes
from tegula.predictions.clock import Clock
from tegula.predictions.database import Database
from tegula.predictions.lifecycle import Lifecycle, add_event, lock, write
from tegula.predictions.mapping import prediction_of
from tegula.predictions.records import Prediction
from tegula.predictions.states import ACTIVE, State, Trigger

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
