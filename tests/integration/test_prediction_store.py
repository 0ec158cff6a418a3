"""What the store promises, on each database it runs on."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, select, text
from starlette.testclient import TestClient
from store_support import (
    NOON,
    VERSION,
    TurnedClock,
    ask,
    counted_statements,
    fresh_database,
    open_store,
)

from tegula.errors import BusyError, ConflictError, NotFoundError, OptionError, ServiceError
from tegula.server.api.app import create_app
from tegula.server.api.service import RunTimeEstimates
from tegula.server.background import Sweeper
from tegula.server.db import Database, utc_now
from tegula.server.predictions import NewPrediction
from tegula.server.queue import PREFER_LOADED, Report
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Base, Deployment, ModelTotal, State, UserModel, UserVersion
from tegula.server.webhooks import Outcome


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request):
    if request.param == "sqlite":
        return None
    return fresh_database(request.getfixturevalue("postgresql"), "tegula_contract")


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


def test_an_accepted_prediction_is_got_as_it_was_made(store):
    made = ask(store, input={"image": "https://example.com/a.png", "ünï": [1, None, 2.5]})
    assert store.predictions.get(made.id) == made
    assert made.status is State.STARTING


def test_what_the_store_hands_out_is_a_copy_that_nobody_changes(store):
    made = ask(store, webhook="https://example.com/")
    for row in (made, store.predictions.get(made.id), store.accounts.get(made.account_id)):
        with pytest.raises(AttributeError, match="copy"):
            row.id = "another"
        assert repr(row)  # every field is there, though its session is closed


def test_accounts_do_not_see_each_other(store):
    made, other = ask(store), store.accounts.ensure("grace")
    with pytest.raises(NotFoundError):
        store.predictions.get(made.id, other.id)
    with pytest.raises(NotFoundError):
        store.predictions.cancel(made.id, other.id)
    assert store.predictions.page(other.id).items == ()


def test_the_tables_are_those_that_the_migrations_make(store):
    with store.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


MANY = "predictions|usage|webhooks|files|events|idempotency_keys"
"""Tables that grow with every prediction."""


@contextmanager
def planned(store):
    """Collect the plans that SQLite makes for all statements that are run meanwhile."""
    plans = []

    def note(connection, _cursor, statement, parameters, *_):
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            steps = connection.connection.dbapi_connection.execute(
                f"EXPLAIN QUERY PLAN {statement}", parameters
            )
            plans.append((statement, [row[3] for row in steps]))

    event.listen(store.database.engine, "before_cursor_execute", note)
    yield plans
    event.remove(store.database.engine, "before_cursor_execute", note)


def test_nothing_that_is_asked_often_looks_at_every_past_prediction(tmp_path, clock):
    """Of 500,000 of them each scan takes up to a second, most of it under the lock to write."""
    store = open_store(tmp_path, clock, history_seconds=9000)
    ada = store.accounts.ensure("ada").id
    store.deployments.create(
        Deployment("ada", "d", ada, 1, "tegula/upscale", "1", "cpu", 0, 1, NOON)
    )
    first = ask(store, webhook="https://example.com/", deployment="ada/d")
    clock.turn(1)
    other = ask(store)
    app = create_app(store)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client, planned(store) as plans:
        store.predictions.share(other.id)
        claimed = store.queue.claim("worker", [VERSION])
        store.queue.claim_fetch("worker")
        store.queue.start(claimed.id, claimed.attempt)
        made = store.files.keep(ada, "o.png", b"out", prediction_id=claimed.id)
        store.queue.succeed(claimed.id, claimed.attempt, Report("a\n", (made.id,)))
        store.queue.rescue()
        store.queue.expire()
        store.predictions.ahead_of(other)
        token = store.accounts.create_token(ada, "t")[1]
        headers = {"authorization": f"Bearer {token}"}
        for path in (
            "metrics", "readyz", "v1/models/tegula/upscale", "v1/models/tegula/upscale/examples",
            "v1/predictions", "v1/files", "v1/webhooks/deliveries", "v1/web/history",
            "v1/web/history?status=failed&model=a/b", "v1/web/history?removed=1",
            f"v1/predictions/{first.id}",
        ):  # fmt: skip
            assert client.get(f"/{path}", headers=headers).status_code == 200, path
        store.webhooks.next_due()
        for message in store.webhooks.due(9, timedelta(), ["example.org"]):
            store.webhooks.finish_attempt(message.id, Outcome("delivered", clock()))
        store.predictions.last_events([first.id])
        store.predictions.events(first.id)
        RunTimeEstimates(store.usage).get("tegula/upscale")
        clock.turn(10_000)
        swept = Sweeper(store).sweep()
    assert swept.predictions == 2  # the data of the first, and then itself
    assert len(plans) > 60
    for statement, steps in plans:
        assert not [step for step in steps if re.match(f"SCAN ({MANY})", step)], (statement, steps)
        # Nearly all have none, which SQLite takes for a rare find.
        shared = [step for step in steps if "share_token=?" in step]
        assert not shared or "share_token IS NULL" not in statement, (statement, steps)
        # Of those that are not finished there are few.
        if re.search(f"FROM ({MANY})", statement) and "status IN" not in statement:
            sorting = "USE TEMP B-TREE FOR ORDER BY" in steps
            assert not sorting or "predictions.status = " in statement, (statement, steps)
    store.close()


def test_totals_stay_though_predictions_are_removed_for_good(store, clock, run):
    object.__setattr__(store.settings, "history_seconds", 100)
    object.__setattr__(store.settings, "retention_seconds", 0)
    settings = ({"webhook": "https://example.com/"}, {}, {}, {"model": "a/b"})
    kept, shared, *_ = asked = [(ask(store, **given), clock.turn(0.1))[0] for given in settings]
    store.predictions.share(shared.id)
    for made in asked:
        name, attempt = run()
        assert name == made.id
        store.queue.report(name, attempt, Report("line\n"))
        clock.turn(2)
        store.queue.succeed(name, attempt)
    waiting = ask(store, model="a/b")
    sweep = Sweeper(store).sweep

    def totals():
        counts = store.predictions.run_counts(["a/b", "tegula/upscale", "c/d"])
        return counts, store.usage.totals(), store.usage.mean_seconds()

    before = totals()
    assert before == (
        {"tegula/upscale": 3, "a/b": 2}, (4, 8.0), {"tegula/upscale": 2.0, "a/b": 2.0}
    )  # fmt: skip
    assert sweep().predictions == 0
    clock.turn(101)
    assert sweep().predictions == 2  # a webhook of the first is still to be sent
    for message in store.webhooks.due(9, timedelta()):
        store.webhooks.finish_attempt(message.id, Outcome("delivered", clock()))
    assert sweep().predictions == 1
    assert {one.id for one in store.predictions.page(None).items} == {shared.id, waiting.id}
    assert store.webhooks.messages(kept.id) == ()
    with store.database.read() as session:
        assert len(session.scalars(select(ModelTotal)).all()) == 2
    assert totals() == before


@pytest.mark.parametrize("how", ["remove", "delete"])
def test_what_a_late_worker_keeps_of_a_removed_prediction_is_due_at_once(store, clock, run, how):
    ask(store)
    name, attempt = run()
    early = store.files.keep(store.accounts.ensure("ada").id, "a.png", b"a", prediction_id=name)
    assert early.expires_at is None
    store.queue.succeed(name, attempt)
    if how == "remove":
        store.predictions.remove(name)
    else:
        object.__setattr__(store.settings, "history_seconds", 10)
        clock.turn(11)
        assert Sweeper(store).sweep().predictions == 1
    late = store.files.keep(early.account_id, "b.png", b"b", prediction_id=name)
    for gone in (early, late):
        with pytest.raises(NotFoundError):
            store.files.get(gone.id)
    assert Sweeper(store).sweep().files == 1


def test_a_database_is_opened_again_with_what_was_in_it(store, tmp_path, database_url):
    made = ask(store)
    links = store.links
    again = open_store(tmp_path, database_url=database_url)
    assert again.predictions.get(made.id) == made
    assert again.links == links
    again.close()


def test_many_may_open_a_new_database_at_once(tmp_path, database_url):
    # Not by ``open_store``, which begins with tables that are there.
    settings = ServerSettings(folder=tmp_path / "new", database_url=database_url)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store.open(settings, clock=utc_now), range(4)))
    assert len({store.links.stream("x") for store in stores}) == 1
    for store in stores:
        store.close()


def test_a_server_with_another_folder_than_the_files_of_the_database_does_not_start(
    tmp_path, database_url
):
    open_store(tmp_path / "one", database_url=database_url).close()
    open_store(tmp_path / "one", database_url=database_url).close()
    shared = database_url or f"sqlite:///{tmp_path / 'one' / 'tegula.sqlite3'}"
    with pytest.raises(ServiceError, match="another folder"):
        open_store(tmp_path / "two", database_url=shared)
    # A folder that was moved is still the same one.
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = database_url or f"sqlite:///{tmp_path / 'moved' / 'tegula.sqlite3'}"
    open_store(tmp_path / "moved", database_url=moved).close()


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


def test_one_key_makes_one_prediction_however_many_ask_at_once(store):
    account = store.accounts.ensure("ada")
    new = NewPrediction(account.id, "tegula/upscale", VERSION, {})

    def create(_):
        return store.predictions.create(new, idempotency_key="k", request_hash="h")

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(30)))
    assert len({each.prediction.id for each in created}) == 1
    assert sum(not each.replayed for each in created) == 1
    assert store.predictions.waiting().count == 1


def test_a_key_is_not_taken_for_another_request(store):
    account = store.accounts.ensure("ada")
    new = NewPrediction(account.id, "tegula/upscale", VERSION, {})
    store.predictions.create(new, idempotency_key="k", request_hash="h")
    with pytest.raises(ConflictError):
        store.predictions.create(new, idempotency_key="k", request_hash="other")


def test_too_much_waiting_work_is_refused_with_a_time_to_come_back(store):
    for _ in range(20):
        ask(store, estimated_seconds=7)
    with pytest.raises(BusyError) as refused:
        ask(store)
    assert refused.value.retry_after == 7


def test_too_many_seconds_of_work_are_refused_unless_nothing_else_waits(store):
    ask(store, estimated_seconds=10_000)
    with pytest.raises(BusyError):
        ask(store, estimated_seconds=1)


def test_a_prediction_is_given_to_one_worker_only(store):
    made = {ask(store).id for _ in range(12)}
    taken, lock = [], threading.Lock()

    def work(number):
        while claimed := store.queue.claim(f"worker {number}"):
            with lock:
                taken.append(claimed.id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(taken) == sorted(made)


def test_the_oldest_goes_first(store, clock):
    first = ask(store)
    clock.turn(1)
    ask(store)
    assert store.queue.claim("worker").id == first.id


def test_a_loaded_model_goes_first_until_another_waits_for_long(store, clock):
    unloaded = ask(store, version="cd" * 32)
    clock.turn(1)
    loaded = ask(store)
    clock.turn(1)
    ask(store)
    assert store.queue.claim("worker", [VERSION]).id == loaded.id
    clock.turn(PREFER_LOADED.total_seconds() + 1)
    assert store.queue.claim("worker", [VERSION]).id == unloaded.id


def test_a_deployment_runs_no_more_at_once_than_it_allows(store, run, clock):
    account = store.accounts.ensure("ada")
    store.deployments.create(
        Deployment("ada", "small", account.id, 1, "m/n", VERSION, "cpu", 0, 1, NOON)
    )
    ask(store, deployment="ada/small")
    clock.turn(1)
    ask(store, deployment="ada/small")
    clock.turn(1)
    free = ask(store)
    fetched = ask(store, deployment="ada/small", fetch_host="a.example").id
    assert store.queue.claim_fetch("fetcher").id == fetched  # which takes up no device
    name, attempt = run()
    assert store.queue.claim("worker").id == free.id
    assert store.queue.claim("worker") is None
    store.queue.succeed(name, attempt)
    assert store.queue.claim("worker") is not None


def test_a_deployment_keeps_its_limit_when_many_claim_at_once(store):
    account = store.accounts.ensure("ada")
    store.deployments.create(
        Deployment("ada", "small", account.id, 1, "m/n", VERSION, "cpu", 0, 2, NOON)
    )
    for _ in range(8):
        ask(store, deployment="ada/small")
    with ThreadPoolExecutor(6) as pool:
        claims = list(pool.map(store.queue.claim, [f"worker {n}" for n in range(6)]))
    assert sum(claim is not None for claim in claims) == 2


def test_no_device_gets_a_prediction_before_its_inputs_are_there(store, clock):
    fetched = ask(store, fetch_host="a.example")
    clock.turn(1)
    ready = ask(store)
    assert store.predictions.waiting().fetching == 1
    assert store.queue.claim("worker").id == ready.id
    assert store.queue.claim("worker") is None
    fetch = store.queue.claim_fetch("fetcher")
    assert (fetch.id, fetch.status) == (fetched.id, State.STARTING)
    assert store.queue.claim_fetch("another") is None
    assert store.queue.hand_on(fetch.id, fetch.attempt, "b.example")
    assert store.queue.claim("worker") is None
    again = store.queue.claim_fetch("fetcher")
    assert (again.id, again.fetch_host) == (fetch.id, "b.example")
    assert store.queue.hand_on(again.id, again.attempt, None)
    assert not store.queue.report(again.id, again.attempt)
    assert store.queue.claim_fetch("fetcher") is None
    assert store.predictions.waiting().fetching == 0
    assert store.queue.claim("worker").id == fetched.id


def test_what_is_fetched_keeps_its_place_in_the_queue(store, clock):
    first = ask(store, fetch_host="a.example")
    clock.turn(1)
    ask(store)
    fetch = store.queue.claim_fetch("fetcher")
    store.queue.hand_on(fetch.id, fetch.attempt, None)
    assert store.queue.claim("worker").id == first.id


def test_accounts_and_hosts_that_have_enough_are_passed_over(store, clock):
    grace = store.accounts.ensure("grace").id
    hosts = {}
    for host, values in {
        "a.example": {},
        "b.example": {},
        "c.example": {"account_id": grace},
    }.items():
        hosts[host] = ask(store, fetch_host=host, **values).id
        clock.turn(1)
    ada = store.accounts.ensure("ada").id
    assert store.queue.claim_fetch("fetcher", [ada], ["c.example"]) is None
    assert store.queue.claim_fetch("fetcher", [ada]).id == hosts["c.example"]
    assert store.queue.claim_fetch("fetcher", [], ["a.example"]).id == hosts["b.example"]
    assert store.queue.claim_fetch("fetcher").id == hosts["a.example"]


def test_a_fetch_is_given_to_one_worker_only(store):
    made = {ask(store, fetch_host="a.example").id for _ in range(12)}
    taken, lock = [], threading.Lock()

    def work(number):
        while claimed := store.queue.claim_fetch(f"worker {number}"):
            with lock:
                taken.append(claimed.id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(taken) == sorted(made)


def test_a_fetch_whose_server_died_is_begun_again_however_often(store, clock):
    name = ask(store, fetch_host="a.example").id
    for attempt in range(1, 5):
        fetch = store.queue.claim_fetch("a server that dies")
        assert (fetch.id, fetch.attempt) == (name, attempt)
        clock.turn(store.settings.lease_seconds + 1)
        assert store.queue.rescue() == (name,)
        assert not store.queue.hand_on(name, attempt, None)
    now = store.predictions.get(name)
    assert (now.status, now.losses, now.logs, now.fetch_host) == (
        State.STARTING, 0, "", "a.example",
    )  # fmt: skip


def test_a_fetch_ends_with_its_prediction(store, clock):
    cancelled = ask(store, fetch_host="a.example").id
    clock.turn(1)
    late = ask(store, fetch_host="a.example", deadline=clock.now + timedelta(seconds=5)).id
    first, second = store.queue.claim_fetch("fetcher"), store.queue.claim_fetch("fetcher")
    store.predictions.cancel(cancelled)
    clock.turn(6)
    assert store.queue.expire() == (late,)
    for fetch in (first, second):
        assert not store.queue.report(fetch.id, fetch.attempt)
        assert not store.queue.hand_on(fetch.id, fetch.attempt, None)
    assert store.predictions.get(late).status is State.ABORTED
    assert store.queue.claim("worker") is None


def test_looking_for_fetches_takes_no_lock_when_there_are_none(tmp_path, clock):
    store = open_store(tmp_path, clock)
    ask(store)
    with counted_statements(store, begins="BEGIN IMMEDIATE") as begun:
        assert store.queue.claim_fetch("fetcher") is None
    assert begun == []
    store.close()


def test_what_was_handed_back_is_no_longer_written_to(store, run):
    ask(store)
    name, attempt = run()
    assert store.queue.release(name, attempt)
    assert not store.queue.report(name, attempt, Report("late\n"))
    assert store.queue.claim("worker").id == name


def test_reports_grow_logs_output_and_progress(store, run):
    ask(store)
    name, attempt = run()
    store.queue.report(name, attempt, Report("one\n", ("a",), progress=0.5))
    store.queue.report(name, attempt, Report("two\n", ("b",), progress=0.2))
    now = store.predictions.get(name)
    assert (now.logs, now.output, now.progress) == ("one\ntwo\n", ["a", "b"], 0.5)
    kinds = [(event.kind, event.data) for event in store.predictions.events(name)]
    assert kinds == [("logs", "one\n"), ("output", "a"), ("logs", "two\n"), ("output", "b")]


def test_events_go_on_after_the_last_one_seen(store, run):
    ask(store)
    name, attempt = run()
    store.queue.report(name, attempt, Report("one\n"))
    seen = store.predictions.events(name)[-1].seq
    store.queue.succeed(name, attempt)
    assert [event.data for event in store.predictions.events(name, after=seen)] == ["succeeded"]


def test_an_attempt_that_was_overtaken_writes_nothing(store, run, clock):
    ask(store)
    name, old = run()
    clock.turn(store.settings.lease_seconds + 1)
    assert store.queue.rescue() == (name,)
    _, new = run()
    late = store.queue.report(name, old, Report("late\n", ("late",)))
    assert (late, store.queue.succeed(name, old), store.queue.lose(name, old, "?")) == (False,) * 3
    assert store.queue.report(name, new, Report(outputs=("right",), append=False))
    assert store.queue.succeed(name, new)
    assert store.predictions.get(name).output == "right"


def test_a_report_renews_the_lease(store, run, clock):
    ask(store)
    name, attempt = run()
    for _ in range(3):
        clock.turn(store.settings.lease_seconds * 0.8)
        assert store.queue.report(name, attempt)
        assert store.queue.rescue() == ()


def test_a_lost_prediction_starts_again_without_its_output(store, run):
    ask(store)
    name, attempt = run()
    store.queue.report(name, attempt, Report(outputs=("half",)))
    store.queue.lose(name, attempt, "its process ended")
    now = store.predictions.get(name)
    assert (now.status, now.output, now.started_at) == (State.STARTING, None, None)
    assert "restart" in [event.kind for event in store.predictions.events(name)]


def test_the_second_loss_fails_the_prediction_and_says_why(store, run):
    ask(store)
    for _ in range(2):
        store.queue.lose(*run(), "its process ended with signal 9")
    (only,) = store.predictions.page(None).items
    assert only.status is State.FAILED
    assert "signal 9" in only.error


def test_what_is_handed_back_counts_as_no_loss(store, run):
    ask(store)
    for _ in range(5):
        assert store.queue.release(*run())
    (only,) = store.predictions.page(None).items
    assert (only.status, only.losses) == (State.STARTING, 0)


def test_cancelling_shows_at_once_and_stops_the_worker(store, run):
    ask(store)
    name, attempt = run()
    assert store.predictions.cancel(name).status is State.CANCELED
    assert not store.queue.report(name, attempt)
    assert not store.queue.succeed(name, attempt)


def test_cancelling_what_is_done_changes_nothing(store, run):
    ask(store)
    name, attempt = run()
    store.queue.succeed(name, attempt)
    done = store.predictions.get(name)
    assert store.predictions.cancel(name) == done


def test_a_deadline_ends_what_waits_and_what_runs(store, run, clock):
    soon = clock.now + timedelta(seconds=5)
    ask(store, deadline=soon)
    running, _ = run()
    waiting = ask(store, deadline=soon).id
    clock.turn(6)
    assert store.queue.claim("worker") is None
    assert set(store.queue.expire()) == {running, waiting}
    ended = store.predictions.get(running), store.predictions.get(waiting)
    assert [each.status for each in ended] == [State.CANCELED, State.ABORTED]
    assert all("deadline" in each.error for each in ended)


@pytest.mark.parametrize("count", [0, 1, 90])
def test_deadlines_are_kept_with_one_lock_for_many(tmp_path, clock, count):
    store = open_store(tmp_path, clock)
    made = {ask(store, deadline=clock.now).id for _ in range(count)}
    with counted_statements(store, begins="BEGIN IMMEDIATE") as begun:
        assert set(store.queue.expire()) == made
    assert len(begun) == (count > 0)
    store.close()


def test_running_time_leaves_out_waiting(store, run, clock):
    ask(store)
    clock.turn(10)
    name, attempt = run()
    clock.turn(4)
    store.queue.succeed(name, attempt)
    assert store.predictions.get(name).predict_seconds == 4
    (line,) = store.usage.lines()
    assert (line.model, line.predictions, line.predict_seconds) == ("tegula/upscale", 1, 4)


def test_pages_lead_through_the_list_and_back(store, clock):
    made = []
    for number in range(7):
        made.append(ask(store).id)
        clock.turn(number % 2)  # some were made at the same moment
    newest = [each.id for each in store.predictions.page(None).items]
    assert sorted(newest) == sorted(made)
    pages, cursor = [], None
    for _ in range(4):
        pages.append(store.predictions.page(None, cursor=cursor, limit=2))
        cursor = pages[-1].next
    assert [each.id for page in pages for each in page.items] == newest
    assert (pages[0].previous, pages[-1].next) == (None, None)
    back = store.predictions.page(None, cursor=pages[2].previous, limit=2)
    assert back.items == pages[1].items
    assert store.predictions.page(None, cursor=back.previous, limit=2).previous is None


def test_a_list_is_narrowed_by_time_and_source(store, clock):
    ask(store)
    clock.turn(10)
    middle, at = ask(store, source="web"), clock.now
    clock.turn(10)
    ask(store)
    page = store.predictions.page(None, created_after=at, created_before=clock.now)
    assert [each.id for each in page.items] == [middle.id]
    assert [each.id for each in store.predictions.page(None, source="web").items] == [middle.id]


@pytest.mark.parametrize("cursor", ["x", "bnVsbA", "WyJvbGRlciIsMSwyXQ", "%00", "W10" * 500])
def test_a_cursor_of_somebody_elses_making_is_refused(store, cursor):
    with pytest.raises(OptionError):
        store.predictions.page(None, cursor=cursor)


def test_a_shared_prediction_is_found_by_its_token_until_it_is_taken_back(store):
    shared = store.predictions.share(ask(store).id)
    assert store.predictions.shared(shared.share_token) == shared
    assert store.predictions.share(shared.id).share_token == shared.share_token
    store.predictions.unshare(shared.id)
    with pytest.raises(NotFoundError):
        store.predictions.shared(shared.share_token)


def test_a_token_opens_its_account_until_it_is_revoked(store):
    account = store.accounts.ensure("ada")
    token, plain = store.accounts.create_token(account.id, "laptop")
    assert store.accounts.authenticate(plain)[0] == account
    assert store.accounts.authenticate(plain[:-1]) is None
    with pytest.raises(ConflictError):
        store.accounts.create_token(account.id, "laptop")
    assert store.accounts.revoke(token.name)
    assert store.accounts.authenticate(plain) is None


def test_a_token_is_kept_nowhere_in_the_clear(store):
    _, plain = store.accounts.create_token(store.accounts.ensure("ada").id, "laptop")
    with store.database.read() as connection:
        (row,) = connection.execute(text("SELECT * FROM tokens")).all()
    assert plain[:-4] not in str(row)


def test_a_release_of_a_deployment_has_the_next_number(store, clock):
    account = store.accounts.ensure("ada")
    made = Deployment("ada", "small", account.id, 1, "m/n", VERSION, "cpu", 0, 1, NOON)
    store.deployments.create(made)
    with pytest.raises(ConflictError):
        store.deployments.create(made)
    clock.turn(5)
    after = store.deployments.update(made)
    assert store.deployments.get("ada", "small") == after
    assert (after.number, after.created_at) == (2, clock.now)
    store.deployments.delete("ada", "small")
    with pytest.raises(NotFoundError):
        store.deployments.delete("ada", "small")


def test_private_models_are_seen_by_their_owner_alone(store):
    ada, grace = store.accounts.ensure("ada"), store.accounts.ensure("grace")
    mine = store.models.create(UserModel("ada", "mine", ada.id, "private", "cpu", NOON))
    assert store.models.all(ada.id) == ((mine, ()),)
    assert store.models.all(grace.id) == store.models.all() == ()
    assert store.models.named("ada", "mine", grace.id) is None
    assert store.models.of_version("ab" * 8, grace.id) == ()


def test_a_model_is_deleted_after_its_versions(store):
    account = store.accounts.ensure("ada")
    store.models.create(UserModel("ada", "mine", account.id, "public", "cpu", NOON))
    version = UserVersion("ef" * 32, "ada/mine", "tegula/upscale", "1", {"scale": 4}, NOON)
    store.models.add_version(version)
    with pytest.raises(ConflictError):
        store.models.delete("ada", "mine")
    store.models.delete_version(version.id)
    store.models.delete("ada", "mine")
    assert store.models.get("ada", "mine") is None


def test_listeners_hear_of_every_change_until_they_leave(store, run):
    heard = []
    leave = store.pubsub.subscribe(heard.append)
    made = ask(store)
    store.queue.succeed(*run())
    assert set(heard) == {made.id}
    before = len(heard)
    leave()
    ask(store)
    assert len(heard) == before


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
