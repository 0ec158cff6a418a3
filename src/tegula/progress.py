"""How a running upscale and its caller speak: progress, previews, and the wish to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tegula.errors import CancelledError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

STAGES = ("prepare", "prescale", "refine", "finish")


@dataclass(frozen=True)
class Progress:
    """One report from a running upscale.

    stage: one of ``STAGES``.
    done, total: units of the stage that are ready, and all of them: tiles in prescale,
        windows times steps in refine, 1 elsewhere. Both are 0 when a stage begins.
    fraction: share of the whole upscale that is done, 0..1, never falling. It counts work, so
        it grows within a unit as well.
    seconds_left: estimate for the whole upscale; None until there is one.
    """

    stage: str
    done: int
    total: int
    fraction: float
    seconds_left: float | None = None


OnProgress = Callable[[Progress], None]
OnUnit = Callable[[int, int], None]
"""Called with (done, total) units of one stage."""

OnShare = Callable[[float], None]
"""Called with the share of the work of one stage that is done, 0..1."""

OnPreview = Callable[["Image"], object]
"""Shown small pictures of the work so far."""

OnPicture = Callable[["NDArray[np.float32]"], object]
"""The same within the pipeline: [height, width, 3] in 0..1."""

Cancelled = Callable[[], bool]
"""Asked between small pieces of work; True stops the upscale with CancelledError."""


def ignore_units(done: int, total: int) -> None:
    """Report to nobody."""


def ignore_share(share: float) -> None:
    """Report to nobody."""


def never_cancelled() -> bool:
    """Carry on to the end."""
    return False


@dataclass(frozen=True)
class Cancel:
    """The caller's wish to stop, checked between small pieces of work."""

    requested: Cancelled = never_cancelled

    def check(self) -> None:
        """Go on, unless the caller wants to stop.

        Raises:
            CancelledError: the caller does.
        """
        if self.requested():
            raise CancelledError


@dataclass(frozen=True)
class StageProgress:
    """What a stage reports to while it works.

    on_unit: called with (done, total) units of the stage; the total may grow.
    cancel: checked between units.
    on_picture: shown small pictures of the work so far; None if nobody looks.
    on_share: called often, with the share of the stage's work that is done. A stage that
        calls it does so before it calls ``on_unit``; for any other, units are the work.
    """

    on_unit: OnUnit = ignore_units
    cancel: Cancel = Cancel()
    on_picture: OnPicture | None = None
    on_share: OnShare = ignore_share

    def part(self, start: float, end: float) -> StageProgress:
        """Return what a part of the stage reports its shares to, as from ``start`` to ``end``."""
        if self.on_share is ignore_share:
            return self
        return replace(self, on_share=lambda share: self.on_share(start + (end - start) * share))


SILENT = StageProgress()
"""Reports to nobody and is never cancelled."""


class StageClock:
    """Measures stages, and checks for cancel before each; ``seconds`` are those by stage."""

    def __init__(self, cancel: Cancel) -> None:
        self.seconds: dict[str, float] = {}
        self._cancel = cancel

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure what is done inside."""
        self._cancel.check()
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


_SMALLEST_MOVE = 0.005
"""Share of a stage's work from which on it is reported that more of it is done."""


class Reporter:
    """Turns work and units of single stages into progress of the whole upscale.

    The time left is estimated from how long the work behind has taken and, the earlier the
    more, from how long the whole was expected to take.

    Args:
        on_progress: called with every report; None reports to nobody.
        shares: of the whole work by stage.
        expected: seconds for the whole; None where that is not known.
    """

    def __init__(
        self,
        on_progress: OnProgress | None,
        shares: Mapping[str, float],
        expected: float | None = None,
    ) -> None:
        self._on_progress = on_progress
        self._shares = shares
        self._expected = expected
        self._behind = 0.0
        self._start = time.perf_counter()

    def begin(self, stage: str) -> float:
        """Report that a stage begins; return the share of the work before it."""
        before = sum(self._shares.get(earlier, 0.0) for earlier in STAGES[: STAGES.index(stage)])
        self._report(stage, 0, 0, before)
        return before

    def stage(
        self, stage: str, cancel: Cancel = Cancel(), on_picture: OnPicture | None = None
    ) -> StageProgress:
        """Return what a stage reports to; the stage begins now."""
        before, size = self.begin(stage), self._shares[stage]
        units, reported = (0, 0), 0.0
        worked: float | None = None

        def on_share(share: float) -> None:
            nonlocal reported, worked
            worked = max(worked or 0.0, share)
            # A net has hundreds of layers, and in strips it calls each of them many times.
            if worked - reported >= _SMALLEST_MOVE:
                reported = worked
                self._report(stage, *units, before + size * worked)

        def on_unit(done: int, total: int) -> None:
            nonlocal units
            units = done, total
            share = done / total if worked is None else worked
            self._report(stage, done, total, before + size * share)

        # Where nobody listens, no layer has to be watched.
        shares = ignore_share if self._on_progress is None else on_share
        return StageProgress(on_unit, cancel, on_picture, shares)

    def finished(self) -> None:
        """Report the end."""
        self._report(STAGES[-1], 1, 1, 1.0)

    def _report(self, stage: str, done: int, total: int, fraction: float) -> None:
        if self._on_progress is None:
            return
        self._behind = max(self._behind, fraction)
        self._on_progress(Progress(stage, done, total, self._behind, self._left()))

    def _left(self) -> float | None:
        spent, ahead = time.perf_counter() - self._start, 1 - self._behind
        if self._expected is not None:
            # What is ahead takes ``ahead * total``, and there are two estimates of the total:
            # the expected one, and ``spent / behind``. Each weighs as much as there is of it:
            # ahead * (ahead * expected + behind * (spent / behind)).
            return ahead * (ahead * self._expected + spent)
        return spent * ahead / self._behind if self._behind > 0 else None


ANNOUNCED_FROM_S = 10.0
"""Expected seconds of work from which on a person is told beforehand how long it takes."""


def about(seconds: float) -> str:
    """Return a time as people say it, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    if seconds < 99.5 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
