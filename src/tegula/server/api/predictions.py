"""Predictions over HTTP: create, wait, list, cancel."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool

from tegula.catalog import InvalidInputsError, validate
from tegula.catalog.inputs import FILE
from tegula.errors import FetchError, InputError, NotFoundError, TooLargeError
from tegula.server.api.bodies import PredictionBody, VersionedPredictionBody
from tegula.server.api.errors import InvalidField, ProblemError, invalid, invalid_header
from tegula.server.api.files import bytes_of
from tegula.server.api.gate import (
    Caller,
    Wait,
    caller_of,
    from_own_page,
    parse_cancel_after,
    parse_prefer,
)
from tegula.server.api.library import Edition
from tegula.server.api.service import Asking, Cursor, Service, Serving, until_finished
from tegula.server.db import (
    DEFAULT_WEBHOOK_EVENTS,
    FILE_KEY,
    Created,
    FileRecord,
    NewPrediction,
    Prediction,
    State,
)
from tegula.server.files import is_data_uri

# The picture that a prediction started from, wherever it came from.

_USUAL = "image"


def source_of(service: Service, prediction: Prediction) -> FileRecord:
    """Return the file behind the input that is enlarged, as this server keeps it.

    Inputs by address have been fetched once for the run; nothing is fetched here.

    Raises:
        NotFoundError: there is none, or none any more.
    """
    value = prediction.input.get(_image_input(service, prediction))
    files = service.store.files
    if isinstance(value, Mapping) and FILE_KEY in value:
        return files.get(value[FILE_KEY], prediction.account_id)
    if not isinstance(value, str):
        raise NotFoundError("This prediction has no picture to start from.")
    if own := service.store.links.own_file(value):
        file_id, public = own
        return files.get(file_id, None if public else prediction.account_id)
    return files.fetched(prediction.id, value)


def _image_input(service: Service, prediction: Prediction) -> str:
    """Return the name of that input; versions of an earlier release are not known any more."""
    inputs: Mapping[str, Any] = prediction.input
    try:
        edition = service.library.resolve(prediction.version, inputs, prediction.account_id)
    except ProblemError:
        return _USUAL
    return edition.base.image


# Creating a prediction: from a request's body to its answer.

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


# Predictions: create, get, list, cancel, share, remove.

router = APIRouter(prefix="/v1", tags=["predictions"])

_WEB_DAYS = 14


def _documented(
    prefer: Annotated[str | None, Header(description="`wait` or `wait=n`, 1 to 60 s.")] = None,
    cancel_after: Annotated[str | None, Header(description="Such as `30s` or `1h30m`.")] = None,
    idempotency_key: Annotated[str | None, Header(description="Makes a retry safe.")] = None,
) -> None:
    """Put the headers of a create into the OpenAPI document; ``creating`` reads them."""


CREATED: dict[int | str, dict[str, Any]] = {
    201: {"description": "Accepted, or done within the wait"},
    202: {"description": "Accepted, and not done within the wait"},
}
Documented = Depends(_documented)


@router.post("/predictions", status_code=201, responses=CREATED, dependencies=[Documented])
async def create_prediction(
    request: Request, service: Serving, caller: Asking, body: VersionedPredictionBody
) -> Response:
    """Run a version, named by id, `owner/name`, `owner/name:id` or `latest`."""
    edition = await service.run(
        service.library.resolve, body.version, body.input, caller.account.id
    )
    return await create(request, service, Order(edition, body))


@router.post(
    "/models/{owner}/{name}/predictions",
    status_code=201, responses=CREATED, dependencies=[Documented],
)  # fmt: skip
async def create_prediction_of_model(
    request: Request, service: Serving, caller: Asking, owner: str, name: str, body: PredictionBody
) -> Response:
    """Run the latest version of a model."""
    edition = await service.run(service.library.edition, owner, name, "latest", caller.account.id)
    return await create(request, service, Order(edition, body))


@router.post(
    "/deployments/{owner}/{name}/predictions",
    status_code=201, responses=CREATED, dependencies=[Documented],
)  # fmt: skip
async def create_prediction_of_deployment(
    request: Request, service: Serving, caller: Asking, owner: str, name: str, body: PredictionBody
) -> Response:
    """Run what a deployment pins."""
    deployment = await service.run(service.deployment, owner, name, caller.account.id)
    if deployment.max_instances == 0:
        raise ProblemError(422, f"{deployment.full_name} is disabled: max_instances is 0.")
    model_owner, _, model = deployment.model.partition("/")
    edition = await service.run(
        service.library.edition, model_owner, model, deployment.version, caller.account.id
    )
    order = Order(edition, body, deployment.full_name, deployment.defaults)
    return await create(request, service, order)


@router.get("/predictions")
def list_predictions(
    request: Request,
    service: Serving,
    caller: Asking,
    cursor: Cursor = None,
    created_after: Annotated[datetime | None, Query(description="At or after this.")] = None,
    created_before: Annotated[datetime | None, Query(description="Before this.")] = None,
    source: Annotated[Literal["web"] | None, Query(description="Made on the web page.")] = None,
) -> JSONResponse:
    """List your predictions, newest first; outputs are links."""
    if source == "web" and created_after is None:
        created_after = service.store.clock() - timedelta(days=_WEB_DAYS)
    page = service.store.predictions.page(
        caller.account.id,
        cursor=cursor,
        created_after=_aware(created_after),
        created_before=_aware(created_before),
        source=source,
    )
    told = [service.told(item, inline=False) for item in page.items]
    return JSONResponse(service.page(request, page, told))


@router.get("/predictions/{prediction_id}")
def get_prediction(service: Serving, caller: Asking, prediction_id: str) -> JSONResponse:
    """Get a prediction."""
    return JSONResponse(
        service.told(service.store.predictions.get(prediction_id, caller.account.id))
    )


@router.get("/predictions/{prediction_id}/source", response_class=FileResponse)
def get_source(service: Serving, caller: Asking, prediction_id: str) -> Response:
    """Get the picture that a prediction started from, as long as it is kept here."""
    prediction = service.store.predictions.get(prediction_id, caller.account.id)
    return bytes_of(service, source_of(service, prediction))


@router.post("/predictions/{prediction_id}/cancel")
def cancel_prediction(service: Serving, caller: Asking, prediction_id: str) -> JSONResponse:
    """Cancel a prediction; one that is over is returned as it is."""
    cancelled = service.store.predictions.cancel(prediction_id, caller.account.id)
    return JSONResponse(service.told(cancelled))


@router.delete("/predictions/{prediction_id}", status_code=204)
def remove_prediction(service: Serving, caller: Asking, prediction_id: str) -> Response:
    """Remove the input, output, files and logs of a prediction now; cancel it first."""
    service.store.predictions.remove(prediction_id, caller.account.id)
    return Response(status_code=204)


@router.post("/predictions/{prediction_id}/share", tags=["sharing"])
def share_prediction(service: Serving, caller: Asking, prediction_id: str) -> JSONResponse:
    """Open the page of a prediction to whoever has the address that this returns."""
    shared = service.store.predictions.share(prediction_id, caller.account.id)
    return JSONResponse({"url": _shared_url(service, shared)})


@router.get("/predictions/{prediction_id}/share", tags=["sharing"])
def get_share(service: Serving, caller: Asking, prediction_id: str) -> JSONResponse:
    """Get the address of the page if it is shared; `url` is null if it is not."""
    shared = service.store.predictions.get(prediction_id, caller.account.id)
    return JSONResponse({"url": _shared_url(service, shared)})


@router.delete("/predictions/{prediction_id}/share", status_code=204, tags=["sharing"])
def unshare_prediction(service: Serving, caller: Asking, prediction_id: str) -> Response:
    """Make that address worthless."""
    service.store.predictions.unshare(prediction_id, caller.account.id)
    return Response(status_code=204)


@router.get("/shared/{share_token}", tags=["sharing"])
def get_shared(service: Serving, share_token: str) -> JSONResponse:
    """Get a shared prediction; needs no token of an account."""
    return JSONResponse(service.told_to_all(service.store.predictions.shared(share_token)))


@router.get("/shared/{share_token}/source", tags=["sharing"], response_class=FileResponse)
def get_shared_source(service: Serving, share_token: str) -> Response:
    """Get the picture that a shared prediction started from."""
    shared = service.store.predictions.shared(share_token)
    return bytes_of(service, source_of(service, shared))


def _shared_url(service: Service, prediction: Prediction) -> str | None:
    if prediction.share_token is None:
        return None
    return f"{service.store.links.web(prediction.id)}?share={prediction.share_token}"


def _aware(moment: datetime | None) -> datetime | None:
    if moment is None or moment.tzinfo:
        return moment
    return moment.replace(tzinfo=timezone.utc)
