"""Ctrl-C and SIGTERM: at once, and without leaving anything half-written.

While an upscale polls ``cancelled`` the first signal is only noted, and the work stops
before its next unit. Anywhere else it raises KeyboardInterrupt, which cleans up on its
way out. A second signal kills the process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tegula.errors import CancelledError

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
        if self._requested:
            raise CancelledError("Cancelled; nothing was written.")

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self._polled:
            raise KeyboardInterrupt
