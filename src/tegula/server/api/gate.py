"""What every request passes before it reaches a route.

Two ASGI middlewares, the outer first: ``OnePrefix`` gives the path its one prefix ``/v1``;
``Gate`` finds the account of the token, applies the rate limits, bounds the body, adds the
headers that every answer carries, and counts and logs the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tegula.server.api.counters import Allowance, Metrics, RateLimiter
from tegula.server.api.errors import (
    ProblemError,
    foreign_change,
    foreign_page,
    stopping,
    throttled,
    too_large,
    unauthenticated,
)
from tegula.server.api.receiving import BoundedBody, BytesInFlight, ReceivedBody
from tegula.server.log import log_context
from tegula.server.settings import MIB, ServerSettings
from tegula.server.tables import Account, Token

log = logging.getLogger("tegula.api")

# Paths. Clients disagree whether their base URL includes ``/v1``: the same environment variable
# holds it with the prefix for one client and without it for another. So ``/v1/v1/predictions``
# and ``/predictions`` reach the API, too. They are rewritten and never redirected, because some
# clients repeat a redirected POST as a GET.

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
_OWN_PROOF = re.compile(r"/v1/(files/[^/]+/download|(files/streams|streams|shared)/.*)", re.DOTALL)
"""Paths of the API that need no token: a signature or a secret in the address opens them."""


_SECRET = re.compile(r"(/o|/v1/(?:files/)?streams|/v1/shared)/[^/]+")


def without_secrets(path: str) -> str:
    """Return a path for the log: whoever reads that must not be able to open what it leads to.

    >>> without_secrets("/o/01m8dp9j.c2lnbmF0dXJl/out-0.png")
    '/o/.../out-0.png'
    """
    return _SECRET.sub(r"\1/...", path)


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
    """ASGI middleware that gives a path its one prefix before the routes are matched.

    Before ``normalise`` it takes off the path at which a gateway mounts the server, where the
    gateway has not done so. That is the path of the public URL or of one of its aliases.
    """

    def __init__(self, app: ASGIApp, mounts: Collection[str]) -> None:
        """Take the paths at which the server is mounted, each with one slash, in front."""
        self._app = app
        self._mounts = sorted(mounts, key=len, reverse=True)
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on under its normal path."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path in self._mounts:
            # The addresses in the pages are relative, and so need the slash at the end.
            await RedirectResponse(f"{path}/", 307)(scope, receive, send)
            return
        self._compare(Headers(scope=scope).get("x-forwarded-prefix", "").rstrip("/"))
        for mount in self._mounts:
            if path.startswith(f"{mount}/"):
                path = path[len(mount) :]
                break
        path = normalise(path)
        await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    def _compare(self, forwarded: str) -> None:
        """Tell the operator once if the gateway's prefix is not in the links that are given out.

        The header itself is not followed: webhooks hold links, too, and no request comes with them.
        """
        if forwarded and forwarded not in self._mounts and not self._has_warned:
            self._has_warned = True
            log.warning(
                "A proxy sends X-Forwarded-Prefix: %.100r; links lead there once public_url ends "
                "with it.",
                forwarded,
            )


# Browsers. A server without tokens must not obey any page that happens to be open in a browser
# on this machine.


def from_own_page(headers: Headers, settings: ServerSettings) -> bool:
    """Whether a page of this server sent a request that changes something."""
    origin = headers.get("origin")
    return origin is not None and _is_own(origin, headers, settings)


def from_foreign_page(headers: Headers, settings: ServerSettings) -> bool:
    """Whether a request may come from a page of another site.

    Such a page can send requests here, and can read the answers after making its own host name
    resolve to this machine (DNS rebinding); the latter is why the ``Host`` header is checked.
    """
    origin = headers.get("origin")
    if origin is not None and not _is_own(origin, headers, settings):
        return not {"*", origin} & set(settings.cors_origins)
    if origin is None and headers.get("sec-fetch-site") == "cross-site":
        return headers.get("sec-fetch-mode") != "navigate"
    name = _host_name(headers.get("host", ""))
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = {_host_name(host) for host in _own_hosts(settings)}
        return name not in own | {"localhost"}
    return False  # no other site's name leads to a bare address


_SAFE_METHODS = ("GET", "HEAD")


def session_name(settings: ServerSettings) -> str:
    """Return the name of the cookie of a browser that is signed in.

    Browsers give a cookie to every port of a host. The name keeps servers beside each other apart.
    """
    return f"tegula-{hashlib.sha256(settings.public_url.encode()).hexdigest()[:8]}"


def _session_cookie(headers: Headers, settings: ServerSettings) -> str | None:
    """Return the value of that cookie, or None if there is none."""
    return cookie_parser(headers.get("cookie", "")).get(session_name(settings))


def _may_use_session(method: str, headers: Headers, settings: ServerSettings) -> bool:
    """Whether a request with the cookie comes from a page of this server.

    The cookie is SameSite=Strict, but the same site is every port of the host. So a request that
    changes something needs an Origin of ours, and one that reads must not come from elsewhere.
    """
    if method not in _SAFE_METHODS:
        return from_own_page(headers, settings)
    return headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def _is_own(origin: str, headers: Headers, settings: ServerSettings) -> bool:
    host = origin.partition("://")[2]
    return host != "" and host in {headers.get("host"), *_own_hosts(settings)}


def _host_name(host: str) -> str:
    """Return a host without its port; "" where it cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _own_hosts(settings: ServerSettings) -> set[str]:
    return {urlsplit(url).netloc for url in (settings.public_url, *settings.url_aliases)}


