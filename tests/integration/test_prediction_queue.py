"""What waits, is fetched and runs: who gets it, what is reported of it, and how it ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from store_support import (
    NOON,
    VERSION,
    ask,
    counted_statements,
    open_store,
)

from tegula.errors import BusyError, ConflictError
from tegula.server.predictions import NewPrediction
from tegula.server.queue import PREFER_LOADED, Report
from tegula.server.tables import Deployment, State


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
