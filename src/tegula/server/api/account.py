"""The account over HTTP, and what operators ask."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from tegula.server.api.errors import ProblemError, not_found
from tegula.server.api.library import (
    SUPER_RESOLUTION,
    Entry,
    account_object,
    collection_object,
    model_object,
    search,
)
from tegula.server.api.service import Asking, Serving
from tegula.server.db import Page

# The account and what surrounds it: hardware, usage, secrets, collections, trainings.

router = APIRouter(prefix="/v1", tags=["account"])

_MOST_FOUND = 50


@router.get("/account")
def get_account(caller: Asking) -> JSONResponse:
    """Get the account that the token belongs to."""
    return JSONResponse(account_object(caller.account))


@router.get("/hardware")
def list_hardware(service: Serving, caller: Asking) -> JSONResponse:  # noqa: ARG001
    """List the devices of this server."""
    return JSONResponse([vars(device) for device in service.hardware])


@router.get("/usage")
def get_usage(
    service: Serving,
    caller: Asking,
    since: Annotated[datetime | None, Query(description="Only what ended later.")] = None,
) -> JSONResponse:
    """List the seconds that your tokens used, by model; it takes the place of a bill."""
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=timezone.utc)
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
def get_webhook_secret(service: Serving, caller: Asking) -> JSONResponse:
    """Get the secret that signs your webhooks."""
    return JSONResponse({"key": service.store.webhooks.secret(caller.account.id)})


@router.post("/webhooks/default/secret/rotate", tags=["webhooks"])
def rotate_webhook_secret(service: Serving, caller: Asking) -> JSONResponse:
    """Make a new secret; for a day webhooks carry the signatures of both."""
    return JSONResponse({"key": service.store.webhooks.rotate_secret(caller.account.id)})


@router.get("/collections", tags=["models"])
def list_collections(request: Request, service: Serving, caller: Asking) -> JSONResponse:  # noqa: ARG001
    """List the collections: there is one, of everything here."""
    return JSONResponse(service.page(request, Page(()), [collection_object(SUPER_RESOLUTION)]))


@router.get("/collections/{slug}", tags=["models"])
def get_collection(service: Serving, caller: Asking, slug: str) -> JSONResponse:
    """Get a collection with its models."""
    if slug != SUPER_RESOLUTION["slug"]:
        raise not_found()
    counts, base = service.store.predictions.run_counts(), service.settings.public_url
    entries = service.library.entries(caller.account.id)
    models = [model_object(entry, base, counts.get(entry.full_name, 0)) for entry in entries]
    full = {"full_description": SUPER_RESOLUTION["description"], "models": models}
    return JSONResponse({**collection_object(SUPER_RESOLUTION), **full})


@router.get("/search", tags=["models"])
def search_everything(
    service: Serving,
    query: Annotated[str | None, Query(description="Words to look for.")] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_FOUND)] = 20,
) -> JSONResponse:
    """Search public models and collections; needs no token."""
    if not query:
        raise ProblemError(400, 'Query parameter "query" is required')
    entries = service.library.entries(None)
    counts, base = service.store.predictions.run_counts(), service.settings.public_url
    models = [
        {
            "model": model_object(entry, base, counts.get(entry.full_name, 0)),
            "metadata": {
                "generated_description": entry.description,
                "tags": ["super-resolution"],
                "score": score,
            },
        }
        for score, entry in search(entries, query)[:limit]
    ]
    return JSONResponse(
        {"query": query, "models": models, "collections": _collections(query, entries), "pages": []}
    )


def _collections(query: str, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    text = " ".join(SUPER_RESOLUTION.values()).lower()
    if not all(word in text for word in query.lower().split()):
        return []
    return [{**SUPER_RESOLUTION, "models": [entry.full_name for entry in entries]}]


@router.get("/trainings", tags=["trainings"])
def list_trainings(request: Request, service: Serving, caller: Asking) -> JSONResponse:  # noqa: ARG001
    """List trainings: there are none, no model here can be trained."""
    return JSONResponse(service.page(request, Page(()), []))


@router.get("/trainings/{training_id}", tags=["trainings"])
def get_training(caller: Asking, training_id: str) -> JSONResponse:  # noqa: ARG001
    """Find no training."""
    raise not_found()


@router.post("/trainings/{training_id}/cancel", tags=["trainings"])
def cancel_training(caller: Asking, training_id: str) -> JSONResponse:  # noqa: ARG001
    """Find no training to cancel."""
    raise not_found()


# What operators and their machines ask.

operations_router = APIRouter(tags=["operations"])


@operations_router.get("/healthz")
def live() -> JSONResponse:
    """Tell that the process answers."""
    return JSONResponse({"status": "ok"})


@operations_router.get("/readyz")
def ready(service: Serving) -> JSONResponse:
    """Tell that work is taken: the database answers and the server is not stopping."""
    waiting = service.store.predictions.waiting()
    if not service.ready:
        raise ProblemError(503, "The server is stopping.")
    return JSONResponse({"status": "ok", "waiting": waiting.count})


@operations_router.get("/metrics", response_class=PlainTextResponse)
def metrics(service: Serving) -> PlainTextResponse:
    """Give counters in Prometheus' text form."""
    waiting = service.store.predictions.waiting()
    lines = service.store.usage.lines()
    gauges = {
        "predictions_unfinished": waiting.count,
        "predictions_unfinished_seconds": waiting.seconds,
        "predictions_run_total": sum(line.predictions for line in lines),
        "predict_seconds_total": sum(line.predict_seconds for line in lines),
    }
    text = service.metrics.text(gauges)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")
