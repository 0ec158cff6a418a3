"""Word of changed predictions to whoever waits for them in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable

Listener = Callable[[str], None]


class Changes:
    """Tells listeners the id of each prediction after a change of it is durable.

    Listeners are called from the thread that made the change and return at once. They
    hear nothing of other processes on the same database, which only asking again shows.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Add a listener; call what is returned to remove it."""
        with self._lock:
            self._listeners = [*self._listeners, listener]

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = [other for other in self._listeners if other is not listener]

        return unsubscribe

    def tell(self, prediction_id: str) -> None:
        """Tell every listener that this prediction changed."""
        for listener in self._listeners:
            listener(prediction_id)
