"""Whether a prediction is let in: room in the queue, and keys that were used before."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from tegula.errors import BusyError, ConflictError
from tegula.predictions import tables
from tegula.predictions.mapping import prediction_of
from tegula.predictions.records import Created, NewPrediction
from tegula.predictions.states import ACTIVE

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
