"""The account over HTTP: hardware, usage, secrets, trainings; and what operators look at."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from tegula.errors import PathError
from tegula.server.api.errors import not_found, not_ready, stopping
from tegula.server.api.objects import account_json
from tegula.server.api.service import CallerDep, Cursor, Moment, ServiceDep
from tegula.server.db import Page
from tegula.server.links import timestamp
from tegula.server.settings import MIB
from tegula.server.tables import WebhookMessage

router = APIRouter(prefix="/v1", tags=["account"])
operations_router = APIRouter(tags=["operations"])


@router.get("/account")
def get_account(caller: CallerDep) -> JSONResponse:
    """Get the account that the token belongs to."""
    return JSONResponse(account_json(caller.account))


@router.get("/hardware")
def list_hardware(service: ServiceDep, caller: CallerDep) -> JSONResponse:  # noqa: ARG001
    """List the devices of this server."""
    return JSONResponse([vars(device) for device in service.hardware])


@router.get("/usage")
def get_usage(
    service: ServiceDep,
    caller: CallerDep,
    since: Annotated[Moment | None, Query(description="Only predictions that ended since.")] = None,
) -> JSONResponse:
    """List the seconds that your tokens used, by model; it takes the place of a bill."""
    names = {token.id: token.name for token in service.store.accounts.tokens(caller.account.id)}
    lines = service.store.usage.lines(caller.account.id, since)
    results = [
        {
            "model": line.model,
            "token": names.get(line.token_id or ""),
            "predictions": line.predictions,
            "predict_seconds": round(line.predict_seconds, 6),
        }
        for line in lines
    ]
    return JSONResponse({"results": results})


@router.get("/webhooks/default/secret", tags=["webhooks"])
def get_webhook_secret(service: ServiceDep, caller: CallerDep) -> JSONResponse:
    """Get the secret that signs your webhooks."""
    return JSONResponse({"key": service.store.webhooks.secret(caller.account.id)})


@router.post("/webhooks/default/secret/rotate", tags=["webhooks"])
def rotate_webhook_secret(service: ServiceDep, caller: CallerDep) -> JSONResponse:
    """Replace the secret; for a day webhooks carry the signatures of both."""
    return JSONResponse({"key": service.store.webhooks.rotate_secret(caller.account.id)})


@router.get("/webhooks/deliveries", tags=["webhooks"])
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
    return JSONResponse(service.page_json(request, page, _delivery_json))


@router.post("/webhooks/deliveries/{delivery_id}/replay", tags=["webhooks"])
def replay_webhook_delivery(
    service: ServiceDep, caller: CallerDep, delivery_id: str
) -> JSONResponse:
    """Send a webhook again, under the same id: at once, and if need be as often as a new one."""
    return JSONResponse(
        _delivery_json(service.store.webhooks.replay(delivery_id, caller.account.id))
    )


def _delivery_json(message: WebhookMessage) -> dict[str, Any]:
    """Return a webhook as it is listed; ``status`` is the receiver's last HTTP status."""
    return {
        "id": message.id,
        "prediction": message.prediction_id,
        "event": message.event,
        "url": message.url,
        "state": message.state,
        "attempts": message.attempts,
        "status": message.last_status,
        "error": message.last_error,
        "created_at": timestamp(message.created_at),
        "next_attempt_at": timestamp(message.next_at if message.state == "pending" else None),
        "completed_at": timestamp(message.finished_at),
    }


@router.get("/trainings", tags=["trainings"])
def list_trainings(request: Request, service: ServiceDep, caller: CallerDep) -> JSONResponse:  # noqa: ARG001
    """List trainings: there are none, since no model here can be trained."""
    return JSONResponse(service.page_json(request, Page(()), dict))


@router.get("/trainings/{training_id}", tags=["trainings"])
def get_training(caller: CallerDep, training_id: str) -> JSONResponse:  # noqa: ARG001
    """Answer that there is no such training."""
    raise not_found()


@router.post("/trainings/{training_id}/cancel", tags=["trainings"])
def cancel_training(caller: CallerDep, training_id: str) -> JSONResponse:  # noqa: ARG001
    """Answer that there is no such training."""
    raise not_found()


@operations_router.get("/healthz")
async def live() -> JSONResponse:
    """Answer as long as the process lives."""
    return JSONResponse({"status": "ok"})


@operations_router.get("/readyz")
def ready(service: ServiceDep) -> JSONResponse:
    """Answer 200 while work is accepted, else 503 with what is in the way.

    The database answers, files can be written, the disk has room, and the server is not stopping.
    """
    waiting = service.store.predictions.waiting()
    if service.stopping:
        raise stopping()
    try:
        free = service.store.blobs.free_bytes()
    except PathError as error:
        raise not_ready(str(error)) from error
    if free < (least := service.settings.min_free_bytes):
        raise not_ready(
            f"The disk has {free // MIB} MiB left; min_free_bytes asks for {least // MIB}."
        )
    return JSONResponse({"status": "ok", "waiting": waiting.count})


@operations_router.get("/metrics", response_class=PlainTextResponse)
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
