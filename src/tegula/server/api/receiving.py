"""Receiving request bodies within bounds, and parsing them beside the event loop.

A body may hold 60 MB of pictures as data URIs, and the event loop that answers everybody else must
not wait for it. So whatever looks at all of a large body happens in a thread, for one body at a
time; and since most functions of C keep Python's lock until they return, it happens in pieces that
take a few milliseconds each.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from tegula.catalog import InvalidField
from tegula.server.api.errors import ProblemError, invalid, too_large

T = TypeVar("T")

# Receiving: how much at once from everybody, how much from one, and how slowly.

_SMALL = 1 << 18
"""Bodies up to so many bytes count for nothing: large ones must not keep ordinary requests out."""

_PATIENCE_S = 30.0
"""How long the sender of a body may keep us waiting in all, besides the time for its bytes."""

_RETRY_S = 5


class BytesInFlight:
    """The bytes of large bodies that are being received or worked on, over all requests."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @cached_property
    def turn(self) -> CapacityLimiter:
        """Lets one thread at a time work on a large body: several would fight for Python's lock.

        Belongs to the event loop in which it is asked for first.
        """
        return CapacityLimiter(1)

    def take(self, size: int) -> None:
        """Count more bytes.

        Raises:
            HTTPException: there would be too many.
        """
        if self.used + size > self.limit:
            raise HTTPException(
                503,
                "The server is receiving as much as it can hold; send this again in a moment.",
                headers={"retry-after": str(_RETRY_S), "x-should-retry": "true"},
            )
        self.used += size


@dataclass
class ReceivedBody:
    """What one request has in memory of its body.

    size: bytes so far. parsed: the JSON value, once it is parsed.
    """

    in_flight: BytesInFlight
    size: int = 0
    parsed: Any = None
    _counted: int = 0

    @property
    def is_large(self) -> bool:
        """Whether work on it would hold up the event loop."""
        return self.size > _SMALL

    def add(self, size: int) -> None:
        """Count bytes that arrived.

        Raises:
            HTTPException: the server has too many in its hands.
        """
        self.size += size
        if self.size <= _SMALL:
            return
        try:
            self.in_flight.take(self.size - self._counted)
        except HTTPException:
            # At once, and not when the answer is sent: else all who send now would fail together.
            self.release()
            raise
        self._counted = self.size

    def release(self) -> None:
        """Let go of the bytes; a request that is held open afterwards needs them no more."""
        self.in_flight.used -= self._counted
        self._counted = 0
        # Frames of the framework below us refer to the same dictionaries until the answer is sent.
        if isinstance(self.parsed, dict):
            for value in self.parsed.values():
                if isinstance(value, dict):
                    value.clear()
            self.parsed.clear()
        self.parsed = None


