"""Counting requests: what ``/metrics`` reports, and the rate limits."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)

from tegula.server.accounts import A_REQUEST, RateBuckets
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

# All servers on a database share the buckets, and to ask for every request what is left would make
# every read a write. So a server asks when a bucket is half empty, and before that once it has let
# a second's worth of requests through by itself. Until then it goes by what was left when it last
# asked. That can only be too much, by what others let through since: with each further server a
# client gets a sixtieth of its limit more at the most. Limits of up to sixty a minute are exact.
_AMPLE = 1 / 2
_UNSETTLED = 1 / 60


@dataclass(frozen=True)
class Allowance:
    """Whether a request may go on.

    remaining: requests that may follow at once.
    reset_seconds: whole seconds until the next one may, or until the bucket is full.
    """

    allowed: bool
    remaining: int
    reset_seconds: int


_UNLIMITED = Allowance(allowed=True, remaining=2**31 - 1, reset_seconds=0)


@dataclass
class _Bucket:
    """What this server knows of a bucket.

    shared: what was in it, without the requests that this server let through since.
    left: the same with them.
    since: when that was.
    unsettled: how many requests these were.
    """

    shared: float
    left: float
    since: float
    unsettled: int = 0

    def fill(self, now: float, size: int) -> None:
        """Let flow in what comes by the even rate."""
        gain = max(0.0, now - self.since) * size / 60
        self.shared = min(float(size), self.shared + gain)
        self.left = min(float(size), self.left + gain)
        self.since = max(self.since, now)

    def settle(self) -> float:
        """Return what this server owes the bucket, and owe nothing any more.

        That is less than it let through where the bucket would have run over meanwhile.
        """
        owed, self.shared, self.unsettled = self.shared - self.left, self.left, 0
        return owed


class RateLimiter:
    """Counts requests, together with the other servers on the database.

    A request that is refused costs nothing. Safe to use from many threads.

    per_minute: the limit of each kind of request; 0 is no limit.
    """

    def __init__(self, per_minute: Mapping[str, int], clock: Clock, shared: RateBuckets) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._shared = shared
        # By (who, kind); the longest unused come first.
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take_known(self, who: str, kind: str) -> Allowance | None:
        """Take one request of this kind out of somebody's bucket, without asking the database.

        Returns None where that must be asked: call ``take_shared`` then, which takes a moment.
        """
        size = self._per_minute[kind]
        if size == 0:
            return _UNLIMITED
        with self._lock:
            bucket = self._buckets.get((who, kind))
            if bucket is None:
                return None
            bucket.fill(self._clock().timestamp(), size)
            if bucket.left < A_REQUEST:
                return _allowance(bucket.left, size, allowed=False)
            if bucket.left <= size * _AMPLE or bucket.unsettled + 1 >= size * _UNSETTLED:
                return None
            bucket.left -= 1
            bucket.unsettled += 1
            self._buckets.move_to_end((who, kind))
            return _allowance(bucket.left, size, allowed=True)

    def take_shared(self, who: str, kind: str) -> Allowance:
        """Take one request out of somebody's bucket in the database."""
        size, now = self._per_minute[kind], self._clock().timestamp()
        with self._lock:
            bucket = self._buckets.setdefault((who, kind), _Bucket(size, size, now))
            bucket.fill(now, size)
            owed = bucket.settle()
        spent = self._shared.spend(who, kind, size=size, owed=owed, now=now)
        with self._lock:
            # Others may have been let through while the database was asked.
            bucket.shared, bucket.since = spent.remaining, spent.counted_at
            bucket.left = bucket.shared - bucket.unsettled
            self._buckets[who, kind] = bucket
            self._buckets.move_to_end((who, kind))
            while len(self._buckets) > _MOST_BUCKETS:
                self._buckets.popitem(last=False)
        return _allowance(spent.remaining, size, allowed=spent.allowed)


def _allowance(left: float, size: int, *, allowed: bool) -> Allowance:
    left += 1 - A_REQUEST  # what seconds since 1970 are short of
    missing = 1 - left if left < 1 else size - left
    remaining, seconds = max(0, math.floor(left)), math.ceil(missing * 60 / size)
    return Allowance(allowed, remaining, max(1, seconds))
