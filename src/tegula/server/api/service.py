"""What every route works with."""

from __future__ import annotations

import asyncio
import base64
import binascii
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Protocol, TypeVar
from urllib.parse import parse_qsl, urlencode

from fastapi import Depends, Query
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from tegula.calibration import usual_seconds
from tegula.errors import NotFoundError, OptionError
from tegula.server.accounts import Ledger
from tegula.server.api.errors import not_found
from tegula.server.api.gate import Caller, Metrics, caller_of
from tegula.server.api.library import Library
from tegula.server.db import FILE_KEY, Account, Deployment, Page, Prediction
from tegula.server.fetch import Policy
from tegula.server.files import encode_data_uri
from tegula.server.links import prediction_object
from tegula.server.queue import Changes
from tegula.server.settings import ServerSettings
from tegula.server.store import Store

# How long a prediction is likely to run, by how long those before it ran.

UNKNOWN_S = 10.0
"""The guess for a model that has not run yet."""

_FRESH_S = 60.0


class UsualSeconds:
    """The mean running time of each model, read from the ledger once a minute."""

    def __init__(self, ledger: Ledger, unknown: float = UNKNOWN_S) -> None:
        """Take what to expect of a model that has not run yet."""
        self._ledger = ledger
        self._unknown = unknown
        self._means: dict[str, float] = {}
        self._stale_at = 0.0
        self._lock = threading.Lock()

    def get(self, model: str) -> float:
        """Return the seconds to expect of a model."""
        with self._lock:
            if time.monotonic() >= self._stale_at:
                self._means = self._read()
                self._stale_at = time.monotonic() + _FRESH_S
            return self._means.get(model, self._unknown)

    def _read(self) -> dict[str, float]:
        counts: dict[str, int] = {}
        seconds: dict[str, float] = {}
        for line in self._ledger.lines():
            counts[line.model] = counts.get(line.model, 0) + line.predictions
            seconds[line.model] = seconds.get(line.model, 0.0) + line.predict_seconds
        return {model: seconds[model] / count for model, count in counts.items()}


# Waiting for predictions to change, without a thread for each who waits.

ASK_AGAIN_S = 1.0
"""How often to look without word of a change: it may come from another process."""


class Watch:
    """Wakes coroutines of one event loop when their prediction changes."""

    def __init__(self, changes: Changes) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.close = changes.subscribe(self._told)

    @contextmanager
    def on(self, prediction_id: str) -> Iterator[asyncio.Event]:
        """Give an event that is set at every change from now on."""
        event = asyncio.Event()
        self._events[prediction_id].add(event)
        try:
            yield event
        finally:
            self._events[prediction_id].discard(event)
            if not self._events[prediction_id]:
                del self._events[prediction_id]

    def _told(self, prediction_id: str) -> None:
        if prediction_id in self._events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, prediction_id)

    def _wake(self, prediction_id: str) -> None:
        for event in self._events.get(prediction_id, ()):
            event.set()


