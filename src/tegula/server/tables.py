"""The tables: one mapped class each, which is also what the store hands out.

Rows leave the store as these objects. By then their session is closed: they hold plain values,
and assigning to them raises, so that nobody takes a local change for a stored one.

Alembic makes and changes the tables (``migrations/``); a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from enum import Enum
from typing import Annotated, Any

import sqlalchemy as sa
from sqlalchemy import JSON, ColumnElement, ForeignKey, Index, String
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcTime(TypeDecorator[datetime]):
    """Aware times in UTC, also in SQLite, which keeps no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:  # noqa: ARG002
        """Return the time as the database is to keep it."""
        return None if value is None else value.astimezone(timezone.utc)

    def process_result_value(self, value: Any, dialect: Any) -> datetime | None:  # noqa: ARG002
        """Return the time as rows have it."""
        if value is None:
            return None
        aware: datetime = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return aware.astimezone(timezone.utc)


class Strings(TypeDecorator[tuple[str, ...]]):
    """A tuple of strings, kept as a JSON list."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Any) -> Any:  # noqa: ARG002
        """Return the list that is kept."""
        return None if value is None else list(value)

    def process_result_value(self, value: Any, dialect: Any) -> tuple[str, ...] | None:  # noqa: ARG002
        """Return the tuple."""
        return None if value is None else tuple(value)


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


ACTIVE = (State.STARTING, State.PROCESSING)

WEBHOOK_EVENTS = ("start", "output", "logs", "completed")
DEFAULT_WEBHOOK_EVENTS = ("output", "completed")

FILE_KEY = "$file"
"""A kept file inside an input or output is ``{"$file": id, "name": ..., "type": ...}``."""


def file_ids(value: Any) -> Iterator[str]:
    """Yield the ids of the kept files inside a JSON value."""
    if isinstance(value, Mapping):
        if FILE_KEY in value:
            yield value[FILE_KEY]
        else:
            for item in value.values():
                yield from file_ids(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from file_ids(item)


Id = Annotated[str, "id"]
Name = Annotated[str, "name"]
Word = Annotated[str, "word"]
Json = Mapping[str, Any]

# SQLite numbers rows by itself only in a column of exactly this type.
_COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# None is stored as SQL's NULL, which queries find, and not as the JSON text "null".
_NULLABLE_JSON = JSON(none_as_null=True)


class Base(MappedAsDataclass, DeclarativeBase):
    """Columns are dataclass fields; two rows are equal if all of their fields are."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - read once, by SQLAlchemy
        Id: String(64),
        Name: String(255),
        Word: String(16),
        str: sa.Text(),
        float: sa.Float(),
        datetime: UtcTime(),
        Json: JSON(),
        State: sa.Enum(
            State,
            native_enum=False,
            length=16,
            values_callable=lambda states: [state.value for state in states],
        ),
    }

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, unless the row has left the store."""
        state = self.__dict__.get("_sa_instance_state")
        if state is not None and state.detached:
            raise AttributeError(
                f"{type(self).__name__} is a copy of a stored row; {name} is fixed."
            )
        super().__setattr__(name, value)


class Account(Base):
    """Who owns predictions, files and private models; ``kind`` is user or organization.

    turn: seconds of work that the devices gave it, over its weight, as ``fairness`` counts them.
    """

    __tablename__ = "accounts"

    id: Mapped[Id] = mapped_column(primary_key=True)
    username: Mapped[Name] = mapped_column(unique=True)
    name: Mapped[Name]
    kind: Mapped[Word]
    created_at: Mapped[datetime]
    turn: Mapped[float] = mapped_column(default=0.0, server_default="0")


class Token(Base):
    """A key to an account; of its text only a hash is kept, and the last four characters."""

    __tablename__ = "tokens"

    id: Mapped[Id] = mapped_column(primary_key=True)
    account_id: Mapped[Id] = mapped_column(ForeignKey("accounts.id"))
    name: Mapped[Name]
    hash: Mapped[Id] = mapped_column(unique=True, repr=False)
    hint: Mapped[str] = mapped_column(String(8))
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime | None] = mapped_column(default=None)
    revoked_at: Mapped[datetime | None] = mapped_column(default=None)


class SecretKey(Base):
    """A key that signs: webhooks of the account ``owner``, or links if that is ``signing``.

    retired_at: when a replaced key stops to sign.
    """

    __tablename__ = "secret_keys"
    __table_args__ = (Index(None, "owner"),)

    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True, autoincrement=True, init=False)
    owner: Mapped[Id]
    value: Mapped[str] = mapped_column(String(128), repr=False)
    created_at: Mapped[datetime]
    retired_at: Mapped[datetime | None] = mapped_column(default=None)


class Property(Base):
    """Something that is true of the whole database, by its name."""

    __tablename__ = "properties"

    name: Mapped[Id] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(String(128))


class Prediction(Base):
    """One accepted piece of work.

    model, version: ``owner/name`` and the 64 hex digits of its version.
    label: of the catalogue's version; None for a version of a user's model. It still names
        the version after a release, when the hex digits are others.
    deployment: ``owner/name`` of the deployment it was made through.
    deadline: when it is given up, started or not.
    estimated_seconds: work it was admitted with.
    attempt: number of the latest claim; only the worker that holds it may write.
    losses: how many workers died or hung over it.
    worker, lease_until: who holds it, and until when without a heartbeat.
    fetch_host: host of the next input to fetch, for which no device is needed; None once all
        inputs are there.
    share_token: opens its page to everybody; None while it is private.
    predict_seconds: time it ran, without waiting.
    progress: share of the work that is done, 0..1.
    """

    __tablename__ = "predictions"
    __table_args__ = (
        Index(None, "account_id", "created_at", "id"),
        Index(None, "status", "created_at"),
        Index(None, "completed_at"),
    )

    id: Mapped[Id] = mapped_column(primary_key=True)
    account_id: Mapped[Id] = mapped_column(ForeignKey("accounts.id"))
    model: Mapped[Name]
    version: Mapped[Id]
    input: Mapped[Json]
    created_at: Mapped[datetime]
    label: Mapped[Id | None] = mapped_column(default=None)
    status: Mapped[State] = mapped_column(default=State.STARTING)
    output: Mapped[Any] = mapped_column(_NULLABLE_JSON, nullable=True, default=None)
    logs: Mapped[str] = mapped_column(default="")
    error: Mapped[str | None] = mapped_column(default=None)
    source: Mapped[Word] = mapped_column(default="api")
    token_id: Mapped[Id | None] = mapped_column(default=None)
    deployment: Mapped[Name | None] = mapped_column(default=None)
    started_at: Mapped[datetime | None] = mapped_column(default=None)
    completed_at: Mapped[datetime | None] = mapped_column(default=None)
    deadline: Mapped[datetime | None] = mapped_column(default=None)
    data_removed: Mapped[bool] = mapped_column(default=False)
    predict_seconds: Mapped[float | None] = mapped_column(default=None)
    progress: Mapped[float] = mapped_column(default=0.0)
    webhook: Mapped[str | None] = mapped_column(default=None)
    webhook_events: Mapped[tuple[str, ...]] = mapped_column(Strings, default=DEFAULT_WEBHOOK_EVENTS)
    share_token: Mapped[Id | None] = mapped_column(unique=True, default=None)
    estimated_seconds: Mapped[float] = mapped_column(default=0.0)
    attempt: Mapped[int] = mapped_column(default=0)
    losses: Mapped[int] = mapped_column(default=0)
    worker: Mapped[Name | None] = mapped_column(default=None)
    lease_until: Mapped[datetime | None] = mapped_column(default=None)
    fetch_host: Mapped[Name | None] = mapped_column(default=None)


def _index_of_some(name: str, where: ColumnElement[bool], *columns: Any) -> Index:
    """Make an index of those rows alone that a statement with the same condition looks for."""
    return Index(name, *columns, sqlite_where=where, postgresql_where=where)


# Past predictions are many, and few of them are looked for otherwise than by id or account.
_index_of_some(
    "ix_predictions_kept_completed_at",
    Prediction.data_removed.is_(False),
    Prediction.completed_at,
)
_index_of_some(
    "ix_predictions_kept_account_id",
    Prediction.data_removed.is_(False),
    Prediction.account_id,
    Prediction.created_at,
    Prediction.id,
)
_index_of_some(
    "ix_predictions_shared_model",
    Prediction.share_token.is_not(None),
    Prediction.model,
    Prediction.created_at,
    Prediction.id,
)
_index_of_some(
    "ix_predictions_claimed_deployment",
    Prediction.lease_until.is_not(None),
    Prediction.deployment,
)


class Event(Base):
    """One thing that happened to a prediction; ``seq`` grows over all predictions.

    kind and data: ``logs`` and a text of whole lines; ``output`` and one item of it;
    ``restart`` and None, after which earlier output no longer counts; ``done`` and the
    terminal state.
    """

    __tablename__ = "events"
    __table_args__ = (Index(None, "prediction_id", "seq"), {"sqlite_autoincrement": True})

    seq: Mapped[int] = mapped_column(_COUNTER, primary_key=True, autoincrement=True, init=False)
    prediction_id: Mapped[Id] = mapped_column(ForeignKey("predictions.id"))
    attempt: Mapped[int]
    kind: Mapped[Word]
    data: Mapped[Any] = mapped_column(_NULLABLE_JSON, nullable=True)
    at: Mapped[datetime]


class IdempotencyKey(Base):
    """A key that a client sent with a create, and the prediction that the create made."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "created_at"), Index(None, "prediction_id"))

    account_id: Mapped[Id] = mapped_column(primary_key=True)
    key: Mapped[Name] = mapped_column(primary_key=True)
    request_hash: Mapped[Id]
    prediction_id: Mapped[Id] = mapped_column(ForeignKey("predictions.id"))
    created_at: Mapped[datetime]


