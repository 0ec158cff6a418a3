"""What every request passes: prefix, token, limits, headers."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tegula.server.api.errors import (
    ProblemError,
    invalid_header,
    stranger,
    throttled,
    too_large,
    unauthenticated,
)
from tegula.server.db import Account, Clock, Token
from tegula.server.settings import MIB, ServerSettings, log_context

# Clients disagree whether their base URL includes ``/v1``; here both reach the API.
#
# The same environment variable holds it with the prefix for one client and without it for
# another, so ``/v1/v1/predictions`` and ``/predictions`` are rewritten, never redirected.

PREFIX = "/v1"
_UNPREFIXED = frozenset(
    {
        "account",
        "collections",
        "deployments",
        "files",
        "hardware",
        "models",
        "predictions",
        "search",
        "streams",
        "trainings",
        "usage",
        "webhooks",
    }
)


def normalise(path: str) -> str:
    """Return the path with exactly one prefix.

    >>> normalise("/v1/v1/predictions"), normalise("/predictions"), normalise("/docs")
    ('/v1/predictions', '/v1/predictions', '/docs')
    """
    while path.startswith(PREFIX * 2 + "/"):
        path = path[len(PREFIX) :]
    first = path.split("/", 2)[1] if path.startswith("/") else ""
    return PREFIX + path if first in _UNPREFIXED else path


class OnePrefix:
    """ASGI middleware that puts ``normalise`` before the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on under its plain path."""
        if scope["type"] == "http":
            path = normalise(scope["path"])
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)


# Which page in a browser a request comes from, if it comes from one.


def from_own_page(headers: Headers, settings: ServerSettings) -> bool:
    """Whether a page of this server sent a request that changes something."""
    origin = headers.get("origin")
    return origin is not None and _own(origin, headers, settings)


def from_stranger(headers: Headers, settings: ServerSettings) -> bool:
    """Whether a request may come from a page of somebody else.

    Where no token is asked for, any page that is open in a browser on this machine could
    send requests here, or read answers after having its own name point here.
    """
    origin = headers.get("origin")
    if origin is not None and not _own(origin, headers, settings):
        return not {"*", origin} & set(settings.cors_origins)
    if origin is None and headers.get("sec-fetch-site") == "cross-site":
        return headers.get("sec-fetch-mode") != "navigate"
    return not _known_host(headers.get("host", ""), settings)


def _own(origin: str, headers: Headers, settings: ServerSettings) -> bool:
    host = urlsplit(origin).netloc
    return host == headers.get("host") or host in _hosts(settings)


def _known_host(host: str, settings: ServerSettings) -> bool:
    """Whether a name is ours; an address always is, because no other name leads to it."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        known = {urlsplit(f"//{one}").hostname for one in _hosts(settings)}
        return name in known | {"localhost"}
    return True


def _hosts(settings: ServerSettings) -> set[str]:
    return {urlsplit(url).netloc for url in (settings.public_url, *settings.url_aliases)}


# The request headers with a grammar of their own: ``Prefer`` and ``Cancel-After``.

MAX_WAIT_S = 60
_LONGEST_HOLD_S = 55.0
_SHORTEST_DEADLINE_S = 5
_WAIT = re.compile(r"wait(?:=(\d{1,18}))?", re.ASCII)
_DURATION = re.compile(r"(?:(\d{1,18})h)?(?:(\d{1,18})m)?(?:(\d{1,18})s?)?", re.ASCII)


@dataclass(frozen=True)
class Wait:
    """How long a create may be held open.

    seconds: what the client asked for, 1..60.
    """

    seconds: int

    @property
    def hold_s(self) -> float:
        """Seconds to hold: a little less, because clients time out at the stroke.

        Some give up at 60 seconds in all and send the request again, which would start a
        second prediction.
        """
        return min(self.seconds - min(1.0, 0.2 * self.seconds), _LONGEST_HOLD_S)

    @property
    def applied(self) -> str:
        """The value of ``Preference-Applied``."""
        return f"wait={self.seconds}"


