"""The database: rows, tables, connections and pages."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    Text,
    create_engine,
    event,
    literal,
    make_url,
    text,
    tuple_,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import QueuePool
from sqlalchemy.types import TypeDecorator

from tegula.errors import MissingExtraError, OptionError, PathError, ServiceError

# The time, as something that tests can put in its place.

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time now, aware and in UTC."""
    return datetime.now(timezone.utc)


# Names for new rows: ordered by time for rows that are listed, random for secrets.

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: no letter that looks like a digit."""

_RANDOM_BITS = 80
_LENGTH = 26


def new_id(now: datetime) -> str:
    """Return 26 characters: 48 bits of milliseconds, then 80 random ones, as in a ULID."""
    number = int(now.timestamp() * 1000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    return "".join(ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))


def new_secret() -> str:
    """Return 40 characters that nobody guesses: 200 random bits."""
    return "".join(secrets.choice(ALPHABET) for _ in range(40))


# The states of a prediction and the only ways between them.


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


# The rows of the store, as frozen records; times are aware and in UTC.

T = TypeVar("T")

WEBHOOK_EVENTS = ("start", "output", "logs", "completed")
DEFAULT_WEBHOOK_EVENTS = ("output", "completed")

FILE_KEY = "$file"
"""A kept file inside an input or output is ``{"$file": id, "name": ..., "type": ...}``."""


@dataclass(frozen=True)
class Account:
    """Who owns predictions, files and private models; ``kind`` is user or organization."""

    id: str
    username: str
    name: str
    kind: str
    created_at: datetime


@dataclass(frozen=True)
class Token:
    """A key to an account; only its hash is kept, and ``hint``, its last four characters."""

    id: str
    account_id: str
    name: str
    hint: str
    created_at: datetime
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True)
class Prediction:
    """One accepted piece of work.

    model, version: ``owner/name`` and the 64 hex digits of its version.
    deployment: ``owner/name`` of the deployment it was asked of.
    deadline: when it is given up, started or not.
    estimated_seconds: work it was admitted with.
    attempt: number of the latest claim; only the worker that holds it may write.
    losses: how many workers died or hung over it.
    device, worker, lease_until: who holds it, and until when without a heartbeat.
    share_token: opens its page to everybody; None while it is private.
    predict_seconds: time it ran, without waiting.
    """

    id: str
    account_id: str
    model: str
    version: str
    input: Mapping[str, Any]
    created_at: datetime
    status: State = State.STARTING
    output: Any = None
    logs: str = ""
    error: str | None = None
    source: str = "api"
    token_id: str | None = None
    deployment: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    deadline: datetime | None = None
    data_removed: bool = False
    predict_seconds: float | None = None
    progress: float = 0.0
    webhook: str | None = None
    webhook_events: tuple[str, ...] = DEFAULT_WEBHOOK_EVENTS
    share_token: str | None = None
    estimated_seconds: float = 0.0
    attempt: int = 0
    losses: int = 0
    worker: str | None = None
    lease_until: datetime | None = None


@dataclass(frozen=True)
class NewPrediction:
    """What a caller asks for, valid and with its files kept."""

    account_id: str
    model: str
    version: str
    input: Mapping[str, Any]
    source: str = "api"
    token_id: str | None = None
    deployment: str | None = None
    deadline: datetime | None = None
    webhook: str | None = None
    webhook_events: tuple[str, ...] = DEFAULT_WEBHOOK_EVENTS
    estimated_seconds: float = 0.0


@dataclass(frozen=True)
class Created:
    """A prediction as accepted; ``replayed`` if an earlier request with the key made it."""

    prediction: Prediction
    replayed: bool = False


@dataclass(frozen=True)
class Event:
    """One thing that happened to a prediction; ``seq`` grows over all predictions.

    kind and data: ``logs`` and a text of whole lines; ``output`` and one item of it;
    ``restart`` and None, after which earlier output no longer counts; ``done`` and the
    terminal state.
    """

    seq: int
    prediction_id: str
    attempt: int
    kind: str
    data: Any
    at: datetime


@dataclass(frozen=True)
class FileRecord:
    """A kept file; its bytes lie under ``sha256``, shared by all files that are equal.

    prediction_id: the prediction whose input or output it is; None for an upload.
    expires_at: when it is removed; None keeps it as long as its prediction.
    """

    id: str
    account_id: str
    name: str
    content_type: str
    size: int
    sha256: str
    md5: str
    created_at: datetime
    metadata: Mapping[str, Any] = field(default_factory=dict)
    prediction_id: str | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class WebhookDelivery:
    """One message of the outbox; ``id`` stays the same over all attempts.

    receiver: host and port of the URL.
    event: one of ``WEBHOOK_EVENTS``.
    body: the exact text to send; None until an intermediate message is first sent.
    state: pending, delivered or failed.
    """

    id: str
    prediction_id: str
    account_id: str
    url: str
    receiver: str
    event: str
    body: str | None
    state: str
    attempts: int
    next_at: datetime
    created_at: datetime
    finished_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None


@dataclass(frozen=True)
class Deployment:
    """A named model version with pinned defaults; ``number`` grows with every change.

    max_instances: how many of its predictions run at once; 0 takes none.
    min_instances: above 0 keeps its model loaded when the queue is empty.
    """

    owner: str
    name: str
    account_id: str
    number: int
    model: str
    version: str
    hardware: str
    min_instances: int
    max_instances: int
    created_at: datetime
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"


@dataclass(frozen=True)
class UserModel:
    """A model that somebody created: a name and texts; its versions are presets over ours."""

    owner: str
    name: str
    account_id: str
    visibility: str
    hardware: str
    created_at: datetime
    description: str = ""
    readme: str = ""
    github_url: str | None = None
    paper_url: str | None = None
    license_url: str | None = None
    weights_url: str | None = None
    cover_image_url: str | None = None

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"


@dataclass(frozen=True)
class UserVersion:
    """A version of a user's model: input defaults over one version of a model of ours."""

    id: str
    model: str
    base_model: str
    base_version: str
    defaults: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class Usage:
    """What one token used of one model."""

    account_id: str
    token_id: str | None
    model: str
    predictions: int
    predict_seconds: float


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list, newest first; cursors are opaque and None at the ends."""

    items: tuple[T, ...]
    next: str | None = None
    previous: str | None = None


# The tables of the store; the migrations bring a database to what stands here.


class UtcTime(TypeDecorator[datetime]):
    """Aware times in UTC, also in SQLite, which keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the time as the database is to keep it."""
        return None if value is None else value.astimezone(timezone.utc)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the time as records have it."""
        if value is None:
            return None
        aware: datetime = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return aware.astimezone(timezone.utc)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Id = String(64)
