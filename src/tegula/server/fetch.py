"""The one client that reads inputs from, and sends webhooks to, URLs that users name.

Whoever may name a URL must not reach what only this server reaches: other programs on the
machine, its private network, a cloud's metadata service. So a host name is resolved once, every
address it has is checked, and the connection goes to an address that was checked; a name that
changes its answer in between gains nothing. Redirects are followed here, each checked anew, and
proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import httpcore

from tegula.errors import CancelledError, FetchError
from tegula.server.settings import ServerSettings

IPRange = IPv4Network | IPv6Network

_NEVER = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "169.254.0.0/16",  # link-local: the metadata services of clouds
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "::/96",  # unspecified, IPv4-compatible, and loopback, which may_reach looks at first
        "::ffff:0:0/96",  # IPv4-mapped
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64 of a network's own
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local, of old
        "ff00::/8",  # multicast
        "fd00:ec2::254/128",  # the metadata service of a cloud
    )
)
"""IP ranges that nobody reaches; several carry an IPv4 address inside an IPv6 one."""

_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
    )
)
"""IP ranges that are private too, though some versions of Python call them global."""


def may_reach(address: str, *, private: bool) -> bool:
    """Whether an IP address may be connected to.

    Only unicast addresses of the public internet may. With ``private``, those of private
    networks and of this machine too; never link-local ones, and never IPv6 addresses that
    carry an IPv4 address inside, whatever that is.
    """
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if parsed == IPv6Address("::1"):
        return private
    if _within(parsed, _NEVER):
        return False
    return private or (parsed.is_global and not _within(parsed, _NOT_PUBLIC))


def _within(address: IPv4Address | IPv6Address, ranges: Iterable[IPRange]) -> bool:
    return any(address in known for known in ranges if known.version == address.version)


_READ_AT_MOST = 16_384


def _out_of_reach(host: str, *, private: bool) -> FetchError:
    """Return why a host is refused; it is named as it was given, not by its addresses."""
    if private:
        return FetchError(f"{host} is a reserved address; the URL must name another host.")
    return FetchError(
        f"{host} is not on the public internet, and this server reaches no private networks "
        "(fetch_private is off)."
    )


Resolve = Callable[[str, int], Sequence[str]]
"""Returns every IP address of a host."""


def system_resolve(host: str, port: int) -> Sequence[str]:
    """Return the IP addresses that the system knows of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(answer[4][0]) for answer in found]


def left_until(end: float) -> float:
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

    What waits for an answer wakes at once, because its connection is shut down. Only looking up
    a host and connecting, which takes ten seconds at most, cannot be interrupted.
    """

    def __init__(self) -> None:
        self._cancelled = False
        self._socket: socket.socket | None = None
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
        addresses = list(dict.fromkeys(self._resolve(host.strip("[]"), port)))
        if not addresses or not all(
            may_reach(address, private=self._private) for address in addresses
        ):
            raise _out_of_reach(host, private=self._private)
        for address in addresses[:-1]:
            try:
                return self._connect(address, port, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):  # noqa: PERF203
                continue
        return self._connect(addresses[-1], port, local_address, socket_options)

    def _connect(
        self, address: str, port: int, local: str | None, options: Iterable[Any] | None
    ) -> httpcore.NetworkStream:
        left = left_until(self._end)
        stream = self._backend.connect_tcp(address, port, min(left, 10.0), local, options)
        self._token.watch(stream.get_extra_info("socket"))
        return _TimedStream(stream, self._end, self._token)


class _TimedStream(httpcore.NetworkStream):
    """A connection on which every wait ends with the exchange."""

    def __init__(self, stream: httpcore.NetworkStream, end: float, token: CancelToken) -> None:
        self._stream = stream
        self._end = end
        self._token = token

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """Read what is there."""
        data = self._stream.read(min(max_bytes, _READ_AT_MOST), left_until(self._end))
        if self._token.cancelled:
            # A connection that was shut down looks like one whose other side has said all, which
            # is how some bodies end.
            raise httpcore.ReadError
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        """Write everything."""
        self._stream.write(buffer, left_until(self._end))

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
        left = left_until(self._end)
        stream = self._stream.start_tls(ssl_context, server_hostname, left)
        return _TimedStream(stream, self._end, self._token)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows of itself."""
        return self._stream.get_extra_info(info)


MOST_REDIRECTS = 3
MOST_CHARACTERS = 4096
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_LONGEST_HOST = 255


