"""A store of one file: its folder, its locks, and what a loss of power may take."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import text
from store_support import (
    NOON,
    ask,
    open_store,
)

from tegula.errors import OptionError, ServiceError
from tegula.server.db import Database
from tegula.server.predictions import NewPrediction
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Deployment


def modes(folder):
    paths = [folder, *folder.rglob("*")]
    return {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths}


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_nobody_else_reads_a_new_folder(tmp_path):
    store = open_store(tmp_path / "data")
    ask(store)
    seen = modes(tmp_path / "data")
    assert {"data", "tegula.sqlite3", "tegula.sqlite3-wal"} <= set(seen)
    assert set(seen.values()) == {0}
    store.close()


@pytest.mark.usefixtures("usual_umask")
def test_a_folder_that_everybody_could_read_is_mended_at_the_start(tmp_path):
    data, home = tmp_path / "data", tmp_path / "home"
    for folder in (data, home):
        open_store(folder).close()
        (folder / "files" / "ab").mkdir(parents=True)
        (folder / "files" / "ab" / "abcd").write_bytes(b"picture")
        for open_to_all in (folder, folder / "files"):
            open_to_all.chmod(0o755)
        (folder / "tegula.sqlite3").chmod(0o644)
    (home / "letter.txt").write_text("of somebody")
    for folder in (data, home):
        open_store(folder).close()
    assert set(modes(data).values()) == {0}
    # A folder with other things in it is not ours to close.
    assert {name for name, mode in modes(home).items() if mode} == {"home", "letter.txt"}


def test_a_new_database_that_another_process_writes_to_is_waited_for(tmp_path):
    path = tmp_path / "new.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.2, other.execute, ("ROLLBACK",))
    release.start()
    Database(f"sqlite:///{path}").close()
    release.join()
    other.close()


def test_opening_a_database_twice_in_one_process_keeps_its_locks(tmp_path):
    path = tmp_path / "one.sqlite3"
    first = Database(f"sqlite:///{path}")
    with first.read() as session:
        session.execute(text("SELECT 1 FROM predictions"))
        second = Database(f"sqlite:///{path}")
        # The last to close a database deletes its log, and it holds itself for the last where
        # nobody has a lock.
        another = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        another += "c.execute('SELECT 1 FROM predictions').fetchall(); c.close()"
        subprocess.run([sys.executable, "-c", another, str(path)], check=True)
        assert Path(f"{path}-wal").exists()
        second.close()
    first.close()


def test_sqlite_keeps_what_it_accepts(tmp_path, monkeypatch):
    monkeypatch.setattr("tegula.server.db._NORMAL", 3)
    with pytest.raises(ServiceError, match="NORMAL"):
        Database(f"sqlite:///{tmp_path / 'a.sqlite3'}")


@pytest.fixture
def on_sqlite(tmp_path):
    opened = Store.open(ServerSettings(folder=tmp_path))
    yield opened
    opened.close()


def test_connections_to_sqlite_keep_little_and_the_last_is_used_first(on_sqlite):
    engine = on_sqlite.database.engine
    with ExitStack() as stack:
        connections = [stack.enter_context(engine.connect()) for _ in range(engine.pool.size())]
        kib = [-one.exec_driver_sql("PRAGMA cache_size").scalar() for one in connections]
        last = connections[0].connection.dbapi_connection
    assert min(kib) > 0
    assert sum(kib) <= 8 * 1024
    with engine.connect() as again:  # the stack closes the first one last
        assert again.connection.dbapi_connection is last


def test_what_is_written_is_flushed_to_the_disk_before_anybody_hears(on_sqlite, monkeypatch):
    path, happened = on_sqlite.database.engine.url.database, []

    def flush(log: str) -> None:
        with sqlite3.connect(path) as other:
            happened.append((log, other.execute("SELECT count(*) FROM predictions").fetchone()[0]))

    monkeypatch.setattr("tegula.server.db._flush", flush)
    on_sqlite.pubsub.subscribe(lambda _id: happened.append("heard"))
    account = on_sqlite.accounts.ensure("ada")
    happened.clear()
    on_sqlite.predictions.create(NewPrediction(account.id, "a/b", "ab" * 32, {}))
    assert happened == [(f"{path}-wal", 1), "heard"]


def test_one_flush_serves_all_who_commit_meanwhile(on_sqlite, monkeypatch):
    account = on_sqlite.accounts.ensure("ada")
    path, flushes = on_sqlite.database.engine.url.database, []

    def committed() -> int:
        with sqlite3.connect(path) as other:
            return other.execute("SELECT count(*) FROM predictions").fetchone()[0]

    def slowly(_log: str) -> None:
        """As a disk that takes longer than all of the commits."""
        end = time.monotonic() + 30
        while committed() < 16 and time.monotonic() < end and not flushes:
            time.sleep(0.01)
        flushes.append(1)

    monkeypatch.setattr("tegula.server.db._flush", slowly)
    new = NewPrediction(account.id, "a/b", "ab" * 32, {})
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: on_sqlite.predictions.create(new), range(16)))
    assert len({one.prediction.id for one in made}) == 16
    assert len(flushes) in (1, 2)


def test_a_write_outlives_a_pool_that_closes_its_connection(on_sqlite):
    engine = on_sqlite.database.engine
    account = on_sqlite.accounts.ensure("ada")
    engine.dispose()
    held = [engine.connect() for _ in range(10)]  # as many as the pool keeps
    with on_sqlite.database.write() as session:
        for connection in held:
            connection.close()
        session.add(Deployment("ada", "a", account.id, 1, "a/b", "1", "cpu", 0, 1, NOON))
    assert on_sqlite.deployments.get("ada", "a") is not None


def test_a_disk_that_cannot_flush_is_an_error(on_sqlite, monkeypatch):
    account = on_sqlite.accounts.ensure("ada")

    def refuse(_handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("tegula.server.db.os.fdatasync", refuse, raising=False)
    monkeypatch.setattr("tegula.server.db.os.fsync", refuse)
    with pytest.raises(ServiceError, match="Input/output error"):
        on_sqlite.predictions.create(NewPrediction(account.id, "a/b", "ab" * 32, {}))


@pytest.mark.parametrize("url", ["sqlite://", "mysql://x/y", "nonsense"])
def test_a_database_that_keeps_nothing_is_refused(url):
    with pytest.raises(OptionError):
        Database(url)
