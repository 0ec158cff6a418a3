"""Server processes on one PostgreSQL hear of each other, and do what is periodic one at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta

import pytest
from engine_support import HereEngine, until
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from store_support import NOON, ask, counted_statements, fresh_database, open_store

from tegula.catalog import Catalog
from tegula.server.addresses import Policy
from tegula.server.api import service as api
from tegula.server.api.library import Library
from tegula.server.api.service import Service
from tegula.server.background import Sweeper, Swept, WebhookSender
from tegula.server.db import SWEEP_LOCK, WEBHOOKS_LOCK, utc_now
from tegula.server.fetch import Fetcher
from tegula.server.pubsub import LOOK_SELDOM_S, ChangeRelay, PubSub, _payloads
from tegula.server.queue import Report
from tegula.server.supervisor import Supervisor
from tegula.server.tables import Deployment, State
from tegula.server.work import InputFiles, ResolvedVersion

LISTENERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'"


@pytest.fixture(scope="module")
def url(postgresql):
    return fresh_database(postgresql, "tegula_changes")


@pytest.fixture
def stores(tmp_path, url):
    """Two processes' stores on one database."""
    opened = [open_store(tmp_path, utc_now, database_url=url) for _ in range(2)]
    # The database stays over the tests of this file, and each has a folder of its own.
    yield opened
    with opened[0].database.write() as session:
        session.execute(text("DELETE FROM properties"))
    for store in opened:
        store.close()


@contextmanager
def relays(*stores, **options):
    running = [ChangeRelay(store.database, store.pubsub, **options) for store in stores]
    for relay in running:
        relay.start()
    try:
        yield running
    finally:
        for relay in running:
            relay.stop()


def hear(*stores):
    until(lambda: all(store.pubsub.hears_others for store in stores), 30)


def service_of(store):
    return Service(store, Library(Catalog("ab"), store.models, None, ()), ())


def cut(store):
    """End the connections that listen, as a database does that restarts."""
    with store.database.engine.connect() as connection:
        assert connection.execute(text(LISTENERS)).all()


def test_what_one_process_changes_another_hears_once_and_itself_not_again(stores):
    one, other = stores
    heard, there, own = Counter(), Counter(), Counter()
    with relays(one, other):
        hear(one, other)
        one.pubsub.subscribe(lambda name: heard.update([name]))
        other.pubsub.subscribe(lambda name: there.update([name]))
        other.pubsub.subscribe(lambda name: own.update([name]), own_only=True)
        made = [ask(one).id for _ in range(3)]
        account = one.accounts.ensure("ada").id
        one.deployments.create(Deployment("ada", "a", account, 1, "a/b", "1", "cpu", 0, 1, NOON))
        until(lambda: len(there) == 4, 30)
        ask(other)
        until(lambda: len(heard) == 5, 30)
    assert set(heard.values()) == {1}
    assert set(there) == {*made, "ada/a", *own}
    assert set(there.values()) == {1}


def test_who_waits_hears_of_other_processes_at_once_and_looks_itself_after_a_gap(
    stores, monkeypatch
):
    one, other = stores
    monkeypatch.setattr(api, "LOOK_AGAIN_S", 600.0)  # nobody comes upon anything by chance
    waiting = service_of(other)

    async def end_of(name, change):
        task = asyncio.create_task(waiting.wait(other.predictions.get(name), 60))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(change)
        return (await asyncio.wait_for(task, 30)).status

    with relays(other):
        hear(other)
        with relays(one):
            heard, missed = ask(one).id, ask(one).id
            assert asyncio.run(end_of(heard, lambda: one.predictions.cancel(heard))) == "canceled"

        def change_unheard():
            """Without a relay nobody says so, as if the listening connection had been gone."""
            one.predictions.cancel(missed)
            cut(other)

        waiting.__dict__.pop("changes")  # it belongs to the loop that has ended
        assert asyncio.run(end_of(missed, change_unheard)) == "canceled"
        hear(other)


