"""The time, as something that tests can put in its place."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time now, aware and in UTC."""
    return datetime.now(timezone.utc)
