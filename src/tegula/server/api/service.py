"""What every route works with: the service behind the routes, and FastAPI's dependencies on it.

Routes that only read the database are plain functions, which FastAPI runs in threads. Those that
wait for a prediction are coroutines and reach the database by ``Service.run``, so that thousands
may wait without a thread each.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Annotated, Any, Protocol, TypeVar
from urllib.parse import parse_qsl, urlencode

from fastapi import Depends, Query
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from tegula.errors import NotFoundError, PathError
from tegula.rates import usual_seconds
from tegula.server.accounts import Usage
from tegula.server.addresses import Policy, Resolve, system_resolve
from tegula.server.api.answers import PageAnswer
from tegula.server.api.counters import Metrics
from tegula.server.api.errors import not_found
from tegula.server.api.gate import Caller, caller_of
from tegula.server.api.library import Library
from tegula.server.db import Page
from tegula.server.files import encode_data_uri
from tegula.server.links import Answer, PredictionAnswer, prediction_answer
from tegula.server.pubsub import PubSub
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import FILE_KEY, Account, Deployment, Prediction, Token

LOG = logging.getLogger("tegula.api")
T = TypeVar("T")

# How long a prediction is likely to run: as long as those of its model before it.

UNKNOWN_S = 10.0
"""The estimate for a model that has never run, on a machine that was never measured."""

_ESTIMATES_KEPT_S = 60.0


class RunTimeEstimates:
    """The mean running time of each model, read from the records of usage once a minute."""

    def __init__(self, usage: Usage, unknown: float = UNKNOWN_S) -> None:
        """Take the estimate for a model that has not run yet."""
        self._usage = usage
        self._unknown = unknown
        self._means: Mapping[str, float] = {}
        self._read_again_at = 0.0
        self._lock = threading.Lock()

    def get(self, model: str) -> float:
        """Return the seconds that a prediction of a model is likely to run."""
        with self._lock:
            if time.monotonic() >= self._read_again_at:
                self._means = self._usage.mean_seconds()
                self._read_again_at = time.monotonic() + _ESTIMATES_KEPT_S
            return self._means.get(model, self._unknown)


# Waiting for a prediction to change, without a thread for each request that waits.

LOOK_AGAIN_S = 1.0
"""How often to look for changes by other processes where those are not heard."""


class ChangeNotices:
    """Wakes coroutines of one event loop when their prediction changes.

    Changes are published, those of other processes where these are heard. Elsewhere one query a
    second asks for everybody who waits, so that a stream on which nothing happens costs next to
    nothing.
    """

    def __init__(
        self, pubsub: PubSub, last_events: Callable[[Sequence[str]], Mapping[str, int]]
    ) -> None:
        """Subscribe; must be called within the event loop.

        Args:
            pubsub: where changes are published.
            last_events: returns the number of the last event of predictions.
        """
        self._loop = asyncio.get_running_loop()
        self._pubsub = pubsub
        self._last_events = last_events
        self._gap = asyncio.Event()
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._looking: asyncio.Task[None] | None = None
        self.close = pubsub.subscribe(self._notify, on_gap=self._notify_gap)

    @contextmanager
    def of(self, prediction_id: str) -> Iterator[asyncio.Event]:
        """Give an event that is set at every change of a prediction from now on."""
        event = asyncio.Event()
        self._events[prediction_id].add(event)
        loop = asyncio.get_running_loop()
        if self._looking is None or self._looking.done() or self._looking.get_loop() is not loop:
            self._looking = loop.create_task(self._look())
        try:
            yield event
        finally:
            self._events[prediction_id].discard(event)
            if not self._events[prediction_id]:
                del self._events[prediction_id]

    def wake_all(self) -> None:
        """Wake every coroutine that waits, whatever it waits for."""
        for prediction_id in list(self._events):
            self._set_events(prediction_id)

    async def _look(self) -> None:
        """Wake those whose prediction has a new event, as long as anybody waits."""
        seen: dict[str, int] = {}
        self._gap = asyncio.Event()  # of this loop
        while self._events:
            await next_change(self._gap, self._pubsub.pause(LOOK_AGAIN_S))
            try:
                last = await run_in_threadpool(self._last_events, list(self._events))
            except Exception:  # the database may be back in a second
                LOG.exception("cannot look for changes")
                continue
            for prediction_id, number in last.items():
                # Of one that is new here an event may have come before the first look.
                if seen.get(prediction_id) != number:
                    self._set_events(prediction_id)
            seen = dict(last)

    def _notify(self, prediction_id: str) -> None:
        """Called in the thread that changed the prediction."""
        if prediction_id in self._events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set_events, prediction_id)

    def _notify_gap(self) -> None:
        """Called in the thread that listens to other processes."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._gap.set)

    def _set_events(self, prediction_id: str) -> None:
        for event in self._events.get(prediction_id, ()):
            event.set()


