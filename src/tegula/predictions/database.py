"""The database: SQLite by default, PostgreSQL by URL, migrated when opened."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from tegula.errors import MissingExtraError, OptionError, PathError, ServiceError

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