@dataclass(frozen=True)
class Policy:
    """Which URLs may be talked to.

    http: also those without TLS.
    private: also those in private networks and on this machine.
    ports: the only ports; all of them if empty.
    """

    http: bool = True
    private: bool = False
    ports: tuple[int, ...] = (80, 443)

    @classmethod
    def of(cls, settings: ServerSettings) -> Policy:
        """Return what the operator allows."""
        return cls(settings.fetch_http, settings.fetch_private, settings.fetch_ports)

    def check(self, url: str) -> SplitResult:
        """Return the parts of a URL, checked as far as is possible without resolving its host.

        Raises:
            FetchError: it may not be talked to.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError as error:
            raise FetchError("The URL is malformed.") from error
        if len(url) > MOST_CHARACTERS or any(ord(character) < 33 for character in url):
            raise FetchError(
                f"The URL must have at most {MOST_CHARACTERS} characters and no spaces."
            )
        if parts.scheme not in (("http", "https") if self.http else ("https",)):
            raise FetchError(
                f"The URL must begin with https://{' or http://' if self.http else ''}."
            )
        if parts.username is not None or parts.password is not None:
            raise FetchError("The URL must not contain a user name or password.")
        if not parts.hostname:
            raise FetchError("The URL must name a host.")
        # Before the port: another port would not help.
        if not self._plausible(parts.hostname):
            raise _out_of_reach(parts.hostname, private=self.private)
        if self.ports and port not in self.ports:
            raise FetchError(f"The URL must use port {' or '.join(map(str, self.ports))}.")
        return parts

    def check_resolved(self, url: str, resolve: Resolve) -> None:
        """Check a URL like ``check``, and also the addresses that its host has at present.

        A host that is unknown at present passes. What is sent is checked again at that time.

        Raises:
            FetchError: it may not be talked to.
        """
        parts = self.check(url)
        host = parts.hostname or ""
        try:
            addresses = resolve(host, parts.port or _PORTS[parts.scheme])
        except (OSError, UnicodeError):
            return
        if not all(may_reach(address, private=self.private) for address in addresses):
            raise _out_of_reach(host, private=self.private)

    def _plausible(self, host: str) -> bool:
        try:
            ip_address(host)
        except ValueError:
            return True
        return may_reach(host, private=self.private)


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
    """

    policy: Policy = Policy()
    resolve: Resolve = system_resolve
    tls: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)

    @contextmanager
    def get(
        self, url: str, *, limit: int, seconds: float, token: CancelToken | None = None
    ) -> Iterator[Fetched]:
        """Open a URL for reading.

        Args:
            url: at most three redirects are followed.
            limit: bytes after which reading fails.
            seconds: time for everything.
            token: ends it from another thread.

        Raises:
            FetchError: the URL may not or cannot be reached, or does not answer with 200; or,
                while reading, it sends too much or too slowly.
            CancelledError: the token was cancelled.
        """
        end, token = time.monotonic() + seconds, token or CancelToken()
        headers = {"Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
        for _ in range(MOST_REDIRECTS + 1):
            with self._exchange("GET", url, headers, None, end, token) as response:
                if response.status in _REDIRECTS:
                    url = urljoin(url, _header(response, b"location") or "")
                    continue
                if response.status != 200:
                    raise FetchError(f"The URL answers with status {response.status}, not 200.")
                if (_header(response, b"content-encoding") or "identity") != "identity":
                    raise FetchError("The URL answers with compressed content, unasked.")
                name = unquote(urlsplit(url).path).rpartition("/")[2]
                kind = _header(response, b"content-type") or ""
                yield Fetched(name, kind, _capped(response.iter_stream(), limit, end))
                return
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
        pool = httpcore.ConnectionPool(ssl_context=self.tls, network_backend=backend)
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


def host_of(url: str) -> str:
    """Return the host that a URL names, in lower case; empty if it is malformed.

    It is cut to what the database takes, which is more than any host has that can be reached.
    """
    try:
        return (urlsplit(url).hostname or "")[:_LONGEST_HOST]
    except ValueError:
        return ""


def _netloc(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if parts.port is None else f"{host}:{parts.port}"


def _header(response: httpcore.Response, name: bytes) -> str | None:
    found = [value for key, value in response.headers if key.lower() == name]
    return found[0].decode("latin-1") if found else None


def _capped(chunks: Iterable[bytes], limit: int, end: float) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise FetchError(f"The URL answers with more than {limit:,} bytes.")
        left_until(end)
        yield chunk
