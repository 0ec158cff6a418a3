"""Counting requests: what ``/metrics`` reports, and the rate limits."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)

from tegula.server.db import Clock

# Counters for Prometheus.

disable_created_metrics()  # type: ignore[no-untyped-call]

_GAUGES: Mapping[str, str] = {
    "predictions_unfinished": "Predictions that are accepted and not finished.",
    "predictions_fetching": "Those of them with an input that is still to be fetched.",
    "predictions_unfinished_seconds": "Estimated seconds of work in them.",
    "predictions_run_total": "Predictions that ran, by the records of usage.",
    "predict_seconds_total": "Seconds that they ran.",
}


class Metrics:
    """What ``/metrics`` reports; safe to use from many threads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tegula_http_requests",
            "Answered requests.",
            ["method", "status"],
            registry=self._registry,
        )
        self._seconds = Counter(
            "tegula_http_request_seconds",
            "Seconds from request to answer.",
            registry=self._registry,
        )
        self._closed = Counter(
            "tegula_connections_closed",
            "Connections that were refused, or closed because their client was too slow.",
            ["reason"],
            registry=self._registry,
        )
        self._gauges = {
            name: Gauge(f"tegula_{name}", text, registry=self._registry)
            for name, text in _GAUGES.items()
        }

    def count_request(self, method: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(method if method.isalpha() else "other", str(status)).inc()
        self._seconds.inc(seconds)

    def count_closed(self, reason: str) -> None:
        """Count one connection that was refused or given up."""
        self._closed.labels(reason).inc()

    def text(self, gauges: Mapping[str, float]) -> bytes:
        """Return everything in Prometheus' text form; ``gauges`` are read at this moment."""
        for name, value in gauges.items():
            self._gauges[name].set(value)
        return generate_latest(self._registry)


# Rate limits. A token bucket lets a client use a minute's worth at once and then continues at the
# even rate. A counting window, as rate limiting libraries have, would lock the same client out for
# the rest of the minute.

_MOST_BUCKETS = 10_000


@dataclass(frozen=True)
class Allowance:
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
        # (who, kind): what was left in the bucket, and when; the longest unused come first.
        self._buckets: OrderedDict[tuple[str, str], tuple[float, datetime]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, who: str, kind: str) -> Allowance:
        """Take one request of this kind out of somebody's bucket."""
        size = self._per_minute[kind]
        if size == 0:
            return Allowance(allowed=True, remaining=2**31 - 1, reset_seconds=0)
        per_second = size / 60
        with self._lock:
            now = self._clock()
            left, since = self._buckets.get((who, kind), (float(size), now))
            seconds = max(0.0, (now - since).total_seconds())
            left = min(float(size), left + seconds * per_second)
            allowed = left >= 1
            left -= allowed
            self._buckets[who, kind] = (left, now)
            self._buckets.move_to_end((who, kind))
            while len(self._buckets) > _MOST_BUCKETS:
                self._buckets.popitem(last=False)
        missing = 1 - left if left < 1 else size - left
        return Allowance(allowed, math.floor(left), max(1, math.ceil(missing / per_second)))
