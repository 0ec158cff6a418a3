"""Creating a prediction: from a request's body to its answer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tegula.api.bodies import PredictionBody
from tegula.api.gate import Caller, caller_of
from tegula.api.headers import Wait, parse_cancel_after, parse_prefer
from tegula.api.library import Edition
from tegula.api.origins import from_own_page
from tegula.api.problems import InvalidField, ProblemError, invalid, invalid_header
from tegula.api.service import Service
from tegula.api.waiting import until_finished
from tegula.catalog import InvalidInputsError, validate
from tegula.catalog.schema import FILE
from tegula.errors import FetchError, InputError, TooLargeError
from tegula.predictions.data_uris import is_data_uri
from tegula.predictions.records import DEFAULT_WEBHOOK_EVENTS, Created, NewPrediction, Prediction
from tegula.predictions.states import State

LOG = logging.getLogger("tegula.api")
_LONGEST_KEY = 255


@dataclass(frozen=True)
class Order:
    """What is asked for, after the version has been found.

    pinned: inputs of a deployment, below those of the request.
    """

    edition: Edition
    body: PredictionBody
    deployment: str | None = None
    pinned: Mapping[str, Any] | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """Every input that is given, by the request or for it."""
        return {**self.edition.defaults, **(self.pinned or {}), **self.body.input}


@dataclass(frozen=True)
class _Terms:
    """What the headers of a create say."""

    wait: Wait | None
    cancel_after: int | None
    key: str | None


async def create(request: Request, service: Service, order: Order) -> Response:
    """Accept a prediction, hold the request open if it wants so, and answer.

    A client that goes away while it waits cancels nothing.

    Raises:
        ProblemError: an input or a header is wrong.
        BusyError, ConflictError: as the store has them.
    """
    terms = _terms(request)
    caller = caller_of(request.state)
    asked = await run_in_threadpool(_hash, request, order.body)
    repeat = f"{caller.token_id or caller.account.id} {asked}"
    created = await _repeated(service, terms, repeat)
    if created is None:
        created = await run_in_threadpool(_accept, request, service, caller, order, terms, asked)
    prediction = created.prediction
    request.state.prediction = prediction.id
    if not created.replayed:
        extra = {"prediction": prediction.id, "account": caller.account.username}
        LOG.info("accepted %s", prediction.model, extra=extra)
    if terms.wait is not None:
        prediction = await _hold(request, service, prediction, terms.wait, repeat)
    return await run_in_threadpool(_answer, service, prediction, terms, created.replayed)


async def _repeated(service: Service, terms: _Terms, repeat: str) -> Created | None:
    """Return what an equal request made whose client gave up waiting for the answer."""
    earlier = None if terms.key else await service.repeats.earlier(repeat)
    if earlier is None:
        return None
    prediction = await service.read(earlier)
    of_use = not prediction.status.terminal or prediction.status is State.SUCCEEDED
    return Created(prediction, replayed=True) if of_use and not prediction.data_removed else None


async def _hold(
    request: Request, service: Service, prediction: Prediction, wait: Wait, repeat: str
) -> Prediction:
    held = service.repeats.hold(repeat, prediction.id, request.is_disconnected)
    try:
        return await until_finished(service.watch, prediction, service.read, wait.hold_s)
    finally:
        await service.repeats.release(repeat, held)


def _hash(request: Request, body: PredictionBody) -> str:
    """Return what is the same for two requests that ask for the same."""
    asked = json.dumps([request.url.path, body.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()


def _terms(request: Request) -> _Terms:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _LONGEST_KEY:
        raise invalid_header("Idempotency-Key", f"Must have 1 to {_LONGEST_KEY} characters")
    return _Terms(
        parse_prefer(request.headers.get("prefer")),
        parse_cancel_after(request.headers.get("cancel-after")),
        key,
    )


def _accept(
    request: Request, service: Service, caller: Caller, order: Order, terms: _Terms, asked: str
) -> Created:
    _check(order)
    _check_webhook(service, order.body)
    store, body = service.store, order.body
    inputs = _with_files(service, caller, order)
    deadline = terms.cancel_after and store.clock() + timedelta(seconds=terms.cancel_after)
    events = body.webhook_events_filter or body.webhook_event_filter
    legacy = ["completed"] if body.webhook is None and body.webhook_completed else None
    new = NewPrediction(
        account_id=caller.account.id,
        model=order.edition.model,
        version=order.edition.id,
        input=inputs,
        source="web" if from_own_page(request.headers, service.settings) else "api",
        token_id=caller.token_id,
        deployment=order.deployment,
        deadline=deadline or None,
        webhook=body.webhook or body.webhook_completed,
        webhook_events=tuple(events or legacy or DEFAULT_WEBHOOK_EVENTS),
        estimated_seconds=service.estimate(order.edition.model),
    )
    return store.predictions.create(new, idempotency_key=terms.key, request_hash=asked)


def _check(order: Order) -> None:
    try:
        validate(order.edition.base, order.inputs)
    except InvalidInputsError as error:
        wrong = (InvalidField(one.type, one.field, one.description) for one in error.fields)
        raise invalid(*wrong) from error


def _with_files(service: Service, caller: Caller, order: Order) -> Mapping[str, Any]:
    """Return the inputs with the data URIs among them kept as files."""
    names = [known.name for known in order.edition.base.fields if known.kind == FILE]
    wrong = [one for name in names if (one := _wrong_url(service, name, order.inputs.get(name)))]
    if wrong:
        raise invalid(*wrong)
    try:
        return service.store.files.adopt(order.inputs, caller.account.id, names)
    except TooLargeError as error:
        raise ProblemError(413, str(error), "Too large") from error
    except InputError as error:
        raise invalid(InvalidField("format", "input", str(error))) from error


def _wrong_url(service: Service, name: str, value: Any) -> InvalidField | None:
    """Refuse at once what would not be fetched later."""
    if not isinstance(value, str) or value == "" or is_data_uri(value):
        return None
    if service.store.links.own_file(value):
        return None
    try:
        service.policy.check(value)
    except FetchError as error:
        return InvalidField("format", f"input.{name}", str(error))
    return None


def _check_webhook(service: Service, body: PredictionBody) -> None:
    url = body.webhook or body.webhook_completed
    try:
        if url is not None:
            service.policy.check(url)
    except FetchError as error:
        raise invalid(InvalidField("format", "webhook", str(error))) from error


def _answer(
    service: Service,
    prediction: Prediction,
    terms: _Terms,
    replayed: bool,  # noqa: FBT001
) -> Response:
    told = service.told(prediction)
    headers = {"preference-applied": terms.wait.applied} if terms.wait else {}
    if replayed:
        headers["idempotent-replayed"] = "true"
    if terms.wait is None or prediction.status.terminal:
        return JSONResponse(told, 201, headers)
    # Clients take any other state than this one as the end of a wait.
    return JSONResponse({**told, "status": State.STARTING.value}, 202, headers)