def test_a_connection_that_ends_is_replaced_and_the_gap_is_known(stores, caplog, monkeypatch):
    one, other = stores
    monkeypatch.setattr("tegula.server.pubsub._RECONNECT_S", 0.05)
    states, heard = [], []
    other.pubsub.subscribe(heard.append, on_gap=lambda: states.append(other.pubsub.hears_others))
    with relays(one, other):
        hear(one, other)
        cut(one)
        until(lambda: states == [True, False, True] and one.pubsub.hears_others, 30)
        name = ask(one).id
        until(lambda: name in heard, 30)
    warnings = [r for r in caplog.records if "cannot be heard" in r.message]
    assert len(warnings) == 2  # once for each of the two


def test_where_notifications_do_not_arrive_everybody_goes_on_to_look(stores, caplog, monkeypatch):
    """As behind a pooler that gives each transaction another connection."""
    store = stores[0]
    monkeypatch.setattr("tegula.server.pubsub._TRY_AGAIN_S", 0.05)
    connect_apart, tries = store.database.connect_apart, []

    def pooled():
        tries.append(1)
        connection = connect_apart()
        monkeypatch.setattr(connection, "execute", lambda _listen: None)
        return connection

    # The store is a frozen dataclass, its database is not.
    monkeypatch.setattr(store.database, "connect_apart", pooled)
    with relays(store, patience=0.05):
        until(lambda: len(tries) > 2, 30)
        assert not store.pubsub.hears_others
        assert store.pubsub.pause(1.0) == 1.0
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [("do not arrive" in r.message) for r in warnings] == [True]


def test_an_idle_server_with_streams_hardly_asks_the_database(stores):
    """Each second it asked about sixteen times; now about once."""
    store = stores[0]
    inputs = InputFiles(store.files, Fetcher(Policy()), 1, 1.0)
    resolver = lambda _: ResolvedVersion("ab", (), False)  # noqa: E731
    background = (
        WebhookSender(store, Fetcher(Policy())),
        Supervisor(store, [HereEngine()], resolver, inputs),
    )
    service = service_of(store)

    async def statements_of_a_while(seconds=1.0):
        account = store.accounts.ensure("idle").id
        # Of a deployment that takes none, so that they wait.
        closed = Deployment("idle", f"d{time.time_ns()}", account, 1, "a/b", "1", "cpu", 0, 0, NOON)
        store.deployments.create(closed)
        names = [ask(store, deployment=closed.full_name).id for _ in range(5)]
        predictions = [store.predictions.get(name) for name in names]
        waits = [asyncio.create_task(service.wait(each, 60)) for each in predictions]
        with counted_statements(store) as statements:
            # Until what follows from the creates is done; who asks is never quiet.
            for _ in range(30 if store.pubsub.hears_others else 2):
                statements.clear()
                await asyncio.sleep(0.3)
                if not statements:
                    break
            statements.clear()
            await asyncio.sleep(seconds)
        for name in names:
            await asyncio.to_thread(store.predictions.cancel, name)
        await asyncio.gather(*waits)
        service.__dict__.pop("changes").close()
        return len(statements) / seconds

    for each in background:
        each.start()
    try:
        asking = asyncio.run(statements_of_a_while())
        with relays(store):
            hear(store)
            hearing = asyncio.run(statements_of_a_while())
    finally:
        for each in reversed(background):
            each.stop()
    assert asking >= 6
    assert hearing <= 3


def test_deadlines_end_on_time_where_nobody_asks_all_the_time(stores, monkeypatch):
    store = stores[0]
    monkeypatch.setattr("tegula.server.supervisor._NEAREST_DEADLINE_S", 1.0)
    inputs = InputFiles(store.files, Fetcher(Policy()), 1, 1.0)
    supervisor = Supervisor(store, [], lambda _: ResolvedVersion("ab", (), False), inputs)
    with relays(store):
        hear(store)
        supervisor.start()
        name = ask(store, deadline=utc_now() + timedelta(seconds=1)).id
        until(lambda: store.predictions.get(name).status.terminal, 8)
        supervisor.stop()
    assert store.predictions.get(name).status is State.ABORTED


