"""Who hears that something changed: listeners in this process, and by PostgreSQL other processes.

Every listener also looks for itself now and then, since a process may die between a change and the
word of it. How often depends on what it hears: each second, or so, where other processes on the
same database cannot be heard, and seldom where they can.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from tegula.server.db import Database, new_secret

log = logging.getLogger(__name__)

Listener = Callable[[str], None]

LOOK_SELDOM_S = 10.0
"""How often listeners look for themselves while they hear of all processes."""


def _ignore() -> None:
    """Do nothing about a gap."""


@dataclass(frozen=True, eq=False)
class _Subscription:
    listener: Listener
    on_gap: Callable[[], None]
    own_only: bool


class PubSub:
    """Passes the id of what changed to all listeners, after the change is durable.

    That is the id of a prediction, or ``owner/name`` of a deployment. Listeners are called from
    the thread that made the change, or from the one that heard of it, and return at once.
    """

    def __init__(self) -> None:
        self._subscriptions: tuple[_Subscription, ...] = ()
        self._lock = threading.Lock()
        self.hears_others = False
        """Whether changes by other processes on the database are passed on, too."""

    def subscribe(
        self,
        listener: Listener,
        *,
        on_gap: Callable[[], None] = _ignore,
        own_only: bool = False,
    ) -> Callable[[], None]:
        """Add a listener; call what is returned to remove it.

        Args:
            listener: called with every id.
            on_gap: called when changes by others may have gone unheard, to look for them.
            own_only: leave out what other processes changed.
        """
        subscription = _Subscription(listener, on_gap, own_only)
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)

        def unsubscribe() -> None:
            with self._lock:
                rest = (each for each in self._subscriptions if each is not subscription)
                self._subscriptions = tuple(rest)

        return unsubscribe

    def publish(self, changed: str) -> None:
        """Call every listener with the id of what this process changed."""
        for each in self._subscriptions:
            each.listener(changed)

    def pass_on(self, changed: str) -> None:
        """Call listeners with the id of what another process changed."""
        for each in self._subscriptions:
            if not each.own_only:
                each.listener(changed)

    def set_hearing(self, hears_others: bool) -> None:  # noqa: FBT001
        """Note whether other processes are heard from now on; between the two lies a gap."""
        self.hears_others = hears_others
        for each in self._subscriptions:
            each.on_gap()

    def pause(self, usual: float) -> float:
        """Return the seconds until a listener should look for itself; ``usual`` if all is quiet."""
        return max(usual, LOOK_SELDOM_S) if self.hears_others else usual


_CHANNEL = "tegula_changes"
_POLL_S = 0.25
"""How soon the listening thread sees that it is to stop."""
_GATHER_S = 0.02
"""Changes that come within this time after a notification go out together with the next one."""
_PAYLOAD_BYTES = 7000
"""PostgreSQL takes notifications of less than 8000 bytes."""
_RECONNECT_S = 1.0
_TRY_AGAIN_S = 60.0
"""Until it is tried again whether notifications arrive, where they did not."""


class _DeafError(Exception):
    """Notifications do not arrive."""


class ChangeRelay:
    """Carries changes between the processes on one PostgreSQL, by LISTEN and NOTIFY.

    What this process publishes goes out after its transaction, from a thread of its own: NOTIFY
    within the transaction would make all commits wait for each other's flush. Changes that come
    close together share a notification.

    A connection may stay open and still bring nothing: behind a pooler that gives each transaction
    another connection, or once the other side has vanished. The relay therefore sends itself an
    empty notification every ``probe_every`` seconds, and takes itself for deaf if that does not
    come back within ``patience``. While it is deaf, listeners look as often as without it.
    On SQLite it does nothing.
    """

    def __init__(
        self,
        database: Database,
        pubsub: PubSub,
        *,
        probe_every: float = 10.0,
        patience: float = 5.0,
    ) -> None:
        self._database = database
        self._pubsub = pubsub
        self._probe_every = probe_every
        self._patience = patience
        self._own = new_secret()[:16]
        self._outgoing: set[str] = set()
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._stopped = threading.Event()
        self._has_warned = False
        self._threads = [
            threading.Thread(target=target, name=f"changes {name}", daemon=True)
            for name, target in (("in", self._listen), ("out", self._send))
        ]

    def start(self) -> None:
        """Begin to listen and to send."""
        if self._database.is_sqlite:
            return
        self._unsubscribe = self._pubsub.subscribe(self._on_change, own_only=True)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send what is left, and end."""
        self._stopped.set()
        self._due.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        if not self._database.is_sqlite:
            self._unsubscribe()

    def _on_change(self, changed: str) -> None:
        with self._lock:
            self._outgoing.add(changed)
        self._due.set()

    # The thread that sends.

    def _send(self) -> None:
        while not self._stopped.is_set():
            self._due.wait()
            self._due.clear()
            pause = _GATHER_S if self._send_outgoing() else _RECONNECT_S
            self._stopped.wait(pause)
        self._send_outgoing()

    def _send_outgoing(self) -> bool:
        """Send what waits; return False, and keep it for the next try, if that fails."""
        with self._lock:
            names = sorted(self._outgoing)
            self._outgoing.clear()
        try:
            self._notify(names)
        except SQLAlchemyError:
            with self._lock:
                self._outgoing.update(names)
            self._due.set()
            return False
        return True

    def _notify(self, names: Iterable[str]) -> None:
        notify = text("SELECT pg_notify(:channel, :payload)")
        with self._database.engine.connect() as pooled:
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT")
            for payload in _payloads(self._own, names):
                connection.execute(notify, {"channel": _CHANNEL, "payload": payload})

    # The thread that listens.

    def _listen(self) -> None:
        while not self._stopped.is_set():
            pause = _RECONNECT_S
            try:
                with closing(self._database.connect_apart()) as connection:
                    connection.execute(f"LISTEN {_CHANNEL}")
                    self._hear(connection)
            except _DeafError:
                pause = _RECONNECT_S if self._pubsub.hears_others else _TRY_AGAIN_S
                self._warn("the database's notifications do not arrive")
            except Exception as error:  # whatever it is, this process looks for itself meanwhile
                self._warn(str(error).splitlines()[0] if str(error) else repr(error))
            if self._pubsub.hears_others and not self._stopped.is_set():
                self._pubsub.set_hearing(False)
            self._stopped.wait(pause)

    def _hear(self, connection: Any) -> None:
        """Pass on what arrives until the relay is stopped.

        Raises:
            _DeafError: an empty notification of its own does not arrive.
        """
        probed = time.monotonic()
        answered = False
        self._due.set()  # sends an empty one, if there is nothing else
        while not self._stopped.is_set():
            for notice in connection.notifies(timeout=_POLL_S):
                sender, _, names = notice.payload.partition(":")
                if sender != self._own:
                    for name in filter(None, names.split(",")):
                        self._pubsub.pass_on(name)
                    continue
                answered = True
                if not self._pubsub.hears_others:
                    # Only now: what was changed before LISTEN took effect is to be looked for.
                    self._pubsub.set_hearing(True)
                    self._has_warned = False
            waited = time.monotonic() - probed
            if not answered and waited > self._patience:
                raise _DeafError
            if answered and waited > self._probe_every:
                probed, answered = time.monotonic(), False
                self._due.set()

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "Changes by other servers on the database are looked for every second from now "
                "on, since they cannot be heard: %s.",
                reason,
            )


def _payloads(own: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the notifications for some names, at least one; each says whose it is."""
    start = payload = f"{own}:"
    for name in names:
        if len(payload) + len(name.encode()) >= _PAYLOAD_BYTES:
            yield payload
            payload = start
        payload += f"{name},"
    yield payload
