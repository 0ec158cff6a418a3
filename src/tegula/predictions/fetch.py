"""The one client that reads inputs from, and sends webhooks to, addresses of strangers.

A name is looked up once, every answer is checked, and the connection goes to an address
that was checked: a name that changes its answer in between gains nothing. Redirects are
followed by us, each checked anew; proxies of the environment are not used.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import httpcore

from tegula.errors import FetchError
from tegula.predictions.addresses import may_reach
from tegula.predictions.network import CheckedBackend, Resolve, left_until, system_resolve
from tegula.predictions.settings import ServerSettings

MOST_REDIRECTS = 3
MOST_CHARACTERS = 4096
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Policy:
    """Where to may be talked.

    http: also without TLS. private: also to private networks and this machine.
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
        """Return the parts of a URL that may be talked to, as far as it shows by itself.

        Raises:
            FetchError: it may not.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError as error:
            raise FetchError("The URL cannot be read.") from error
        if len(url) > MOST_CHARACTERS or any(ord(character) < 33 for character in url):
            raise FetchError(f"A URL has at most {MOST_CHARACTERS} characters, and no spaces.")
        if parts.scheme not in (("http", "https") if self.http else ("https",)):
            raise FetchError(f"The URL begins with https://{' or http://' if self.http else ''}.")
        if parts.username is not None or parts.password is not None:
            raise FetchError("The URL holds no user name or password.")
        if self.ports and port not in self.ports:
            raise FetchError(f"The URL uses port {' or '.join(map(str, self.ports))}.")
        if not parts.hostname or not self._plausible(parts.hostname):
            raise FetchError("The URL names a host on the public internet.")
        return parts

    def _plausible(self, host: str) -> bool:
        try:
            ip_address(host)
        except ValueError:
            return True
        return may_reach(host, private=self.private)


@dataclass(frozen=True)
class Fetched:
    """What an address answers with: a name from its URL, the type it claims, its bytes."""

    name: str
    content_type: str
    chunks: Iterable[bytes]


@dataclass(frozen=True)
class Answer:
    """How a receiver answered; ``retry_after`` in seconds, if it asks for a pause."""

    status: int
    retry_after: float | None = None


@dataclass(frozen=True)
class Fetcher:
    """Talks to addresses of strangers within a policy.

    Every exchange has a limit in seconds from its beginning to its end, however slowly
    the other side talks.
    """

    policy: Policy = Policy()
    resolve: Resolve = system_resolve
    tls: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)

    @contextmanager
    def get(self, url: str, *, limit: int, seconds: float) -> Iterator[Fetched]:
        """Open an address for reading.

        Args:
            url: where; at most three redirects are followed.
            limit: bytes after which reading fails.
            seconds: time for everything.

        Raises:
            FetchError: it may not be reached, cannot be, or does not answer with 200; or,
                while reading, it is too much or too slow.
        """
        end = time.monotonic() + seconds
        headers = {"Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
        for _ in range(MOST_REDIRECTS + 1):
            with self._exchange("GET", url, headers, None, end) as response:
                if response.status not in _REDIRECTS:
                    _accept(response)
                    yield _fetched(url, response, limit, end)
                    return
                url = urljoin(url, _header(response, b"location") or "")
        raise FetchError(f"The URL redirects more than {MOST_REDIRECTS} times.")

    def post(self, url: str, body: bytes, headers: Mapping[str, str], *, seconds: float) -> Answer:
        """Send a body; redirects are not followed, and the answer's body is not read on.

        Raises:
            FetchError: it may not be reached or cannot be.
        """
        end = time.monotonic() + seconds
        with self._exchange("POST", url, headers, body, end) as response:
            after = _header(response, b"retry-after") or ""
            return Answer(response.status, float(after) if after.isdecimal() else None)

    @contextmanager
    def _exchange(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, end: float
    ) -> Iterator[httpcore.Response]:
        parts = self.policy.check(url)
        target = f"{parts.scheme}://{_netloc(parts)}{parts.path or '/'}"
        target += f"?{parts.query}" if parts.query else ""
        backend = CheckedBackend(self.policy.private, self.resolve, end)
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
            raise FetchError("The URL's server cannot be reached.") from error
        except UnicodeError as error:
            raise FetchError("The URL is written in ASCII; escape what is not.") from error


def _netloc(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if parts.port is None else f"{host}:{parts.port}"


def _header(response: httpcore.Response, name: bytes) -> str | None:
    found = [value for key, value in response.headers if key.lower() == name]
    return found[0].decode("latin-1") if found else None


def _accept(response: httpcore.Response) -> None:
    if response.status != 200:
        raise FetchError(f"The URL answers with status {response.status}, not 200.")
    if (_header(response, b"content-encoding") or "identity") != "identity":
        raise FetchError("The URL answers with compressed content that was not asked for.")


def _fetched(url: str, response: httpcore.Response, limit: int, end: float) -> Fetched:
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    kind = _header(response, b"content-type") or ""
    return Fetched(name, kind, _capped(response.iter_stream(), limit, end))


def _capped(chunks: Iterable[bytes], limit: int, end: float) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise FetchError(f"The URL answers with more than {limit:,} bytes.")
        left_until(end)
        yield chunk
