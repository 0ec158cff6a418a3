"""Creating a prediction: from the request to its answer, 201 or 202.

``create`` is the whole way, top to bottom: read the headers; look whether this is a request that
a client sends again; check the inputs and keep files given as data URIs; add the prediction to the
queue; hold the request open for as long as ``Prefer: wait`` asks; answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from tegula.catalog import InvalidField, InvalidInputsError, validate
from tegula.catalog.inputs import FILE
from tegula.errors import FetchError, InputError, TooLargeError
from tegula.server.addresses import host_of
from tegula.server.api.answers import respond
from tegula.server.api.bodies import PredictionBody
from tegula.server.api.errors import ProblemError, invalid, invalid_header
from tegula.server.api.gate import caller_of, from_own_page
from tegula.server.api.library import ServedVersion
from tegula.server.api.receiving import ReceivedBody, beside_the_loop
from tegula.server.api.service import Service
from tegula.server.predictions import Created, NewPrediction
from tegula.server.tables import DEFAULT_WEBHOOK_EVENTS, State

log = logging.getLogger("tegula.api")

# The headers of a create.

MAX_WAIT_S = 60
_LONGEST_HOLD_S = 55.0
_SHORTEST_DEADLINE_S = 5
LONGEST_KEY = 255
_LONG_TEXT, _SLICE = 1 << 12, 1 << 20
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


def parse_prefer(value: str | None) -> Wait | None:
    """Return the wait that a ``Prefer`` header asks for, if any.

    Other preferences are passed over, as RFC 7240 wants. A wait of more than a minute is
    taken as a minute.

    Raises:
        ProblemError: the wait is not a number of seconds from 1 up.
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
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = min(hours * 3600 + minutes * 60 + seconds, 10**9)
    if total < _SHORTEST_DEADLINE_S:
        raise invalid_header("Cancel-After", "Must be a duration of at least 5s, like 30s or 1h30m")
    return total


# Retried requests. A create that is held open may take longer than the client, or a proxy on the
# way, is willing to wait. Such clients then send the same body again, which would start the work
# anew. An equal request whose client is still connected is another matter: both get a prediction.

REMEMBERED_S = 60.0
"""How long an abandoned request is remembered; clients retry within seconds."""

Disconnected = Callable[[], Awaitable[bool]]


@dataclass
class _PendingCreate:
    """A create that is held open, or was until its client disconnected.

    disconnected: asks whether the client did, while the request is held; None afterwards.
    forget_at: when an abandoned request is forgotten.
    """

    prediction_id: str
    disconnected: Disconnected | None
    forget_at: float | None = None