def parse_prefer(value: str | None) -> Wait | None:
    """Return the wait that a ``Prefer`` header asks for, if any.

    Other preferences are passed over, as RFC 7240 wants. A wait of more than a minute is
    taken as a minute.

    Raises:
        ProblemError: the wait is no number of seconds from 1.
    """
    for part in (value or "").replace(";", ",").split(","):
        preference = part.strip().replace('"', "")
        if preference.partition("=")[0].strip() != "wait":
            continue
        match = _WAIT.fullmatch(preference.replace(" ", ""))
        seconds = int(match[1] or MAX_WAIT_S) if match else 0
        if seconds < 1:
            raise invalid_header("Prefer", "Must be wait or wait=n with n from 1 to 60 seconds")
        return Wait(min(seconds, MAX_WAIT_S))
    return None


def parse_cancel_after(value: str | None) -> int | None:
    """Return the seconds of a ``Cancel-After`` header such as 30, 5m or 1h30m45s.

    Raises:
        ProblemError: it cannot be read, or is less than five seconds.
    """
    if value is None or not value.strip():
        return None
    match = _DURATION.fullmatch(value.strip())
    seconds = _seconds(match) if match else 0
    if seconds < _SHORTEST_DEADLINE_S:
        raise invalid_header("Cancel-After", "Must be a duration of at least 5s, like 30s or 1h30m")
    return seconds


def _seconds(match: re.Match[str]) -> int:
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return min(hours * 3600 + minutes * 60 + seconds, 10**9)


# Counters for Prometheus, in its text form.


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


# How many requests a token may make: buckets that fill evenly and hold a minute's worth.

_MOST_KEYS = 10_000


@dataclass(frozen=True)
class Verdict:
    """Whether a request may go on.

    remaining: requests that may follow at once.
    reset_seconds: whole seconds until the next one may, or until the bucket is full.
    """

    allowed: bool
    remaining: int
    reset_seconds: int


class RateLimiter:
    """Counts in memory, for this process; a refused request costs nothing.

    per_minute: the limit of each kind of request; 0 is no limit.
    """

    def __init__(self, per_minute: Mapping[str, int], clock: Clock) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, datetime]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, who: str, kind: str) -> Verdict:
        """Take one request of this kind from somebody's bucket."""
        size = self._per_minute[kind]
        if size == 0:
            return Verdict(True, 2**31 - 1, 0)  # noqa: FBT003
        with self._lock:
            level = self._level(who, kind, size)
            allowed = level >= 1
            level -= allowed
            self._buckets[who, kind] = (level, self._clock())
            self._buckets.move_to_end((who, kind))
            while len(self._buckets) > _MOST_KEYS:
                self._buckets.popitem(last=False)
        per_second = size / 60
        missing = 1 - level if level < 1 else size - level
        return Verdict(allowed, math.floor(level), max(1, math.ceil(missing / per_second)))

    def _level(self, who: str, kind: str, size: int) -> float:
        level, at = self._buckets.get((who, kind), (float(size), self._clock()))
        passed = max(0.0, (self._clock() - at).total_seconds())
        return min(float(size), level + passed * size / 60)


# What every request passes: who asks, how often, how much, and the line in the log.

CREATE, OTHER = "create", "other"
LOG = logging.getLogger("tegula.api")
_SILENCE_S = 30.0
_DOWNLOAD = re.compile(r"/v1/files/[^/]+/download")
_OPEN = ("/v1/files/streams/", "/v1/streams/", "/v1/shared/", "/v1/search")


@dataclass(frozen=True)
class Caller:
    """Whose request it is; without authentication there is no token."""

    account: Account
    token: Token | None

    @property
    def token_id(self) -> str | None:
        """The id that the usage ledger notes."""
        return self.token.id if self.token else None


Authenticate = Callable[[str], "tuple[Account, Token] | None"]


