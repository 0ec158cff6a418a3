"""The progress of a running command: a bar on a terminal, a few lines elsewhere, or JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tegula.cli.console import Console
from tegula.progress import OnProgress, Progress

_UNITS = {"prescale": "tiles", "refine": "windows"}
_QUARTERS = 4
_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def show_waiting(console: Console, what: str) -> Iterator[None]:
    """Show on a terminal that something is under way."""
    if not (console.talks and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console as Terminal

    with Terminal(stderr=True).status(what):
        yield


WholeText = Callable[[Progress], str]
"""Says how far a command is with all its pictures, from the progress of the present one."""


@contextmanager
def show_progress(
    console: Console, name: str, source: str, whole: WholeText | None = None
) -> Iterator[OnProgress | None]:
    """Show the progress of one picture, unless messages are off.

    Args:
        console: where it is shown.
        name: of the picture, for people.
        source: the same for programs, as ``input`` of a record.
        whole: says how far all pictures are, where there are several.
    """
    if console.json and console.progress:
        yield ProgressRecords(source, console.record)
    elif not console.talks:
        yield None
    elif sys.stderr.isatty():
        with _bar(name, whole) as report:
            yield report
    else:
        yield ProgressLines(name, console.message, whole)


@contextmanager
def _bar(name: str, whole: WholeText | None) -> Iterator[OnProgress]:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{name}: prepare", total=1.0, left="")

        def report(progress: Progress) -> None:
            text = f"{name}: {stage_text(progress)}"
            parts = [time_left(progress), whole(progress) if whole else ""]
            left = "; ".join(part for part in parts if part)
            bar.update(task, completed=progress.fraction, description=text, left=left)

        yield report


@dataclass
class ProgressLines:
    """Writes a line for every quarter of the work, and none for work that ends at once."""

    name: str
    write: Callable[[str], None]
    whole: WholeText | None = None
    clock: Callable[[], float] = time.monotonic
    _quarter: int = 0
    _written: float = field(init=False)

    def __post_init__(self) -> None:
        self._written = self.clock()

    def __call__(self, progress: Progress) -> None:
        """Take a report; see ``OnProgress``."""
        quarter = int(progress.fraction * _QUARTERS)
        soon = self.clock() - self._written < _SECONDS_BETWEEN_LINES
        if quarter <= self._quarter or quarter == _QUARTERS or soon:
            return
        self._quarter, self._written = quarter, self.clock()
        parts = [f"{progress.fraction:.0%}", stage_text(progress), time_left(progress)]
        line = f"{self.name}: {', '.join(part for part in parts if part)}"
        self.write(f"{line}; {self.whole(progress)}" if self.whole else line)


@dataclass
class ProgressRecords:
    """Writes an object for every hundredth of the work."""

    source: str
    write: Callable[[Mapping[str, Any]], None]
    _percent: int = -1

    def __call__(self, progress: Progress) -> None:
        """Take a report; see ``OnProgress``."""
        if int(progress.fraction * 100) > self._percent:
            self._percent = int(progress.fraction * 100)
            self.write({"input": self.source, "progress": vars(progress)})


def stage_text(progress: Progress) -> str:
    """Return what is being done and how far it is, such as ``refine 3/12 windows``."""
    unit = _UNITS.get(progress.stage)
    if unit is None or progress.total == 0:
        return progress.stage
    return f"{progress.stage} {progress.done}/{progress.total} {unit}"


def time_left(progress: Progress) -> str:
    """Return the time left, such as ``0:01:05 left``; or nothing where that says nothing."""
    if progress.seconds_left is None or progress.seconds_left < 0.5:
        return ""
    return f"{timedelta(seconds=round(progress.seconds_left))} left"
