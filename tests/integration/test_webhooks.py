"""Webhooks: what is written, what is sent, and what follows from an answer."""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime, timedelta, timezone

import pytest
import standardwebhooks
from receiver_support import receiving
from store_support import NOON, TurnedClock, ask, counted_statements, open_store

from tegula.errors import NotFoundError
from tegula.server.addresses import Policy
from tegula.server.background import WebhookSender
from tegula.server.fetch import Answer, Fetcher
from tegula.server.queue import Report
from tegula.server.tables import WEBHOOK_EVENTS, WebhookMessage
from tegula.server.webhooks import JITTER, SCHEDULE, outcome, signed_headers

LOOPBACK = Policy(private=True, ports=())


@pytest.fixture
def clock():
    return TurnedClock()


@pytest.fixture
def store(tmp_path, clock):
    opened = open_store(tmp_path, clock, webhook_seconds=60.0)
    yield opened
    opened.close()


@pytest.fixture
def receiver():
    with receiving() as server:
        yield server


@pytest.fixture
def deliver(store):
    """Send everything that is due."""
    deliverer = WebhookSender(store, Fetcher(LOOPBACK))

    def step():
        while sent := deliverer.send_due():
            for future in sent:
                future.result(300)

    yield step
    deliverer.stop()


def hooked(store, url, events=WEBHOOK_EVENTS):
    name = ask(store, webhook=url, webhook_events=events).id
    return name, store.queue.claim("worker").attempt


def finish(store, url, events=("completed",)):
    name, attempt = hooked(store, url, events)
    store.queue.start(name, attempt)
    store.queue.succeed(name, attempt)
    return name


def waiting(store, name):
    return [(each.event, each.state) for each in store.webhooks.messages(name)]


def test_the_signature_is_that_of_the_known_vector():
    body = '{"id": "ufawqhfynnddngldkgtslldrkq", "status": "succeeded", '
    body += '"logs": "100%|██████████| 4/4 [00:01<00:00]"}'
    secret, message = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX", "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W"
    at = datetime.fromtimestamp(1674087231.9, timezone.utc)
    headers = signed_headers([secret], message, at, body)
    assert headers["webhook-timestamp"] == "1674087231"
    assert headers["webhook-signature"] == "v1,HfspxP3l31EtJAMphCS9iVhvsgGPimCuts1f2IbwqGI="


def test_only_what_was_asked_for_is_written(store):
    name = finish(store, "https://example.com/hook", ("start",))
    assert waiting(store, name) == [("start", "pending")]


def test_a_change_that_is_taken_back_leaves_no_message(store, monkeypatch):
    name, attempt = hooked(store, "https://example.com/hook", ("completed",))
    monkeypatch.setattr("tegula.server.lifecycle.UsageRecord", lambda **_: 1 / 0)
    store.queue.start(name, attempt)
    with pytest.raises(ZeroDivisionError):
        store.queue.succeed(name, attempt)
    assert waiting(store, name) == []
    assert not store.predictions.get(name).status.terminal


def test_logs_and_output_are_told_at_most_twice_a_second(store, clock, deliver, receiver):
    name, attempt = hooked(store, receiver.url, ("logs",))
    for number in range(20):
        store.queue.report(name, attempt, Report(f"{number}\n"))
        deliver()
        clock.turn(0.1)
    clock.turn(1)
    deliver()
    bodies = [json.loads(request[3]) for request in receiver.requests]
    assert 4 <= len(bodies) <= 5
    assert bodies[-1]["logs"].endswith("19\n")


def test_a_message_is_signed_compact_and_whole(store, deliver, receiver):
    name = finish(store, receiver.url)
    store.clock.now = standard_time()
    store.webhooks.replay(store.webhooks.messages(name)[0].id)
    deliver()
    (_, _, headers, body) = receiver.requests[0]
    account = store.accounts.ensure("ada")
    secret = store.webhooks.secret(account.id)
    seen = standardwebhooks.Webhook(secret).verify(body.decode(), headers)
    assert (seen["id"], seen["status"]) == (name, "succeeded")
    assert body.decode() == json.dumps(seen, separators=(",", ":"), ensure_ascii=False)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(secret).verify(body.decode() + " ", headers)


def standard_time():
    from tegula.server.db import utc_now

    return utc_now()


def test_a_rotated_secret_still_signs_for_a_day(store, clock, deliver, receiver):
    account = store.accounts.ensure("ada")
    old = store.webhooks.secret(account.id)
    new = store.webhooks.rotate_secret(account.id)
    assert store.webhooks.secrets(account.id) == (new, old)
    finish(store, receiver.url)
    deliver()
    (_, _, headers, body) = receiver.requests[0]
    stamp = int(headers["webhook-timestamp"])
    at = datetime.fromtimestamp(stamp, timezone.utc)
    expected = [
        standardwebhooks.Webhook(each).sign(headers["webhook-id"], at, body.decode())
        for each in (new, old)
    ]
    assert headers["webhook-signature"].split() == expected
    clock.turn(25 * 3600)
    assert store.webhooks.secrets(account.id) == (new,)


def test_a_secret_has_nothing_that_clients_split_at(store):
    key = store.webhooks.secret("somebody").removeprefix("whsec_")
    assert "_" not in key
    assert "." not in key


def test_a_terminal_message_is_tried_for_days_with_one_id(store, clock, deliver, receiver):
    receiver.status = 500
    name, began = finish(store, receiver.url), clock.now
    for _ in range(40):
        deliver()
        due = store.webhooks.next_due()
        if due is None:
            break
        clock.now = due
    assert waiting(store, name) == [("completed", "failed")]
    assert len(receiver.requests) == 1 + len(SCHEDULE)
    assert len({request[2]["webhook-id"] for request in receiver.requests}) == 1
    assert len({request[3] for request in receiver.requests}) == 1
    assert clock.now - began > timedelta(hours=75 * (1 - JITTER))


