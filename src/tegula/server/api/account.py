"""The account over HTTP: hardware, usage, secrets, trainings; and what operators look at."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy.exc import SQLAlchemyError

from tegula.errors import PathError
from tegula.server.api.answers import (
    AccountAnswer,
    DeliveryAnswer,
    HardwareAnswer,
    LiveAnswer,
    PageAnswer,
    ReadyAnswer,
    UsageAnswer,
    UsageLine,
    WebhookSecretAnswer,
    account_answer,
    delivery_answer,
    respond,
)
from tegula.server.api.errors import not_found, not_ready, problems, stopping
from tegula.server.api.service import CallerDep, Cursor, Moment, ServiceDep
from tegula.server.db import Page
from tegula.server.links import Answer
from tegula.server.settings import MIB

router = APIRouter(prefix="/v1", tags=["account"])
operations_router = APIRouter(tags=["operations"])


@router.get("/account", operation_id="account.get", response_model=AccountAnswer)
def get_account(caller: CallerDep) -> JSONResponse:
    """Get the account that the token belongs to."""
    return respond(account_answer(caller.account))


@router.get("/hardware", operation_id="hardware.list", response_model=list[HardwareAnswer])
def list_hardware(service: ServiceDep, caller: CallerDep) -> JSONResponse:  # noqa: ARG001
    """List the devices of this server."""
    devices = [HardwareAnswer(sku=one.sku, name=one.name) for one in service.hardware]
    return JSONResponse([device.as_json() for device in devices])


@router.get("/usage", operation_id="usage.get", response_model=UsageAnswer)
def get_usage(
    service: ServiceDep,
    caller: CallerDep,
    since: Annotated[Moment | None, Query(description="Only predictions that ended since.")] = None,
) -> JSONResponse:
    """List the seconds that your tokens used, by model; it takes the place of a bill."""
    names = {token.id: token.name for token in service.store.accounts.tokens(caller.account.id)}
    lines = service.store.usage.lines(caller.account.id, since)
    results = [
        UsageLine(
            model=line.model,
            token=names.get(line.token_id or ""),
            predictions=line.predictions,
            predict_seconds=round(line.predict_seconds, 6),
        )
        for line in lines
    ]
    return respond(UsageAnswer(results=results))


@router.get(
    "/webhooks/default/secret",
    tags=["webhooks"],
    operation_id="webhooks.default.secret.get",
    response_model=WebhookSecretAnswer,
)
def get_webhook_secret(service: ServiceDep, caller: CallerDep) -> JSONResponse:
    """Get the secret that signs your webhooks."""
    return respond(WebhookSecretAnswer(key=service.store.webhooks.secret(caller.account.id)))


@router.post(
    "/webhooks/default/secret/rotate",
    tags=["webhooks"],
    operation_id="webhooks.default.secret.rotate",
    response_model=WebhookSecretAnswer,
)
def rotate_webhook_secret(service: ServiceDep, caller: CallerDep) -> JSONResponse:
    """Replace the secret; for a day webhooks carry the signatures of both."""
    key = service.store.webhooks.rotate_secret(caller.account.id)
    return respond(WebhookSecretAnswer(key=key))


@router.get(
    "/webhooks/deliveries",
    tags=["webhooks"],
    operation_id="webhooks.deliveries.list",
    response_model=PageAnswer[DeliveryAnswer],
)
def list_webhook_deliveries(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    cursor: Cursor = None,
    prediction: Annotated[str | None, Query(description="Of this prediction.")] = None,
    state: Annotated[
        Literal["pending", "delivered", "failed"] | None, Query(description="In this state.")
    ] = None,
) -> JSONResponse:
    """List what was sent to your webhooks in the last week, or is to be sent, newest first."""
    page = service.store.webhooks.page(
        caller.account.id, cursor=cursor, prediction_id=prediction, state=state
    )
    return respond(service.page_answer(request, page, delivery_answer))


@router.post(
    "/webhooks/deliveries/{delivery_id}/replay",
    tags=["webhooks"],
    operation_id="webhooks.deliveries.replay",
    response_model=DeliveryAnswer,
    responses=problems(404),
)
def replay_webhook_delivery(
    service: ServiceDep, caller: CallerDep, delivery_id: str
) -> JSONResponse:
    """Send a webhook again, under the same id: at once, and if need be as often as a new one."""
    replayed = service.store.webhooks.replay(delivery_id, caller.account.id)
    return respond(delivery_answer(replayed))


@router.get(
    "/trainings",
    tags=["trainings"],
    operation_id="trainings.list",
    response_model=PageAnswer[dict[str, Any]],
)
def list_trainings(request: Request, service: ServiceDep, caller: CallerDep) -> JSONResponse:  # noqa: ARG001
    """List trainings: there are none, since no model here can be trained."""
    none: Page[Answer] = Page(())
    return respond(service.page_answer(request, none, lambda training: training))


@router.get(
    "/trainings/{training_id}",
    tags=["trainings"],
    operation_id="trainings.get",
    status_code=404,
    responses=problems(404),
)
def get_training(caller: CallerDep, training_id: str) -> JSONResponse:  # noqa: ARG001
    """Answer that there is no such training."""
    raise not_found()


@router.post(
    "/trainings/{training_id}/cancel",
    tags=["trainings"],
    operation_id="trainings.cancel",
    status_code=404,
    responses=problems(404),
)
def cancel_training(caller: CallerDep, training_id: str) -> JSONResponse:  # noqa: ARG001
    """Answer that there is no such training."""
    raise not_found()


@operations_router.get("/healthz", operation_id="operations.live", response_model=LiveAnswer)
async def live() -> JSONResponse:
    """Answer as long as the process lives."""
    return respond(LiveAnswer(status="ok"))


@operations_router.get(
    "/readyz", operation_id="operations.ready", response_model=ReadyAnswer, responses=problems(503)
)
def ready(service: ServiceDep) -> JSONResponse:
    """Answer 200 while work is accepted, else 503 with what is in the way.

    The database answers, files can be written, the disk has room, and the server is not stopping.
    """
    if service.stopping:
        raise stopping()
    try:
        waiting = service.store.predictions.waiting()
    except SQLAlchemyError as error:
        raise not_ready("The database does not answer.") from error
    try:
        free = service.store.blobs.free_bytes()
    except PathError as error:
        raise not_ready(str(error)) from error
    if free < (least := service.settings.min_free_bytes):
        raise not_ready(
            f"The disk has {free // MIB} MiB left; min_free_bytes asks for {least // MIB}."
        )
    return respond(ReadyAnswer(status="ok", waiting=waiting.count))


@operations_router.get(
    "/metrics", response_class=PlainTextResponse, operation_id="operations.metrics"
)
def metrics(service: ServiceDep) -> PlainTextResponse:
    """Get counters in Prometheus' text form."""
    waiting = service.store.predictions.waiting()
    count, seconds = service.store.usage.totals()
    gauges = {
        "predictions_unfinished": waiting.count,
        "predictions_fetching": waiting.fetching,
        "predictions_unfinished_seconds": waiting.seconds,
        "predictions_run_total": count,
        "predict_seconds_total": seconds,
    }
    text = service.metrics.text(gauges)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")
