"""Connections: how many there may be, how long each may wait, and what becomes of those beyond.

uvicorn limits how long an idle connection is kept and how many requests run. The rest is here, in
uvicorn's own protocol.

A connection is busy from the end of a request's headers to the end of the answer; else it waits
for its client. Where there are too many, the one that has waited for longest makes room for the new
one. So a client that opens thousands and completes no request loses its own, oldest first, and
others, who complete theirs within moments, notice nothing.

With TLS a connection counts from when it is accepted: asyncio would tell of it only once the
handshake is over, and a client that never begins one would be seen by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, ClassVar, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tegula.server.api.errors import MEDIA_TYPE
from tegula.server.api.service import Service

log = logging.getLogger("tegula.api")

_SWEEP_EVERY_S = 1.0
WRITE_S = 60.0
"""A client that takes nothing of its answer for so long is given up."""
HEAD_BYTES = 1 << 16
"""What a request may have before its body; the parser itself would take any amount."""
_LINGER_S, _MOST_DISCARDED = 1.0, 1 << 20
"""How long, and how much, a client may still send whose headers were refused."""
MOST_PIPELINED = 32
"""Requests that a connection may send ahead of their answers; hardly any client sends two."""
KEEP_S = 75
"""Longer than proxies keep an idle connection; they would send into one closed by us."""
_SHARE_OF_FILES = 0.75
"""The share of the files this process may open that connections may take."""
_NAMED = 5


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may do.

    most: connections at once. by_address: those of one address, or of one IPv6 network of a
        customer (/64).
    head_s: seconds from the first byte of a request, or from the connection, to the end of its
        headers; a TLS handshake is part of them.
    """

    most: int
    by_address: int
    head_s: float


