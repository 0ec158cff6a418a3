"""Accounts share the devices: whose turn it is, by the work that each was given so far.

Start-time fair queueing (Goyal, Vin and Cheng, 1996), with accounts as flows and seconds on a
device as cost. Every account has a counter of seconds over its weight, its turn; of the accounts
with work that waits, the one with the smallest counter goes first. An account that comes back
after a rest begins where the last of the others is by now, so that rest earns no credit; what it
took too much of before it left still counts. How long a prediction will run is not known
when it begins: its estimate is charged then, and put right when it ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from tegula.server.tables import Account, Prediction, Property

_NOW = "turn"
"""The property that says where whoever comes back begins: the smallest turn that waits."""
_LEAST_SECONDS = 1.0
"""What is charged when a prediction begins whose time nobody can estimate."""


@dataclass(frozen=True)
class FairTurns:
    """Says which accounts may go next, and charges them for what the devices do for them.

    weights: by username; an account of weight 2 gets twice the seconds of one of 1, the usual.
    tolerance: seconds that an account may be ahead of others. Within them it keeps its turn, so
        that devices do not change models with every prediction.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 30.0

    def next_accounts(self, session: Session, waiting: Collection[str]) -> Collection[str]:
        """Return those of the accounts with work that waits who may go next."""
        if not waiting:
            return waiting
        query = select(Account.id, Account.turn).where(Account.id.in_(waiting))
        turns = dict(session.execute(query).all())
        first = max(_now(session), min(turns.values()))
        session.merge(Property(_NOW, repr(first)))
        return [each for each, turn in turns.items() if turn <= first + self.tolerance]

    def begin(self, session: Session, prediction: Prediction) -> None:
        """Charge an account for a prediction that a device begins."""
        account = session.get_one(Account, prediction.account_id, with_for_update=True)
        began = max(account.turn, _now(session))
        account.turn = began + _estimate(prediction) / self._weight(account)

    def end(self, session: Session, prediction: Prediction, seconds: float) -> None:
        """Put the charge right for a prediction that took a device this long.

        Call it while the prediction is still claimed: one that no device began was not charged.
        """
        if prediction.lease_until is None or prediction.fetch_host is not None:
            return
        account = session.get_one(Account, prediction.account_id, with_for_update=True)
        account.turn += (seconds - _estimate(prediction)) / self._weight(account)

    def _weight(self, account: Account) -> float:
        return self.weights.get(account.username, 1.0)


def _now(session: Session) -> float:
    known = session.get(Property, _NOW)
    return float(known.value) if known else 0.0


def _estimate(prediction: Prediction) -> float:
    return max(prediction.estimated_seconds, _LEAST_SECONDS)
