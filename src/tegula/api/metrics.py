"""Counters for Prometheus, in its text form."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping


class Metrics:
    """What the API counts of itself; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = 0.0

    def request(self, method: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        with self._lock:
            self._requests[method if method.isalpha() else "other", status] += 1
            self._seconds += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return everything, with values that are read at the moment of asking."""
        with self._lock:
            requests, seconds = dict(self._requests), self._seconds
        return "".join(f"{line}\n" for line in _lines(requests, seconds, gauges))


def _lines(
    requests: Mapping[tuple[str, int], int], seconds: float, gauges: Mapping[str, float]
) -> Iterator[str]:
    yield "# TYPE tegula_http_requests_total counter"
    for (method, status), count in sorted(requests.items()):
        yield f'tegula_http_requests_total{{method="{method}",status="{status}"}} {count}'
    yield "# TYPE tegula_http_request_seconds_total counter"
    yield f"tegula_http_request_seconds_total {seconds:.6f}"
    for name, value in gauges.items():
        yield f"# TYPE tegula_{name} gauge"
        yield f"tegula_{name} {value:g}"
