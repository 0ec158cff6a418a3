"""Webhooks: written with the change they tell of, signed, and tried again.

A message is a row, written in the transaction that changes the prediction, so that neither is
ever there without the other. ``background.WebhookSender`` sends it afterwards.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from urllib.parse import urlsplit

import standardwebhooks
from sqlalchemy import Update, func, or_, select, update
from sqlalchemy.orm import Session

from tegula.errors import NotFoundError
from tegula.server.db import WEBHOOKS_LOCK, Clock, Database, Page, new_id, read_page
from tegula.server.fetch import Answer
from tegula.server.pubsub import PubSub
from tegula.server.tables import Prediction, SecretKey, WebhookMessage


def signed_headers(
    secrets: Sequence[str], message_id: str, now: datetime, body: str
) -> Mapping[str, str]:
    """Return the headers of a message, with one signature for each valid secret.

    Args:
        secrets: each ``whsec_`` and base64.
        message_id: the same over all attempts.
        now: time of this attempt.
        body: the text that is sent.
    """
    signatures = [standardwebhooks.Webhook(one).sign(message_id, now, body) for one in secrets]
    return {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


MINUTE, HOUR = 60, 3600
SCHEDULE = (
    *(1, 3, 8, 16, 28),
    *(5 * MINUTE, 30 * MINUTE),
    *(2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 20 * HOUR, 24 * HOUR),
)
"""Seconds between the attempts for a terminal message; the others are sent once.

