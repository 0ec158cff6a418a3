"""Accounts share the devices: turns, weights, and what one account may have waiting."""

from __future__ import annotations

from collections import Counter

import pytest
from store_support import VERSION, TurnedClock, fresh_database, open_store

from bench.scheduling import simulate
from tegula.errors import BusyError, TooLargeError
from tegula.server.predictions import NewPrediction


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request):
    if request.param == "sqlite":
        return None
    return fresh_database(request.getfixturevalue("postgresql"), "tegula_fairness")


@pytest.fixture
def store(tmp_path, database_url):
    opened = open_store(
        tmp_path,
        TurnedClock(),
        database_url=database_url,
        account_weights={"zoe": 3},
        max_waiting=120,
        max_account_waiting=100,
        max_account_waiting_seconds=5000,
        max_account_bytes=1000,
    )
    yield opened
    opened.close()


def wait(store, name, count=1, seconds=10.0):
    account = store.accounts.ensure(name)
    for _ in range(count):
        store.predictions.create(
            NewPrediction(account.id, "tegula/upscale", VERSION, {}, estimated_seconds=seconds)
        )
        store.clock.turn(0.01)


def run(store, seconds):
    """Run the next prediction, by its account's seconds; return whose it was, and them."""
    claimed = store.queue.claim("device")
    store.queue.start(claimed.id, claimed.attempt)
    name = store.accounts.get(claimed.account_id).username
    store.clock.turn(seconds[name])
    store.queue.succeed(claimed.id, claimed.attempt)
    return name, seconds[name]


def served(store, seconds, runs):
    totals = Counter()
    for name, took in (run(store, seconds) for _ in range(runs)):
        totals[name] += took
    return totals


def turn_of(store, name):
    return store.accounts.ensure(name).turn


def test_who_comes_later_does_not_wait_for_all_of_another_account(store):
    wait(store, "ada", 30)
    assert served(store, {"ada": 10}, 10) == {"ada": 100}
    wait(store, "bob", 3)
    assert served(store, {"ada": 10, "bob": 10}, 8)["bob"] == 30


def test_accounts_get_equal_seconds_whatever_their_predictions_take_and_promise(store):
    wait(store, "ada", 30, seconds=20)
    wait(store, "bob", 10, seconds=1)
    totals = served(store, {"ada": 10, "bob": 40}, 25)
    assert abs(totals["ada"] - totals["bob"]) <= 70


def test_an_account_of_three_times_the_weight_gets_three_times_the_seconds(store):
    wait(store, "ada", 20)
    wait(store, "zoe", 30)
    totals = served(store, {"ada": 20, "zoe": 20}, 28)
    assert 2 <= totals["zoe"] / totals["ada"] <= 4


def test_rest_earns_no_credit_and_pays_no_debt(store):
    wait(store, "ada", 20)
    served(store, {"ada": 20}, 8)
    wait(store, "bob", 12)
    totals = served(store, {"ada": 20, "bob": 20}, 10)
    assert abs(totals["ada"] - totals["bob"]) <= 60
    owed = turn_of(store, "ada")
    wait(store, "zoe")
    run(store, {"ada": 20, "bob": 20, "zoe": 20})
    assert turn_of(store, "ada") >= owed


def test_only_what_a_device_did_is_charged(store):
    wait(store, "ada", seconds=50)
    claimed = store.queue.claim("device")
    assert turn_of(store, "ada") == 50
    store.queue.release(claimed.id, claimed.attempt)
    assert turn_of(store, "ada") == 0
    run(store, {"ada": 7})
    assert turn_of(store, "ada") == pytest.approx(7)
    wait(store, "ada", seconds=50)
    store.predictions.cancel(store.predictions.page(None).items[0].id)
    assert turn_of(store, "ada") == pytest.approx(7)


def test_one_account_does_not_take_all_the_room_for_waiting_work(store):
    wait(store, "ada", 100, seconds=1)
    with pytest.raises(BusyError, match="100 predictions of this account are waiting") as refused:
        wait(store, "ada")
    assert refused.value.retry_after == 1
    wait(store, "bob", 20)
    with pytest.raises(BusyError, match="120 predictions are waiting"):
        wait(store, "bob")


def test_one_account_takes_four_fifths_of_the_room_where_nothing_is_said(tmp_path):
    store = open_store(tmp_path, TurnedClock(), max_waiting=9, max_waiting_seconds=1e6)
    wait(store, "ada", 8, seconds=1e5)
    with pytest.raises(BusyError, match="8 predictions of this account"):
        wait(store, "ada")
    wait(store, "bob")
    store.close()


def test_one_account_does_not_take_all_the_time_for_waiting_work(store):
    wait(store, "ada", seconds=4990)
    with pytest.raises(BusyError, match="of this account are waiting already, about 4990 seconds"):
        wait(store, "ada", seconds=11)
    wait(store, "bob", seconds=11)


def test_uploads_of_one_account_have_a_limit_together(store):
    ada, bob = (store.accounts.ensure(name).id for name in ("ada", "bob"))
    kept = store.files.keep(ada, "a.png", bytes(600))
    with pytest.raises(TooLargeError, match="uploads of this account may have 1,000 bytes"):
        store.files.keep(ada, "b.png", bytes(401))
    store.files.keep(bob, "b.png", bytes(401))
    store.files.delete(kept.id, ada)
    store.files.keep(ada, "b.png", bytes(401))


def test_many_devices_that_fail_are_kept_busy_and_shared_by_weight(tmp_path):
    outcome = simulate(tmp_path, predictions=120, devices=4, failures=0.05)
    assert outcome.ended == 120
    assert outcome.losses > 0
    assert outcome.makespan <= 1.1 * outcome.ideal
    for name, wanted in outcome.wanted.items():
        # Some thirty runs each, as long as chance has it; alike, all four would have a quarter.
        assert abs(outcome.shares[name] - wanted) <= 0.15
