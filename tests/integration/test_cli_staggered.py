"""Many items through three steps at once."""

import threading

import pytest

from tegula.cli.several import staggered

LONG = 300
"""Seconds that only a failing test waits."""


class StopError(Exception):
    pass


class Steps:
    """Three steps that note what they did, each in a thread of its own."""

    def __init__(self, broken=()):
        self.broken = broken
        self.noted = []
        self.lock = threading.Lock()
        self.begun = {}
        self.threads = {}

    def event(self, *name):
        with self.lock:
            return self.begun.setdefault(name, threading.Event())

    def note(self, step, item):
        self.event(step, item).set()
        self.threads.setdefault(step, set()).add(threading.get_ident())
        error = dict(self.broken).get((step, item))
        if error is not None:
            raise error
        with self.lock:
            self.noted.append((step, item))

    def read(self, item):
        self.note("read", item)
        return item

    def work(self, item, read):
        assert read == item
        self.note("work", item)
        return item

    def write(self, item, worked):
        assert worked == item
        self.note("write", item)

    def failed(self, item, error):
        self.note(f"failed: {error}", item)

    def run(self, items):
        staggered(items, self.read, self.work, self.write, self.failed, (StopError,))

    def items_of(self, *steps):
        return [item for step, item in self.noted if step in steps]


def test_every_step_sees_the_items_in_their_order_and_in_its_own_thread():
    steps = Steps()
    steps.run(range(5))
    for step in ("read", "work", "write"):
        assert steps.items_of(step) == [0, 1, 2, 3, 4]
        assert len(steps.threads[step]) == 1
    assert len(set.union(*steps.threads.values())) == 3


def test_the_next_is_read_and_the_last_is_written_while_one_is_worked_on():
    steps = Steps()
    overlapped = []

    def work(item, read):
        waited = item == 3 or steps.event("read", item + 1).wait(LONG)
        waited = waited and (item == 0 or steps.event("write", item - 1).wait(LONG))
        overlapped.append(waited)
        return read

    staggered(range(4), steps.read, work, steps.write, steps.failed, (StopError,))
    assert overlapped == [True] * 4


def test_no_more_than_one_item_is_read_ahead():
    steps = Steps()

    def work(item, read):
        steps.event("read", min(item + 1, 4)).wait(LONG)
        assert max(steps.items_of("read"), default=0) <= item + 1
        return read

    staggered(range(5), steps.read, work, steps.write, steps.failed, (StopError,))


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_a_failure_is_told_in_its_turn_and_the_others_go_on(step):
    steps = Steps({(step, 1): ValueError("bad")}.items())
    steps.run(range(4))
    assert steps.items_of("write", "failed: bad") == [0, 1, 2, 3]
    assert ("failed: bad", 1) in steps.noted


@pytest.mark.parametrize("step", ["read", "work"])
def test_what_stops_the_whole_lets_finished_work_be_written(step):
    steps = Steps({(step, 2): StopError()}.items())
    with pytest.raises(StopError):
        steps.run(range(5))
    assert steps.items_of("write") == [0, 1]
    assert 3 not in steps.items_of("work")


def test_what_stops_the_writing_stops_the_whole():
    steps = Steps({("write", 0): StopError()}.items())
    with pytest.raises(StopError):
        steps.run(range(5))
    assert steps.items_of("work") in ([0], [0, 1])


def test_nothing_to_do_is_nothing_done():
    steps = Steps()
    steps.run([])
    assert steps.noted == []
