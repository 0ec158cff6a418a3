"""Predictions as they happen, as server-sent events."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from tegula.api.dependencies import Serving
from tegula.api.problems import not_found
from tegula.api.streams import Source, last_event, stream
from tegula.predictions.records import Event

router = APIRouter(prefix="/v1", tags=["predictions"])

_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",
    "access-control-allow-origin": "*",
}


@router.get("/files/streams/{token}", response_class=StreamingResponse)
@router.get("/streams/{token}", response_class=StreamingResponse, include_in_schema=False)
async def stream_prediction(
    request: Request, service: Serving, token: str, *, logs: bool = False
) -> StreamingResponse:
    """Follow a prediction by its `urls.stream`; `logs=1` sends log lines too."""
    prediction_id = service.store.links.streamed(token)
    if prediction_id is None:
        raise not_found()
    request.state.prediction = prediction_id
    await service.read(prediction_id)

    async def events(prediction_id: str, after: int) -> tuple[Event, ...]:
        return await service.run(service.store.predictions.events, prediction_id, after)

    source = Source(events, service.read, service.told_output)
    after = last_event(request.headers.get("last-event-id"))
    body = stream(source, service.watch, prediction_id, after=after, logs=logs)
    return StreamingResponse(body, media_type="text/event-stream", headers=_HEADERS)
