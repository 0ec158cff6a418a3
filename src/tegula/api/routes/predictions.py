"""Predictions: create, get, list, cancel, share, remove."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from tegula.api.bodies import PredictionBody, VersionedPredictionBody
from tegula.api.creating import Order, create
from tegula.api.dependencies import Asking, Cursor, Serving
from tegula.api.problems import ProblemError
from tegula.api.routes.files import bytes_of
from tegula.api.service import Service
from tegula.api.sources import source_of
from tegula.predictions.records import Prediction

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
