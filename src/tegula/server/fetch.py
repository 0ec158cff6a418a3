"""The one client that reads inputs from, and sends webhooks to, URLs that users name.

A host name is resolved once, every address it has is checked (``addresses``), and the connection
goes to an address that was checked; a name that changes its answer in between gains nothing.
Redirects are followed here, each checked anew, and proxies of the environment are not used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import httpcore

from tegula.errors import CancelledError, FetchError
from tegula.server.addresses import (
    Policy,
    Resolve,
    host_of,
    may_reach,
    out_of_reach,
    system_resolve,
)

Admit = Callable[[str], None]
"""Blocks until the host that a redirect leads to may be connected to."""

_READ_AT_MOST = 16_384
_CONNECT_S = 10.0


def _left_until(end: float) -> float:
    """Return the seconds until a moment of the monotonic clock.

    Raises:
        httpcore.ReadTimeout: it has passed.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left


class CancelToken:
    """Ends an exchange from another thread, however long its own would wait for the other side.

    What waits for an answer wakes at once, because its connection is shut down. Looking a host up
    and connecting to it cannot be interrupted, so a thread of its own does that, and is left to
    itself when the exchange ends; connecting takes it ten seconds at most.
    """

    def __init__(self) -> None:
        self._cancelled = False
        self._socket: socket.socket | None = None
        self._opening: concurrent.futures.Future[httpcore.NetworkStream] | None = None
        self._opener: threading.Thread | None = None
        self._lock = threading.RLock()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled; it stays so."""
        return self._cancelled

    def cancel(self) -> None:
        """End the exchange that is under way, and every later one when it connects."""
        with self._lock:
            self._cancelled = True
            self._shut_down()
            if self._opening is not None:
                self._opening.cancel()

    @property
    def left_behind(self) -> threading.Thread | None:
        """The thread that still opens a connection which nobody waits for any more."""
        return self._opener if self._opener is not None and self._opener.is_alive() else None

    def open(
        self, connect: Callable[[], httpcore.NetworkStream], end: float
    ) -> httpcore.NetworkStream:
        """Return the connection that a call opens, and watch it.

        Raises:
            httpcore.ConnectError: cancelled, before or meanwhile.
            httpcore.ConnectTimeout: it is not open by the end.
        """
        opening: concurrent.futures.Future[httpcore.NetworkStream] = concurrent.futures.Future()

        def run() -> None:
            try:
                stream = connect()
            except BaseException as error:
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    opening.set_exception(error)
                return
            try:
                opening.set_result(stream)
            except concurrent.futures.InvalidStateError:
                stream.close()  # nobody waits for it any more

        with self._lock:
            if self._cancelled:
                raise httpcore.ConnectError
            self._opening = opening
        self._opener = threading.Thread(target=run, name="connect", daemon=True)
        self._opener.start()
        try:
            stream = opening.result(_left_until(end))
        except concurrent.futures.CancelledError:
            raise httpcore.ConnectError from None
        except concurrent.futures.TimeoutError:
            if opening.cancel():
                raise httpcore.ConnectTimeout from None
            stream = opening.result()  # it came at the last moment
        self.watch(stream.get_extra_info("socket"))
        return stream

    def watch(self, connection: socket.socket) -> None:
        """Shut this connection down when cancelled, in place of one before it.

        Its descriptor is doubled: TLS takes the first one over, and whoever reads may close it
        at any moment, after which its number may be that of another connection.
        """
        with self._lock:
            self.release()
            self._socket = connection.dup()
            if self._cancelled:
                self._shut_down()

    def release(self) -> None:
        """Let go of the connection, whose exchange is over."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _shut_down(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the other side was first
                self._socket.shutdown(socket.SHUT_RDWR)


class CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked IP addresses only, and gives up at ``end`` of the monotonic clock."""

    def __init__(
        self,
        private: bool,  # noqa: FBT001
        resolve: Resolve,
        end: float,
        token: CancelToken,
    ) -> None:
        self._private = private
        self._resolve = resolve
        self._end = end
        self._token = token
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the end of the exchange counts
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers, once all of them are checked."""

        def connect() -> httpcore.NetworkStream:
            return self._connect_first(host, port, local_address, socket_options)

        return _TimedStream(self._token.open(connect, self._end), self._end, self._token)

    def _connect_first(
        self, host: str, port: int, local: str | None, options: Iterable[Any] | None
    ) -> httpcore.NetworkStream:
        addresses = list(dict.fromkeys(self._resolve(host.strip("[]"), port)))
        if not addresses or not all(
            may_reach(address, private=self._private) for address in addresses
        ):
            raise out_of_reach(host, private=self._private)
        for address in addresses[:-1]:
            try:
                return self._connect(address, port, local, options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):  # noqa: PERF203
                continue
        return self._connect(addresses[-1], port, local, options)

    def _connect(
        self, address: str, port: int, local: str | None, options: Iterable[Any] | None
    ) -> httpcore.NetworkStream:
        if self._token.cancelled:
            raise httpcore.ConnectError
        left = min(_left_until(self._end), _CONNECT_S)
        return self._backend.connect_tcp(address, port, left, local, options)