@dataclass(frozen=True)
class Gate:
    """ASGI middleware before all routes.

    anonymous: the account of every request when no token is asked for.
    """

    app: ASGIApp
    settings: ServerSettings
    authenticate: Authenticate
    anonymous: Account | None
    limits: RateLimiter
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        started = time.monotonic()
        try:
            with log_context(prediction=_named(scope)):
                await self._pass(scope, receive, answer)
        finally:
            seconds = time.monotonic() - started
            self.metrics.request(scope["method"], answer.status, seconds)
            extra = {"prediction": _named(scope), "account": answer.account}
            LOG.info(
                "%s %s %d", scope["method"], scope["path"], answer.status,
                extra={"seconds": round(seconds, 4), **extra},
            )  # fmt: skip

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._admit(scope, answer)
            limit = self._body_limit(scope)
            _refuse_announced(Headers(scope=scope), limit)
            await self.app(scope, _Body(receive, limit), answer)
        except ProblemError as problem:
            await problem.response()(scope, receive, answer)

    async def _admit(self, scope: Scope, answer: _Answer) -> None:
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            raise ProblemError(400, "Addresses hold no NUL.", "Bad request")
        if not _guarded(scope):
            return
        caller = await self._caller(Headers(scope=scope))
        answer.account = caller.account.username
        scope.setdefault("state", {})["caller"] = caller
        creates = scope["method"] == "POST" and scope["path"].endswith("/predictions")
        kind = CREATE if creates else OTHER
        taken = self.limits.take(caller.token_id or caller.account.id, kind)
        answer.limit = (taken.remaining, taken.reset_seconds)
        if not taken.allowed:
            raise throttled(taken.reset_seconds)

    async def _caller(self, headers: Headers) -> Caller:
        kind, _, plain = headers.get("authorization", "").partition(" ")
        if self.anonymous is not None:
            if from_stranger(headers, self.settings):
                raise stranger()
            return Caller(self.anonymous, None)
        if kind.lower() not in ("bearer", "token") or not plain.strip():
            raise unauthenticated()
        found = await run_in_threadpool(self.authenticate, plain.strip())
        if found is None:
            raise unauthenticated()
        return Caller(*found)

    def _body_limit(self, scope: Scope) -> int:
        if scope["method"] == "POST" and scope["path"] == "/v1/files":
            return self.settings.max_upload_bytes + MIB
        return self.settings.max_body_bytes


def _named(scope: Scope) -> str | None:
    """Return the prediction that a request is about, for the log, as far as it is known yet."""
    parts: list[str] = scope["path"].split("/")
    if parts[1:3] == ["v1", "predictions"] and parts[3:]:
        return parts[3]
    found: str | None = scope.get("state", {}).get("prediction")
    return found


def _guarded(scope: Scope) -> bool:
    path: str = scope["path"]
    if scope["method"] == "OPTIONS" or not path.startswith("/v1/"):
        return False
    return not (_DOWNLOAD.fullmatch(path) or path.startswith(_OPEN))


def _refuse_announced(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large(limit)


class _Body:
    """Receives at most ``limit`` bytes, and gives up on a sender that falls silent."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit
        self._limit = limit
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), _SILENCE_S)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"The body stopped for {_SILENCE_S:.0f} seconds.") from None
        self._left -= len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._left < 0:
            raise HTTPException(413, too_large(self._limit).detail)
        return message


class _Answer:
    """Sends, with the headers that every answer carries."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.status = 500
        self.account: str | None = None
        self.limit: tuple[int, int] | None = None
        self._api = scope["path"].startswith("/v1/")
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add(MutableHeaders(scope=message))
        await self._send(message)

    def _add(self, headers: MutableHeaders) -> None:
        headers.setdefault("x-content-type-options", "nosniff")
        if self._api:
            headers.setdefault("cache-control", "no-store")
        if self.limit is not None:
            headers["ratelimit-remaining"] = str(self.limit[0])
            headers["ratelimit-reset"] = str(self.limit[1])


def caller_of(state: Any) -> Caller:
    """Return who asks, as the gate noted it.

    Raises:
        ProblemError: the gate let the request through without asking.
    """
    caller: Caller | None = getattr(state, "caller", None)
    if caller is None:
        raise unauthenticated()
    return caller