class RetriedRequests:
    """Remembers creates whose client went away, by a key of caller and body.

    Used by one event loop only. What it knows is lost with the process: a client for which two
    runs must be ruled out sends an ``Idempotency-Key``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: dict[str, list[_PendingCreate]] = {}

    async def take_abandoned(self, key: str) -> str | None:
        """Return the prediction of an equal request whose client is gone, and forget it."""
        now = self._clock()
        for other, entries in list(self._pending.items()):
            for pending in list(entries):
                if pending.forget_at is not None and pending.forget_at < now:
                    self._drop(other, pending)
        for pending in list(self._pending.get(key, ())):
            gone = pending.disconnected is None or await pending.disconnected()
            # Another retry may have taken it while this one waited.
            if gone and self._drop(key, pending):
                return pending.prediction_id
        return None

    def hold(self, key: str, prediction_id: str, disconnected: Disconnected) -> _PendingCreate:
        """Note that a request is held open from now on."""
        pending = _PendingCreate(prediction_id, disconnected)
        self._pending.setdefault(key, []).append(pending)
        return pending

    async def release(self, key: str, pending: _PendingCreate) -> None:
        """Note that it is answered; if nobody is there to receive the answer, remember it."""
        if pending.disconnected is not None and await pending.disconnected():
            pending.disconnected, pending.forget_at = None, self._clock() + REMEMBERED_S
        else:
            self._drop(key, pending)

    def _drop(self, key: str, pending: _PendingCreate) -> bool:
        """Forget a request; return whether it was still known."""
        known = self._pending.get(key, [])
        left = [other for other in known if other is not pending]
        if left:
            self._pending[key] = left
        else:
            self._pending.pop(key, None)
        return len(left) < len(known)


# The create itself.


@dataclass(frozen=True)
class PredictionRequest:
    """What a request asks for, once its version is found.

    deployment: ``owner/name``, if it came through one.
    pinned: the deployment's inputs; those of the request override them.
    """

    version: ServedVersion
    body: PredictionBody
    deployment: str | None = None
    pinned: Mapping[str, Any] | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """Every input that is given, by the request or for it."""
        return {**self.version.defaults, **(self.pinned or {}), **self.body.input}

    @property
    def file_fields(self) -> Collection[str]:
        """The names of the inputs that are files."""
        return [field.name for field in self.version.base.fields if field.kind == FILE]

    @property
    def webhook(self) -> str | None:
        """Where to send webhooks, by its name of today or of older clients."""
        return self.body.webhook or self.body.webhook_completed

    @property
    def webhook_events(self) -> tuple[str, ...]:
        """Which webhooks to send; the name ``webhook_completed`` stands for one event."""
        body = self.body
        completed = ["completed"] if body.webhook is None and body.webhook_completed else None
        chosen = body.webhook_events_filter or body.webhook_event_filter or completed
        return tuple(chosen or DEFAULT_WEBHOOK_EVENTS)


async def create(request: Request, service: Service, wanted: PredictionRequest) -> Response:
    """Accept a prediction, hold the request open if it prefers that, and answer.

    A client that disconnects while it waits cancels nothing.

    Raises:
        ProblemError: an input or a header is wrong.
        BusyError, ConflictError: as the store raises them.
    """
    caller = caller_of(request.state)
    retried: RetriedRequests = request.app.state.retried
    wait = parse_prefer(request.headers.get("prefer"))
    cancel_after = parse_cancel_after(request.headers.get("cancel-after"))
    idempotency_key = request.headers.get("idempotency-key")
    if idempotency_key is not None and not 0 < len(idempotency_key) <= LONGEST_KEY:
        raise invalid_header("Idempotency-Key", f"Must have 1 to {LONGEST_KEY} characters")

    received: ReceivedBody = request.state.body
    request_hash = await beside_the_loop(received, _hash, request.url.path, wanted.body)
    retry_key = f"{caller.key} {request_hash}"
    created = None if idempotency_key else await _abandoned(service, retried, retry_key)

    def accept() -> Created:
        _check(service, wanted)
        store = service.store
        now = store.clock()
        remote = next(store.files.remote(wanted.inputs, wanted.file_fields), None)
        new = NewPrediction(
            account_id=caller.account.id,
            model=wanted.version.model,
            version=wanted.version.id,
            label=wanted.version.label,
            input=_keep_files(service, caller.account.id, wanted),
            fetch_host=None if remote is None else host_of(remote.url),
            source="web" if from_own_page(request.headers, service.settings) else "api",
            token_id=caller.token_id,
            deployment=wanted.deployment,
            deadline=now + timedelta(seconds=cancel_after) if cancel_after else None,
            webhook=wanted.webhook,
            webhook_events=wanted.webhook_events,
            estimated_seconds=service.estimates.get(wanted.version.model),
        )
        return store.predictions.create(
            new, idempotency_key=idempotency_key, request_hash=request_hash
        )

    if created is None:
        created = await beside_the_loop(received, accept)
    wanted.body.input.clear()  # files are on the disk now, and a held request has no use for them
    received.release()
    prediction = created.prediction
    request.state.prediction = prediction.id  # for the log
    if not created.replayed:
        extra = {"prediction": prediction.id, "account": caller.account.username}
        log.info("accepted %s", prediction.model, extra=extra)

    if wait is not None:
        pending = retried.hold(retry_key, prediction.id, request.is_disconnected)
        try:
            prediction = await service.wait(prediction, wait.hold_s)
        finally:
            await retried.release(retry_key, pending)

    headers = {"preference-applied": f"wait={wait.seconds}"} if wait else {}
    if created.replayed:
        headers["idempotent-replayed"] = "true"
    shown = await run_in_threadpool(service.prediction_answer, prediction)
    if wait is None or prediction.status.terminal:
        return respond(shown, 201, headers)
    # Clients take any other state than this one as the end of a wait.
    return respond(shown.model_copy(update={"status": State.STARTING.value}), 202, headers)


def _hash(path: str, body: PredictionBody) -> str:
    """Return what two requests have in common if they ask for the same."""
    content = json.dumps([path, _brief(body.model_dump())], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _brief(value: Any) -> Any:
    """Return a value with hashes in place of its long texts, which are hashed in slices."""
    if isinstance(value, Mapping):
        return {key: _brief(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_brief(part) for part in value]
    if not isinstance(value, str) or len(value) <= _LONG_TEXT:
        return value
    digest = hashlib.sha256()
    for start in range(0, len(value), _SLICE):
        digest.update(value[start : start + _SLICE].encode())
    return {"sha256": digest.hexdigest()}


async def _abandoned(service: Service, retried: RetriedRequests, retry_key: str) -> Created | None:
    """Return the prediction of an equal, abandoned request, unless it came to nothing."""
    prediction_id = await retried.take_abandoned(retry_key)
    if prediction_id is None:
        return None
    prediction = await service.read(prediction_id)
    failed = prediction.status.terminal and prediction.status is not State.SUCCEEDED
    return None if failed or prediction.data_removed else Created(prediction, replayed=True)


def _check(service: Service, wanted: PredictionRequest) -> None:
    """Check the inputs, and at once what could only fail later: addresses that are out of bounds.

    Raises:
        ProblemError: lists what is wrong.
    """
    try:
        validate(wanted.version.base, wanted.inputs)
    except InvalidInputsError as error:
        raise invalid(*error.fields) from error
    remote = service.store.files.remote(wanted.inputs, wanted.file_fields)
    addresses = [(f"input.{each.name}", each.url) for each in remote]
    if wanted.webhook:
        addresses.append(("webhook", wanted.webhook))
    wrong = []
    for field, address in addresses:
        try:
            service.policy.check(address)
            if field == "webhook":
                service.check_webhook(address)
        except FetchError as error:  # noqa: PERF203
            wrong.append(InvalidField("format", field, str(error)))
    if wrong:
        raise invalid(*wrong)


def _keep_files(service: Service, account_id: str, wanted: PredictionRequest) -> Mapping[str, Any]:
    """Return the inputs with the data URIs among them kept as files."""
    kept: dict[str, Any] = {}
    for name, value in wanted.inputs.items():
        try:
            kept |= service.store.files.adopt({name: value}, account_id, wanted.file_fields)
        except TooLargeError as error:  # noqa: PERF203
            raise ProblemError(413, f"input.{name}: {error}", "Too large") from error
        except InputError as error:
            raise invalid(InvalidField("format", f"input.{name}", str(error))) from error
    return kept