class _TimedStream(httpcore.NetworkStream):
    """A connection on which every wait ends with the exchange."""

    def __init__(self, stream: httpcore.NetworkStream, end: float, token: CancelToken) -> None:
        self._stream = stream
        self._end = end
        self._token = token

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """Read what is there."""
        data = self._stream.read(min(max_bytes, _READ_AT_MOST), _left_until(self._end))
        if self._token.cancelled:
            # A connection that was shut down looks like one whose other side has said all, which
            # is how some bodies end.
            raise httpcore.ReadError
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        """Write everything."""
        self._stream.write(buffer, _left_until(self._end))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        """Go on with TLS; the certificate is that of the name, not of the address."""
        left = _left_until(self._end)
        stream = self._stream.start_tls(ssl_context, server_hostname, left)
        return _TimedStream(stream, self._end, self._token)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows of itself."""
        return self._stream.get_extra_info(info)


MOST_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True)
class Fetched:
    """An answer to a GET: a name from the URL, the type that is claimed, and the bytes."""

    name: str
    content_type: str
    chunks: Iterable[bytes]


@dataclass(frozen=True)
class Answer:
    """An answer to a POST; ``retry_after`` in seconds, if the receiver asks for a pause."""

    status: int
    retry_after: float | None = None


@dataclass(frozen=True)
class Fetcher:
    """Talks to URLs within a policy.

    Every exchange has a limit in seconds from its beginning to its end, however slowly
    the other side talks.

    tls: what certificates of https are checked with; by default the authorities that the system
        and certifi know.
    """

    policy: Policy = field(default_factory=Policy)
    resolve: Resolve = system_resolve
    tls: ssl.SSLContext | None = None

    @contextmanager
    def get(
        self,
        url: str,
        *,
        limit: int,
        seconds: float,
        token: CancelToken | None = None,
        admit: Admit | None = None,
    ) -> Iterator[Fetched]:
        """Open a URL for reading.

        Args:
            url: at most three redirects are followed.
            limit: bytes after which reading fails.
            seconds: time for everything, but for what ``admit`` takes.
            token: ends it from another thread.
            admit: called before a redirect to another host is followed.

        Raises:
            FetchError: the URL may not or cannot be reached, or does not answer with 200; or,
                while reading, it sends too much or too slowly.
            CancelledError: the token was cancelled.
        """
        end, token = time.monotonic() + seconds, token or CancelToken()
        headers = {"Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
        for _ in range(MOST_REDIRECTS + 1):
            with self._exchange("GET", url, headers, None, end, token) as response:
                if response.status not in _REDIRECTS:
                    if response.status != 200:
                        raise FetchError(f"The URL answers with status {response.status}, not 200.")
                    if (_header(response, b"content-encoding") or "identity") != "identity":
                        raise FetchError("The URL answers with compressed content, unasked.")
                    name = unquote(urlsplit(url).path).rpartition("/")[2]
                    kind = _header(response, b"content-type") or ""
                    yield Fetched(name, kind, _capped(response.iter_stream(), limit, end))
                    return
                before, url = url, _redirected(url, _header(response, b"location") or "")
            # The connection to the host before is closed by now: nobody waits for one host while
            # it holds on to another, so no two fetches wait for each other.
            self.policy.check(url)
            if admit is not None and host_of(url) != host_of(before):
                waiting_since = time.monotonic()
                admit(host_of(url))
                end += time.monotonic() - waiting_since
        raise FetchError(f"The URL redirects more than {MOST_REDIRECTS} times.")

    def post(self, url: str, body: bytes, headers: Mapping[str, str], *, seconds: float) -> Answer:
        """Send a body; redirects are not followed, and the answer's body is not read on.

        Raises:
            FetchError: the URL may not or cannot be reached.
        """
        end = time.monotonic() + seconds
        with self._exchange("POST", url, headers, body, end, CancelToken()) as response:
            after = _header(response, b"retry-after") or ""
            return Answer(response.status, float(after) if after.isdecimal() else None)

    @contextmanager
    def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        end: float,
        token: CancelToken,
    ) -> Iterator[httpcore.Response]:
        parts = self.policy.check(url)
        target = f"{parts.scheme}://{_netloc(parts)}{parts.path or '/'}"
        target += f"?{parts.query}" if parts.query else ""
        backend = CheckedBackend(self.policy.private, self.resolve, end, token)
        secure = parts.scheme == "https"
        tls = (self.tls or _known_authorities()) if secure else None
        pool = httpcore.ConnectionPool(ssl_context=tls, network_backend=backend)
        try:
            with (
                pool,
                pool.stream(
                    method,
                    target.encode("ascii", "strict"),
                    headers=[*headers.items(), ("Host", _netloc(parts)), ("User-Agent", "tegula")],
                    content=body,
                ) as response,
            ):
                yield response
        except httpcore.TimeoutException as error:
            raise FetchError("The URL's server answers too slowly.") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            if token.cancelled:
                raise CancelledError from error
            raise FetchError("The URL's server cannot be reached.") from error
        except UnicodeError as error:
            raise FetchError("The URL must be ASCII; escape other characters.") from error
        finally:
            token.release()


@cache
def _known_authorities() -> ssl.SSLContext:
    """Return the default context; reading it takes a tenth of a second: no start waits for it."""
    return httpcore.default_ssl_context()


def _netloc(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if parts.port is None else f"{host}:{parts.port}"


def _redirected(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError("The URL redirects to an address that cannot be read.") from error


def _header(response: httpcore.Response, name: bytes) -> str | None:
    found = [value for key, value in response.headers if key.lower() == name]
    return found[0].decode("latin-1") if found else None


def _capped(chunks: Iterable[bytes], limit: int, end: float) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise FetchError(f"The URL answers with more than {limit:,} bytes.")
        _left_until(end)
        yield chunk