# The gate itself.

CREATE, OTHER = "create", "other"
_READ_OFF_S = 10.0


@dataclass(frozen=True)
class Caller:
    """Whose request it is; on a server without tokens there is no token."""

    account: Account
    token: Token | None

    @property
    def token_id(self) -> str | None:
        """The id that records of usage carry."""
        return self.token.id if self.token else None

    @property
    def key(self) -> str:
        """What rate limits and retried requests go by."""
        return self.token_id or self.account.id


def caller_of(state: Any) -> Caller:
    """Return the caller that the gate noted in the state of a request.

    Raises:
        ProblemError: the gate let the request through without a token.
    """
    caller: Caller | None = getattr(state, "caller", None)
    if caller is None:
        raise unauthenticated()
    return caller


@dataclass(frozen=True)
class Gate:
    """ASGI middleware before all routes.

    authenticate: finds account and token by the token's text.
    resume: finds both by the cookie of a browser that is signed in.
    anonymous: the account of every request on a server without tokens.
    is_stopping: whether creates are to go elsewhere, and connections are to close.
    """

    app: ASGIApp
    settings: ServerSettings
    authenticate: Callable[[str], tuple[Account, Token] | None]
    resume: Callable[[str], tuple[Account, Token] | None]
    anonymous: Account | None
    limits: RateLimiter
    metrics: Metrics
    bodies: BytesInFlight
    uploads: BytesInFlight
    is_stopping: Callable[[], bool] = lambda: False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send, self.is_stopping)
        received = ReceivedBody(self.uploads if _is_upload(scope) else self.bodies)
        scope.setdefault("state", {})["body"] = received
        started = time.monotonic()
        try:
            with log_context(prediction=_prediction_of(scope)):
                try:
                    await self._admit(scope, answer)
                    await self.app(scope, self._bounded_body(scope, receive, received), answer)
                except ProblemError as problem:
                    if self.is_stopping():
                        await _read_off(receive, self.settings.max_body_bytes)
                    await problem.response()(scope, receive, answer)
        finally:
            received.release()
            seconds = time.monotonic() - started
            self.metrics.count_request(scope["method"], answer.status, seconds)
            # By now a create has noted which prediction it made.
            extra = {
                "prediction": _prediction_of(scope),
                "account": answer.account,
                "client": scope["client"][0] if scope.get("client") else None,
            }
            log.info(
                "%s %s %d", scope["method"], without_secrets(scope["path"]), answer.status,
                extra={"seconds": round(seconds, 4), **extra},
            )  # fmt: skip

    async def _admit(self, scope: Scope, answer: _Answer) -> None:
        path: str = scope["path"]
        if "\0" in path or b"%00" in scope["query_string"]:
            raise ProblemError(400, "Addresses hold no NUL.", "Bad request")
        is_public = not path.startswith("/v1/") or _OWN_PROOF.fullmatch(path)
        if is_public or scope["method"] == "OPTIONS":
            return
        caller = await self._caller(scope["method"], Headers(scope=scope))
        answer.account = caller.account.username
        scope.setdefault("state", {})["caller"] = caller
        creates = scope["method"] == "POST" and path.endswith("/predictions")
        if creates and self.is_stopping():
            raise stopping()
        wanted = caller.key, CREATE if creates else OTHER
        allowance = self.limits.take_known(*wanted)
        if allowance is None:
            allowance = await run_in_threadpool(self.limits.take_shared, *wanted)
        answer.allowance = allowance
        if not allowance.allowed:
            raise throttled(allowance.reset_seconds)

    async def _caller(self, method: str, headers: Headers) -> Caller:
        if self.anonymous is not None:
            if from_foreign_page(headers, self.settings):
                raise foreign_page()
            return Caller(self.anonymous, None)
        cookie = _session_cookie(headers, self.settings)
        if cookie is not None and not headers.get("authorization"):
            resumed = await run_in_threadpool(self.resume, cookie)
            if resumed is None:
                raise unauthenticated()
            if not _may_use_session(method, headers, self.settings):
                raise foreign_change()
            return Caller(*resumed)
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() not in ("bearer", "token") or not token.strip():
            raise unauthenticated()
        found = await run_in_threadpool(self.authenticate, token.strip())
        if found is None:
            raise unauthenticated()
        return Caller(*found)

    def _bounded_body(self, scope: Scope, receive: Receive, received: ReceivedBody) -> Receive:
        """Return ``receive`` with a limit; a body that announces more is refused at once."""
        limit = self.settings.max_body_bytes
        if _is_upload(scope):
            limit = self.settings.max_upload_bytes + MIB  # what multipart adds to the file
        length = Headers(scope=scope).get("content-length", "")
        # Python refuses to read numbers of thousands of digits.
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise too_large(limit)
        return BoundedBody(receive, limit, self.settings.least_body_rate, received)


