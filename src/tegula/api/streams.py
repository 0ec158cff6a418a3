"""A prediction's events as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tegula.api.waiting import ASK_AGAIN_S, Watch, changed
from tegula.predictions.records import Event, Prediction
from tegula.predictions.states import State

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
    return int(header) if header and header.isascii() and header.isdigit() else 0