class BoundedBody:
    """Receives at most ``limit`` bytes, at no less than ``least_rate`` bytes a second.

    The rate is that of the time spent waiting for the sender, who may be silent for half a minute
    in all.
    """

    def __init__(
        self, receive: Receive, limit: int, least_rate: int, received: ReceivedBody
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._least_rate = max(1, least_rate)
        self._received = received
        self._waited = 0.0
        self._complete = False

    async def __call__(self) -> Message:
        """Return the next message.

        Raises:
            HTTPException: the body is too large, its sender is too slow, or the bodies of all
                requests together are too large.
        """
        if self._complete:
            return await self._receive()  # waits for the client to leave
        began = time.monotonic()
        left = _PATIENCE_S + self._received.size / self._least_rate - self._waited
        try:
            message = await asyncio.wait_for(self._receive(), min(max(left, 0.0), _PATIENCE_S))
        except asyncio.TimeoutError:
            raise HTTPException(
                408,
                f"The body came too slowly: send at least {self._least_rate} bytes a second.",
                headers={"connection": "close"},
            ) from None
        self._waited += time.monotonic() - began
        size = len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received.size + size > self._limit:
            raise HTTPException(413, too_large(self._limit).detail)
        self._received.add(size)
        return message


# Parsing. Large bodies are large because of a few long texts, pictures as data URIs. These are
# taken out and decoded piece by piece, and the small frame that remains is parsed at once.

DEEPEST = 64
MOST_FRAME = 1 << 18
_LONG = 4096
_PIECE = 1 << 20
_MOST_ESCAPES = 2_000_000
_SEQUENCE = 12
"""Bytes of the longest escape sequence: a character in two halves, each as ``\\uXXXX``."""

_UNSTORABLE = (
    f"Must hold only finite numbers, Unicode text without NUL, and at most {DEEPEST} levels"
)


class UnstorableError(HTTPException):
    """A body that cannot be written as JSON and UTF-8, or not be kept by PostgreSQL."""

    def __init__(self) -> None:
        super().__init__(422, _UNSTORABLE)

    def problem(self) -> ProblemError:
        """Return the answer."""
        return invalid(InvalidField("format", "", self.detail))


def parse_json(body: bytes) -> Any:
    """Return the value of a JSON body.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError, RecursionError: it is no JSON.
        UnstorableError: a part of it cannot be kept.
        HTTPException: it is large otherwise than by long texts.
    """
    texts: dict[str, str] = {}
    frame = body if len(body) <= _SMALL else _take_out_texts(body, texts)
    return _checked(json.loads(frame), texts, DEEPEST)


def _take_out_texts(body: bytes, texts: dict[str, str]) -> bytes:
    """Return a body with names in place of its long texts, which go into ``texts``."""
    mark, parts, start, taken = secrets.token_hex(8), [], 0, 0
    for opening, closing in _literals(body):
        if closing - opening > _LONG:
            name = f"{mark} {len(texts)}"
            texts[name] = "".join(_pieces(body, opening + 1, closing))
            parts += [body[start:opening], f'"{name}"'.encode()]
            taken += closing - opening
            start = closing + 1
        if closing - taken > MOST_FRAME:
            break
    if len(body) - taken > MOST_FRAME:
        raise HTTPException(
            413, f"Besides long texts, a body must be less than {MOST_FRAME // 1000}kB in size"
        )
    return b"".join([*parts, body[start:]])


def _literals(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each text begins and ends: the places of its quotation marks."""
    escapes = 0
    opening = body.find(b'"')
    while opening >= 0:
        at = opening + 1
        closing = body.find(b'"', at)
        while closing >= 0 and (escape := body.find(b"\\", at, closing)) >= 0:
            escapes += 1
            if escapes > _MOST_ESCAPES:
                raise HTTPException(413, f"A body must hold at most {_MOST_ESCAPES:,} escapes")
            at = escape + 2
            if closing < at:
                closing = body.find(b'"', at)
        if closing < 0:
            return
        yield opening, closing
        opening = body.find(b'"', closing + 1)


def _pieces(body: bytes, start: int, end: int) -> Iterator[str]:
    """Yield what the text between two quotation marks says, piece by piece."""
    while start < end:
        cut = min(start + _PIECE, end)
        while cut < end and not _is_boundary(body, start, cut):
            cut += 1
        piece: str = json.loads(b'"%b"' % body[start:cut])
        if not _is_storable(piece):
            raise UnstorableError
        yield piece
        start = cut


def _is_boundary(body: bytes, start: int, cut: int) -> bool:
    """Whether a text may be cut here: not within a character or an escape sequence."""
    if body[cut : cut + 1] == b"\\":
        before = body[start:cut]
        escaped = (len(before) - len(before.rstrip(b"\\"))) % 2
        # The second half of a character outside the basic plane belongs to the first.
        is_half = body[cut + 1 : cut + 4].lower() in (b"udc", b"udd", b"ude", b"udf")
        return not escaped and not is_half
    in_character = body[cut] & 0xC0 == 0x80
    return not in_character and body.rfind(b"\\", max(start, cut - _SEQUENCE), cut) < 0


def _checked(value: Any, texts: Mapping[str, str], levels: int) -> Any:
    """Return a value with the long texts in their places again.

    Raises:
        UnstorableError: a part of it cannot be kept.
    """
    if levels == 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise UnstorableError
    if isinstance(value, str):
        if value in texts:
            return texts[value]
        if not _is_storable(value):
            raise UnstorableError
    if isinstance(value, dict):
        return {
            _checked(key, texts, levels - 1): _checked(part, texts, levels - 1)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [_checked(part, texts, levels - 1) for part in value]
    return value


def _is_storable(text: str) -> bool:
    """Whether a text can be written as UTF-8, and kept by PostgreSQL."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character
        return False
    return "\0" not in text


class _JsonRequest(Request):
    """A request whose JSON is parsed in a thread."""

    _chunks: Sequence[bytes] = ()

    async def body(self) -> bytes:
        """Receive the body and return how it begins.

        The framework looks only whether there is one, and would keep a second copy of it until
        the answer is sent.
        """
        if not self._chunks:
            self._chunks = [chunk async for chunk in self.stream() if chunk]
        return self._chunks[0][:1] if self._chunks else b""

    async def json(self) -> Any:
        """Return the parsed body."""
        received: ReceivedBody = self.state.body
        chunks, self._chunks = self._chunks, ()
        parsed = await beside_the_loop(received, _parse_chunks, list(chunks))
        received.parsed = parsed
        return parsed


def _parse_chunks(chunks: list[bytes]) -> Any:
    body = b"".join(chunks)
    chunks.clear()
    return parse_json(body)


class JsonRoute(APIRoute):
    """A route whose JSON body, if it has one, is parsed by ``parse_json``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def answer(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind and kind != "application/json" and not kind.endswith("+json"):
                raise ProblemError(
                    415,
                    "The body must be JSON, sent with the header Content-Type: application/json; "
                    f"this one came as {kind[:100]}.",
                    "Unsupported media type",
                )
            return await handler(_JsonRequest(request.scope, request.receive))

        return answer


async def beside_the_loop(received: ReceivedBody, work: Callable[..., T], *args: Any) -> T:
    """Return what a function makes of a body, called in a thread; large bodies take turns."""
    limiter = received.in_flight.turn if received.is_large else None
    return await to_thread.run_sync(partial(work, *args), limiter=limiter)
