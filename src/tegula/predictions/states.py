"""The states of a prediction and the only ways between them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class State(str, Enum):
    """What a prediction is doing, in the words of the HTTP API."""

    STARTING = "starting"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    ABORTED = "aborted"

    @property
    def terminal(self) -> bool:
        """Whether nothing changes any more."""
        return self not in ACTIVE


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


ACTIVE = frozenset({State.STARTING, State.PROCESSING})

TRANSITIONS: Mapping[tuple[State, Trigger], State] = {
    (State.STARTING, Trigger.START): State.PROCESSING,
    (State.STARTING, Trigger.REQUEUE): State.STARTING,
    (State.STARTING, Trigger.FAIL): State.FAILED,
    (State.STARTING, Trigger.CANCEL): State.CANCELED,
    (State.STARTING, Trigger.EXPIRE): State.ABORTED,
    (State.PROCESSING, Trigger.REQUEUE): State.STARTING,
    (State.PROCESSING, Trigger.SUCCEED): State.SUCCEEDED,
    (State.PROCESSING, Trigger.FAIL): State.FAILED,
    (State.PROCESSING, Trigger.CANCEL): State.CANCELED,
    (State.PROCESSING, Trigger.EXPIRE): State.CANCELED,
}


def transition(state: State, trigger: Trigger) -> State | None:
    """Return the state that follows, or None where the trigger changes nothing.

    No trigger ever leads out of a terminal state.
    """
    return TRANSITIONS.get((state, trigger))
