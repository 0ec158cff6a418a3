"""Rate limits of tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from store_support import TurnedClock

from tegula.server.api.counters import RateLimiter


def limiter(clock, **per_minute):
    return RateLimiter({"create": 600, "other": 3000, **per_minute}, clock)


def test_a_minutes_worth_may_come_at_once_and_no_more():
    limits = limiter(TurnedClock())
    verdicts = [limits.take("token", "create") for _ in range(601)]
    assert [verdict.allowed for verdict in verdicts] == [True] * 600 + [False]
    assert (verdicts[0].remaining, verdicts[-1].remaining) == (599, 0)


def test_tokens_and_kinds_have_limits_of_their_own():
    limits = limiter(TurnedClock(), create=1)
    assert limits.take("a", "create").allowed
    assert not limits.take("a", "create").allowed
    assert limits.take("b", "create").allowed
    assert limits.take("a", "other").allowed


def test_refused_requests_do_not_put_off_the_next_one():
    clock = TurnedClock()
    limits = limiter(clock, create=60)
    for _ in range(60):
        limits.take("token", "create")
    for _ in range(1000):
        assert not limits.take("token", "create").allowed
    clock.turn(1)
    assert limits.take("token", "create").allowed


@given(st.lists(st.floats(0, 5), max_size=60))
def test_no_minute_takes_more_than_a_full_bucket_and_what_flows_in(pauses):
    clock = TurnedClock()
    limits, allowed = limiter(clock, create=6), 0
    for pause in pauses:
        clock.turn(pause)
        allowed += limits.take("token", "create").allowed
    assert allowed <= 6 + sum(pauses) * 6 / 60 + 1e-6


def test_no_limit_is_no_limit():
    limits = limiter(TurnedClock(), create=0)
    assert all(limits.take("token", "create").allowed for _ in range(2000))
