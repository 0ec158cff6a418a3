"""Webhooks: the outbox and its signatures."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, func, select, update

from tegula.errors import NotFoundError
from tegula.server import db as tables
from tegula.server.db import (
    Clock,
    Database,
    Prediction,
    WebhookDelivery,
    new_id,
    prediction_of,
    record,
)

# The signature of a webhook, as standard-webhooks (standardwebhooks.com) defines it.


def sign(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """Return ``v1,`` and the base64 of an HMAC-SHA256 over id, time and body.

    Args:
        secret: ``whsec_`` and base64.
        message_id: id of the message, the same over all attempts.
        timestamp: seconds since 1970 of this attempt.
        body: the text that is sent.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, f"{message_id}.{timestamp}.{body}".encode(), hashlib.sha256)
    return "v1," + base64.b64encode(digest).decode()


def signed_headers(
    secrets: Sequence[str], message_id: str, timestamp: int, body: str
) -> Mapping[str, str]:
    """Return the headers of a message, with one signature for each valid secret."""
    signatures = " ".join(sign(secret, message_id, timestamp, body) for secret in secrets)
    return {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signatures,
    }


# Webhooks as rows, written in the transaction that changes the prediction.

APART = timedelta(milliseconds=500)
"""Messages of one prediction about output or logs are at least this far apart."""

RETIRED_SIGNS_FOR = timedelta(hours=24)
"""A rotated secret still signs for so long, beside the new one."""

Render = Callable[[Prediction], str]
"""The body of a message about a prediction, as it is now."""


@dataclass(frozen=True)
class Outbox:
    """Writes messages; ``delivery`` sends them."""

    render: Render

    def put(
        self, connection: Connection, prediction: Prediction, event: str, now: datetime
    ) -> None:
        """Write a message, if the prediction has a webhook that wants this event.

        Of output and logs, one waiting message is enough, since its body is made when it
        is sent. That of start and completed is made here and never changes.
        """
        if prediction.webhook is None or event not in prediction.webhook_events:
            return
        at = now
        if intermediate := event in ("output", "logs"):
            latest = _latest(connection, prediction.id, event)
            if latest is not None and latest.state == "pending" and latest.body is None:
                return
            at = now if latest is None else max(now, latest.next_at + APART)
        connection.execute(
            tables.webhooks.insert().values(
                id=f"msg_{new_id(now)}",
                prediction_id=prediction.id,
                account_id=prediction.account_id,
                url=prediction.webhook,
                receiver=urlsplit(prediction.webhook).netloc.lower()[:255],
                event=event,
                body=None if intermediate else self.render(prediction),
                state="pending",
                attempts=0,
                next_at=at,
                created_at=now,
            )
        )


def _latest(connection: Connection, prediction_id: str, event: str) -> WebhookDelivery | None:
    table = tables.webhooks
    query = (
        select(table)
        .where(table.c.prediction_id == prediction_id, table.c.event == event)
        .order_by(table.c.next_at.desc())
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else record(WebhookDelivery, row)


@dataclass(frozen=True)
class Webhooks:
    """The messages of the outbox, and the secrets that sign them."""

    database: Database
    clock: Clock
    outbox: Outbox

    def secret(self, account_id: str) -> str:
        """Return the secret that signs the webhooks of an account, made when first asked for."""
        return self.secrets(account_id)[0]

    def secrets(self, account_id: str) -> tuple[str, ...]:
        """Return every secret that signs now, the newest first."""
        found = self._valid(account_id)
        return found or (self._add_first(account_id),)

    def rotate_secret(self, account_id: str) -> str:
        """Return a new secret; the present one signs beside it for another day."""
        table, now = tables.secret_keys, self.clock()
        retire = update(table).where(table.c.owner == account_id, table.c.retired_at.is_(None))
        with self.database.write() as connection:
            connection.execute(retire.values(retired_at=now + RETIRED_SIGNS_FOR))
            return _add_secret(connection, account_id, now)

    def due(
        self, limit: int, hold: timedelta, busy: Collection[str] = ()
    ) -> tuple[WebhookDelivery, ...]:
        """Take messages whose time has come; for ``hold`` nobody else is given them.

        A taker that dies has its messages given out again, with the same ids. Those to
        receivers that are ``busy`` wait.
        """
        table, now = tables.webhooks, self.clock()
        query = (
            select(table)
            .where(table.c.state == "pending", table.c.next_at <= now)
            .where(table.c.receiver.not_in(busy))
            .order_by(table.c.next_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self.database.write() as connection:
            rows = connection.execute(query).all()
            for row in rows:
                held = (
                    update(table)
                    .where(table.c.id == row.id)
                    .values(
                        attempts=row.attempts + 1,
                        next_at=now + hold,
                        body=row.body or self._body(connection, row.prediction_id),
                    )
                )
                connection.execute(held)
            names = [row.id for row in rows]
            taken = connection.execute(select(table).where(table.c.id.in_(names))).all()
        return tuple(record(WebhookDelivery, row) for row in taken)

    def settle(self, delivery_id: str, **values: Any) -> None:
        """Note how an attempt went."""
        table = tables.webhooks
        query = update(table).where(table.c.id == delivery_id, table.c.state == "pending")
        with self.database.write() as connection:
            connection.execute(query.values(values))

    def next_due(self) -> datetime | None:
        """Return when the next message is to be sent."""
        table = tables.webhooks
        query = select(func.min(table.c.next_at)).where(table.c.state == "pending")
        with self.database.read() as connection:
            return connection.execute(query).scalar()

    def deliveries(self, prediction_id: str) -> tuple[WebhookDelivery, ...]:
        """Return the messages about a prediction, oldest first."""
        table = tables.webhooks
        query = select(table).where(table.c.prediction_id == prediction_id).order_by(table.c.id)
        with self.database.read() as connection:
            return tuple(record(WebhookDelivery, row) for row in connection.execute(query))

    def replay(self, delivery_id: str) -> None:
        """Send a message again, with the same id.

        Raises:
            NotFoundError: there is none with this id.
        """
        table = tables.webhooks
        query = update(table).where(table.c.id == delivery_id)
        fresh = {"state": "pending", "attempts": 0, "next_at": self.clock(), "finished_at": None}
        with self.database.write() as connection:
            if not connection.execute(query.values(fresh)).rowcount:
                raise NotFoundError("There is no such webhook message.")

    def _body(self, connection: Connection, prediction_id: str) -> str:
        query = select(tables.predictions).where(tables.predictions.c.id == prediction_id)
        return self.outbox.render(prediction_of(connection.execute(query).one()))

    def _valid(self, owner: str) -> tuple[str, ...]:
        table = tables.secret_keys
        now = self.clock()
        query = select(table).where(table.c.owner == owner).order_by(table.c.id.desc())
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        return tuple(r.value for r in rows if r.retired_at is None or r.retired_at > now)

    def _add_first(self, owner: str) -> str:
        with self.database.write() as connection:
            query = select(tables.secret_keys.c.value).where(tables.secret_keys.c.owner == owner)
            found = connection.execute(query).scalars().first()
            return found or _add_secret(connection, owner, self.clock())


def _add_secret(connection: Connection, owner: str, now: datetime) -> str:
    value = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
    row = {"owner": owner, "value": value, "created_at": now}
    connection.execute(tables.secret_keys.insert().values(row))
    return value