class FileRecord(Base):
    """A kept file; its bytes lie under ``sha256``, shared by all files that are equal.

    user_metadata: what the uploader attached, given back as it is.
    prediction_id: the prediction whose input or output it is; None for an upload.
    expires_at: when it is removed; None keeps it as long as its prediction.
    """

    __tablename__ = "files"
    __table_args__ = (
        Index(None, "sha256"),
        Index(None, "prediction_id"),
        Index(None, "expires_at"),
    )

    id: Mapped[Id] = mapped_column(primary_key=True)
    account_id: Mapped[Id] = mapped_column(ForeignKey("accounts.id"))
    name: Mapped[Name]
    content_type: Mapped[Name]
    size: Mapped[int] = mapped_column(sa.BigInteger)
    sha256: Mapped[Id]
    md5: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime]
    user_metadata: Mapped[Json] = mapped_column("metadata", default_factory=dict)
    prediction_id: Mapped[Id | None] = mapped_column(default=None)
    expires_at: Mapped[datetime | None] = mapped_column(default=None)


_index_of_some(
    "ix_files_uploaded_account_id",
    FileRecord.prediction_id.is_(None),
    FileRecord.account_id,
    FileRecord.created_at,
    FileRecord.id,
)


class WebhookMessage(Base):
    """One webhook to send; ``id`` stays the same over all attempts.

    receiver: host and port of the URL.
    event: one of ``WEBHOOK_EVENTS``.
    body: the exact text to send; None until an intermediate message is first sent.
    state: pending, delivered or failed.
    """

    __tablename__ = "webhooks"
    __table_args__ = (
        Index(None, "state", "next_at"),
        Index(None, "prediction_id", "event", "next_at"),
        Index(None, "account_id", "created_at", "id"),
        Index(None, "finished_at"),
    )

    id: Mapped[Id] = mapped_column(primary_key=True)
    prediction_id: Mapped[Id] = mapped_column(ForeignKey("predictions.id"))
    account_id: Mapped[Id]
    url: Mapped[str]
    receiver: Mapped[Name]
    event: Mapped[Word]
    body: Mapped[str | None]
    next_at: Mapped[datetime]
    created_at: Mapped[datetime]
    state: Mapped[Word] = mapped_column(default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    finished_at: Mapped[datetime | None] = mapped_column(default=None)
    last_status: Mapped[int | None] = mapped_column(default=None)
    last_error: Mapped[str | None] = mapped_column(default=None)


class Deployment(Base):
    """A named model version with pinned defaults; ``number`` grows with every change.

    version: the label of a version of the catalogue, which outlives releases, or the id of a
        version of a user's model, which is a row.
    max_instances: how many of its predictions run at once; 0 takes none.
    min_instances: above 0 keeps its model loaded when the queue is empty.
    """

    __tablename__ = "deployments"

    owner: Mapped[Name] = mapped_column(primary_key=True)
    name: Mapped[Name] = mapped_column(primary_key=True)
    account_id: Mapped[Id] = mapped_column(ForeignKey("accounts.id"))
    number: Mapped[int]
    model: Mapped[Name]
    version: Mapped[Id]
    hardware: Mapped[Name]
    min_instances: Mapped[int]
    max_instances: Mapped[int]
    created_at: Mapped[datetime]
    defaults: Mapped[Json] = mapped_column(default_factory=dict)

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"


class UserModel(Base):
    """A model that somebody created: a name and texts; its versions are presets over ours."""

    __tablename__ = "user_models"

    owner: Mapped[Name] = mapped_column(primary_key=True)
    name: Mapped[Name] = mapped_column(primary_key=True)
    account_id: Mapped[Id] = mapped_column(ForeignKey("accounts.id"))
    visibility: Mapped[Word]
    hardware: Mapped[Name]
    created_at: Mapped[datetime]
    description: Mapped[str] = mapped_column(default="")
    readme: Mapped[str] = mapped_column(default="")
    github_url: Mapped[str | None] = mapped_column(default=None)
    paper_url: Mapped[str | None] = mapped_column(default=None)
    license_url: Mapped[str | None] = mapped_column(default=None)
    weights_url: Mapped[str | None] = mapped_column(default=None)
    cover_image_url: Mapped[str | None] = mapped_column(default=None)

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"


class UserVersion(Base):
    """A version of a user's model: input defaults over a version of the catalogue.

    base_model, base_label: name the version of the catalogue, in this release and the next.
    """

    __tablename__ = "user_versions"
    __table_args__ = (Index(None, "model", "created_at"),)

    id: Mapped[Id] = mapped_column(primary_key=True)
    model: Mapped[Name]
    base_model: Mapped[Name]
    base_label: Mapped[Id]
    defaults: Mapped[Json]
    created_at: Mapped[datetime]


class UsageRecord(Base):
    """Seconds that one prediction ran; it stays when the prediction's data is removed."""

    __tablename__ = "usage"
    __table_args__ = (Index(None, "account_id", "completed_at"),)

    prediction_id: Mapped[Id] = mapped_column(primary_key=True)
    account_id: Mapped[Id]
    token_id: Mapped[Id | None]
    model: Mapped[Name]
    predict_seconds: Mapped[float]
    completed_at: Mapped[datetime]


class RateBucket(Base):
    """What a caller may still ask for, as a bucket that fills evenly within a minute.

    A bucket that has no row is full. What is lost with the power is refilled in a minute, so
    PostgreSQL keeps the table without its log: counting then waits for no disk.

    who: id of a token, or of the account of a server without tokens.
    kind: of requests.
    remaining: requests in it at ``counted_at``, in seconds since 1970.
    allowed: whether the last request that was counted may go on.
    """

    __tablename__ = "rate_buckets"

    who: Mapped[Id] = mapped_column(primary_key=True)
    kind: Mapped[Word] = mapped_column(primary_key=True)
    remaining: Mapped[float]
    counted_at: Mapped[float]
    allowed: Mapped[bool]


class ModelTotal(Base):
    """A part of what all predictions of a model come to, which is the sum over its rows.

    Every change adds a row, since those who wrote to one and the same would wait for each other;
    the sweep makes one row of many. The sums stay when predictions are removed for good.

    created: predictions that were accepted.
    ran, seconds: those that ran and ended, and for how long.
    """

    __tablename__ = "model_totals"

    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True, autoincrement=True, init=False)
    model: Mapped[Name]
    created: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    ran: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    seconds: Mapped[float] = mapped_column(default=0.0)
