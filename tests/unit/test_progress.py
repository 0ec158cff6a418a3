"""The wish to stop, and the clock that checks it between stages."""

import pytest

from tegula.errors import CancelledError
from tegula.progress import SILENT, Cancel, StageClock


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
