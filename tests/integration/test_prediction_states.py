"""The states of a prediction, by themselves and in a store that anything may happen to."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_support import NOON, VERSION, TurnedClock, ask, open_store

from tegula.server.lifecycle import TRANSITIONS, Lifecycle, Trigger
from tegula.server.queue import Report
from tegula.server.tables import ACTIVE, WEBHOOK_EVENTS, Prediction, State

TERMINAL = frozenset(State) - frozenset(ACTIVE)


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("trigger", list(Trigger))
def test_nothing_leads_out_of_a_terminal_state(state, trigger):
    assert (state, trigger) not in TRANSITIONS


@given(st.lists(st.sampled_from(Trigger)))
def test_any_triggers_walk_along_the_table(triggers):
    lifecycle, session = Lifecycle(MagicMock(), MagicMock()), MagicMock()
    prediction = Prediction("p", "a", "tegula/upscale", VERSION, {}, NOON)
    for trigger in triggers:
        before = prediction.status
        changed = lifecycle.apply(session, prediction, trigger, NOON)
        assert changed == ((before, trigger) in TRANSITIONS)
        assert prediction.status is TRANSITIONS.get((before, trigger), before)


def test_every_state_can_be_reached():
    assert {State.STARTING, *TRANSITIONS.values()} == set(State)


def test_only_a_prediction_that_never_started_is_aborted():
    assert {pair for pair, state in TRANSITIONS.items() if state is State.ABORTED} == {
        (State.STARTING, Trigger.EXPIRE)
    }


class AnythingHappens(RuleBasedStateMachine):
    """Workers, callers and clocks do what they like, in any order."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = TurnedClock()
        self.store = open_store(self.folder, self.clock)
        self.claims = []
        self.seen = {}

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)

    @precondition(lambda self: len(self.seen) < 3)
    @rule(deadline=st.booleans())
    def ask(self, deadline):
        at = self.clock.now if deadline else None
        hook = {"webhook": "https://example.com/hook", "webhook_events": WEBHOOK_EVENTS}
        prediction = ask(self.store, deadline=at, **hook)
        self.seen[prediction.id] = prediction

    @rule()
    def claim(self):
        if claimed := self.store.queue.claim("worker"):
            assert claimed.attempt > self.seen[claimed.id].attempt
            self.claims.append((claimed.id, claimed.attempt))

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), act=st.sampled_from(["start", "succeed", "release", "report"]))
    def worker_acts(self, data, act):
        name, attempt = data.draw(st.sampled_from(self.claims))
        report = (Report("a line\n", ("an output",), progress=0.5),) if act == "report" else ()
        current = self.store.predictions.get(name)
        done = getattr(self.store.queue, act)(name, attempt, *report)
        assert not (done and (current.status.terminal or current.attempt != attempt))

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), act=st.sampled_from(["fail", "lose"]))
    def worker_fails(self, data, act):
        getattr(self.store.queue, act)(*data.draw(st.sampled_from(self.claims)), "it broke")

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def cancel(self, data):
        self.store.predictions.cancel(data.draw(st.sampled_from(sorted(self.seen))))

    @rule(seconds=st.sampled_from([-60, 1, 20]))
    def time_passes(self, seconds):
        self.clock.turn(seconds)

    @rule()
    def keeper_looks(self):
        self.store.queue.rescue()
        self.store.queue.expire()

    @invariant()
    def the_rows_make_sense(self):
        for name, before in self.seen.items():
            now = self.store.predictions.get(name)
            assert not before.status.terminal or now == before
            assert now.attempt >= before.attempt
            assert now.losses <= 2
            times = [t for t in (now.created_at, now.started_at, now.completed_at) if t]
            assert times == sorted(times)
            assert (now.completed_at is not None) == now.status.terminal
            self.the_end_is_told_once(now)
            self.seen[name] = now

    def the_end_is_told_once(self, prediction):
        ends = [e for e in self.store.predictions.events(prediction.id) if e.kind == "done"]
        reported = [
            w for w in self.store.webhooks.messages(prediction.id) if w.event == "completed"
        ]
        assert len(ends) == len(reported) == prediction.status.terminal


AnythingHappens.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_whatever_happens_the_rows_make_sense = AnythingHappens.TestCase