Six attempts fall into the first minute, since most receivers that fail are just being restarted.
From the second minute on it is the schedule that the Standard Webhooks specification recommends.
"""

JITTER = 0.1
_LONGEST_PAUSE = HOUR


@dataclass(frozen=True)
class Outcome:
    """What follows from one attempt.

    state: of the message: pending, delivered or failed.
    next_at: when to try again, if it is pending.
    status, error: how the receiver answered, or why it did not.
    """

    state: str
    next_at: datetime
    status: int | None = None
    error: str | None = None


def outcome(
    message: WebhookMessage,
    answer: Answer | None,
    now: datetime,
    jitter: float,
    error: str | None = None,
) -> Outcome:
    """Return what follows from an answer, or from none.

    Only 2xx is success; redirects are failures, and 410 asks never to be called again.

    Args:
        message: its attempts counted with this one.
        answer: None if the receiver could not be reached.
        now: when.
        jitter: share by which the pause is longer or shorter, -0.1..0.1.
        error: why it could not be reached.
    """
    status = answer.status if answer else None
    if status is not None and 200 <= status < 300:
        return Outcome("delivered", now, status)
    once = message.event != "completed" or message.attempts > len(SCHEDULE)
    if once or status == HTTPStatus.GONE:
        return Outcome("failed", now, status, error)
    pause = SCHEDULE[message.attempts - 1] * (1 + jitter)
    wanted = min((answer.retry_after if answer else None) or 0, _LONGEST_PAUSE)
    return Outcome("pending", now + timedelta(seconds=max(pause, wanted)), status, error)


APART = timedelta(milliseconds=500)
"""Messages of one prediction about output or logs are at least this far apart."""

RETIRED_SIGNS_FOR = timedelta(hours=24)
"""A rotated secret still signs for so long, beside the new one."""


@dataclass(frozen=True)
class Webhooks:
    """The messages to send, and the secrets that sign them.

    render: makes the body of a message about a prediction, as it is now.
    """

    database: Database
    clock: Clock
    pubsub: PubSub
    render: Callable[[Prediction], str]

    def enqueue(self, session: Session, prediction: Prediction, event: str, now: datetime) -> None:
        """Write a message, if the prediction has a webhook that wants this event.

        Of output and logs, one waiting message is enough, since its body is made when it
        is sent. That of start and completed is made here and never changes.
        """
        if prediction.webhook is None or event not in prediction.webhook_events:
            return
        at, body = now, None
        if event in ("output", "logs"):
            latest = session.scalar(
                select(WebhookMessage)
                .where(WebhookMessage.prediction_id == prediction.id, WebhookMessage.event == event)
                .order_by(WebhookMessage.next_at.desc())
                .limit(1)
            )
            if latest is not None:
                if latest.state == "pending" and latest.body is None:
                    return
                at = max(now, latest.next_at + APART)
        else:
            body = self.render(prediction)
        session.add(
            WebhookMessage(
                id=f"msg_{new_id(now)}",
                prediction_id=prediction.id,
                account_id=prediction.account_id,
                url=prediction.webhook,
                receiver=urlsplit(prediction.webhook).netloc.lower()[:255],
                event=event,
                body=body,
                next_at=at,
                created_at=now,
            )
        )

    def due(
        self, limit: int, hold: timedelta, busy: Collection[str] = ()
    ) -> tuple[WebhookMessage, ...]:
        """Take messages whose time has come; for ``hold`` nobody else is given them.

        A taker that dies has its messages given out again, with the same ids. Those to
        receivers that are ``busy`` wait. While another process is taking some there are none:
        all of them wake when a retry is due, and one is enough to send it.
        """
        now = self.clock()
        query = (
            select(WebhookMessage)
            .where(WebhookMessage.state == "pending", WebhookMessage.next_at <= now)
            .where(WebhookMessage.receiver.not_in(busy))
            .order_by(WebhookMessage.next_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self.database.write() as session:
            if not self.database.is_first(session, WEBHOOKS_LOCK):
                return ()
            messages = session.scalars(query).all()
            unwritten = [message.prediction_id for message in messages if message.body is None]
            rows = session.scalars(select(Prediction).where(Prediction.id.in_(unwritten)))
            predictions = {prediction.id: prediction for prediction in rows}
            for message in messages:
                message.attempts += 1
                message.next_at = now + hold
                if message.body is None:
                    message.body = self.render(predictions[message.prediction_id])
        return tuple(messages)

    def finish_attempt(self, message_id: str, result: Outcome) -> None:
        """Note how an attempt went."""
        values = {
            "state": result.state,
            "next_at": result.next_at,
            "finished_at": None if result.state == "pending" else result.next_at,
            "last_status": result.status,
            "last_error": result.error,
        }
        with self.database.write() as session:
            session.execute(_pending(message_id).values(values))

    def put_off(self, message_id: str, until: datetime) -> None:
        """Give back a message that was taken and not sent; the attempt does not count."""
        values = {"next_at": until, "attempts": WebhookMessage.attempts - 1}
        with self.database.write() as session:
            session.execute(_pending(message_id).values(values))

    def next_due(self) -> datetime | None:
        """Return when the next message is to be sent."""
        query = select(func.min(WebhookMessage.next_at)).where(WebhookMessage.state == "pending")
        with self.database.read() as session:
            return session.scalar(query)

    def messages(self, prediction_id: str) -> tuple[WebhookMessage, ...]:
        """Return the messages about a prediction, oldest first."""
        query = select(WebhookMessage).where(WebhookMessage.prediction_id == prediction_id)
        with self.database.read() as session:
            return tuple(session.scalars(query.order_by(WebhookMessage.id)))

    def page(
        self,
        account_id: str | None,
        *,
        cursor: str | None = None,
        limit: int = 100,
        prediction_id: str | None = None,
        state: str | None = None,
    ) -> Page[WebhookMessage]:
        """Return the messages of an account, or of all, the newest first.

        Raises:
            OptionError: the cursor is not from a page.
        """
        filters = {
            WebhookMessage.account_id: account_id,
            WebhookMessage.prediction_id: prediction_id,
            WebhookMessage.state: state,
        }
        query = select(WebhookMessage).where(
            *(column == value for column, value in filters.items() if value is not None)
        )
        columns = WebhookMessage.created_at, WebhookMessage.id
        with self.database.read() as session:
            return read_page(session, query, columns, cursor=cursor, limit=limit)

    def replay(self, message_id: str, account_id: str | None = None) -> WebhookMessage:
        """Send a message again, with the same id, and as often as a new one; return it.

        Raises:
            NotFoundError: there is none with this id, or it belongs to another account.
        """
        with self.database.write() as session:
            message = session.get(WebhookMessage, message_id, with_for_update=True)
            if message is None or account_id not in (None, message.account_id):
                raise NotFoundError("There is no such webhook message.")
            message.state, message.attempts = "pending", 0
            message.next_at, message.finished_at = self.clock(), None
        self.pubsub.publish(message.prediction_id)
        return message

    def secret(self, account_id: str) -> str:
        """Return the secret that signs the webhooks of an account, made when first needed."""
        return self.secrets(account_id)[0]

    def secrets(self, account_id: str) -> tuple[str, ...]:
        """Return every secret that signs now, the newest first."""
        valid = select(SecretKey.value).where(
            SecretKey.owner == account_id,
            or_(SecretKey.retired_at.is_(None), SecretKey.retired_at > self.clock()),
        )
        valid = valid.order_by(SecretKey.id.desc())
        with self.database.read() as session:
            found = tuple(session.scalars(valid))
        if found:
            return found
        with self.database.write(alone=True) as session:
            # Another thread may have made the first one meanwhile.
            return tuple(session.scalars(valid)) or (self._add_secret(session, account_id),)

    def rotate_secret(self, account_id: str) -> str:
        """Return a new secret; the present one signs beside it for another day."""
        retire = (
            update(SecretKey)
            .where(SecretKey.owner == account_id, SecretKey.retired_at.is_(None))
            .values(retired_at=self.clock() + RETIRED_SIGNS_FOR)
        )
        with self.database.write() as session:
            session.execute(retire)
            return self._add_secret(session, account_id)

    def _add_secret(self, session: Session, account_id: str) -> str:
        # 24 bytes make base64 without padding, and its standard alphabet has neither the "_" nor
        # the "." at which some clients split a secret.
        value = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
        session.add(SecretKey(account_id, value, self.clock()))
        return value


def _pending(message_id: str) -> Update:
    return update(WebhookMessage).where(
        WebhookMessage.id == message_id, WebhookMessage.state == "pending"
    )
