"""What operators and their machines ask."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse

from tegula.api.dependencies import Serving
from tegula.api.problems import ProblemError

router = APIRouter(tags=["operations"])


@router.get("/healthz")
def live() -> JSONResponse:
    """Tell that the process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
def ready(service: Serving) -> JSONResponse:
    """Tell that work is taken: the database answers and the server is not stopping."""
    waiting = service.store.predictions.waiting()
    if not service.ready:
        raise ProblemError(503, "The server is stopping.")
    return JSONResponse({"status": "ok", "waiting": waiting.count})


@router.get("/metrics", response_class=PlainTextResponse)
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