_Name = String(255)
_Counter = BigInteger().with_variant(Integer, "sqlite")

accounts = Table(
    "accounts",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("username", _Name, nullable=False, unique=True),
    Column("name", _Name, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("name", _Name, nullable=False),
    Column("hash", _Id, nullable=False, unique=True),
    Column("hint", String(8), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("last_used_at", UtcTime),
    Column("revoked_at", UtcTime),
)

secret_keys = Table(
    "secret_keys",
    metadata,
    Column("id", _Counter, primary_key=True, autoincrement=True),
    Column("owner", _Id, nullable=False),
    Column("value", String(128), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("retired_at", UtcTime),
    Index(None, "owner"),
)

predictions = Table(
    "predictions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("token_id", _Id),
    Column("model", _Name, nullable=False),
    Column("version", _Id, nullable=False),
    Column("deployment", _Name),
    Column("input", JSON, nullable=False),
    Column("output", JSON(none_as_null=True)),
    Column("logs", Text, nullable=False),
    Column("error", Text),
    Column("status", String(16), nullable=False),
    Column("source", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("completed_at", UtcTime),
    Column("deadline", UtcTime),
    Column("data_removed", Boolean, nullable=False),
    Column("predict_seconds", Float),
    Column("progress", Float, nullable=False),
    Column("webhook", Text),
    Column("webhook_events", JSON, nullable=False),
    Column("share_token", _Id, unique=True),
    Column("estimated_seconds", Float, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("worker", _Name),
    Column("lease_until", UtcTime),
    Index(None, "account_id", "created_at", "id"),
    Index(None, "model", "created_at"),
    Index(None, "status", "created_at"),
    Index(None, "completed_at"),
)

events = Table(
    "events",
    metadata,
    Column("seq", _Counter, primary_key=True, autoincrement=True),
    Column("prediction_id", _Id, ForeignKey("predictions.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("data", JSON(none_as_null=True)),
    Column("at", UtcTime, nullable=False),
    Index(None, "prediction_id", "seq"),
    sqlite_autoincrement=True,
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("account_id", _Id, primary_key=True),
    Column("key", _Name, primary_key=True),
    Column("request_hash", _Id, nullable=False),
    Column("prediction_id", _Id, ForeignKey("predictions.id"), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "created_at"),
)

files = Table(
    "files",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("prediction_id", _Id),
    Column("name", _Name, nullable=False),
    Column("content_type", _Name, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", _Id, nullable=False),
    Column("md5", String(32), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Index(None, "account_id", "created_at", "id"),
    Index(None, "sha256"),
    Index(None, "prediction_id"),
    Index(None, "expires_at"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("prediction_id", _Id, ForeignKey("predictions.id"), nullable=False),
    Column("account_id", _Id, nullable=False),
    Column("url", Text, nullable=False),
    Column("receiver", _Name, nullable=False),
    Column("event", String(16), nullable=False),
    Column("body", Text),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UtcTime, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime),
    Column("last_status", Integer),
    Column("last_error", Text),
    Index(None, "state", "next_at"),
    Index(None, "prediction_id", "event", "next_at"),
)

deployments = Table(
    "deployments",
    metadata,
    Column("owner", _Name, primary_key=True),
    Column("name", _Name, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("model", _Name, nullable=False),
    Column("version", _Id, nullable=False),
    Column("hardware", _Name, nullable=False),
    Column("min_instances", Integer, nullable=False),
    Column("max_instances", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("defaults", JSON, nullable=False),
)

user_models = Table(
    "user_models",
    metadata,
    Column("owner", _Name, primary_key=True),
    Column("name", _Name, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("visibility", String(16), nullable=False),
    Column("hardware", _Name, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("description", Text, nullable=False),
    Column("readme", Text, nullable=False),
    Column("github_url", Text),
    Column("paper_url", Text),
    Column("license_url", Text),
    Column("weights_url", Text),
    Column("cover_image_url", Text),
)

user_versions = Table(
    "user_versions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("model", _Name, nullable=False),
    Column("base_model", _Name, nullable=False),
    Column("base_version", _Id, nullable=False),
    Column("defaults", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "model", "created_at"),
)

usage = Table(
    "usage",
    metadata,
    Column("prediction_id", _Id, primary_key=True),
    Column("account_id", _Id, nullable=False),
    Column("token_id", _Id),
    Column("model", _Name, nullable=False),
    Column("predict_seconds", Float, nullable=False),
    Column("completed_at", UtcTime, nullable=False),
    Index(None, "account_id", "completed_at"),
)


# Between rows of the tables and frozen records, and what is inside them.

R = TypeVar("R")


def record(kind: type[R], row: Row[Any]) -> R:
    """Return a row as a record; columns that the record does not have are left out."""
    return kind(**_values(kind, row))


def prediction_of(row: Row[Any]) -> Prediction:
    """Return a row of the predictions as a record."""
    values = _values(Prediction, row)
    values["status"] = State(values["status"])
    values["webhook_events"] = tuple(values["webhook_events"])
    return Prediction(**values)


def _values(kind: Any, row: Row[Any]) -> dict[str, Any]:
    mapping = row._mapping
    return {name: mapping[name] for name in _names(kind)}


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def columns_of(value: Any) -> dict[str, Any]:
    """Return the values of a record by column, as the database takes them."""
    columns = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: _plain(column) for name, column in columns.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, State):
        return value.value
    return list(value) if isinstance(value, tuple) else value


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


# The database: SQLite by default, PostgreSQL by URL, migrated when opened.

_FULL = 2
_MIGRATION_LOCK, _ALONE_LOCK = 7_386_118_114, 7_386_118_115


class Database:
    """Connections to one database; safe to use from many threads.

    A commit is on the disk when it returns: SQLite runs in WAL mode with synchronous
    FULL, PostgreSQL with synchronous_commit on, and ``__init__`` refuses anything less.

    Raises:
        OptionError: the URL is no URL of a database we know.
        MissingExtraError: the driver is not installed.
        PathError: the folder of an SQLite file cannot be used.
        ServiceError: the database cannot be reached, or does not keep what it accepts.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # SQLite lets one connection write: a queue in here is fair, its busy loop is not.
        self._writing: AbstractContextManager[Any] = (
            threading.Lock() if self.is_sqlite else nullcontext()
        )
        try:
            self._check()
            migrate(self.engine)
        except SQLAlchemyError as error:
            reason = str(error).splitlines()[0]
            raise ServiceError(f"The database cannot be used: {reason}.") from error

    @contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Connection]:
        """Open a transaction that writes; it commits when left without an error.

        No two that are opened ``alone`` run at the same time, in any process; in SQLite
        no two that write ever do.
        """
        with self._writing, self.engine.connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif alone:
                _lock_others_out(connection, _ALONE_LOCK)
            yield connection
            connection.commit()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees one moment of the database."""
        with self.engine.connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN")
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _check(self) -> None:
        with self.engine.connect() as connection:
            if self.is_sqlite:
                mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
                full = connection.exec_driver_sql("PRAGMA synchronous").scalar()
                kept = mode == "wal" and full == _FULL
            else:
                kept = connection.execute(text("SHOW synchronous_commit")).scalar() != "off"
                kept = kept and connection.execute(text("SHOW fsync")).scalar() == "on"
        if not kept:
            raise ServiceError(
                "The database must keep what it accepts: SQLite in WAL mode with synchronous "
                "FULL, PostgreSQL with fsync and synchronous_commit on."
            )


def migrate(engine: Engine) -> None:
    """Bring the tables to the newest form; several processes may start at once."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            _lock_others_out(connection, _MIGRATION_LOCK)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()


def _lock_others_out(connection: Connection, lock: int) -> None:
    """Wait for a lock of PostgreSQL and hold it until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise OptionError("database_url begins with sqlite:/// or postgresql://.") from error
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        return _sqlite(parsed.database)
    if kind not in ("postgresql", "postgres"):
        raise OptionError(f"database_url names SQLite or PostgreSQL, not {kind}.")
    try:
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"), pool_size=10, max_overflow=20
        )
    except ImportError as error:
        raise MissingExtraError(
            "PostgreSQL needs its driver: pip install 'tegula[postgres]'."
        ) from error


def _sqlite(path: str | None) -> Engine:
    if not path or path == ":memory:":
        raise OptionError("database_url names a file: a database in memory keeps nothing.")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(f"The folder of {path} cannot be made: {error.strerror}.") from error
    engine = create_engine(
        f"sqlite+pysqlite:///{path}",
        poolclass=QueuePool,
        pool_size=10,
        max_overflow=50,
        connect_args={"check_same_thread": False, "timeout": 30.0},
    )
    event.listen(engine, "connect", _configure_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # Without this the driver begins transactions by itself, too late for BEGIN IMMEDIATE.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


# Pages of long lists, newest first, by the place of a row and never by an offset.

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_LONGEST = 256

Place = tuple[str, datetime, str]
"""Direction (``older`` or ``newer``), time and id of the row to go on from."""


def read_page(
    connection: Connection,
    table: Table,
    query: Select[Any],
    make: Callable[[Row[Any]], R],
    *,
    cursor: str | None,
    limit: int,
) -> Page[R]:
    """Return one page of a query over a table that has ``created_at`` and ``id``.

    Raises:
        OptionError: the cursor is none of ours.
    """
    direction, *place = decode_cursor(cursor) if cursor else ("older",)
    key = tuple_(table.c.created_at, table.c.id)
    newer = direction == "newer"
    if place:
        start = tuple_(literal(place[0], UtcTime), literal(place[1]))
        query = query.where(key > start if newer else key < start)
    order = [
        column.asc() if newer else column.desc() for column in (table.c.created_at, table.c.id)
    ]
    rows = connection.execute(query.order_by(*order).limit(limit + 1)).all()
    more, rows = len(rows) > limit, rows[:limit]
    rows = rows[::-1] if newer else rows
    return Page(
        tuple(make(row) for row in rows),
        next=encode_cursor("older", rows[-1]) if rows and (more or newer) else None,
        previous=encode_cursor("newer", rows[0]) if rows and (more if newer else place) else None,
    )


def encode_cursor(direction: str, row: Row[Any]) -> str:
    """Return the place of a row as url-safe text."""
    microseconds = (row._mapping["created_at"] - _EPOCH) // _MICROSECOND
    text = json.dumps([direction, microseconds, row._mapping["id"]], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> Place:
    """Return the place that a cursor stands for.

    Raises:
        OptionError: the cursor is none of ours.
    """
    try:
        padded = cursor[:_LONGEST] + "=" * (-len(cursor[:_LONGEST]) % 4)
        direction, microseconds, name = json.loads(base64.urlsafe_b64decode(padded))
        if direction not in ("older", "newer") or not isinstance(name, str):
            raise ValueError(direction)
        return direction, _EPOCH + int(microseconds) * _MICROSECOND, name
    except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise OptionError("cursor is taken from next or previous of a page.") from error
