"""The database: its transactions and migrations, ids for rows, and pages of rows."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Executable, Row, Select, String, event, text
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.pool import QueuePool

from tegula.errors import MissingExtraError, OptionError, PathError, ServiceError
from tegula.folders import make_private
from tegula.server.tables import Base, UtcTime

T = TypeVar("T")

Clock = Callable[[], datetime]
"""Returns the time; tests put their own in its place."""


def utc_now() -> datetime:
    """Return the time now, aware and in UTC."""
    return datetime.now(timezone.utc)


ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: no letter that looks like a digit."""


def new_id(now: datetime) -> str:
    """Return 26 characters: 48 bits of milliseconds, then 80 random ones, as in a ULID.

    Ids sort by the time they were made.
    """
    number = int(now.timestamp() * 1000) << 80 | secrets.randbits(80)
    return "".join(ALPHABET[number >> 5 * place & 31] for place in reversed(range(26)))


def new_secret() -> str:
    """Return 40 characters that nobody guesses: 200 random bits."""
    return "".join(secrets.choice(ALPHABET) for _ in range(40))


# Transactions: SQLite by default, PostgreSQL by URL, migrated when opened.

_NORMAL = 1
"""SQLite's number for ``synchronous=NORMAL``."""
_CACHE_KIB = 512
"""Pages that a connection to SQLite keeps, which is a quarter of SQLite's default.

Every connection has such a cache of its own, fills it within hours, and never gives it back: with
the default, 20 MiB for the ten of the pool. A larger one gains nothing: whenever another connection
has written, its content is stale, and the system has the file in memory anyway.
"""
_LONGEST_WAIT_S = 30.0
"""Until a connection to SQLite that finds the database locked fails."""
_PATIENCE_S, _TRY_AGAIN_S = 30.0, 0.5
"""How long, and how often, a database that was lost is tried again."""
_SQLITE_SUFFIXES = ("", "-wal", "-shm", "-journal")
"""Endings of the files of one SQLite database."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_REVISION = sa.table("alembic_version", sa.column("version_num", String))
"""Where Alembic notes which migration was the last."""

# PostgreSQL's advisory locks have numbers, which all programs on the database share.
_MIGRATION_LOCK, _ALONE_LOCK = 7_386_118_114, 7_386_118_115
SWEEP_LOCK, WEBHOOKS_LOCK = 7_386_118_116, 7_386_118_117


class _SharedFlush:
    """Brings SQLite's log to the disk, once for all transactions that committed meanwhile.

    With ``synchronous=FULL`` SQLite would do so within every commit, and one after the other: it
    holds the lock of all who write meanwhile, for milliseconds. With NORMAL a commit is whole but
    may be lost with the power, until the log is flushed; that happens here, outside of the lock.
    """

    def __init__(self, database: str) -> None:
        self._log = f"{database}-wal"
        self._asked = 0  # commits that are to be on the disk
        self._flushed = 0  # those that are
        self._counting, self._flushing = threading.Lock(), threading.Lock()

    def __call__(self) -> None:
        """Return once whatever the caller committed is on the disk.

        Raises:
            ServiceError: the disk refuses.
        """
        with self._counting:
            self._asked += 1
            own = self._asked
        with self._flushing:
            if self._flushed < own:
                asked = self._asked
                try:
                    _flush(self._log)
                except OSError as error:
                    raise ServiceError(f"The disk keeps nothing: {error.strerror}.") from error
                self._flushed = asked


def _flush(path: str) -> None:
    try:
        # SQLite holds no locks on its log: those on other files would end with this handle.
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return  # the last connection closed, and by that brought everything into the database
    try:
        getattr(os, "fdatasync", os.fsync)(handle)
    finally:
        os.close(handle)


class Database:
    """Transactions on one database; safe to use from many threads.

    What was written is on the disk when ``write`` is left: SQLite runs in WAL mode, and its log is
    flushed after each commit; PostgreSQL runs with synchronous_commit on. ``__init__`` refuses
    anything less.

    Raises:
        OptionError: the URL names no database that tegula knows.
        MissingExtraError: the driver is not installed.
        PathError: the folder of an SQLite file cannot be used.
        ServiceError: the database cannot be reached, or does not keep what it accepts.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # A transaction that begins as a reader and then writes fails at once when another one
        # wrote meanwhile. Writers therefore take the lock of the file with their first statement.
        self._writing = self.engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        # SQLite lets one connection write at a time, and others poll for their turn. Waiting in
        # here is fair, and wakes at once.
        self._turn: AbstractContextManager[Any] = (
            threading.Lock() if self.is_sqlite else nullcontext()
        )
        # PostgreSQL flushes by itself, and several commits at once.
        self._flush = _SharedFlush(str(self.engine.url.database)) if self.is_sqlite else None
        try:
            self._check()
            self._migrate()
        except SQLAlchemyError as error:
            reason = str(error).splitlines()[0]
            raise ServiceError(f"The database cannot be used: {reason}.") from error

    @contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Session]:
        """Open a transaction that writes; left without an error, it is on the disk.

        No two that are opened ``alone`` run at the same time, in any process; in SQLite
        no two that write ever do.
        """
        with (
            self._turn,
            Session(self._writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            if alone and not self.is_sqlite:
                _lock_others_out(session, _ALONE_LOCK)
            connection: Any = session.connection().connection.dbapi_connection
            before = connection.total_changes if self._flush else 0
            yield session
            session.flush()
            # Before the end: the pool may close the connection then.
            changed = self._flush is not None and connection.total_changes > before
        if self._flush and changed:
            self._flush()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a transaction that sees one moment of the database."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    def transact(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in a transaction that writes, and again while a connection to it is lost.

        A server of PostgreSQL that restarts, or is replaced by its standby, cuts what is under way.
        All of that is undone, so beginning anew is safe, except in the moment of the commit: what
        became of it then nobody here can tell, and the error goes on to the caller.

        Raises:
            OperationalError: the database stayed away, or was lost within the commit.
        """
        end = time.monotonic() + _PATIENCE_S
        while True:
            committing = False
            try:
                with self.write() as session:
                    result = work(session)
                    session.flush()
                    committing = True
            except OperationalError:
                if self.is_sqlite or committing or time.monotonic() > end:
                    raise
                time.sleep(_TRY_AGAIN_S)
            else:
                return result

    def write_unflushed(self, statement: Executable, values: Mapping[str, Any]) -> Row[Any]:
        """Run one statement that writes and return its row, without waiting for the disk.

        For counters, whose latest changes may be lost when the power fails.
        """
        if self.is_sqlite:
            with self._turn, self._writing.begin() as connection:
                return connection.execute(statement, values).one()
        with self.engine.connect() as pooled:
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT")
            return connection.execute(statement, values).one()

    def is_first(self, session: Session | Connection, lock: int) -> bool:
        """Take one of PostgreSQL's locks until the transaction ends; False if another has it.

        Locks of transactions also work behind a pooler, which those of sessions do not. In SQLite,
        where whoever writes is alone, there is nothing to take.
        """
        taken = text("SELECT pg_try_advisory_xact_lock(:lock)")
        return self.is_sqlite or bool(session.execute(taken, {"lock": lock}).scalar())

    @contextmanager
    def first_to(self, lock: int) -> Iterator[bool]:
        """Hold a lock for work in many transactions; gives False if another process is at it.

        The transaction that holds it looks at no rows, and so keeps none from being cleaned up.
        """
        if self.is_sqlite:
            yield True
            return
        with self.engine.connect() as connection:
            yield self.is_first(connection, lock)

    def connect_apart(self) -> Any:
        """Return a connection of the driver, outside of the pool and in autocommit."""
        dialect = self.engine.dialect
        positional, named = dialect.create_connect_args(self.engine.url)
        return dialect.connect(*positional, **{**named, "autocommit": True})

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _check(self) -> None:
        with self.engine.connect() as connection:
            if self.is_sqlite:
                mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
                normal = connection.exec_driver_sql("PRAGMA synchronous").scalar()
                kept = mode == "wal" and normal == _NORMAL
            else:
                kept = connection.execute(text("SHOW synchronous_commit")).scalar() != "off"
                kept = kept and connection.execute(text("SHOW fsync")).scalar() == "on"
        if not kept:
            raise ServiceError(
                "The database must keep what it accepts: SQLite in WAL mode with synchronous "
                "NORMAL, PostgreSQL with fsync and synchronous_commit on."
            )

    def _migrate(self) -> None:
        """Bring the tables to the newest form; several processes may start at once."""
        if self._is_newest():
            return
        # Alembic takes as long to import as a server to open its database otherwise.
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self._writing.begin() as connection:
            if not self.is_sqlite:
                _lock_others_out(connection, _MIGRATION_LOCK)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        if self._flush:
            self._flush()

    def _is_newest(self) -> bool:
        """Return whether the tables are those that the last migration makes."""
        with self.engine.connect() as connection:
            if not sa.inspect(connection).has_table(_REVISION.name):
                return False
            revision = connection.scalar(sa.select(_REVISION.c.version_num))
        last = max(path.name for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))
        return revision == last.partition("_")[0]


def _lock_others_out(connection: Connection | Session, lock: int) -> None:
    """Wait for a lock of PostgreSQL and hold it until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})