def raise_file_limit() -> int | None:
    """Let this process open as many files as the system allows; return the number, if known."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says "unlimited" and takes no more than this.
    wanted = hard if hard != resource.RLIM_INFINITY else 10_240
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None if soft == resource.RLIM_INFINITY else soft
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Connections:
    """The open connections of a server; used by its event loop only."""

    def __init__(self, limits: ConnectionLimits, count: Callable[[str], None]) -> None:
        """Take the limits, and what counts a connection that is refused or closed, by reason."""
        self.limits = limits
        self._count = count
        self._open: dict[str, int] = {}
        # Those that wait, for all and by address; the longest waiting come first.
        self._waiting: dict[_Client, None] = {}
        self._waiting_at: dict[str, dict[_Client, None]] = {}
        self._all: set[_Client] = set()
        self._closed: Counter[tuple[str, str]] = Counter()
        self._sweeping = False

    def admit(self, connection: _Client) -> bool:
        """Note a new connection, or return False if there is no room and none can be made."""
        address = connection.address
        if self._open.get(address, 0) >= self.limits.by_address > 0:
            if not self._make_room(self._waiting_at.get(address, {})):
                self.note("too many connections of its address", address)
                return False
        elif len(self._all) >= self.limits.most > 0 and not self._make_room(self._waiting):
            self.note("too many connections", address)
            return False
        self._all.add(connection)
        self._open[address] = self._open.get(address, 0) + 1
        self.wait(connection)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_EVERY_S, self._sweep)
        return True

    def wait(self, connection: _Client) -> None:
        """Note that a connection waits for its client."""
        if connection in self._all:
            self._waiting[connection] = None
            self._waiting_at.setdefault(connection.address, {})[connection] = None

    def work(self, connection: _Client) -> None:
        """Note that a connection has a request that is to be answered."""
        self._waiting.pop(connection, None)
        if at := self._waiting_at.get(connection.address):
            at.pop(connection, None)
            if not at:
                del self._waiting_at[connection.address]

    def forget(self, connection: _Client) -> bool:
        """Note that a connection is closed; return whether it was known."""
        if connection not in self._all:
            return False
        self.work(connection)
        self._all.discard(connection)
        self._open[connection.address] -= 1
        if not self._open[connection.address]:
            del self._open[connection.address]
        return True

    def _make_room(self, waiting: dict[_Client, None]) -> bool:
        if (oldest := next(iter(waiting), None)) is None:
            return False
        self.note("it waited longest of too many", oldest.address)
        self.forget(oldest)
        oldest.abort()
        return True

    def note(self, reason: str, address: str) -> None:
        """Count a connection that is refused or closed, for the metrics and the log."""
        self._count(reason)
        self._closed[reason, address] += 1

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self._all):
            if reason := connection.overdue(now, self.limits.head_s):
                self.note(reason, connection.address)
        # One line for all of a second: who wants to fill the log must not be able to.
        for (reason, address), count in self._closed.most_common(_NAMED):
            extra = {"client": address, "connections": count}
            log.warning("Connections closed: %s", reason, extra=extra)
        self._closed.clear()
        self._sweeping = bool(self._all)
        if self._sweeping:
            asyncio.get_running_loop().call_later(_SWEEP_EVERY_S, self._sweep)


class _Connection(HttpToolsProtocol):
    """uvicorn's protocol within limits."""

    table: ClassVar[Connections]

    address = ""
    before: _Handshake | None = None
    _in_head = True
    _since = 0.0
    _parses_head = False
    _head_bytes = 0
    _is_refused = False
    _blocked_since: float | None = None
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit or refuse a connection."""
        super().connection_made(transport)
        self._since = time.monotonic() if self.before is None else self.before.finish()
        self.address = _network(self.client[0] if self.client else "")
        if not self.table.admit(self):
            self._refuse(503, "Too many connections; try again later.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self.table.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self.transport.is_closing():
            return
        if self._is_refused:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_DISCARDED:
                self.abort()
            return
        if not self._in_head and not self._is_busy:
            self._in_head, self._since = True, time.monotonic()
        went_on = self._parses_head
        super().data_received(data)
        if went_on and self._parses_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin with the headers of a request, perhaps before the one before is answered."""
        super().on_message_begin()
        self._parses_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._parses_head = False
        if len(self.url) + sum(len(name) + len(text) for name, text in self.headers) > HEAD_BYTES:
            self._refuse_head()
            return
        if len(self.pipeline) >= MOST_PIPELINED:
            self.table.note("too many requests at once", self.address)
            self._is_refused = True
            self.abort()
            raise ValueError  # stops the parser, which else goes on to the end of what came
        self._in_head = False
        self.table.work(self)
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer what is no HTTP; uvicorn would do so in the middle of another answer, too."""
        if self._is_refused:
            return
        if self._is_busy:
            self._is_refused = True
            self.abort()
        else:
            self._refuse(400, "The request cannot be read; this server speaks HTTP/1.1.")

    def on_body(self, body: bytes) -> None:
        """Take a part of a body, if its request is answered."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the client has sent all, perhaps after its request was answered."""
        if self._is_refused:
            return
        super().on_message_complete()
        if not self._is_busy:
            self._in_head, self._since = False, time.monotonic()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self._is_busy:
            # What is left of a body, which nobody reads any more, has the time of headers.
            self._in_head, self._since = self.cycle.more_body, time.monotonic()
            self.table.wait(self)

    def pause_writing(self) -> None:
        """Note that the client does not take its answer as quickly as it comes."""
        self._blocked_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that it takes it again."""
        self._blocked_since = None
        super().resume_writing()

    def abort(self) -> None:
        """Close the connection, whatever is on its way."""
        self.transport.abort()

    def overdue(self, now: float, head_s: float) -> str | None:
        """Close a connection whose client is too slow, and return in which way it is."""
        if self.transport.is_closing():
            self._blocked_since = self._blocked_since or now
        if self._blocked_since is not None:
            unsent, self._unsent = self._unsent, self.transport.get_write_buffer_size()
            if self._unsent < unsent:
                self._blocked_since = now
            elif now - self._blocked_since > WRITE_S:
                self.transport.abort()
                return "it does not take its answer"
        elif (
            self._in_head
            and not self._is_busy
            and not self._is_refused
            and now - self._since > head_s
        ):
            self._refuse(408, f"The headers must come within {head_s:.0f} seconds.")
            return "its headers are slow"
        return None

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_head(self) -> None:
        self.table.note("its headers are too large", self.address)
        if self._is_busy:  # the answer to another request is on its way, and nothing may follow it
            self.transport.abort()
        else:
            # A client that still sends would be answered by a reset if this closed at once.
            detail = f"The headers must have at most {HEAD_BYTES // 1024} kB."
            self._refuse(431, detail, close_after_s=_LINGER_S)

    def _refuse(self, status: int, detail: str, close_after_s: float = 0.0) -> None:
        self._is_refused = True
        problem = json.dumps({"detail": detail, "status": status}).encode()
        retry = "retry-after: 5\r\n" if status in (408, 503) else ""
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(problem)}\r\n"
            f"{retry}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + problem)
        if close_after_s:
            self.loop.call_later(close_after_s, self.transport.close)
        else:
            self.transport.close()


class _Handshake(asyncio.Protocol):
    """A connection before and during its TLS handshake; afterwards it is a ``_Connection``.

    What is accepted is handed to the event loop a second time, now for TLS, as a socket of its own:
    with ``start_tls`` uvloop loses what a client sends at once.
    """

    def __init__(self, connection: _Connection, context: ssl.SSLContext) -> None:
        self.address = ""
        self._connection = connection
        self._context = context
        self._since = time.monotonic()
        self._is_late = self._has_begun = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit a connection or close it; before TLS there is no way to say why."""
        peer = transport.get_extra_info("peername")
        self.address = _network(peer[0] if isinstance(peer, tuple) else "")
        if self._connection.table.admit(self):
            try:
                descriptor = os.dup(transport.get_extra_info("socket").fileno())
            except OSError:  # no file is left
                self._end()
            else:
                accepted = socket.socket(fileno=descriptor)
                accepted.settimeout(0)
                self._begin(accepted)
        transport.abort()

    def abort(self) -> None:
        """Close the connection."""
        if self._task is not None:
            self._task.cancel()

    shutdown = abort  # what uvicorn calls when the server stops

    def overdue(self, now: float, head_s: float) -> str | None:
        """Close a connection whose handshake is too slow."""
        if self._is_late or now - self._since <= head_s:
            return None
        self._is_late = True
        self.abort()
        return "its TLS handshake is slow"

    def finish(self) -> float:
        """Make way for the connection, and return when its time began to run."""
        self._connection.table.forget(self)
        return self._since

    def _begin(self, accepted: socket.socket) -> None:
        def end(_task: asyncio.Task[None]) -> None:
            if not self._has_begun:  # else it is the event loop's to close
                accepted.close()
            self._connection.connections.discard(self)
            self._end()

        self._connection.before = self
        self._connection.connections.add(self)  # type: ignore[arg-type]
        self._task = self._connection.loop.create_task(self._shake_hands(accepted))
        self._task.add_done_callback(end)

    def _end(self) -> None:
        """Note that it failed, unless it made way for the connection or for another one."""
        if self._connection.table.forget(self) and not self._is_late:
            self._connection.table.note("its TLS handshake failed", self.address)

    async def _shake_hands(self, accepted: socket.socket) -> None:
        self._has_begun = True
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await self._connection.loop.connect_accepted_socket(
                lambda: self._connection,
                accepted,
                ssl=self._context,
                # ``overdue`` comes before it, and counts.
                ssl_handshake_timeout=self._connection.table.limits.head_s + 2 * _SWEEP_EVERY_S,
            )


