"""A prediction as the HTTP API shows it: one rendering for answers and webhooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from tegula.predictions.links import Links
from tegula.predictions.records import FILE_KEY, Prediction
from tegula.predictions.states import State

Inline = Callable[[Mapping[str, Any]], str | None]
"""Given a kept file, return its data URI, or None to give a link."""


def timestamp(time: datetime | None) -> str | None:
    """Return RFC 3339 in UTC with milliseconds, which every client can read."""
    if time is None:
        return None
    text = time.astimezone(timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def prediction_object(
    prediction: Prediction,
    links: Links,
    *,
    strict_statuses: bool = False,
    inline: Inline | None = None,
) -> dict[str, Any]:
    """Return the JSON object of a prediction.

    Args:
        prediction: the row.
        links: makes its addresses.
        strict_statuses: show ``aborted`` as such and not as ``canceled``.
        inline: gives small outputs as data URIs.
    """
    removed = prediction.data_removed
    shown = {
        "id": prediction.id,
        "model": prediction.model,
        "version": prediction.version,
        "input": links.resolve(prediction.input),
        "output": _output(prediction.output, links, inline),
        "logs": None if removed else prediction.logs,
        "error": prediction.error,
        "status": _status(prediction.status, strict=strict_statuses),
        "source": prediction.source,
        "data_removed": removed,
        "created_at": timestamp(prediction.created_at),
        "started_at": timestamp(prediction.started_at),
        "completed_at": timestamp(prediction.completed_at),
        "metrics": _metrics(prediction),
        "urls": _urls(prediction.id, links),
    }
    return {**shown, **_where_applicable(prediction)}


def compact_json(value: Any) -> str:
    """Return JSON as JavaScript writes it, so that a parsed webhook verifies there too."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _output(output: Any, links: Links, inline: Inline | None) -> Any:
    if inline is not None and isinstance(output, Mapping) and FILE_KEY in output:
        return inline(output) or links.output(output)
    if isinstance(output, Mapping) and FILE_KEY not in output:
        return {key: _output(value, links, inline) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [_output(item, links, inline) for item in output]
    return links.resolve(output)


def _status(state: State, *, strict: bool) -> str:
    """Several clients know no ``aborted`` and would wait for ever."""
    shown = State.CANCELED if state is State.ABORTED and not strict else state
    return shown.value


def _metrics(prediction: Prediction) -> dict[str, float]:
    if prediction.completed_at is None:
        return {"progress": round(prediction.progress, 4)} if prediction.started_at else {}
    total = (prediction.completed_at - prediction.created_at).total_seconds()
    metrics = {"total_time": round(total, 6)}
    if prediction.predict_seconds is not None:
        metrics["predict_time"] = round(prediction.predict_seconds, 6)
    return metrics


def _urls(prediction_id: str, links: Links) -> dict[str, str]:
    return {
        "get": links.prediction(prediction_id),
        "cancel": links.cancel(prediction_id),
        "web": links.web(prediction_id),
        "stream": links.stream(prediction_id),
    }


def _where_applicable(prediction: Prediction) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if prediction.deployment is not None:
        shown["deployment"] = prediction.deployment
    if prediction.deadline is not None:
        shown["deadline"] = timestamp(prediction.deadline)
    if prediction.webhook is not None:
        shown["webhook"] = prediction.webhook
        shown["webhook_events_filter"] = list(prediction.webhook_events)
    return shown
