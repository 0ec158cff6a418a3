"""The progress of a running upscale: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tegula.cli.report import Console
from tegula.progress import OnProgress, Progress

_UNITS = {"prescale": "tiles", "refine": "windows"}
_QUARTERS = 4
_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show that something is under way, on a terminal."""
    if not (console.talks and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console as Terminal

    with Terminal(stderr=True).status(what):
        yield


@contextmanager
def showing(console: Console, name: str) -> Iterator[OnProgress | None]:
    """Show the progress of one picture to whoever is told anything."""
    if not console.talks:
        yield None
    elif sys.stderr.isatty():
        with _bar(name) as report:
            yield report
    else:
        yield Lines(name, console.tell)


@contextmanager
def _bar(name: str) -> Iterator[OnProgress]:
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
            left = time_left(progress)
            bar.update(task, completed=progress.fraction, description=text, left=left)

        yield report


@dataclass
class Lines:
    """A line for every quarter of the work, and none for work that is done at once."""

    name: str
    write: Callable[[str], None]
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
        left = time_left(progress)
        text = f"{self.name}: {progress.fraction:.0%}, {stage_text(progress)}"
        self.write(f"{text}, {left}" if left else text)


def stage_text(progress: Progress) -> str:
    """Return what is being done and how far it is, such as ``refine 3/12 windows``."""
    unit = _UNITS.get(progress.stage)
    if unit is None or progress.total == 0:
        return progress.stage
    return f"{progress.stage} {progress.done}/{progress.total} {unit}"


def time_left(progress: Progress) -> str:
    """Return the time left as people say it; nothing where it is not known."""
    if progress.seconds_left is None:
        return ""
    seconds = round(progress.seconds_left)
    if seconds < 60:
        return f"{seconds} s left"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02} min left"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02} h left"