async def next_change(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until the event is set, and clear it; return False if it is not within ``timeout_s``."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except asyncio.TimeoutError:
        return False
    event.clear()
    return True


# The service.

_NAME_LOOKUP_S = 2.0


@dataclass(frozen=True)
class Hardware:
    """A device that predictions run on; ``sku`` is its short name in the API."""

    sku: str
    name: str


class Background(Protocol):
    """Something that works while the server is up, such as the supervisor of the engines."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """Finish or hand back what is in hand, and end."""


@dataclass
class Service:
    """The server below its routes.

    stopping: set once the server is asked to stop. From then on creates are refused, nobody is
        made to wait, and everything else is answered as before.
    resolve: finds the IP addresses of the hosts that webhooks are to go to.
    """

    store: Store
    library: Library
    hardware: Sequence[Hardware]
    background: Sequence[Background] = ()
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False
    resolve: Resolve = system_resolve

    @property
    def settings(self) -> ServerSettings:
        """What the operator set."""
        return self.store.settings

    @cached_property
    def changes(self) -> ChangeNotices:
        """Wakes requests that wait; created by the first of them, in the event loop."""
        return ChangeNotices(self.store.pubsub, self.store.predictions.last_events)

    @cached_property
    def estimates(self) -> RunTimeEstimates:
        """How long predictions of a model are likely to run."""
        measured = usual_seconds(self.settings.bundle)
        return RunTimeEstimates(self.store.usage, UNKNOWN_S if measured is None else measured)

    @cached_property
    def policy(self) -> Policy:
        """Where inputs may be fetched from and webhooks sent to."""
        return Policy.of(self.settings)

    def check_webhook(self, url: str) -> None:
        """Check where the host of a webhook leads; a slow name server is not waited for.

        Raises:
            FetchError: no webhook would ever be sent there.
        """
        check = self._name_lookups.submit(self.policy.check_resolved, url, self.resolve)
        with suppress(FutureTimeoutError):
            check.result(_NAME_LOOKUP_S)

    @cached_property
    def _name_lookups(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(4, thread_name_prefix="names")

    @cached_property
    def local_account(self) -> Account:
        """The account of every request on a server without tokens."""
        return self.store.accounts.ensure("local", "Local")

    def resume(self, cookie: str) -> tuple[Account, Token] | None:
        """Return account and token of a browser that is signed in; None if it is no more."""
        token_id = self.store.links.session_of(cookie, self.store.clock().timestamp())
        return None if token_id is None else self.store.accounts.resume(token_id)

    async def stop(self) -> None:
        """Release everybody who waits, and return once the work is finished or handed back.

        The server may go on to answer requests meanwhile. Stopping twice is stopping once.
        """
        if self.stopping:
            return
        self.stopping = True
        self.changes.wake_all()
        for worker in reversed(self.background):
            await run_in_threadpool(worker.stop)

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """Call something that reads or writes the database, outside the event loop."""
        return await run_in_threadpool(call, *args)

    async def read(self, prediction_id: str) -> Prediction:
        """Return a prediction as it is now."""
        return await run_in_threadpool(self.store.predictions.get, prediction_id)

    async def wait(self, prediction: Prediction, seconds: float) -> Prediction:
        """Return a prediction once it is in a terminal state, or as it is after ``seconds``.

        A server that stops waits no longer.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        with self.changes.of(prediction.id) as event:
            prediction = await self.read(prediction.id)
            while (
                not prediction.status.terminal
                and not self.stopping
                and (left := end - loop.time()) > 0
            ):
                await next_change(event, left)
                prediction = await self.read(prediction.id)
        return prediction

    def deployment(self, owner: str, name: str, account_id: str) -> Deployment:
        """Return a deployment of an account.

        Raises:
            ProblemError: there is none of this name, or it belongs to another account.
        """
        found = self.store.deployments.get(owner, name)
        if found is None or found.account_id != account_id:
            raise not_found()
        return found

    def prediction_answer(
        self, prediction: Prediction, *, inline: bool = True, to_owner: bool = True
    ) -> PredictionAnswer:
        """Return a prediction as it is shown.

        Args:
            prediction: the row.
            inline: allows outputs as data URIs.
            to_owner: also show what concerns its owner alone.
        """
        return prediction_answer(
            prediction,
            self.store.links,
            strict_statuses=self.settings.strict_statuses,
            inline=self.data_uri if inline else None,
            to_owner=to_owner,
        )

    def shared_prediction(self, prediction: Prediction) -> PredictionAnswer:
        """Return a shared prediction as everybody may see it."""
        return self.prediction_answer(prediction, inline=False, to_owner=False)

    def output_json(self, item: Any) -> Any:
        """Return one item of an output, as streams send it."""
        return self.store.links.resolve(item, self.data_uri)

    def data_uri(self, file: Mapping[str, Any]) -> str | None:
        """Return an output file as a data URI, or None where a link is returned.

        Clients turn only ``https:`` and ``data:`` outputs into files; over plain HTTP a program
        that writes its output to a file would write the address.
        """
        limit = 0 if self.settings.secure else self.settings.inline_output_bytes
        if int(file.get("size", limit + 1)) > limit:
            return None
        try:
            kept = self.store.files.get(str(file[FILE_KEY]))
            return encode_data_uri(self.store.files.path(kept).read_bytes(), kept.content_type)
        except (NotFoundError, PathError, OSError):
            return None

    def page_answer(
        self, request: Request, page: Page[T], shown: Callable[[T], Answer]
    ) -> PageAnswer[Answer]:
        """Return a page; its links keep the filters of the request."""

        def link(cursor: str | None) -> str | None:
            if cursor is None:
                return None
            kept = [pair for pair in parse_qsl(request.url.query) if pair[0] != "cursor"]
            query = urlencode([*kept, ("cursor", cursor)])
            return f"{self.settings.public_url}{request.url.path}?{query}"

        results = [shown(item) for item in page.items]
        return PageAnswer(next=link(page.next), previous=link(page.previous), results=results)


# FastAPI's dependencies. They are coroutines because FastAPI would run functions in threads.

_BEARER = HTTPBearer(
    scheme_name="token", auto_error=False, description="A token of `tegula tokens create`."
)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _caller(request: Request, _scheme: Annotated[object, Depends(_BEARER)]) -> Caller:
    """Return the caller; the scheme is there for the OpenAPI document, the gate has checked it."""
    return caller_of(request.state)


ServiceDep = Annotated[Service, Depends(_service)]
CallerDep = Annotated[Caller, Depends(_caller)]
Cursor = Annotated[str | None, Query(description="From `next` or `previous` of a page.")]


def _in_utc(moment: datetime) -> datetime:
    """Return a time in UTC, in which one without an offset is taken to be."""
    if moment.tzinfo is None:
        return moment.replace(tzinfo=timezone.utc)
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError:  # the first day with an offset to the east, the last with one to the west
        raise ValueError("Must be within the years 1 to 9999 in UTC, too") from None


def _no_number(moment: Any) -> Any:
    """Refuse what would be taken for seconds since 1970, whatever it was meant to be."""
    if isinstance(moment, str) and re.fullmatch(
        r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", moment.strip(), re.I
    ):
        raise ValueError("Must be a date and time, such as 2026-11-22T09:30:00Z")
    return moment


Moment = Annotated[
    datetime,
    BeforeValidator(_no_number),
    AfterValidator(_in_utc),
    WithJsonSchema({"type": "string", "anyOf": [{"format": "date-time"}, {"format": "date"}]}),
]
"""A time from outside; every query takes its times as this."""
