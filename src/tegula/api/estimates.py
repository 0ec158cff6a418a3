"""How long a prediction is likely to run, by how long those before it ran."""

from __future__ import annotations

import threading
import time

from tegula.predictions.ledger import Ledger

UNKNOWN_S = 10.0
"""The guess for a model that has not run yet."""

_FRESH_S = 60.0


class UsualSeconds:
    """The mean running time of each model, read from the ledger once a minute."""

    def __init__(self, ledger: Ledger, unknown: float = UNKNOWN_S) -> None:
        """Take what to expect of a model that has not run yet."""
        self._ledger = ledger
        self._unknown = unknown
        self._means: dict[str, float] = {}
        self._stale_at = 0.0
        self._lock = threading.Lock()

    def get(self, model: str) -> float:
        """Return the seconds to expect of a model."""
        with self._lock:
            if time.monotonic() >= self._stale_at:
                self._means = self._read()
                self._stale_at = time.monotonic() + _FRESH_S
            return self._means.get(model, self._unknown)

    def _read(self) -> dict[str, float]:
        counts: dict[str, int] = {}
        seconds: dict[str, float] = {}
        for line in self._ledger.lines():
            counts[line.model] = counts.get(line.model, 0) + line.predictions
            seconds[line.model] = seconds.get(line.model, 0.0) + line.predict_seconds
        return {model: seconds[model] / count for model, count in counts.items()}
