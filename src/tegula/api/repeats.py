"""Requests that clients send again because they gave up waiting for the answer.

A create that holds the request open may take longer than the client, or a proxy between, is
willing to wait. Clients then send the same body again, which would start the work anew.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

REMEMBERED_S = 60.0
"""How long a request that nobody waited for is remembered; clients retry within seconds."""

Gone = Callable[[], Awaitable[bool]]


@dataclass
class _Held:
    """A request that is held open, or that was until nobody waited for it any more.

    gone: tells whether its client left, while it is held. until: when to forget it, after.
    """

    prediction_id: str
    gone: Gone | None
    until: float | None = None


class Repeats:
    """Knows the creates whose client went away, by a key of who asked for what.

    Only one event loop uses it. What it knows is lost with the process: a client that must
    not be run twice sends an ``Idempotency-Key``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, list[_Held]] = {}

    async def earlier(self, key: str) -> str | None:
        """Return the prediction of an equal request whose client is gone, once."""
        self._forget()
        for held in self._held.get(key, []):
            if held.gone is None or await held.gone():
                self._drop(key, held)
                return held.prediction_id
        return None

    def hold(self, key: str, prediction_id: str, gone: Gone) -> _Held:
        """Note that a request begins to be held; ``gone`` tells whether its client left."""
        held = _Held(prediction_id, gone)
        self._held.setdefault(key, []).append(held)
        return held

    async def release(self, key: str, held: _Held) -> None:
        """Note that it is held no more; it is remembered if nobody waits for the answer."""
        if held.gone is not None and await held.gone():
            held.gone, held.until = None, self._clock() + REMEMBERED_S
        else:
            self._drop(key, held)

    def _forget(self) -> None:
        now = self._clock()
        for key, several in list(self._held.items()):
            for held in several:
                if held.until is not None and held.until < now:
                    self._drop(key, held)

    def _drop(self, key: str, held: _Held) -> None:
        several = [other for other in self._held.get(key, []) if other is not held]
        if several:
            self._held[key] = several
        else:
            self._held.pop(key, None)