_Client = _Connection | _Handshake


class _Config(uvicorn.Config):
    """Lets ``_Handshake`` begin TLS in place of asyncio.

    Not on Windows, whose event loop takes no socket a second time: handshakes have a minute there.
    """

    def load(self) -> None:
        """Load what is configured."""
        super().load()
        if self.ssl is not None and sys.platform != "win32":
            connection = cast("type[_Connection]", self.http_protocol_class)
            self.http_protocol_class = partial(_begin, connection, self.ssl)  # type: ignore[assignment]
            self.ssl = None


def _begin(kind: type[_Connection], context: ssl.SSLContext, **options: Any) -> _Handshake:
    return _Handshake(kind(**options), context)


def _network(address: str) -> str:
    """Return what stands for everybody who can use an address."""
    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(parsed, ipaddress.IPv6Address):
            if parsed.ipv4_mapped:
                return str(parsed.ipv4_mapped)
            return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def serving_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """Return how uvicorn serves the application; ``options`` are uvicorn's own."""
    service: Service = app.state.service
    settings = service.settings
    most, files = settings.max_connections, raise_file_limit()
    if files is not None and not 0 < most <= files * _SHARE_OF_FILES:
        most = int(files * _SHARE_OF_FILES)
        log.warning("At most %d connections, because %d files may be open.", most, files)
    limits = ConnectionLimits(most, settings.max_connections_per_address, settings.header_seconds)
    connections = Connections(limits, service.metrics.count_closed)
    return _Config(
        app,
        http=type("Connection", (_Connection,), {"table": connections}),
        ws="none",
        access_log=False,
        server_header=False,
        **{"log_config": None, "timeout_keep_alive": KEEP_S, **options},
    )
