"""Waiting for predictions to change, without a thread for each who waits."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from tegula.predictions.changes import Changes
from tegula.predictions.records import Prediction

ASK_AGAIN_S = 1.0
"""How often to look without word of a change: it may come from another process."""


class Watch:
    """Wakes coroutines of one event loop when their prediction changes."""

    def __init__(self, changes: Changes) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.close = changes.subscribe(self._told)

    @contextmanager
    def on(self, prediction_id: str) -> Iterator[asyncio.Event]:
        """Give an event that is set at every change from now on."""
        event = asyncio.Event()
        self._events[prediction_id].add(event)
        try:
            yield event
        finally:
            self._events[prediction_id].discard(event)
            if not self._events[prediction_id]:
                del self._events[prediction_id]

    def _told(self, prediction_id: str) -> None:
        if prediction_id in self._events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, prediction_id)

    def _wake(self, prediction_id: str) -> None:
        for event in self._events.get(prediction_id, ()):
            event.set()


async def changed(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for the next change for at most so long; return whether one came."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except asyncio.TimeoutError:
        return False
    event.clear()
    return True


async def until_finished(
    watch: Watch,
    prediction: Prediction,
    read: Callable[[str], Awaitable[Prediction]],
    hold_s: float,
) -> Prediction:
    """Return the prediction once it is in a terminal state, or as it is after ``hold_s``."""
    loop = asyncio.get_running_loop()
    end = loop.time() + hold_s
    with watch.on(prediction.id) as event:
        prediction = await read(prediction.id)
        while not prediction.status.terminal and (left := end - loop.time()) > 0:
            await changed(event, min(left, ASK_AGAIN_S))
            prediction = await read(prediction.id)
    return prediction
