"""A database that release 0.1.0 left is opened with every row as it was, and goes on.

``data/database-0001.sql`` is the dump of a small SQLite database that the program of that
release made, and ``data/database-0001.json`` what it read from it: its rows, the links that it
gave out, and the ids of its versions.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from store_support import TurnedClock, fresh_database, open_store

from tegula.catalog import Catalog, packaged_fingerprint
from tegula.errors import ConflictError
from tegula.server import tables
from tegula.server.accounts import UsageLine
from tegula.server.api.library import Library
from tegula.server.db import Database
from tegula.server.fetch import Fetcher
from tegula.server.predictions import NewPrediction
from tegula.server.queue import Report
from tegula.server.store import Store
from tegula.server.tables import FILE_KEY, State
from tegula.server.work import CatalogResolver, InputFiles, PredictionRunner

DATA = Path(__file__).parents[1] / "data"
READ = json.loads((DATA / "database-0001.json").read_text(encoding="utf-8"))
DUMP = (DATA / "database-0001.sql").read_text(encoding="utf-8")
BATOU, FIRST, SECOND = "batouresearch/high-resolution-controlnet-tile", "1", "2"
RENAMED = {"metadata": "user_metadata"}


def sqlite_of_0001(folder: Path) -> None:
    with sqlite3.connect(folder / "tegula.sqlite3") as database:
        database.executescript(DUMP)
    database.close()


def postgresql_of_0001(folder: Path, url: str) -> None:
    """Make the tables of the first migration and copy the rows of the dump into them."""
    upgrade = command.upgrade
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "upgrade", lambda config, _: upgrade(config, "0001"))
        Database(url).close()
    sqlite_of_0001(folder)
    source = sa.create_engine(f"sqlite:///{folder / 'tegula.sqlite3'}")
    target = sa.create_engine(url)
    old, new = sa.MetaData(), sa.MetaData()
    old.reflect(source)
    new.reflect(target)
    with source.connect() as reading, target.begin() as writing:
        writing.execute(sa.text("SET timezone TO 'UTC'"))
        for table in old.sorted_tables:
            rows = [dict(row._mapping) for row in reading.execute(table.select())]
            if rows and table.name != "alembic_version":
                writing.execute(new.tables[table.name].insert(), rows)
        for table, column in (("events", "seq"), ("secret_keys", "id")):
            last = f"SELECT max({column}) FROM {table}"
            writing.execute(
                sa.text(f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), ({last}))")
            )
    source.dispose()
    target.dispose()


@contextmanager
def upgraded(request: pytest.FixtureRequest, folder: Path, name: str) -> Iterator[Store]:
    if request.param == "sqlite":
        url = None
        sqlite_of_0001(folder)
    else:
        server = request.getfixturevalue("postgresql")
        url = fresh_database(server, name, empty=True)
        postgresql_of_0001(folder, url)
    clock = TurnedClock(datetime.fromisoformat(READ["now"]))
    opened = open_store(folder, clock, database_url=url)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def read_store(request, tmp_path_factory):
    """Return the store of the tests that only read."""
    with upgraded(request, tmp_path_factory.mktemp("read"), "tegula_read") as opened:
        yield opened


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    with upgraded(request, tmp_path, "tegula_upgrade") as opened:
        yield opened


def plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple):
        return list(value)
    return value.value if isinstance(value, State) else value


@pytest.mark.parametrize(
    "name",
    ["Account", "Token", "Prediction", "Event", "FileRecord", "WebhookMessage", "Deployment",
     "UserModel", "UserVersion"],
)  # fmt: skip
def test_every_row_is_read_as_it_was(read_store, name):
    kind = getattr(tables, name)
    with read_store.database.read() as session:
        rows = session.scalars(sa.select(kind)).all()
    keys = [column.key for column in sa.inspect(kind).primary_key]
    found = {tuple(plain(getattr(row, key)) for key in keys): row for row in rows}
    assert len(found) == len(READ[name]) > 0
    for expected in READ[name]:
        row = found[tuple(expected[key] for key in keys)]
        for field, value in expected.items():
            if field == "base_version" or (name, field) == ("Deployment", "version"):
                continue  # now labels; see below
            assert plain(getattr(row, RENAMED.get(field, field))) == value, field


def test_secrets_tokens_and_links_are_valid_as_before(read_store):
    account, _ = read_store.accounts.authenticate(READ["token"])
    assert account.username == "ada"
    assert list(read_store.webhooks.secrets(account.id)) == READ["secrets"]
    shared = next(p for p in READ["Prediction"] if p["share_token"])
    made = read_store.predictions.shared(shared["share_token"])
    assert READ["links"] == [read_store.links.stream(made.id), read_store.links.output(made.output)]
    upload = next(f for f in READ["FileRecord"] if f["name"] == "cat.png")
    assert read_store.links.signer.download("ada", upload["id"], 1_800_000_000) == READ["download"]


def test_totals_are_added_up_from_what_is_there(read_store):
    counts = Counter(made["model"] for made in READ["Prediction"])
    assert read_store.predictions.run_counts(list(counts)) == counts
    ran = sum(line["predictions"] for line in READ["usage"])
    seconds = sum(line["predict_seconds"] for line in READ["usage"])
    assert read_store.usage.totals() == (ran, pytest.approx(seconds))


def test_usage_and_idempotency_keys_are_there(read_store):
    assert set(read_store.usage.lines()) == {UsageLine(**line) for line in READ["usage"]}
    done = next(p for p in READ["Prediction"] if p["share_token"])
    new = NewPrediction(done["account_id"], "tegula/upscale", done["version"], {})
    again = read_store.predictions.create(new, idempotency_key="k1", request_hash="h" * 64)
    assert (again.replayed, again.prediction.id) == (True, done["id"])
    with pytest.raises(ConflictError):
        read_store.predictions.create(new, idempotency_key="k1", request_hash="i" * 64)


def test_what_was_pinned_by_id_is_pinned_by_label(read_store):
    """Ids that were valid become their label, and those of other weights the newest version."""
    own = [
        version
        for _, versions in read_store.models.all(READ["Account"][0]["id"])
        for version in versions
    ]
    labels = {(version.base_model, version.base_label) for version in own}
    assert labels == {(BATOU, FIRST), (BATOU, SECOND), ("tegula/upscale", "1")}
    get = read_store.deployments.get
    assert get("ada", "small").version == FIRST
    assert get("ada", "older").version == SECOND
    assert get("ada", "faces").version in {version.id for version in own}
    released = Catalog("other weights")
    library, ada = Library(released, read_store.models), READ["Account"][0]["id"]
    for name, label in (("small", FIRST), ("older", SECOND), ("faces", "1")):
        assert library.deployed(get("ada", name), ada).base.label == label
    resolver = CatalogResolver(released, read_store.models)
    for prediction in read_store.predictions.page(None).items:
        resolved = resolver(prediction).version
        assert resolved in {version.id for model in released.models for version in model.versions}
        if prediction.version == READ["batou"][1]:
            assert resolved == released.find(f"{BATOU}:{FIRST}").id


def test_work_goes_on(store):
    running = next(p for p in READ["Prediction"] if p["worker"])
    assert store.queue.report(running["id"], running["attempt"], Report("more\n", ("a",)))
    last = store.predictions.events(running["id"])[-1]
    assert last.seq > max(event["seq"] for event in READ["Event"])
    assert store.queue.succeed(running["id"], running["attempt"])
    waiting = store.queue.claim("worker")
    assert waiting is not None
    assert store.predictions.cancel(waiting.id).status is State.CANCELED
    account = READ["Account"][0]["id"]
    kept = store.files.keep(account, "new.png", b"x")
    new = NewPrediction(account, "tegula/upscale", READ["upscale"], {FILE_KEY: kept.id}, label="1")
    assert store.predictions.create(new).prediction.id in {
        prediction.id for prediction in store.predictions.page(account, limit=1).items
    }


def test_an_address_that_waited_to_be_run_is_fetched_first(store):
    class NoEngine:
        def run(self, *_):
            raise AssertionError("no device is needed yet")

    catalog = Catalog(packaged_fingerprint())
    inputs = InputFiles(store.files, Fetcher(), 1000, 60.0)
    runner = PredictionRunner(store, CatalogResolver(catalog, store.models), inputs)
    claimed = store.queue.claim("worker")
    runner.run(claimed, NoEngine(), lambda: False)
    assert store.queue.claim("worker") is None
    fetch = store.queue.claim_fetch("fetcher")
    assert (fetch.id, fetch.fetch_host) == (claimed.id, "example.com")


def test_the_catalogue_still_has_every_label_that_was_pinned():
    catalog = Catalog(packaged_fingerprint())
    for model in (BATOU, "tegula/upscale", "philz1337x/clarity-upscaler"):
        assert catalog.find(f"{model}:1").label == "1"
    assert catalog.find(BATOU).label == SECOND


def test_tables_of_the_last_migration_are_opened_without_one(tmp_path, monkeypatch):
    open_store(tmp_path).close()
    monkeypatch.delattr(command, "upgrade")
    open_store(tmp_path).close()
