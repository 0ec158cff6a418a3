"""Inputs that are given as addresses: fetched before a device is needed, and never in its way."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from engine_support import HereEngine, ended, supervising, until
from receiver_support import receiving
from store_support import ask, open_store

from tegula.errors import UnknownModelError
from tegula.server.addresses import Policy, host_of
from tegula.server.background import WebhookSender
from tegula.server.db import utc_now
from tegula.server.fetch import Fetcher
from tegula.server.tables import State
from tegula.server.work import InputFiles, ResolvedVersion

FETCHER = Fetcher(Policy(private=True, ports=()))
PNG = b"\x89PNG\r\n\x1a\n picture"
VERSION = ResolvedVersion("ab", ("image", "mask"), is_list=True)


@dataclass
class Dripper:
    """Answers at once, but below /drip with headers alone, until it is enough.

    Below /to it redirects to the rest of the path, under its own URL.

    begun: how often each path was requested.
    closed: set when somebody closed a connection before that.
    """

    url: str
    begun: Counter = field(default_factory=Counter)
    closed: threading.Event = field(default_factory=threading.Event)
    enough: threading.Event = field(default_factory=threading.Event)

    def answer(self, request):
        self.begun[request.path] += 1
        if request.path.startswith("/to/"):
            request.send_response(302)
            request.send_header("location", self.url + request.path.removeprefix("/to"))
            request.send_header("content-length", "0")
            request.end_headers()
            return
        drips = request.path.startswith("/drip") and not self.enough.is_set()
        request.send_response(200)
        request.send_header("content-length", str(len(PNG)))
        request.end_headers()
        end = time.monotonic() + 600
        try:
            while drips and not self.enough.wait(0.02) and time.monotonic() < end:
                request.connection.setblocking(False)
                try:
                    if request.connection.recv(1) == b"":
                        self.closed.set()
                        return
                except BlockingIOError:
                    pass
                finally:
                    request.connection.setblocking(True)
            request.wfile.write(PNG)
        except OSError:
            self.closed.set()


@pytest.fixture
def dripper():
    with receiving() as receiver:
        server = Dripper(receiver.url)
        receiver.handle = server.answer
        yield server
        server.enough.set()


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path, utc_now, lease_seconds=4.0)
    yield opened
    opened.close()


@pytest.fixture
def supervise(store):
    with supervising() as start:

        def supervise_one(engine, resolver=lambda _: VERSION, its_store=store, fetcher=FETCHER):
            inputs = InputFiles(its_store.files, fetcher, 1000, 600.0)
            return start(its_store, [engine], resolver, inputs)

        yield supervise_one


def ask_for(store, url, **values):
    values = {"input": {"image": url}, "fetch_host": host_of(url), **values}
    return ask(store, **values).id


def test_a_dripping_address_keeps_no_device_waiting(store, supervise, dripper):
    engine = HereEngine()
    supervise(engine)
    slow = ask_for(store, f"{dripper.url}/drip")
    until(lambda: dripper.begun)
    assert ended(store, ask(store).id).status is State.SUCCEEDED
    assert ended(store, ask_for(store, f"{dripper.url}/quick")).status is State.SUCCEEDED
    now = store.predictions.get(slow)
    assert (now.status, now.started_at) == (State.STARTING, None)
    assert slow not in [job.id for job in engine.ran]
    dripper.enough.set()
    done = ended(store, slow)
    assert done.status is State.SUCCEEDED
    assert engine.ran[-1].input["image"].read_bytes() == PNG


def test_a_fetch_that_is_longer_than_its_lease_is_kept(store, supervise, dripper):
    supervise(HereEngine())
    slow = ask_for(store, f"{dripper.url}/drip")
    until(lambda: dripper.begun)
    lease = store.predictions.get(slow).lease_until
    until(lambda: lease < utc_now() and lease < store.predictions.get(slow).lease_until)
    dripper.enough.set()
    done = ended(store, slow)
    assert (done.status, done.losses, dripper.begun["/drip"]) == (State.SUCCEEDED, 0, 1)


def test_several_inputs_are_fetched_one_by_one_and_each_once(store, supervise, dripper):
    supervise(HereEngine())
    host = host_of(dripper.url)
    values = {"image": f"{dripper.url}/a", "mask": f"{dripper.url}/b"}
    done = ended(store, ask(store, input=values, fetch_host=host).id)
    again = ended(store, ask(store, input={**values, "mask": values["image"]}).id)
    assert done.status is again.status is State.SUCCEEDED
    assert dripper.begun == {"/a": 2, "/b": 1}


def test_cancelling_closes_the_connection_at_once(store, supervise, dripper):
    supervise(HereEngine())
    slow = ask_for(store, f"{dripper.url}/drip")
    until(lambda: dripper.begun)
    store.predictions.cancel(slow)
    assert dripper.closed.wait(300)
    now = store.predictions.get(slow)
    assert (now.status, now.error) == (State.CANCELED, None)


def test_a_cancel_of_another_process_closes_it_too(store, supervise, dripper):
    supervise(HereEngine())
    slow = ask_for(store, f"{dripper.url}/drip")
    until(lambda: dripper.begun)
    other = open_store(store.settings.folder, utc_now)
    other.predictions.cancel(slow)
    other.close()
    assert dripper.closed.wait(300)


def test_no_host_or_account_gets_more_than_its_share(store, supervise, dripper):
    for limit in ("fetches_per_account", "fetches_per_host"):
        object.__setattr__(store.settings, limit, 2)
    supervise(HereEngine())
    grace = store.accounts.ensure("grace").id
    names = [ask_for(store, f"{dripper.url}/drip/{number}") for number in range(4)]
    until(lambda: len(dripper.begun) == 2)
    # Another host is no way around the limit of the account, nor another account around the host's.
    elsewhere = dripper.url.replace("127.0.0.1", "localhost")
    names += [ask_for(store, f"{elsewhere}/drip/x"), ask_for(store, f"{dripper.url}/drip/y")]
    with store.database.write() as session:
        session.merge(store.predictions.get(names[-1])).account_id = grace
    free = ask_for(store, f"{elsewhere}/quick", account_id=grace)
    assert ended(store, free).status is State.SUCCEEDED
    assert len(dripper.begun) == 3
    dripper.enough.set()
    assert {ended(store, name).status for name in names} == {State.SUCCEEDED}


def test_a_redirect_is_no_way_around_the_limit_of_the_host_that_it_leads_to(
    store, supervise, dripper
):
    object.__setattr__(store.settings, "fetches_per_host", 1)
    supervise(HereEngine())
    elsewhere = dripper.url.replace("127.0.0.1", "localhost")
    names = [ask_for(store, f"{dripper.url}/drip/a")]
    until(lambda: dripper.begun["/drip/a"])
    names.append(ask_for(store, f"{elsewhere}/to/drip/b"))
    until(lambda: dripper.begun["/to/drip/b"])
    # It waits for the other host and does not count at its first one any more.
    assert ended(store, ask_for(store, f"{elsewhere}/quick")).status is State.SUCCEEDED
    cancelled = ask_for(store, f"{elsewhere}/to/drip/c")
    until(lambda: dripper.begun["/to/drip/c"])
    store.predictions.cancel(cancelled)
    until(lambda: [each.name for each in threading.enumerate()].count("fetch") == 2)
    assert (dripper.begun["/drip/b"], dripper.begun["/drip/c"]) == (0, 0)
    dripper.enough.set()
    assert {ended(store, name).status for name in names} == {State.SUCCEEDED}


def test_a_cancelled_fetch_counts_for_its_account_until_its_host_was_looked_up(
    store, supervise, dripper
):
    object.__setattr__(store.settings, "fetches_per_account", 1)
    reached, known = threading.Event(), threading.Event()

    def resolve(host, port):
        if host == "slow.test":
            reached.set()
            known.wait(300)
        return ["127.0.0.1"]

    fetcher = Fetcher(Policy(private=True, ports=()), resolve)
    supervise(HereEngine(), fetcher=fetcher)
    slow = ask_for(store, dripper.url.replace("127.0.0.1", "slow.test"))
    assert reached.wait(300)
    store.predictions.cancel(slow)
    until(lambda: "fetch" not in [each.name for each in threading.enumerate()])
    quick = ask_for(store, f"{dripper.url}/quick")
    time.sleep(0.2)
    assert not dripper.begun
    known.set()
    assert ended(store, quick).status is State.SUCCEEDED


def test_stopping_hands_a_fetch_back_at_once_and_the_next_server_begins_again(
    store, supervise, dripper
):
    supervisor = supervise(HereEngine())
    slow = ask_for(store, f"{dripper.url}/drip")
    until(lambda: dripper.begun)
    begun = time.monotonic()
    assert supervisor.stop(grace=600) is True
    assert time.monotonic() - begun < 300
    assert dripper.closed.wait(300)
    back = store.predictions.get(slow)
    assert (back.status, back.worker, back.lease_until) == (State.STARTING, None, None)
    dripper.enough.set()
    supervise(HereEngine())
    assert ended(store, slow).losses == 0


def test_two_servers_on_one_folder_share_the_fetches(store, supervise, dripper):
    other = open_store(store.settings.folder, utc_now, lease_seconds=4.0)
    for each in (store, other):
        object.__setattr__(each.settings, "fetches_per_host", 1)
        supervise(HereEngine(), its_store=each)
    names = [ask_for(store, f"{dripper.url}/drip/{number}") for number in range(2)]
    until(lambda: len(dripper.begun) == 2)
    dripper.enough.set()
    assert {ended(store, name).status for name in names} == {State.SUCCEEDED}
    assert set(dripper.begun.values()) == {1}
    other.close()


@pytest.mark.parametrize("known", [True, False])
def test_a_failed_fetch_fails_the_prediction_and_says_why(store, supervise, known):
    engine = HereEngine()
    supervise(engine)
    with receiving() as receiver:
        receiver.status = 404
        host = "127.0.0.1" if known else None  # None: from a release that did not note it
        failed = ended(store, ask_for(store, f"{receiver.url}/a.png", fetch_host=host))
    assert failed.status is State.FAILED
    assert failed.error == "image cannot be fetched: The URL answers with status 404, not 200."
    assert failed.predict_seconds is None
    assert engine.ran == []


def test_a_version_that_is_gone_fails_before_anything_is_fetched(store, supervise, dripper):
    def gone(_):
        raise UnknownModelError("No model has this version.")

    supervise(HereEngine(), gone)
    failed = ended(store, ask_for(store, f"{dripper.url}/quick"))
    assert (failed.error, dripper.begun) == ("No model has this version.", {})


def test_webhooks_say_start_and_completed_in_this_order(store, supervise, dripper):
    with receiving() as receiver:
        sender = WebhookSender(store, FETCHER)
        sender.start()
        supervise(HereEngine())
        hook = {"webhook": receiver.url, "webhook_events": ("start", "completed")}
        done = ended(store, ask_for(store, f"{dripper.url}/quick", **hook))
        until(lambda: len(receiver.requests) == 2)
        sender.stop()
        messages = store.webhooks.messages(done.id)
        reported = [json.loads(message.body)["status"] for message in messages]
    assert reported == ["processing", "succeeded"]
