"""The request headers with a grammar of their own: ``Prefer`` and ``Cancel-After``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tegula.api.problems import invalid_header

MAX_WAIT_S = 60
_LONGEST_HOLD_S = 55.0
_SHORTEST_DEADLINE_S = 5
_WAIT = re.compile(r"wait(?:=(\d+))?", re.ASCII)
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", re.ASCII)


@dataclass(frozen=True)
class Wait:
    """How long a create may be held open.

    seconds: what the client asked for, 1..60.
    """

    seconds: int

    @property
    def hold_s(self) -> float:
        """Seconds to hold: a little less, because clients time out at the stroke.

        Some give up at 60 seconds in all and send the request again, which would start a
        second prediction.
        """
        return min(self.seconds - min(1.0, 0.2 * self.seconds), _LONGEST_HOLD_S)

    @property
    def applied(self) -> str:
        """The value of ``Preference-Applied``."""
        return f"wait={self.seconds}"


def parse_prefer(value: str | None) -> Wait | None:
    """Return the wait that a ``Prefer`` header asks for, if any.

    Other preferences are passed over, as RFC 7240 wants. A wait of more than a minute is
    taken as a minute.

    Raises:
        ProblemError: the wait is no number of seconds from 1.
    """
    for part in (value or "").replace(";", ",").split(","):
        preference = part.strip().replace('"', "")
        if preference.partition("=")[0].strip() != "wait":
            continue
        match = _WAIT.fullmatch(preference.replace(" ", ""))
        seconds = int(match[1] or MAX_WAIT_S) if match else 0
        if seconds < 1:
            raise invalid_header("Prefer", "Must be wait or wait=n with n from 1 to 60 seconds")
        return Wait(min(seconds, MAX_WAIT_S))
    return None


def parse_cancel_after(value: str | None) -> int | None:
    """Return the seconds of a ``Cancel-After`` header such as 30, 5m or 1h30m45s.

    Raises:
        ProblemError: it cannot be read, or is less than five seconds.
    """
    if value is None or not value.strip():
        return None
    match = _DURATION.fullmatch(value.strip())
    seconds = _seconds(match) if match else 0
    if seconds < _SHORTEST_DEADLINE_S:
        raise invalid_header("Cancel-After", "Must be a duration of at least 5s, like 30s or 1h30m")
    return seconds


def _seconds(match: re.Match[str]) -> int:
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return min(hours * 3600 + minutes * 60 + seconds, 10**9)