def _is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"] == "/v1/files")


async def _read_off(receive: Receive, limit: int) -> None:
    """Read a body that nobody wants, before its connection is closed.

    A client that still sends would be answered by a reset, and could not tell that it may send
    the request again.
    """

    async def read() -> None:
        left = limit
        while left >= 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), _READ_OFF_S)


def _prediction_of(scope: Scope) -> str | None:
    """Return the prediction that a request is about, for the log, as far as it is known yet."""
    parts: list[str] = scope["path"].split("/")
    if parts[1:3] == ["v1", "predictions"] and parts[3:]:
        return parts[3]
    prediction_id: str | None = scope.get("state", {}).get("prediction")
    return prediction_id


class _Answer:
    """Sends, and adds the headers that every answer carries."""

    def __init__(self, scope: Scope, send: Send, is_stopping: Callable[[], bool]) -> None:
        self.status = 500
        self.account: str | None = None
        self.allowance: Allowance | None = None
        self._is_api = scope["path"].startswith("/v1/")
        self._is_head = scope["method"] == "HEAD"
        self._is_stopping = is_stopping
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.setdefault("x-content-type-options", "nosniff")
            if self._is_api:
                headers.setdefault("cache-control", "no-store")
            if self._is_stopping():
                # Else a proxy could send its next request into a connection that we just close.
                headers["connection"] = "close"
            if self.allowance is not None:
                headers["ratelimit-remaining"] = str(self.allowance.remaining)
                headers["ratelimit-reset"] = str(self.allowance.reset_seconds)
        elif self._is_head:
            message = {**message, "body": b""}
        await self._send(message)
