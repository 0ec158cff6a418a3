"""What the commands print, how errors become sentences, and how signals stop the work.

Messages go to standard error and data to standard output. With ``--json``, data is one
object per line, errors included, and there are no messages.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import click

from tegula.errors import CancelledError, OutOfMemoryError, PathError, TegulaError
from tegula.progress import Cancel

_CONSOLE = "tegula.cli.console"
_STREAM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG)


def prepare_streams() -> None:
    """Make the standard streams fit for any name, and stand in for those that are closed.

    What goes into a pipe or file is UTF-8 whatever the locale says, as programs expect of
    JSON; a terminal keeps its encoding. What cannot be written, such as half of a name that
    is not UTF-8, is escaped, in the form that JSON has for it.
    """
    # The next files that are opened would take the numbers of closed streams, and be written to.
    spare = os.open(os.devnull, os.O_RDWR)
    while spare < 2:
        spare = os.open(os.devnull, os.O_RDWR)
    if spare > 2:
        os.close(spare)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 - for good
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif stream.isatty():
            stream.reconfigure(errors="backslashreplace")
        else:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def is_stdout_closed() -> bool:
    """Tell whether the program was started without standard output."""
    return sys.__stdout__ is None


@dataclass(frozen=True)
class Failure:
    """An error as a sentence for people, a code for programs and a status for the shell."""

    code: str
    message: str
    exit_status: int

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception of any kind in one line."""
        if isinstance(error, KeyboardInterrupt):
            error = CancelledError()
        elif isinstance(error, MemoryError):
            error = OutOfMemoryError("Memory ran out; ask for a smaller result.")
        elif isinstance(error, OSError) and error.filename is not None:
            error = PathError(f"{error.filename} cannot be used: {error.strerror}.")
        elif isinstance(error, OSError) and error.errno in _STREAM_ERRORS:
            error = PathError(f"Standard output cannot be written: {error.strerror}.")
        words = " ".join(str(error).split())
        if isinstance(error, TegulaError):
            return cls(error.code, words, error.exit_status)
        hint = "run `tegula --debug` with the same arguments to see where it came from."
        return cls("internal", f"Unexpected {type(error).__name__}: {words or '-'}; {hint}", 1)

    def as_json(self) -> Mapping[str, str]:
        """Return what ``--json`` prints of it."""
        return {"code": self.code, "message": self.message}


@dataclass(frozen=True)
class Console:
    """Where a command prints.

    quiet: only errors and data.
    json: data as JSON, one object per line, and no messages.
    progress: with ``json``, a line for every hundredth of the work, too.
    """

    quiet: bool = False
    json: bool = False
    progress: bool = False

    @classmethod
    def open(cls, *, quiet: bool = False, json: bool = False, progress: bool = False) -> Console:
        """Return the console of the running command, which reports its errors, too."""
        console = cls(quiet, json, progress)
        click.get_current_context().meta[_CONSOLE] = console
        return console

    @classmethod
    def current(cls) -> Console:
        """Return the console that the running command opened, or a plain one."""
        console: Console = click.get_current_context().meta.get(_CONSOLE, cls())
        return console

    @property
    def talks(self) -> bool:
        """Whether messages are printed."""
        return not (self.quiet or self.json)

    def message(self, sentence: str) -> None:
        """Print a sentence on what is going on; that nobody can read it stops no work."""
        if self.talks:
            with contextlib.suppress(OSError):
                click.echo(sentence, err=True)

    def error(self, failure: Failure) -> None:
        """Print why the command, or one picture of it, failed."""
        if self.json and self.current().json:
            with contextlib.suppress(PathError):
                self.record({"error": failure.as_json()})
                return
        with contextlib.suppress(OSError):
            click.echo(f"tegula: {failure.message}", err=True)

    def text(self, line: str = "") -> None:
        """Print a line of the data that was asked for, where people read it."""
        if not self.json:
            self._print(line)

    def record(self, value: Mapping[str, Any]) -> None:
        """Print the same data as one JSON object on a line, where programs read it."""
        if self.json:
            self._print(json.dumps(value, ensure_ascii=False, default=str))

    def _print(self, line: str) -> None:
        """Print a line on standard output at once.

        Raises:
            PathError: it takes no more, as on a full disk.
            BrokenPipeError: nobody reads it any longer.
        """
        try:
            click.echo(line)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            # What waits in the buffer would fail once more, and with a traceback, at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.get_current_context().meta[_CONSOLE] = replace(self, json=False)
            raise PathError(f"Standard output cannot be written: {error.strerror}.") from error


def plural(count: int, noun: str) -> str:
    """Return ``1 window`` or ``2 windows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_bytes(size: float) -> str:
    """Return a number of bytes as people write it, such as ``5.7 GB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def quieten_libraries() -> None:
    """Hide what libraries tell their developers from the user."""
    warnings.simplefilter("ignore")
    for variable, value in (
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
    ):
        os.environ.setdefault(variable, value)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Ctrl-C and SIGTERM stop the work at once and leave nothing half-written.

    Within ``polled`` the first signal is only noted, because the work asks ``requested``
    between its units. Anywhere else it raises KeyboardInterrupt, and what is being written
    is removed on its way out. A second signal kills the process.
    """

    def __init__(self) -> None:
        self._requested = False
        self._polled = False

    def requested(self) -> bool:
        """Return whether a signal came."""
        return self._requested

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within the block.

        Raises:
            KeyboardInterrupt: a signal came outside ``polled``.
        """
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Only note a signal within the block.

        Raises:
            CancelledError: a signal came too late for the work to notice it.
        """
        self._polled = True
        try:
            yield
        finally:
            self._polled = False
        Cancel(self.requested).check()

    @contextmanager
    def unpolled(self) -> Iterator[None]:
        """Raise at once after all, for a long step within ``polled`` that does not ask."""
        Cancel(self.requested).check()
        self._polled = False
        try:
            yield
        finally:
            self._polled = True

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self._polled:
            raise KeyboardInterrupt
