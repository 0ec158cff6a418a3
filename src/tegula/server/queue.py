"""The queue: how workers get predictions, and report what becomes of them.

A worker claims a prediction under a lease, which its reports renew: first to fetch each input that
is given as an address, then to run it on a device. Each claim has a number, the attempt. Everything
that a worker writes names its attempt, and nothing is written once a later attempt, or the end of
the prediction, came before it, or the worker gave it back. A worker that was taken for dead and
comes back therefore changes nothing, and no lock outlives a transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import Session

from tegula.server.db import Clock, Database
from tegula.server.lifecycle import Lifecycle, Trigger, add_event, lock
from tegula.server.pubsub import PubSub
from tegula.server.tables import ACTIVE, Deployment, Prediction, State

MOST_LOSSES = 2
"""A prediction over which so many workers died or hung is not run again."""

LOST = "The worker that ran this prediction died or hung, twice"
"""How the error of such a prediction begins."""

PREFER_LOADED = timedelta(seconds=30)
"""A prediction that waits for longer goes first, whatever model is loaded."""

_BATCH = 100


@dataclass(frozen=True)
class Report:
    """What happened in a run since the last report.

    logs: whole lines, or empty.
    outputs: new items of the output.
    append: whether the items form a list; else the last one is the output.
    progress: share of the work that is done, 0..1.
    preview: a file of the work so far, as inputs and outputs hold files.
    """

    logs: str = ""
    outputs: Sequence[Any] = ()
    append: bool = True
    progress: float | None = None
    preview: Any = None


@dataclass(frozen=True)
class Queue:
    """Hands predictions to workers and takes their reports.

    A worker is a thread of some server's process: one that fetches inputs, or that of an engine.

    lease: how long a worker may be silent before its prediction is given to another.
    """

    database: Database
    clock: Clock
    lifecycle: Lifecycle
    pubsub: PubSub
    lease: timedelta

    def claim(self, worker: str, loaded: Collection[str] = ()) -> Prediction | None:
        """Give a worker the next prediction whose inputs are there, or None if there is none.

        Accounts take turns by the work that each was given so far, as ``FairTurns`` counts it. Of
        those whose turn it is, the oldest goes first, with two exceptions. To change models costs
        seconds, so what runs on a version that the worker has ``loaded`` overtakes what does not;
        but whoever has waited for ``PREFER_LOADED`` is overtaken no more, else a busy model would
        starve all others. And a deployment that runs as many predictions as it allows is passed
        over.

        Most of the time there is none to give, which reading alone tells.
        """
        now = self.clock()
        ready = _waiting(now).where(Prediction.fetch_host.is_(None))
        with self.database.read() as session:
            if session.scalar(ready.with_only_columns(Prediction.id).limit(1)) is None:
                return None
        # Alone, because two claims at once would both count a deployment before either runs it.
        with self.database.write(alone=True) as session:
            waiting = ready
            if full := list(session.scalars(_FULL_DEPLOYMENTS)):
                elsewhere = Prediction.deployment.is_(None) | Prediction.deployment.not_in(full)
                waiting = waiting.where(elsewhere)
            turns = self.lifecycle.turns
            accounts = waiting.with_only_columns(Prediction.account_id).distinct()
            whose = turns.next_accounts(session, session.scalars(accounts).all())
            first = or_(Prediction.created_at < now - PREFER_LOADED, Prediction.version.in_(loaded))
            query = waiting.where(Prediction.account_id.in_(whose))
            chosen = self._take(session, query.order_by(first.desc(), *_OLDEST), worker, now)
            if chosen is not None:
                turns.begin(session, chosen)
            return chosen

    def waiting(self) -> int:
        """Return how many predictions wait for an engine."""
        query = _waiting(self.clock()).where(Prediction.fetch_host.is_(None))
        with self.database.read() as session:
            return session.scalar(query.with_only_columns(func.count())) or 0

    def claim_fetch(
        self, worker: str, busy_accounts: Collection[str] = (), busy_hosts: Collection[str] = ()
    ) -> Prediction | None:
        """Give a worker the oldest prediction with an input to fetch, or None if there is none.

        Accounts and hosts for which the worker fetches as much as it may are passed over. Most of
        the time there is none at all, which reading alone tells without the lock to write.
        """
        now = self.clock()
        waiting = (
            _waiting(now)
            .where(Prediction.fetch_host.is_not(None), Prediction.fetch_host.not_in(busy_hosts))
            .where(Prediction.account_id.not_in(busy_accounts))
            .order_by(*_OLDEST)
        )
        with self.database.read() as session:
            if session.scalar(waiting.with_only_columns(Prediction.id).limit(1)) is None:
                return None
        with self.database.write() as session:
            return self._take(session, waiting, worker, now)

    def hand_on(self, prediction_id: str, attempt: int, fetch_host: str | None) -> bool:
        """Hand a prediction on: to whoever fetches from a host, or with None to a device.

        Returns False if it is no longer the worker's.
        """

        def hand_on(session: Session, prediction: Prediction) -> bool:
            self.lifecycle.apply(session, prediction, Trigger.REQUEUE, self.clock())
            prediction.fetch_host = fetch_host
            return True

        return self._change(prediction_id, attempt, hand_on)

    def start(self, prediction_id: str, attempt: int) -> bool:
        """Note that the worker began; False if the prediction is no longer its own."""
        return self._apply(prediction_id, attempt, Trigger.START)

    def report(self, prediction_id: str, attempt: int, report: Report | None = None) -> bool:
        """Renew the lease and note what happened; False if it is no longer the worker's."""
        done = report or Report()

        def note(session: Session, prediction: Prediction) -> bool:
            self._note(session, prediction, done)
            return True

        return self._change(prediction_id, attempt, note, silently=done == Report())

    def succeed(self, prediction_id: str, attempt: int, report: Report | None = None) -> bool:
        """End a prediction, after a last report, with the output it has by then.

        Returns False if it is no longer the worker's.
        """
        return self._apply(prediction_id, attempt, Trigger.SUCCEED, report=report)

    def fail(self, prediction_id: str, attempt: int, error: str) -> bool:
        """End a prediction without success; False if it is no longer the worker's."""
        return self._apply(prediction_id, attempt, Trigger.FAIL, error=error)

    def release(self, prediction_id: str, attempt: int) -> bool:
        """Hand a prediction back, through no fault of its own, for another worker to begin anew."""
        return self._apply(prediction_id, attempt, Trigger.REQUEUE)

    def lose(self, prediction_id: str, attempt: int, reason: str) -> bool:
        """Note that the worker died or hung: run again, or after the second time fail."""

        def lose(session: Session, prediction: Prediction) -> bool:
            self._lose(session, prediction, reason, self.clock())
            return True

        return self._change(prediction_id, attempt, lose)

    def rescue(self) -> tuple[str, ...]:
        """Take back the predictions of workers that have been silent for too long."""

        def take_back(session: Session, prediction: Prediction, now: datetime) -> None:
            if prediction.fetch_host is None:
                self._lose(session, prediction, "it fell silent", now)
            else:
                # No input kills who fetches it, so it is fetched again however often that is.
                self.lifecycle.apply(session, prediction, Trigger.REQUEUE, now)

        return self._for_all_active(lambda now: Prediction.lease_until < now, take_back)

    def expire(self) -> tuple[str, ...]:
        """End every prediction whose deadline has passed."""

        def end(session: Session, prediction: Prediction, now: datetime) -> None:
            self.lifecycle.apply(session, prediction, Trigger.EXPIRE, now)

        return self._for_all_active(lambda now: Prediction.deadline <= now, end)

    def next_due(self) -> datetime | None:
        """Return when the next lease or deadline runs out, if nothing renews it before."""
        query = select(func.min(Prediction.lease_until), func.min(Prediction.deadline))
        with self.database.read() as session:
            due = session.execute(query.where(Prediction.status.in_(ACTIVE))).one()
        return min((each for each in due if each is not None), default=None)

    def _take(
        self, session: Session, query: Select[Prediction], worker: str, now: datetime
    ) -> Prediction | None:
        """Give a worker the first row of a query that nobody else is taking at the moment."""
        chosen = session.scalar(query.limit(1).with_for_update(skip_locked=True))
        if chosen is not None:
            chosen.attempt += 1
            chosen.worker = worker
            chosen.lease_until = now + self.lease
        return chosen

    def _apply(
        self,
        prediction_id: str,
        attempt: int,
        trigger: Trigger,
        *,
        report: Report | None = None,
        error: str | None = None,
    ) -> bool:
        def apply(session: Session, prediction: Prediction) -> bool:
            if report is not None:
                self._note(session, prediction, report)
            return self.lifecycle.apply(session, prediction, trigger, self.clock(), error)

        return self._change(prediction_id, attempt, apply)

    def _change(
        self,
        prediction_id: str,
        attempt: int,
        change: Callable[[Session, Prediction], bool],
        *,
        silently: bool = False,
    ) -> bool:
        """Change a prediction if it is still its worker's; False if not, or if nothing changed.

        While the database is away nobody takes it from its worker either, and a run that took an
        hour is worth the wait.
        """

        def work(session: Session) -> bool:
            prediction = _claimed(session, prediction_id, attempt)
            return prediction is not None and change(session, prediction)

        changed = self.database.transact(work)
        if not silently:
            self.pubsub.publish(prediction_id)
        return changed

    def _note(self, session: Session, prediction: Prediction, report: Report) -> None:
        now = self.clock()
        prediction.lease_until = now + self.lease
        prediction.progress = max(prediction.progress, report.progress or 0.0)
        if report.outputs:
            kept = prediction.output or []
            prediction.output = [*kept, *report.outputs] if report.append else report.outputs[-1]
        self._log(session, prediction, report.logs, now)
        if report.preview is not None:
            add_event(session, prediction, "preview", report.preview, now)
        for item in report.outputs:
            add_event(session, prediction, "output", item, now)
        if report.outputs:
            self.lifecycle.webhooks.enqueue(session, prediction, "output", now)

    def _log(self, session: Session, prediction: Prediction, lines: str, now: datetime) -> None:
        if lines:
            prediction.logs += lines
            add_event(session, prediction, "logs", lines, now)
            self.lifecycle.webhooks.enqueue(session, prediction, "logs", now)

    def _lose(self, session: Session, prediction: Prediction, reason: str, now: datetime) -> None:
        prediction.losses += 1
        self._log(session, prediction, f"The worker was lost: {reason}.\n", now)
        if prediction.losses < MOST_LOSSES:
            self.lifecycle.apply(session, prediction, Trigger.REQUEUE, now)
        else:
            self.lifecycle.apply(session, prediction, Trigger.FAIL, now, f"{LOST}: {reason}.")

    def _for_all_active(
        self,
        due: Callable[[datetime], ColumnElement[bool]],
        act: Callable[[Session, Prediction, datetime], None],
    ) -> tuple[str, ...]:
        """Act on all unfinished predictions that are due, many in each transaction.

        Most of the time there are none, which reading alone tells without the lock to write.
        """
        now = self.clock()
        query = select(Prediction.id).where(Prediction.status.in_(ACTIVE), due(now))
        with self.database.read() as session:
            ids = session.scalars(query).all()
        acted: list[str] = []
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            with self.database.write() as session:
                still = select(Prediction).where(
                    Prediction.id.in_(batch), Prediction.status.in_(ACTIVE), due(now)
                )
                rows = session.scalars(still.order_by(Prediction.id).with_for_update()).all()
                for prediction in rows:
                    act(session, prediction, now)
            acted += [row.id for row in rows]
        for prediction_id in acted:
            self.pubsub.publish(prediction_id)
        return tuple(acted)


