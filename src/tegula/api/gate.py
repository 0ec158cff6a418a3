"""What every request passes: who asks, how often, how much, and the line in the log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tegula.api.metrics import Metrics
from tegula.api.origins import from_stranger
from tegula.api.problems import ProblemError, stranger, throttled, too_large, unauthenticated
from tegula.predictions.limits import RateLimiter
from tegula.predictions.logs import about
from tegula.predictions.records import Account, Token
from tegula.predictions.settings import MIB, ServerSettings

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
            with about(prediction=_named(scope)):
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
