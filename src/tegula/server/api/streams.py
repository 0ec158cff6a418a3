"""Server-sent events of a prediction."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from tegula.server.api.errors import not_found
from tegula.server.api.service import ASK_AGAIN_S, Serving, Watch, changed
from tegula.server.db import Event, Prediction, State

# A prediction's events as server-sent events.

KEEP_ALIVE_S = 10.0
"""The Python client gives up after 30 silent seconds."""

_DONE = {State.SUCCEEDED: {}, State.FAILED: {"reason": "error"}}


@dataclass(frozen=True)
class Source:
    """Where a stream reads from.

    events: those of a prediction after a sequence number.
    prediction: its row. told: an output item as clients receive it.
    """

    events: Callable[[str, int], Awaitable[Sequence[Event]]]
    prediction: Callable[[str], Awaitable[Prediction]]
    told: Callable[[Any], Any]


def message(kind: str, number: int, data: Any) -> str:
    r"""Return one event; lines end in a bare ``\n``, which the Go client insists on."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    lines = "".join(f"data: {line}\n" for line in text.split("\n"))
    return f"event: {kind}\nid: {number}\n{lines}\n"


async def stream(
    source: Source, watch: Watch, prediction_id: str, *, after: int = 0, logs: bool = False
) -> AsyncIterator[str]:
    """Yield everything that happened and happens to a prediction, until it is done.

    Args:
        source: where to read.
        watch: wakes the stream.
        prediction_id: whose events.
        after: the last event that the client has seen.
        logs: also send log lines, which some clients of streams cannot take.
    """
    yield ": hi\n\n"
    last_sent = time.monotonic()
    with watch.on(prediction_id) as event:
        while True:
            prediction = await source.prediction(prediction_id)
            news = await _news(source, prediction_id, after)
            after = news[-1].seq if news else after
            for text in _told(news, source, logs=logs):
                last_sent = time.monotonic()
                yield text
            if prediction.status.terminal:
                for text in _end(prediction, after):
                    yield text
                return
            if time.monotonic() - last_sent > KEEP_ALIVE_S:
                last_sent = time.monotonic()
                yield ": still here\n\n"
            await changed(event, ASK_AGAIN_S)


async def _news(source: Source, prediction_id: str, after: int) -> list[Event]:
    """Return every event after one, however many there are."""
    news: list[Event] = []
    while batch := await source.events(prediction_id, news[-1].seq if news else after):
        news += batch
    return news


def _told(events: Sequence[Event], source: Source, *, logs: bool) -> Iterator[str]:
    """Yield what clients are told; output before a restart counts no more."""
    restart = max((event.seq for event in events if event.kind == "restart"), default=0)
    for event in events:
        if event.kind == "output" and event.seq > restart:
            yield message("output", event.seq, source.told(event.data))
        elif event.kind == "logs" and logs:
            yield message("logs", event.seq, str(event.data))


def _end(prediction: Prediction, after: int) -> list[str]:
    """Return the closing events; they repeat the last number, so that none is skipped."""
    done = message("done", after, _DONE.get(prediction.status, {"reason": "canceled"}))
    if prediction.status is not State.FAILED:
        return [done]
    return [message("error", after, {"detail": prediction.error or ""}), done]


def last_event(header: str | None) -> int:
    """Return the number in ``Last-Event-ID``, or 0."""
    return int(header) if header and re.fullmatch("[0-9]{1,18}", header) else 0


# Predictions as they happen, as server-sent events.

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
