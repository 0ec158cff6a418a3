"""Predictions as their owners see them: create, get, list, cancel, share, remove."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, or_, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tegula.errors import BusyError, ConflictError, NotFoundError
from tegula.server.db import Clock, Database, Page, new_id, new_secret, read_page
from tegula.server.lifecycle import Lifecycle, Trigger, lock
from tegula.server.pubsub import PubSub
from tegula.server.tables import (
    ACTIVE,
    DEFAULT_WEBHOOK_EVENTS,
    Event,
    FileRecord,
    IdempotencyKey,
    ModelTotal,
    Prediction,
    State,
    WebhookMessage,
    file_ids,
)

_MOST_NAMES = 500
"""Names in one query; databases have limits."""
_MOST_EVENTS = 1000
"""Events read at a time; a stream comes back for more."""


@dataclass(frozen=True)
class NewPrediction:
    """What is accepted, its inputs valid and its files kept; see ``tables.Prediction``."""

    account_id: str
    model: str
    version: str
    input: Mapping[str, Any]
    label: str | None = None
    source: str = "api"
    token_id: str | None = None
    deployment: str | None = None
    deadline: datetime | None = None
    webhook: str | None = None
    webhook_events: tuple[str, ...] = DEFAULT_WEBHOOK_EVENTS
    estimated_seconds: float = 0.0
    fetch_host: str | None = None


@dataclass(frozen=True)
class Created:
    """A prediction as accepted; ``replayed`` if an earlier request with the key made it."""

    prediction: Prediction
    replayed: bool = False


@dataclass(frozen=True)
class Waiting:
    """The work that was accepted and is not done: predictions, and estimated seconds.

    fetching: how many of the predictions wait for an input to be fetched.
    """

    count: int
    seconds: float
    fetching: int


@dataclass(frozen=True)
class Room:
    """The work that may wait at a time: predictions, and estimated seconds."""

    count: int
    seconds: float

    def takes(self, waiting: Waiting, seconds: float) -> bool:
        """Tell whether a prediction of so many seconds may wait too.

        One that is too much by itself may still run where nothing waits.
        """
        fits = not waiting.count or waiting.seconds + seconds <= self.seconds
        return waiting.count < self.count and fits


@dataclass(frozen=True)
class Predictions:
    """The predictions of all accounts; ``account_id`` hides those of the others.

    room, account_room: for work of all accounts, and of each; beyond it none is accepted.
    """

    database: Database
    clock: Clock
    lifecycle: Lifecycle
    pubsub: PubSub
    room: Room
    account_room: Room

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
            with self.database.write() as session:
                created = _replay(session, new, idempotency_key, request_hash)
                if created is None:
                    created = self._insert(session, new, idempotency_key, request_hash)
        except IntegrityError:
            # On PostgreSQL a twin with the same key may win between look and insert.
            with self.database.read() as session:
                created = _replay(session, new, idempotency_key, request_hash)
            if created is None:
                raise
        if not created.replayed:
            self.pubsub.publish(created.prediction.id)
        return created

    def _insert(
        self, session: Session, new: NewPrediction, key: str | None, request_hash: str
    ) -> Created:
        self._check_room(session, new.account_id, new.estimated_seconds)
        now = self.clock()
        prediction = Prediction(id=new_id(now), created_at=now, **vars(new))
        session.add_all((prediction, ModelTotal(new.model, created=1)))
        session.flush()  # before the rows that refer to it
        if kept := list(file_ids(prediction.input)):
            # From now on the files inside the input live and die with the prediction.
            session.execute(
                update(FileRecord)
                .where(
                    FileRecord.id.in_(kept),
                    FileRecord.account_id == prediction.account_id,
                    FileRecord.prediction_id.is_(None),
                )
                .values(prediction_id=prediction.id, expires_at=None)
            )
        if key is not None:
            session.add(IdempotencyKey(new.account_id, key, request_hash, prediction.id, now))
        return Created(prediction)

    def _check_room(self, session: Session, account_id: str, seconds: float) -> None:
        row = session.execute(_WAITING_OF, {"account_id": account_id}).one()
        waiting, whose = Waiting(*row[:3]), ""
        if self.room.takes(waiting, seconds):
            waiting, whose = Waiting(*row[3:]), " of this account"
            if self.account_room.takes(waiting, seconds):
                return
        raise BusyError(
            f"{waiting.count} predictions{whose} are waiting already, about "
            f"{waiting.seconds:.0f} seconds of work; try again later.",
            retry_after=min(max(1, round(waiting.seconds / max(waiting.count, 1))), 600),
        )

    def get(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Return a prediction.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.read() as session:
            return _owned(session.get(Prediction, prediction_id), account_id)

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
        statuses: Collection[State] = (),
        kept: bool = False,
    ) -> Page[Prediction]:
        """Return predictions, newest first, created from the first time on and before the second.

        With ``kept`` those are left out whose data has been removed.

        Raises:
            OptionError: the cursor is not from a page.
        """
        filters = {
            Prediction.account_id: account_id,
            Prediction.source: source,
            Prediction.model: model,
        }
        query = select(Prediction)
        for column, value in filters.items():
            query = query if value is None else query.where(column == value)
        if statuses:
            query = query.where(Prediction.status.in_(statuses))
        if kept:
            query = query.where(Prediction.data_removed.is_(False))
        if created_after is not None:
            query = query.where(Prediction.created_at >= created_after)
        if created_before is not None:
            query = query.where(Prediction.created_at < created_before)
        columns = Prediction.created_at, Prediction.id
        with self.database.read() as session:
            return read_page(session, query, columns, cursor=cursor, limit=limit)

    def events(self, prediction_id: str, after: int = 0) -> tuple[Event, ...]:
        """Return the next things that happened to a prediction after an event, oldest first."""
        query = (
            select(Event)
            .where(Event.prediction_id == prediction_id, Event.seq > after)
            .order_by(Event.seq)
            .limit(_MOST_EVENTS)
        )
        with self.database.read() as session:
            return tuple(session.scalars(query))

    def last_events(self, prediction_ids: Sequence[str]) -> Mapping[str, int]:
        """Return the number of the last event of each of some predictions that has any."""
        found: dict[str, int] = {}
        for start in range(0, len(prediction_ids), _MOST_NAMES):
            names = prediction_ids[start : start + _MOST_NAMES]
            query = select(Event.prediction_id, func.max(Event.seq))
            query = query.where(Event.prediction_id.in_(names)).group_by(Event.prediction_id)
            with self.database.read() as session:
                found |= dict(session.execute(query).all())
        return found

    def cancel(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """End a prediction at once; whoever runs it learns so and stops. Else do nothing.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.write() as session:
            prediction = _owned(lock(session, prediction_id), account_id)
            self.lifecycle.apply(session, prediction, Trigger.CANCEL, self.clock())
        self.pubsub.publish(prediction_id)
        return prediction

    def remove(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Remove the data of a prediction now, ending it first if it is not done.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.write() as session:
            prediction = _owned(lock(session, prediction_id), account_id)
            self.lifecycle.apply(session, prediction, Trigger.CANCEL, self.clock())
            session.flush()
            forget(session, [prediction_id])
            session.refresh(prediction)
        self.pubsub.publish(prediction_id)
        return prediction

    def share(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Give a prediction a token that opens its page to everybody; keep its data.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.write() as session:
            prediction = _owned(lock(session, prediction_id), account_id)
            prediction.share_token = prediction.share_token or new_secret()
        return prediction

    def unshare(self, prediction_id: str, account_id: str | None = None) -> Prediction:
        """Take the token back.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.write() as session:
            prediction = _owned(lock(session, prediction_id), account_id)
            prediction.share_token = None
        return prediction

    def shared(self, share_token: str) -> Prediction:
        """Return the prediction that a share token opens.

        Raises:
            NotFoundError: there is none, or its token was taken back.
        """
        query = select(Prediction).where(Prediction.share_token == share_token)
        with self.database.read() as session:
            found = session.scalars(query).one_or_none()
        if found is None:
            raise NotFoundError("There is no such shared prediction.")
        return found

    def shared_page(
        self, model: str, *, cursor: str | None = None, limit: int = 100
    ) -> Page[Prediction]:
        """Return the shared predictions of a model that succeeded, newest first.

        Raises:
            OptionError: the cursor is not from a page.
        """
        query = select(Prediction).where(
            Prediction.model == model,
            Prediction.share_token.is_not(None),
            Prediction.status == State.SUCCEEDED,
        )
        columns = Prediction.created_at, Prediction.id
        with self.database.read() as session:
            return read_page(session, query, columns, cursor=cursor, limit=limit)

    def run_counts(self, models: Collection[str]) -> Mapping[str, int]:
        """Return how many predictions were created of each of these models; 0 is left out."""
        created = func.sum(ModelTotal.created)
        query = select(ModelTotal.model, created).where(ModelTotal.model.in_(models))
        query = query.group_by(ModelTotal.model).having(created > 0)
        with self.database.read() as session:
            return {model: int(count) for model, count in session.execute(query)}

    def ahead_of(self, prediction: Prediction) -> Waiting:
        """Return the unfinished work created before a prediction; of what runs, the rest."""
        earlier = or_(
            Prediction.created_at < prediction.created_at,
            and_(Prediction.created_at == prediction.created_at, Prediction.id < prediction.id),
        )
        left = Prediction.estimated_seconds * (1 - Prediction.progress)
        query = _WAITING.with_only_columns(
            func.count(), func.coalesce(func.sum(left), 0.0), func.count(Prediction.fetch_host)
        ).where(earlier)
        with self.database.read() as session:
            count, total, fetching = session.execute(query).one()
        return Waiting(count, float(total), fetching)

    def waiting(self) -> Waiting:
        """Return the work that is not done."""
        with self.database.read() as session:
            return Waiting(*session.execute(_WAITING).one())


def forget(session: Session, prediction_ids: Collection[str]) -> None:
    """Remove inputs, outputs, logs, events and files of predictions; the rows stay."""
    removed: dict[str, Any] = {
        "input": {},
        "output": None,
        "logs": "",
        "share_token": None,
        "data_removed": True,
    }
    session.execute(update(Prediction).where(Prediction.id.in_(prediction_ids)).values(removed))
    for owned in (Event, FileRecord):
        session.execute(delete(owned).where(owned.prediction_id.in_(prediction_ids)))


def delete_rows(session: Session, prediction_ids: Collection[str]) -> None:
    """Remove predictions for good, with all that is known of them but their usage."""
    for owned in (Event, FileRecord, IdempotencyKey, WebhookMessage):
        session.execute(delete(owned).where(owned.prediction_id.in_(prediction_ids)))
    session.execute(delete(Prediction).where(Prediction.id.in_(prediction_ids)))


def _owned(prediction: Prediction | None, account_id: str | None) -> Prediction:
    if prediction is None or account_id not in (None, prediction.account_id):
        raise NotFoundError("There is no such prediction.")
    return prediction


def _sums(*only: ColumnElement[bool]) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of ``Waiting`` over the predictions that meet these conditions."""
    where = and_(true(), *only)
    return (
        func.count().filter(where),
        func.coalesce(func.sum(Prediction.estimated_seconds).filter(where), 0.0),
        func.count(Prediction.fetch_host).filter(where),
    )


# Asked for with every create, so it is put together once.
_WAITING = select(*_sums()).where(Prediction.status.in_(ACTIVE))
_WAITING_OF = _WAITING.add_columns(*_sums(Prediction.account_id == bindparam("account_id")))


def _replay(
    session: Session, new: NewPrediction, key: str | None, request_hash: str
) -> Created | None:
    """Return what an earlier request of the account with this key made, if there was one.

    Raises:
        ConflictError: that was another request.
    """
    used = None if key is None else session.get(IdempotencyKey, (new.account_id, key))
    if used is None:
        return None
    if used.request_hash != request_hash:
        raise ConflictError("This Idempotency-Key was used for a different request.")
    return Created(session.get_one(Prediction, used.prediction_id), replayed=True)
