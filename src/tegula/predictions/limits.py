"""How many requests a token may make: buckets that fill evenly and hold a minute's worth."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tegula.predictions.clock import Clock

_MOST_KEYS = 10_000


@dataclass(frozen=True)
class Verdict:
    """Whether a request may go on.

    remaining: requests that may follow at once.
    reset_seconds: whole seconds until the next one may, or until the bucket is full.
    """

    allowed: bool
    remaining: int
    reset_seconds: int


class RateLimiter:
    """Counts in memory, for this process; a refused request costs nothing.

    per_minute: the limit of each kind of request; 0 is no limit.
    """

    def __init__(self, per_minute: Mapping[str, int], clock: Clock) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, datetime]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, who: str, kind: str) -> Verdict:
        """Take one request of this kind from somebody's bucket."""
        size = self._per_minute[kind]
        if size == 0:
            return Verdict(True, 2**31 - 1, 0)  # noqa: FBT003
        with self._lock:
            level = self._level(who, kind, size)
            allowed = level >= 1
            level -= allowed
            self._buckets[who, kind] = (level, self._clock())
            self._buckets.move_to_end((who, kind))
            while len(self._buckets) > _MOST_KEYS:
                self._buckets.popitem(last=False)
        per_second = size / 60
        missing = 1 - level if level < 1 else size - level
        return Verdict(allowed, math.floor(level), max(1, math.ceil(missing / per_second)))

    def _level(self, who: str, kind: str, size: int) -> float:
        level, at = self._buckets.get((who, kind), (float(size), self._clock()))
        passed = max(0.0, (self._clock() - at).total_seconds())
        return min(float(size), level + passed * size / 60)
