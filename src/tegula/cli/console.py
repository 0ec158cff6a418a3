"""What the command line prints: reports, errors, progress; and signals."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from types import FrameType
from typing import Any, TypeVar

import click

from tegula.errors import CancelledError, OutOfMemoryError, PathError, TegulaError
from tegula.progress import Cancel, OnProgress, Progress

# What the commands say: messages on standard error, data on standard output.

_JSON = "tegula.cli.json"


@dataclass(frozen=True)
class Console:
    """Where messages go.

    quiet: only errors are told.
    json: data goes to standard output as JSON, one object a line, and nothing is told.
    """

    quiet: bool = False
    json: bool = False

    @property
    def talks(self) -> bool:
        """Whether anything but errors is told."""
        return not (self.quiet or self.json)

    def tell(self, sentence: str) -> None:
        """Print a message."""
        if self.talks:
            click.echo(sentence, err=True)

    def complain(self, sentence: str) -> None:
        """Print an error, unless it is part of the JSON."""
        if not self.json:
            click.echo(f"tegula: {sentence}", err=True)

    def data(self, value: Mapping[str, Any]) -> None:
        """Print data for programs, if they read it."""
        if self.json:
            print_json(value)


def wants_json(ctx: click.Context, *, json: bool) -> None:
    """Remember that errors, too, are to be JSON."""
    ctx.meta[_JSON] = json


def asks_for_json(ctx: click.Context) -> bool:
    """Return what ``wants_json`` was told."""
    return bool(ctx.meta.get(_JSON))


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str))
    sys.stdout.flush()


def plural(count: int, noun: str) -> str:
    """Return ``1 window`` or ``2 windows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# Ctrl-C and SIGTERM: at once, and without leaving anything half-written.
#
# While an upscale polls ``cancelled`` the first signal is only noted, and the work stops
# before its next unit. Anywhere else it raises KeyboardInterrupt, which cleans up on its
# way out. A second signal kills the process.

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the user wants the program to stop."""

    def __init__(self) -> None:
        self._requested = False
        self._polled = False

    def cancelled(self) -> bool:
        """Return whether a signal came."""
        return self._requested

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to the signals.

        Raises:
            KeyboardInterrupt: a signal came outside ``polled``.
        """
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Only note a signal, because the work inside asks ``cancelled``.

        Raises:
            CancelledError: a signal came too late for the work to see it.
        """
        self._polled = True
        try:
            yield
        finally:
            self._polled = False
        Cancel(self.cancelled).check()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self._polled:
            raise KeyboardInterrupt


# What went wrong, as a sentence for people, a code for programs, a status for the shell.

_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


@dataclass(frozen=True)
class Failure:
    """An error as it is told; ``message`` is one line."""

    code: str
    message: str
    exit_status: int

    def told(self) -> dict[str, str]:
        """Return what ``--json`` prints of it."""
        return {"code": self.code, "message": self.message}


def tell_failure(failure: Failure, *, as_json: bool) -> None:
    """Print one line, or one JSON object to standard output."""
    if as_json:
        print_json({"error": failure.told()})
    else:
        click.echo(f"tegula: {failure.message}", err=True)


def failure_of(error: BaseException) -> Failure:
    """Return how an exception of any kind is told."""
    if isinstance(error, KeyboardInterrupt):
        return failure_of(CancelledError())
    if isinstance(error, MemoryError):
        return failure_of(OutOfMemoryError("Memory ran out; ask for a smaller result."))
    words = " ".join(str(error).split())
    if isinstance(error, TegulaError):
        return Failure(error.code, words, error.exit_status)
    if isinstance(error, OSError) and error.filename is not None:
        return failure_of(PathError(f"{error.filename} cannot be used: {error.strerror}."))
    hint = "run `tegula --debug` with the same arguments to see where it came from."
    return Failure("internal", f"Unexpected {type(error).__name__}: {words or '-'}; {hint}", 1)


def quieten_libraries() -> None:
    """Keep what libraries tell their developers out of the messages to the user."""
    warnings.simplefilter("ignore")
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)


# The progress of a running upscale: a bar on a terminal, a few lines elsewhere.

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


# Many items through three steps, of which the middle one is what time is spent on.
#
# While one item is worked on, the next is read and the one before is written, each in a
# thread of its own. At most one item waits on either side, so memory holds three.

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")


def staggered(
    items: Sequence[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Made],
    write: Callable[[Item, Made], None],
    failed: Callable[[Item, Exception], None],
    stopping: tuple[type[BaseException], ...],
) -> None:
    """Read, work on, and write items; every step sees them in their order.

    Args:
        items: what there is to do.
        read: runs ahead, in a thread.
        work: runs here.
        write: runs behind, in a thread.
        failed: told in the place of ``write``, and in its thread, what went wrong.
        stopping: errors that end the whole. What was worked on before is written first.

    Raises:
        Exception: one of ``stopping``, from any step.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming: list[Future[Read]] = [reader.submit(read, item) for item in items[:1]]
        writing: Future[None] | None = None
        for item, following in zip_longest(items, items[1:]):
            ready = coming.pop()
            if following is not None:
                coming.append(reader.submit(read, following))
            try:
                after = partial(_written, item, work(item, ready.result()), write, failed, stopping)
            except stopping:
                raise
            except Exception as error:  # noqa: BLE001, RUF100 - each is told of in its turn
                after = partial(failed, item, error)
            if writing is not None:
                writing.result()
            writing = writer.submit(after)
        if writing is not None:
            writing.result()


def _written(
    item: Item,
    made: Made,
    write: Callable[[Item, Made], None],
    failed: Callable[[Item, Exception], None],
    stopping: tuple[type[BaseException], ...],
) -> None:
    try:
        write(item, made)
    except stopping:
        raise
    except Exception as error:  # noqa: BLE001, RUF100
        failed(item, error)
