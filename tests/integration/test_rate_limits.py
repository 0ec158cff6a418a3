"""Rate limits of tokens, on each database and over several servers on it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from api_support import open_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from starlette.testclient import TestClient
from store_support import TurnedClock, counted_statements, fresh_database, open_store

from tegula.server.api.app import create_app
from tegula.server.api.counters import RateLimiter
from tegula.server.background import Sweeper
from tegula.server.tables import RateBucket


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request):
    if request.param == "sqlite":
        return None
    return fresh_database(request.getfixturevalue("postgresql"), "tegula_rates")


@pytest.fixture(scope="module")
def shared(tmp_path_factory, database_url):
    store = open_store(tmp_path_factory.mktemp("rates"), database_url=database_url)
    yield store
    store.close()


@pytest.fixture
def limiter(shared):
    """Return what makes the limiter of another server on the database, whose buckets are full."""
    with shared.database.write() as session:
        for bucket in session.scalars(select(RateBucket)):
            session.delete(bucket)
    clock = TurnedClock()

    def limiter(**per_minute):
        made = RateLimiter({"create": 600, "other": 3000, **per_minute}, clock, shared.rates)
        made.clock = clock
        return made

    return limiter


def take(limits, who="token", kind="create"):
    return limits.take_known(who, kind) or limits.take_shared(who, kind)


def test_a_minutes_worth_may_come_at_once_and_no_more(limiter):
    limits = limiter()
    verdicts = [take(limits) for _ in range(601)]
    assert [verdict.allowed for verdict in verdicts] == [True] * 600 + [False]
    assert [verdict.remaining for verdict in verdicts] == [*reversed(range(600)), 0]


def test_tokens_and_kinds_have_limits_of_their_own(limiter):
    limits = limiter(create=1)
    assert take(limits, "a").allowed
    assert not take(limits, "a").allowed
    assert take(limits, "b").allowed
    assert take(limits, "a", "other").allowed


def test_refused_requests_do_not_put_off_the_next_one_and_cost_nothing(limiter, shared):
    limits = limiter(create=60)
    for _ in range(60):
        take(limits)
    with counted_statements(shared) as statements:
        for _ in range(1000):
            assert not take(limits).allowed
    assert statements == []
    limits.clock.turn(1)
    assert take(limits).allowed


def test_rest_fills_the_bucket_as_if_it_were_asked_each_time(limiter):
    limits = limiter()
    for _ in range(50):  # ten a second flow in
        assert take(limits).remaining == 599
        limits.clock.turn(0.1)
    for _ in range(20):
        last = take(limits)
    assert (last.remaining, last.reset_seconds) == (580, 2)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1)), max_size=40))
def test_no_minute_takes_more_than_a_full_bucket_and_what_flows_in(limiter, asked):
    first, clock = limiter(create=6), None
    servers, allowed = [first, limiter(create=6)], 0
    clock = first.clock
    clock.turn(600)
    for pause, server in asked:
        clock.turn(pause)
        allowed += take(servers[server]).allowed
    assert allowed <= 6 + sum(pause for pause, _ in asked) * 6 / 60 + 1e-6


def test_no_limit_is_no_limit_and_costs_nothing(limiter, shared):
    limits = limiter(create=0)
    with counted_statements(shared) as statements:
        assert all(take(limits).allowed for _ in range(2000))
    assert statements == []


def test_servers_on_one_database_share_a_limit(limiter):
    servers = [limiter(), limiter(), limiter()]
    allowed = sum(take(servers[turn % 3]).allowed for turn in range(900))
    assert 600 <= allowed <= 600 + 2 * 10
    assert not any(take(server).allowed for server in servers)


def test_who_is_far_from_a_limit_seldom_costs_a_statement(limiter, shared):
    limits = limiter()
    with counted_statements(shared) as statements:
        for _ in range(250):
            assert take(limits).allowed
    assert len(statements) <= 26


def test_a_clock_that_is_behind_fills_nothing_twice(limiter):
    ahead, behind = limiter(create=6), limiter(create=6)
    for _ in range(6):
        take(ahead)
    ahead.clock.turn(-5)
    assert not take(behind).allowed
    ahead.clock.turn(10)
    assert not take(behind).allowed


def test_two_servers_answer_with_the_limit_of_both(shared, database_url):
    limits = {"requests_per_minute": 5, "creates_per_minute": 2}
    folder, clock = shared.settings.folder, TurnedClock()
    one = open_server(folder, clock=clock, database_url=database_url, **limits)
    other = TestClient(create_app(one.store), base_url="https://tile.example")
    other.headers["authorization"] = f"Bearer {one.token}"
    with ExitStack() as stack:
        clients = [stack.enter_context(each) for each in (one.client, other)]
        answers = [clients[turn % 2].get("/v1/predictions") for turn in range(6)]
        creates = [client.post("/v1/predictions", json={}) for client in (*clients, *clients)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    remaining = [answer.headers["ratelimit-remaining"] for answer in answers]
    assert remaining == ["4", "3", "2", "1", "0", "0"]
    assert answers[-1].headers["ratelimit-reset"] == "12"
    assert [answer.status_code == 429 for answer in creates] == [False, False, True, True]
    one.store.close()


def test_a_sweep_removes_what_is_full_again(tmp_path):
    store = open_store(tmp_path)
    take(RateLimiter({"create": 600}, store.clock, store.rates))
    sweeper = Sweeper(store)
    for seconds, left in ((60, 1), (61, 0)):
        store.clock.turn(seconds)
        sweeper.sweep()
        with store.database.read() as session:
            assert len(session.scalars(select(RateBucket)).all()) == left
    store.close()
