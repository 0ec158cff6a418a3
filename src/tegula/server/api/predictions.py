"""Predictions over HTTP: create, get, list, cancel, share, remove."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from tegula.errors import NotFoundError
from tegula.server.api.answers import PageAnswer, ShareAnswer, respond
from tegula.server.api.bodies import PredictionBody, VersionedPredictionBody
from tegula.server.api.create import PredictionRequest, create
from tegula.server.api.errors import ProblemError, documented, problems
from tegula.server.api.files import STORED_FILE, file_response
from tegula.server.api.library import LATEST
from tegula.server.api.receiving import JsonRoute
from tegula.server.api.service import CallerDep, Cursor, Moment, Service, ServiceDep
from tegula.server.links import PredictionAnswer
from tegula.server.tables import FileRecord, Prediction

router = APIRouter(
    prefix="/v1", tags=["predictions"], route_class=JsonRoute, strict_content_type=False
)

_WEB_DAYS = 14


def _header(name: str, description: str, example: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "description": description,
        "schema": {"type": "string"},
        "example": example,
    }


_REQUEST_HEADERS = {
    "parameters": [
        _header("Prefer", "`wait` or `wait=n`, 1 to 60 s.", "wait=30"),
        _header("Cancel-After", "At least 5 s, such as `30s` or `1h30m`.", "1h30m"),
        _header("Idempotency-Key", "Makes a retry safe.", "order-71"),
    ]
}
"""``create`` reads them itself; as parameters of the routes they would be read twice."""

_WAIT_HEADERS = {
    "Preference-Applied": documented("The wait that was granted: `wait=n`."),
    "Idempotent-Replayed": documented("`true` where an earlier request made the prediction."),
}
_CREATED: dict[int | str, dict[str, Any]] = {
    201: {"description": "Accepted, or done within the wait", "headers": _WAIT_HEADERS},
    202: {
        "model": PredictionAnswer,
        "description": "Accepted, and not done within the wait",
        "headers": _WAIT_HEADERS,
    },
    **problems(409, 429, 503),
}


@router.post(
    "/predictions",
    operation_id="predictions.create", status_code=201, response_model=PredictionAnswer,
    responses=_CREATED, openapi_extra=_REQUEST_HEADERS,
)  # fmt: skip
async def create_prediction(
    request: Request, service: ServiceDep, caller: CallerDep, body: VersionedPredictionBody
) -> Response:
    """Run a version, named by id, `owner/name`, `owner/name:id` or `latest`."""
    version = await service.run(
        service.library.resolve, body.version, body.input, caller.account.id
    )
    return await create(request, service, PredictionRequest(version, body))


@router.post(
    "/models/{owner}/{name}/predictions",
    operation_id="models.predictions.create", status_code=201, response_model=PredictionAnswer,
    responses={**_CREATED, **problems(404)}, openapi_extra=_REQUEST_HEADERS,
)  # fmt: skip
async def create_prediction_of_model(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    owner: str,
    name: str,
    body: PredictionBody,
) -> Response:
    """Run the latest version of a model."""
    version = await service.run(service.library.version, owner, name, LATEST, caller.account.id)
    return await create(request, service, PredictionRequest(version, body))


@router.post(
    "/deployments/{owner}/{name}/predictions",
    operation_id="deployments.predictions.create", status_code=201, response_model=PredictionAnswer,
    responses={**_CREATED, **problems(404)}, openapi_extra=_REQUEST_HEADERS,
)  # fmt: skip
async def create_prediction_of_deployment(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    owner: str,
    name: str,
    body: PredictionBody,
) -> Response:
    """Run what a deployment pins."""
    deployment = await service.run(service.deployment, owner, name, caller.account.id)
    if deployment.max_instances == 0:
        raise ProblemError(422, f"{deployment.full_name} is disabled: max_instances is 0.")
    version = await service.run(service.library.deployed, deployment, caller.account.id)
    wanted = PredictionRequest(version, body, deployment.full_name, deployment.defaults)
    return await create(request, service, wanted)


@router.get(
    "/predictions", operation_id="predictions.list", response_model=PageAnswer[PredictionAnswer]
)
def list_predictions(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    cursor: Cursor = None,
    created_after: Annotated[Moment | None, Query(description="At or after this.")] = None,
    created_before: Annotated[Moment | None, Query(description="Before this.")] = None,
    source: Annotated[Literal["web"] | None, Query(description="Created on the web page.")] = None,
) -> JSONResponse:
    """List your predictions, newest first; outputs are links."""
    if source == "web" and created_after is None:
        created_after = service.store.clock() - timedelta(days=_WEB_DAYS)
    page = service.store.predictions.page(
        caller.account.id,
        cursor=cursor,
        created_after=created_after,
        created_before=created_before,
        source=source,
    )
    shown = partial(service.prediction_answer, inline=False)
    return respond(service.page_answer(request, page, shown))


@router.get(
    "/predictions/{prediction_id}",
    operation_id="predictions.get",
    response_model=PredictionAnswer,
    responses=problems(404),
)
def get_prediction(service: ServiceDep, caller: CallerDep, prediction_id: str) -> JSONResponse:
    """Get a prediction."""
    found = service.store.predictions.get(prediction_id, caller.account.id)
    return respond(service.prediction_answer(found))


@router.get(
    "/predictions/{prediction_id}/source",
    response_class=FileResponse,
    operation_id="predictions.source.get",
    responses=STORED_FILE,
)
def get_source(service: ServiceDep, caller: CallerDep, prediction_id: str) -> Response:
    """Get the picture that a prediction started from, as long as it is kept here."""
    prediction = service.store.predictions.get(prediction_id, caller.account.id)
    return file_response(service, source_of(service, prediction))


@router.post(
    "/predictions/{prediction_id}/cancel",
    operation_id="predictions.cancel",
    response_model=PredictionAnswer,
    responses=problems(404),
)
def cancel_prediction(service: ServiceDep, caller: CallerDep, prediction_id: str) -> JSONResponse:
    """Cancel a prediction; one that is over is returned as it is."""
    cancelled = service.store.predictions.cancel(prediction_id, caller.account.id)
    return respond(service.prediction_answer(cancelled))


@router.delete(
    "/predictions/{prediction_id}",
    status_code=204,
    operation_id="predictions.delete",
    responses=problems(404),
)
def remove_prediction(service: ServiceDep, caller: CallerDep, prediction_id: str) -> Response:
    """Remove the input, output, files and logs of a prediction now; cancel it first."""
    service.store.predictions.remove(prediction_id, caller.account.id)
    return Response(status_code=204)


@router.post(
    "/predictions/{prediction_id}/share",
    tags=["sharing"],
    operation_id="predictions.share.create",
    response_model=ShareAnswer,
    responses=problems(404),
)
def share_prediction(service: ServiceDep, caller: CallerDep, prediction_id: str) -> JSONResponse:
    """Open the page of a prediction to whoever has the address that this returns."""
    shared = service.store.predictions.share(prediction_id, caller.account.id)
    return respond(ShareAnswer(url=_shared_url(service, shared)))


@router.get(
    "/predictions/{prediction_id}/share",
    tags=["sharing"],
    operation_id="predictions.share.get",
    response_model=ShareAnswer,
    responses=problems(404),
)
def get_share(service: ServiceDep, caller: CallerDep, prediction_id: str) -> JSONResponse:
    """Get the address of the page if it is shared; `url` is null if it is not."""
    shared = service.store.predictions.get(prediction_id, caller.account.id)
    return respond(ShareAnswer(url=_shared_url(service, shared)))


@router.delete(
    "/predictions/{prediction_id}/share",
    status_code=204,
    tags=["sharing"],
    operation_id="predictions.share.delete",
    responses=problems(404),
)
def unshare_prediction(service: ServiceDep, caller: CallerDep, prediction_id: str) -> Response:
    """Close that page again; its address stops working."""
    service.store.predictions.unshare(prediction_id, caller.account.id)
    return Response(status_code=204)


@router.get(
    "/shared/{share_token}",
    tags=["sharing"],
    operation_id="shared.get",
    response_model=PredictionAnswer,
    responses=problems(404),
)
def get_shared(service: ServiceDep, share_token: str) -> JSONResponse:
    """Get a shared prediction; needs no token of an account."""
    shared = service.store.predictions.shared(share_token)
    return respond(service.shared_prediction(shared))


@router.get(
    "/shared/{share_token}/source",
    tags=["sharing"],
    response_class=FileResponse,
    operation_id="shared.source.get",
    responses=STORED_FILE,
)
def get_shared_source(service: ServiceDep, share_token: str) -> Response:
    """Get the picture that a shared prediction started from."""
    shared = service.store.predictions.shared(share_token)
    return file_response(service, source_of(service, shared))


def _shared_url(service: Service, prediction: Prediction) -> str | None:
    if prediction.share_token is None:
        return None
    return f"{service.store.links.web(prediction.id)}?share={prediction.share_token}"


def source_of(service: Service, prediction: Prediction) -> FileRecord:
    """Return the kept file of the picture that a prediction started from.

    An input given as an address was fetched for the run and kept; nothing is fetched here.

    Raises:
        NotFoundError: there is none, or none any more.
    """
    value = prediction.input.get(_image_input(service, prediction))
    if not value or not isinstance(value, str | Mapping):
        raise NotFoundError("This prediction has no picture to start from.")
    return service.store.files.of_input(value, prediction)


def _image_input(service: Service, prediction: Prediction) -> str:
    """Return the name of that input."""
    label = prediction.label
    reference = prediction.version if label is None else f"{prediction.model}:{label}"
    try:
        version = service.library.resolve(reference, prediction.input, prediction.account_id)
    except ProblemError:  # the version is gone
        return "image"
    return version.base.image