_OLDEST = Prediction.created_at, Prediction.id
"""Orders predictions by age; ids tell apart those of one moment."""


def _waiting(now: datetime) -> Select[Prediction]:
    """Select what has not been claimed and is in time for its deadline."""
    return select(Prediction).where(
        Prediction.status == State.STARTING,
        Prediction.lease_until.is_(None),
        or_(Prediction.deadline.is_(None), Prediction.deadline > now),
    )


def _claimed(session: Session, prediction_id: str, attempt: int) -> Prediction | None:
    """Return a locked row, if this attempt is still the latest and neither over nor handed back."""
    prediction = lock(session, prediction_id)
    if prediction is None or prediction.attempt != attempt or prediction.lease_until is None:
        return None
    return None if prediction.status.terminal else prediction


_DEPLOYMENT_NAME = Deployment.owner + "/" + Deployment.name

_FULL_DEPLOYMENTS = (
    select(_DEPLOYMENT_NAME)
    .outerjoin(
        Prediction,
        and_(
            Prediction.deployment == _DEPLOYMENT_NAME,
            Prediction.lease_until.is_not(None),
            Prediction.fetch_host.is_(None),
        ),
    )
    .group_by(Deployment.owner, Deployment.name, Deployment.max_instances)
    .having(func.count(Prediction.id) >= Deployment.max_instances)
)
"""Deployments that run as many predictions as they allow; of those with a limit of 0, all."""