def _engine(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise OptionError("database_url must begin with sqlite:/// or postgresql://.") from error
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        return _sqlite(parsed.database)
    if kind not in ("postgresql", "postgres"):
        raise OptionError(f"database_url must name SQLite or PostgreSQL, not {kind}.")
    try:
        return sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"), pool_size=10, max_overflow=20
        )
    except ImportError as error:
        raise MissingExtraError(
            "PostgreSQL needs its driver: pip install 'tegula[postgres]'."
        ) from error


def _sqlite(path: str | None) -> Engine:
    if not path or path == ":memory:":
        raise OptionError("database_url must name a file: a database in memory keeps nothing.")
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(f"The folder of {path} cannot be made: {error.strerror}.") from error
    # It holds what signs links and webhooks. SQLite gives the files beside it the same mode. One
    # that is there is not opened: with the handle, this process would lose SQLite's locks on it.
    with contextlib.suppress(OSError):  # SQLite says better what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    for suffix in _SQLITE_SUFFIXES:
        make_private(Path(path + suffix))
    engine = sa.create_engine(
        f"sqlite+pysqlite:///{path}",
        poolclass=QueuePool,
        pool_size=10,
        max_overflow=50,
        # The connection that was used last has the freshest cache, and the others stay small.
        pool_use_lifo=True,
        connect_args={"check_same_thread": False, "timeout": _LONGEST_WAIT_S},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        # Python's driver would begin transactions by itself, and only before the first change.
        connection.isolation_level = None
        _write_ahead(connection)
        for pragma in (
            "synchronous=NORMAL",
            "foreign_keys=ON",
            f"cache_size=-{_CACHE_KIB}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        how = connection.get_execution_options().get("sqlite_begin", "BEGIN")
        connection.exec_driver_sql(how)

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn a database to WAL mode, which it keeps.

    SQLite does not wait its timeout here when another connection writes to a new database, which
    happens where several processes start at once: it fails at once.
    """
    end = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError:  # noqa: PERF203 - it waits
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


# Pages of long lists, by the place of an item and never by an offset or a name alone: a page
# goes on where the one before ended, also when items came or went in between.

R = TypeVar("R", bound=Base)

SortKey = tuple[float | str, ...]
"""What a list is sorted by, descending: numbers, and a name that tells apart what is equal."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_LONGEST_CURSOR = 2048


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list; cursors are opaque text, and None at the ends."""

    items: tuple[T, ...]
    next: str | None = None
    previous: str | None = None


@dataclass(frozen=True)
class _Place:
    """Where a page begins: behind this key, or before it if ``back``."""

    back: bool
    key: SortKey

    def cursor(self) -> str:
        words = json.dumps(["newer" if self.back else "older", *self.key], separators=(",", ":"))
        return base64.urlsafe_b64encode(words.encode()).decode().rstrip("=")

    @classmethod
    def of(cls, cursor: str) -> _Place:
        padded = cursor[:_LONGEST_CURSOR] + "=" * (-len(cursor[:_LONGEST_CURSOR]) % 4)
        direction, *numbers, name = json.loads(base64.urlsafe_b64decode(padded))
        plain = isinstance(name, str) and all(isinstance(n, int | float) for n in numbers)
        if direction not in ("older", "newer") or not plain:
            raise ValueError(cursor)
        return cls(direction == "newer", (*numbers, name))


def microseconds(moment: datetime) -> int:
    """Return a time as part of a sort key."""
    return (moment - _EPOCH) // _MICROSECOND


def read_page(
    session: Session,
    query: Select[R],
    columns: tuple[InstrumentedAttribute[datetime], InstrumentedAttribute[str]],
    *,
    cursor: str | None,
    limit: int,
) -> Page[R]:
    """Return one page of a query, the newest rows first.

    Args:
        session: an open transaction.
        query: rows of one table.
        columns: the time that the rows are sorted by, and what tells apart rows of one time.
        cursor: from ``next`` or ``previous`` of another page; None for the first page.
        limit: the most items.

    Raises:
        OptionError: the cursor is not from a page.
    """
    at, name = columns

    def key(row: R) -> SortKey:
        return microseconds(getattr(row, at.key)), getattr(row, name.key)

    def read(place: _Place | None, count: int) -> Sequence[R]:
        back, chosen = place is not None and place.back, query
        if place is not None:
            when, which = place.key
            start = sa.tuple_(
                sa.literal(_EPOCH + int(when) * _MICROSECOND, UtcTime), sa.literal(which, String)
            )
            row = sa.tuple_(at, name)
            chosen = chosen.where(row > start if back else row < start)
        order = (at.asc(), name.asc()) if back else (at.desc(), name.desc())
        return session.scalars(chosen.order_by(*order).limit(count)).all()

    return _page(read, key, cursor, limit)


def paginate(
    items: Sequence[T], key: Callable[[T], SortKey], *, cursor: str | None, limit: int
) -> Page[T]:
    """Return one page of items that are in memory, sorted by a key, descending.

    Raises:
        OptionError: the cursor is not from a page.
    """

    def read(place: _Place | None, count: int) -> Sequence[T]:
        back = place is not None and place.back
        ahead = sorted(items, key=key, reverse=not back)
        if place is not None:
            ahead = [i for i in ahead if (key(i) > place.key if back else key(i) < place.key)]
        return ahead[:count]

    return _page(read, key, cursor, limit)


def _page(
    read: Callable[[_Place | None, int], Sequence[T]],
    key: Callable[[T], SortKey],
    cursor: str | None,
    limit: int,
) -> Page[T]:
    """Make a page of what ``read`` gives in the direction of the cursor, nearest first.

    One item more than fits is read, which tells whether there is another page that way.
    """
    try:
        place = _Place.of(cursor) if cursor else None
        rows = read(place, limit + 1)
    except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise OptionError("cursor must be taken from next or previous of a page.") from error
    back = place is not None and place.back
    more, rows = len(rows) > limit, rows[:limit]
    rows = rows[::-1] if back else rows
    # There is a page in the direction that the reader came from, too: it gave out the cursor.
    older = bool(rows) and (more or back)
    newer = bool(rows) and (more if back else place is not None)
    return Page(
        tuple(rows),
        next=_Place(back=False, key=key(rows[-1])).cursor() if older else None,
        previous=_Place(back=True, key=key(rows[0])).cursor() if newer else None,
    )