def test_one_process_sweeps_at_a_time(stores):
    one, other = stores
    one.files.keep(one.accounts.ensure("ada").id, "a.png", b"png", lifetime=timedelta(seconds=-1))
    with one.database.first_to(SWEEP_LOCK) as is_first:
        assert is_first
        assert Sweeper(other).sweep() == Swept(0, 0, 0)
    assert Sweeper(other).sweep().files == 1


def test_one_process_takes_due_webhooks_at_a_time(stores):
    one, other = stores
    name = ask(one, webhook="https://a.example/hook").id
    one.predictions.cancel(name)
    hold = timedelta(minutes=1)
    with one.database.write() as session:
        assert one.database.is_first(session, WEBHOOKS_LOCK)
        assert other.webhooks.due(10, hold) == ()
    assert [message.prediction_id for message in other.webhooks.due(10, hold)] == [name]
    assert one.webhooks.due(10, hold) == ()


@contextmanager
def cut_once(database, moment):
    """Let the server cut the connection that comes first to a moment of the engine."""
    left = [True]

    def cut(connection, *_):
        if left and left.pop():
            pid = connection.connection.dbapi_connection.info.backend_pid
            with database.connect_apart() as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

    event.listen(database.engine, moment, cut)
    try:
        yield left
    finally:
        event.remove(database.engine, moment, cut)


def test_what_a_worker_reports_survives_a_cut_connection(stores):
    store = stores[0]
    prediction = ask(store)
    store.queue.claim("a worker")
    owner, name = prediction.account_id, prediction.id
    for report in (
        lambda: store.queue.start(name, 1),
        lambda: store.queue.report(name, 1, Report(logs="once\n")),
        lambda: store.files.keep(owner, "a.png", b"png", prediction_id=name),
        lambda: store.queue.succeed(name, 1),
    ):
        with cut_once(store.database, "before_cursor_execute") as left:
            assert report()
            assert not left
    now = store.predictions.get(name)
    assert (now.status, now.logs, now.attempt) == (State.SUCCEEDED, "once\n", 1)


def test_who_publishes_is_not_hurt_by_a_supervisor_that_lost_the_database(stores, monkeypatch):
    store = stores[0]
    inputs = InputFiles(store.files, Fetcher(Policy()), 1, 1.0)
    away, real = [OperationalError("SELECT 1", {}, OSError())], store.predictions.get

    def get(name, *given):
        if away:
            raise away.pop()
        return real(name, *given)

    engine = HereEngine()
    supervisor = Supervisor(store, [engine], lambda _: ResolvedVersion("ab", (), False), inputs)
    supervisor.start()
    name = ask(store, input={"do": "wait"}).id
    until(lambda: engine.ran, 60)
    monkeypatch.setattr(type(store.predictions), "get", lambda _, *given: get(*given))
    store.pubsub.publish(name)
    assert not away
    store.predictions.cancel(name)
    until(lambda: store.predictions.get(name).status.terminal, 60)
    assert supervisor.stop(grace=60)


def test_a_commit_that_was_cut_is_not_made_again(stores):
    database, calls = stores[0].database, []

    def work(session):
        session.execute(text("SELECT 1"))
        calls.append(session)

    with cut_once(database, "commit"), pytest.raises(OperationalError):
        database.transact(work)
    assert len(calls) == 1


def test_many_changes_fit_into_few_notifications():
    names = [f"{number:026d}" for number in range(600)]
    payloads = list(_payloads("me", names))
    assert 1 < len(payloads) < 4
    assert max(map(len, payloads)) < 8000
    assert [n for p in payloads for n in p.partition(":")[2].split(",") if n] == names
    assert list(_payloads("me", [])) == ["me:"]


def test_listeners_look_seldom_only_while_they_hear_of_all():
    pubsub, gaps = PubSub(), []
    pubsub.subscribe(lambda _: None, on_gap=lambda: gaps.append(threading.get_ident()))
    assert pubsub.pause(0.5) == 0.5
    pubsub.set_hearing(True)
    assert pubsub.pause(0.5) == LOOK_SELDOM_S
    pubsub.set_hearing(False)
    assert pubsub.pause(0.5) == 0.5
    assert len(gaps) == 2
