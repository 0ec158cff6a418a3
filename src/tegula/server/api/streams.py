"""Following a prediction by server-sent events."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from tegula.server.api.errors import documented, not_found, problems
from tegula.server.api.service import Service, ServiceDep, next_change
from tegula.server.tables import Event, State

router = APIRouter(prefix="/v1", tags=["predictions"])

KEEP_ALIVE_S = 10.0
"""The Python client gives up after 30 silent seconds."""

_COME_BACK_MS = 1000

_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would collect events before it passes them on
    "access-control-allow-origin": "*",
}
_EVENT = {
    "type": "object",
    "description": "One item of the output, as the prediction has it; lines of the log; an error; "
    "or, at last, `{}` or the reason why there is no result.",
    "required": ["event", "id", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["output", "logs", "preview", "error", "done"]},
        "id": {"type": "string", "description": "To go on after it, send it as `Last-Event-ID`."},
        "data": {"type": "string"},
    },
}
_DONE = {State.SUCCEEDED: {}, State.FAILED: {"reason": "error"}}

_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
        "headers": {
            "X-Accel-Buffering": documented("That nginx must pass events on at once.", "no"),
            "Access-Control-Allow-Origin": documented("That scripts of other sites may read it."),
        },
    },
    **problems(404),
}


@router.get(
    "/files/streams/{token}",
    operation_id="predictions.stream",
    response_class=StreamingResponse,
    responses=_DOCUMENTED,
)
@router.get("/streams/{token}", response_class=StreamingResponse, include_in_schema=False)
async def stream_prediction(
    request: Request,
    service: ServiceDep,
    token: str,
    *,
    logs: bool = False,
    previews: bool = False,
) -> StreamingResponse:
    """Follow a prediction by its `urls.stream`; `logs=1` sends log lines, too.

    `previews=1` sends small pictures of the work so far, if the web page created the prediction.
    """
    prediction_id = service.store.links.streamed(token)
    if prediction_id is None:
        raise not_found()
    request.state.prediction = prediction_id  # for the log
    await service.read(prediction_id)
    last_seen = request.headers.get("last-event-id", "")
    after = int(last_seen) if re.fullmatch("[0-9]{1,18}", last_seen) else 0
    extra = {name for name, wanted in (("logs", logs), ("preview", previews)) if wanted}
    events = stream(service, prediction_id, after=after, extra=extra)
    # HEAD must not wait for the end of the prediction.
    body = iter(()) if request.method == "HEAD" else events
    return StreamingResponse(body, media_type="text/event-stream", headers=_HEADERS)


async def stream(
    service: Service, prediction_id: str, *, after: int = 0, extra: Collection[str] = ()
) -> AsyncIterator[str]:
    """Yield everything that happened and happens to a prediction, until it is done.

    Args:
        service: reads the prediction and knows when it changes.
        prediction_id: whose events.
        after: the last event that the client has seen.
        extra: events that some clients of streams cannot take: ``logs`` and ``preview``.
    """
    yield ": hi\n\n"
    last_sent = time.monotonic()
    with service.changes.of(prediction_id) as changed:
        while True:
            # The state first: events that come between the two reads are sent before the end is.
            prediction = await service.read(prediction_id)
            events: list[Event] = []
            while batch := await service.run(
                service.store.predictions.events, prediction_id, events[-1].seq if events else after
            ):
                events += batch
            after = events[-1].seq if events else after
            # Not here in the loop: outputs may have to be read, or even be downloaded first.
            for text in await service.run(_messages, events, service.output_json, extra):
                last_sent = time.monotonic()
                yield text
            if prediction.status.terminal:
                # The closing messages repeat the last number: a client that reconnects with it
                # gets them again, and skips no event.
                if prediction.status is State.FAILED:
                    yield message("error", after, {"detail": prediction.error or ""})
                yield message("done", after, _DONE.get(prediction.status, {"reason": "canceled"}))
                return
            if service.stopping:
                # A client of server-sent events comes back after this pause with the number of
                # its last event, and another process, or the next one, goes on from there.
                yield f"retry: {_COME_BACK_MS}\n\n"
                return
            while not await next_change(changed, last_sent + KEEP_ALIVE_S - time.monotonic()):
                last_sent = time.monotonic()
                yield ": still here\n\n"


def _messages(
    events: Sequence[Event], output_json: Callable[[Any], Any], extra: Collection[str]
) -> list[str]:
    """Return what clients see of some events; output from before a restart counts no more.

    Of previews only the last is there: each takes the place of the one before.
    """
    preview = max((event.seq for event in events if event.kind == "preview"), default=0)
    restart = max((event.seq for event in events if event.kind == "restart"), default=0)
    messages = []
    for event in events:
        if event.kind == "output" and event.seq > restart:
            messages.append(message("output", event.seq, output_json(event.data)))
        elif event.kind == "logs" and "logs" in extra:
            messages.append(message("logs", event.seq, str(event.data)))
        elif event.seq == preview and "preview" in extra:
            messages.append(message("preview", event.seq, output_json(event.data)))
    return messages


def message(kind: str, number: int, data: Any) -> str:
    r"""Return one event; lines end in a bare ``\n``, which the Go client insists on."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    lines = "".join(f"data: {line}\n" for line in text.split("\n"))
    return f"event: {kind}\nid: {number}\n{lines}\n"