async def changed(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for the next change for at most so long; return whether one came."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except asyncio.TimeoutError:
        return False
    event.clear()
    return True


async def until_finished(
    watch: Watch,
    prediction: Prediction,
    read: Callable[[str], Awaitable[Prediction]],
    hold_s: float,
) -> Prediction:
    """Return the prediction once it is in a terminal state, or as it is after ``hold_s``."""
    loop = asyncio.get_running_loop()
    end = loop.time() + hold_s
    with watch.on(prediction.id) as event:
        prediction = await read(prediction.id)
        while not prediction.status.terminal and (left := end - loop.time()) > 0:
            await changed(event, min(left, ASK_AGAIN_S))
            prediction = await read(prediction.id)
    return prediction


# Requests that clients send again because they gave up waiting for the answer.
#
# A create that holds the request open may take longer than the client, or a proxy between, is
# willing to wait. Clients then send the same body again, which would start the work anew.

REMEMBERED_S = 60.0
"""How long a request that nobody waited for is remembered; clients retry within seconds."""

Gone = Callable[[], Awaitable[bool]]


@dataclass
class _Held:
    """A request that is held open, or that was until nobody waited for it any more.

    gone: tells whether its client left, while it is held. until: when to forget it, after.
    """

    prediction_id: str
    gone: Gone | None
    until: float | None = None


class Repeats:
    """Knows the creates whose client went away, by a key of who asked for what.

    Only one event loop uses it. What it knows is lost with the process: a client that must
    not be run twice sends an ``Idempotency-Key``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, list[_Held]] = {}

    async def earlier(self, key: str) -> str | None:
        """Return the prediction of an equal request whose client is gone, once."""
        self._forget()
        for held in self._held.get(key, []):
            if held.gone is None or await held.gone():
                self._drop(key, held)
                return held.prediction_id
        return None

    def hold(self, key: str, prediction_id: str, gone: Gone) -> _Held:
        """Note that a request begins to be held; ``gone`` tells whether its client left."""
        held = _Held(prediction_id, gone)
        self._held.setdefault(key, []).append(held)
        return held

    async def release(self, key: str, held: _Held) -> None:
        """Note that it is held no more; it is remembered if nobody waits for the answer."""
        if held.gone is not None and await held.gone():
            held.gone, held.until = None, self._clock() + REMEMBERED_S
        else:
            self._drop(key, held)

    def _forget(self) -> None:
        now = self._clock()
        for key, several in list(self._held.items()):
            for held in several:
                if held.until is not None and held.until < now:
                    self._drop(key, held)

    def _drop(self, key: str, held: _Held) -> None:
        several = [other for other in self._held.get(key, []) if other is not held]
        if several:
            self._held[key] = several
        else:
            self._held.pop(key, None)


# Pages of lists that lie in memory, by the key of the row to go on from.

T = TypeVar("T")
_LONGEST = 512


def page_of(items: Sequence[T], key: Callable[[T], str], cursor: str | None, limit: int) -> Page[T]:
    """Return one page of a list in its order.

    Raises:
        OptionError: the cursor is none of ours.
    """
    keys = [key(item) for item in items]
    wanted = _decode(cursor) if cursor else ""
    start = keys.index(wanted) if wanted in keys else 0
    end = start + limit
    return Page(
        tuple(items[start:end]),
        next=_encode(keys[end]) if end < len(items) else None,
        previous=_encode(keys[max(0, start - limit)]) if start else None,
    )


def _encode(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def _decode(cursor: str) -> str:
    try:
        padded = cursor[:_LONGEST] + "=" * (-len(cursor[:_LONGEST]) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise OptionError("cursor is taken from next or previous of a page.") from error


# What every route works with.

_PRIVATE = ("webhook", "webhook_events_filter", "deployment")


@dataclass(frozen=True)
class Hardware:
    """A device that predictions run on; ``sku`` is its short name in the API."""

    sku: str
    name: str


class Background(Protocol):
    """Something that works while the server is up, such as the dispatcher of an engine."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """Finish or hand back what is in hand, and end."""


@dataclass
class Service:
    """The server below its routes."""

    store: Store
    library: Library
    hardware: Sequence[Hardware]
    background: Sequence[Background] = ()
    metrics: Metrics = field(default_factory=Metrics)
    repeats: Repeats = field(default_factory=Repeats)
    ready: bool = True

    @property
    def settings(self) -> ServerSettings:
        """What the operator set."""
        return self.store.settings

    @cached_property
    def watch(self) -> Watch:
        """Wakes those who wait; made in the event loop that serves."""
        return Watch(self.store.changes)

    @cached_property
    def _seconds(self) -> UsualSeconds:
        measured = usual_seconds(self.settings.bundle)
        return UsualSeconds(self.store.usage, UNKNOWN_S if measured is None else measured)

    @cached_property
    def policy(self) -> Policy:
        """Where inputs may be fetched from and webhooks sent to."""
        return Policy.of(self.settings)

    @cached_property
    def local_account(self) -> Account:
        """Who asks when nobody is asked for a token."""
        return self.store.accounts.ensure("local", "Local")

    def told(self, prediction: Prediction, *, inline: bool = True) -> dict[str, Any]:
        """Return the JSON object of a prediction; ``inline`` allows outputs as data URIs."""
        return prediction_object(
            prediction,
            self.store.links,
            strict_statuses=self.settings.strict_statuses,
            inline=self.inline if inline else None,
        )

    def told_to_all(self, prediction: Prediction) -> dict[str, Any]:
        """Return the JSON object of a shared prediction, without what concerns its owner."""
        told = self.told(prediction, inline=False)
        return {key: value for key, value in told.items() if key not in _PRIVATE}

    def told_output(self, item: Any) -> Any:
        """Return one item of an output, as streams give it."""
        if isinstance(item, Mapping) and FILE_KEY in item:
            return self.inline(item) or self.store.links.output(item)
        return self.store.links.resolve(item)

    def inline(self, file: Mapping[str, Any]) -> str | None:
        """Return an output file as a data URI, where it is told so.

        Clients turn only ``https:`` and ``data:`` outputs into files; a program that
        writes an ``http:`` output to a file writes its address.
        """
        limit = 0 if self.settings.secure else self.settings.inline_output_bytes
        if int(file.get("size", limit + 1)) > limit:
            return None
        try:
            kept = self.store.files.get(str(file[FILE_KEY]))
            return encode_data_uri(self.store.files.path(kept).read_bytes(), kept.content_type)
        except (NotFoundError, OSError):
            return None

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """Call something that reads the database, outside the event loop."""
        return await run_in_threadpool(call, *args)

    def deployment(self, owner: str, name: str, account_id: str) -> Deployment:
        """Return a deployment of an account.

        Raises:
            ProblemError: there is none of this name, or it is somebody else's.
        """
        found = self.store.deployments.get(owner, name)
        if found is None or found.account_id != account_id:
            raise not_found()
        return found

    async def read(self, prediction_id: str) -> Prediction:
        """Return a prediction as it is now."""
        return await run_in_threadpool(self.store.predictions.get, prediction_id)

    def estimate(self, model: str) -> float:
        """Return the seconds of work that a prediction of a model is likely to be."""
        return self._seconds.get(model)

    def page(self, request: Request, page: Page[Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the JSON object of a page; its links keep the filters of the request."""
        return {
            "next": self._page_url(request, page.next),
            "previous": self._page_url(request, page.previous),
            "results": list(results),
        }

    def _page_url(self, request: Request, cursor: str | None) -> str | None:
        if cursor is None:
            return None
        kept = [pair for pair in parse_qsl(request.url.query) if pair[0] != "cursor"]
        query = urlencode([*kept, ("cursor", cursor)])
        return f"{self.settings.public_url}{request.url.path}?{query}"


def service_of(request: Request) -> Service:
    """Return the service of the app that a request came to."""
    service: Service = request.app.state.service
    return service


# What FastAPI gives to routes.

_BEARER = HTTPBearer(auto_error=False, description="A token of `tegula tokens create`.")


async def _service(request: Request) -> Service:
    """Return the service; a coroutine, because FastAPI runs functions in other threads."""
    return service_of(request)


async def _caller(request: Request, _scheme: Annotated[object, Depends(_BEARER)]) -> Caller:
    """Return who asks; the scheme is only for the OpenAPI document, the gate has checked."""
    return caller_of(request.state)


Serving = Annotated[Service, Depends(_service)]
Asking = Annotated[Caller, Depends(_caller)]
Cursor = Annotated[str | None, Query(description="From `next` or `previous` of a page.")]