def test_most_attempts_of_the_first_hour_fall_into_its_first_minute():
    moments = [sum(SCHEDULE[:count]) for count in range(len(SCHEDULE) + 1)]
    assert len([moment for moment in moments if moment <= 60]) == 6
    assert SCHEDULE[-1] == max(SCHEDULE) == 24 * 3600


def test_messages_are_listed_by_account_prediction_and_state(store, clock):
    names = []
    for _ in range(3):
        clock.turn(1)
        names.append(finish(store, "https://example.com/hook"))
    ids = [store.webhooks.messages(name)[0].id for name in names]
    store.webhooks.finish_attempt(ids[0], outcome(delivery(99), None, NOON, 0, "It is down."))
    ada, other = store.accounts.ensure("ada").id, store.accounts.ensure("grace").id

    def listed(*account, **filters):
        return [message.id for message in store.webhooks.page(*account, **filters).items]

    assert listed(ada) == listed(None) == ids[::-1]
    assert listed(other) == []
    assert listed(ada, state="failed") == ids[:1]
    assert listed(ada, prediction_id=names[1]) == ids[1:2]
    first = store.webhooks.page(ada, limit=2)
    assert listed(ada, cursor=first.next) == ids[:1]
    with pytest.raises(NotFoundError):
        store.webhooks.replay(ids[0], other)
    assert store.webhooks.replay(ids[0], ada).state == "pending"
    assert listed(ada, state="failed") == []


def test_other_messages_are_sent_once(store, clock, deliver, receiver):
    receiver.status = 500
    name, attempt = hooked(store, receiver.url, ("start",))
    store.queue.start(name, attempt)
    deliver()
    clock.turn(3600)
    deliver()
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("status", "state"),
    [(200, "delivered"), (204, "delivered"), (301, "pending"), (404, "pending"), (410, "failed")],
)
def test_what_follows_from_a_status(status, state):
    assert outcome(delivery(), Answer(status), NOON, 0).state == state


def test_a_receiver_may_ask_for_a_longer_pause_but_not_for_ever():
    pauses = [
        outcome(delivery(), Answer(503, after), NOON, 0).next_at - NOON for after in (1, 90, 10**9)
    ]
    assert [pause.total_seconds() for pause in pauses] == [SCHEDULE[0], 90, 3600]


def delivery(attempts=1):
    url = "https://example.com"
    return WebhookMessage(
        "msg_1", "p", "a", url, "example.com", "completed", "{}", NOON, NOON, attempts=attempts
    )


def test_an_address_inside_is_never_called(store, receiver):
    name = finish(store, receiver.url)
    deliverer = WebhookSender(store, Fetcher(Policy(ports=())))
    for future in deliverer.send_due():
        future.result(300)
    deliverer.stop()
    assert receiver.requests == []
    assert store.webhooks.messages(name)[0].last_error is not None


def test_a_message_whose_sender_died_is_sent_again(store, clock, deliver, receiver):
    name = finish(store, receiver.url)
    (taken,) = store.webhooks.due(10, timedelta(seconds=30))
    assert store.webhooks.due(10, timedelta(seconds=30)) == ()
    clock.turn(31)
    deliver()
    assert [request[2]["webhook-id"] for request in receiver.requests] == [taken.id]
    assert waiting(store, name) == [("completed", "delivered")]


def test_a_slow_receiver_holds_up_nobody_else(store, clock, receiver):
    free, lock = threading.Event(), threading.Lock()

    def slow(request):
        with lock:
            receiver.at_once += 1
            receiver.most_at_once = max(receiver.most_at_once, receiver.at_once)
        free.wait(300)
        with lock:
            receiver.at_once -= 1
        request.send_response(200)
        request.end_headers()

    receiver.handle = slow
    for _ in range(12):
        finish(store, receiver.url)
    with receiving() as quick:
        finish(store, quick.url)
        deliverer = WebhookSender(store, Fetcher(LOOPBACK))
        sent = deliverer.send_due()
        until(lambda: quick.requests)
        free.set()
        for future in sent:
            future.result(300)
        deliverer.stop()
    assert receiver.most_at_once <= store.settings.webhooks_per_receiver


def test_looking_for_what_is_due_takes_no_lock_while_nothing_is(store):
    hooked(store, "https://example.com/hook", ("completed",))
    sender = WebhookSender(store, Fetcher(LOOPBACK))
    with counted_statements(store, begins="BEGIN IMMEDIATE") as begun:
        assert sender._look() > 0
    assert begun == []


def test_the_thread_sends_by_itself(store, receiver):
    deliverer = WebhookSender(store, Fetcher(LOOPBACK))
    deliverer.start()
    finish(store, receiver.url)
    until(lambda: receiver.requests)
    deliverer.stop()


def test_a_message_that_the_thread_did_not_see_is_sent_at_the_stop(store, receiver, monkeypatch):
    monkeypatch.setattr(WebhookSender, "_run", lambda self: self._stopped.wait())
    deliverer = WebhookSender(store, Fetcher(LOOPBACK))
    deliverer.start()
    name = finish(store, receiver.url)
    deliverer.stop()
    assert waiting(store, name) == [("completed", "delivered")]


def test_replaying_what_is_not_there_is_refused(store):
    with pytest.raises(NotFoundError):
        store.webhooks.replay("msg_none")


def until(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
