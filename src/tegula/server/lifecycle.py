"""How a prediction goes from state to state, and what is written with each change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from sqlalchemy import delete
from sqlalchemy.orm import Session

from tegula.server.fairness import FairTurns
from tegula.server.tables import (
    Event,
    FileRecord,
    ModelTotal,
    Prediction,
    State,
    UsageRecord,
    file_ids,
)
from tegula.server.webhooks import Webhooks


class Trigger(str, Enum):
    """What happens to a prediction.

    START: a worker began to run it. REQUEUE: its worker was lost or handed it back.
    EXPIRE: its deadline passed.
    """

    START = "start"
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"
    REQUEUE = "requeue"


TRANSITIONS: Mapping[tuple[State, Trigger], State] = {
    # Claimed or not, a prediction is starting until its worker says that the model runs it, also
    # while its inputs are fetched. It may fail before, when one cannot be, or its model cannot be
    # loaded.
    (State.STARTING, Trigger.START): State.PROCESSING,
    (State.STARTING, Trigger.REQUEUE): State.STARTING,
    (State.STARTING, Trigger.FAIL): State.FAILED,
    (State.STARTING, Trigger.CANCEL): State.CANCELED,
    # Replicate calls it aborted if a deadline passes before the start, else canceled.
    (State.STARTING, Trigger.EXPIRE): State.ABORTED,
    (State.PROCESSING, Trigger.REQUEUE): State.STARTING,
    (State.PROCESSING, Trigger.SUCCEED): State.SUCCEEDED,
    (State.PROCESSING, Trigger.FAIL): State.FAILED,
    (State.PROCESSING, Trigger.CANCEL): State.CANCELED,
    (State.PROCESSING, Trigger.EXPIRE): State.CANCELED,
    # Nothing leads out of the other four.
}
"""The only ways between states; a trigger that is not here for a state changes nothing."""

NEVER_STARTED = "The deadline passed before the prediction started."
NEVER_FINISHED = "The deadline passed while the prediction was running."


@dataclass(frozen=True)
class Lifecycle:
    """Changes the state of predictions, within transactions of the caller.

    The state, its event, its webhook and its usage record are committed together or not at all.
    """

    webhooks: Webhooks
    turns: FairTurns

    def apply(
        self,
        session: Session,
        prediction: Prediction,
        trigger: Trigger,
        now: datetime,
        error: str | None = None,
    ) -> bool:
        """Apply a trigger to a locked row; return whether that changed anything.

        ``error`` is for the caller to read, where the prediction ends without a result.
        """
        before = prediction.status
        after = TRANSITIONS.get((before, trigger))
        if after is None:
            return False
        prediction.status = after
        if trigger is Trigger.START:
            prediction.started_at = max(now, prediction.created_at)
            self.webhooks.enqueue(session, prediction, "start", now)
        elif trigger is Trigger.REQUEUE:
            if before is State.PROCESSING:
                outputs = list(file_ids(prediction.output))
                session.execute(delete(FileRecord).where(FileRecord.id.in_(outputs)))
                add_event(session, prediction, "restart", None, now)
            self.turns.end(session, prediction, 0.0)
            prediction.started_at = prediction.output = None
            prediction.progress = 0.0
            prediction.worker = prediction.lease_until = None
        else:
            if trigger is Trigger.EXPIRE:
                error = NEVER_STARTED if before is State.STARTING else NEVER_FINISHED
            self._end(session, prediction, now, error)
        return True

    def _end(
        self, session: Session, prediction: Prediction, now: datetime, error: str | None
    ) -> None:
        # Clocks are set back now and then, but no prediction ends before it began.
        began = prediction.started_at
        end = max(now, began or prediction.created_at)
        seconds = 0.0 if began is None else (end - began).total_seconds()
        self.turns.end(session, prediction, seconds)
        prediction.completed_at = end
        prediction.error = error
        prediction.worker = prediction.lease_until = None
        if prediction.status is State.SUCCEEDED:
            prediction.progress = 1.0
        if began is not None:
            prediction.predict_seconds = seconds
            session.add(
                UsageRecord(
                    prediction_id=prediction.id,
                    account_id=prediction.account_id,
                    token_id=prediction.token_id,
                    model=prediction.model,
                    predict_seconds=seconds,
                    completed_at=end,
                )
            )
            seconds = prediction.predict_seconds
            session.add(ModelTotal(prediction.model, ran=1, seconds=seconds))
        add_event(session, prediction, "done", prediction.status.value, now)
        self.webhooks.enqueue(session, prediction, "completed", now)


def lock(session: Session, prediction_id: str) -> Prediction | None:
    """Return a row that nobody else can change until the transaction ends."""
    return session.get(Prediction, prediction_id, with_for_update=True)


def add_event(
    session: Session, prediction: Prediction, kind: str, data: Any, now: datetime
) -> None:
    """Append to the events of a prediction."""
    session.add(Event(prediction.id, prediction.attempt, kind, data, now))
