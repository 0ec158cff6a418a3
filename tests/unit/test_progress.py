"""The wish to stop, and the clock that checks it between stages."""

import pytest

from tegula.errors import CancelledError
from tegula.progress import SILENT, Cancel, Reporter, StageClock


def test_whoever_notices_a_cancel_says_the_same():
    with pytest.raises(CancelledError) as first:
        Cancel(lambda: True).check()
    with pytest.raises(CancelledError) as second, StageClock(Cancel(lambda: True))("refine"):
        pytest.fail("a cancelled stage must not begin")
    assert str(first.value) == str(second.value) == "Cancelled; nothing half-written is left."


def test_without_a_wish_to_stop_the_work_goes_on_and_is_measured():
    SILENT.cancel.check()
    clock = StageClock(Cancel())
    with clock("prescale"):
        pass
    assert clock.seconds["prescale"] >= 0


def test_work_within_a_unit_moves_the_whole_and_never_back():
    seen = []
    stage = Reporter(seen.append, {"prescale": 0.5, "refine": 0.5}).stage("prescale")
    tile = stage.part(0.5, 1.0)
    for share in (0.1, 0.108, 0.5, 0.3):
        tile.on_share(share)
    stage.on_unit(1, 2)
    tile.on_share(1.0)
    stage.on_unit(2, 2)
    assert [each.fraction for each in seen] == [0, 0.275, 0.375, 0.375, 0.5, 0.5]
    assert [(each.done, each.total) for each in seen[-3:]] == [(1, 2), (1, 2), (2, 2)]


def test_a_stage_that_counts_units_alone_moves_by_them():
    seen = []
    stage = Reporter(seen.append, {"refine": 1.0}).stage("refine")
    stage.on_unit(1, 4)
    assert seen[-1].fraction == 0.25
