"""The server's log: one JSON object a line, with the prediction that it is about.

The process of an engine logs, too, which is why the settings and pydantic are not imported here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

from pythonjsonlogger.json import JsonFormatter

_CONTEXT: ContextVar[Mapping[str, Any]] = ContextVar("log context")


@contextmanager
def log_context(**fields: Any) -> Iterator[None]:
    """Add fields to every line that any part of the program logs within the block.

    That includes functions called in a thread pool of the event loop.
    """
    before = _CONTEXT.set({**_CONTEXT.get({}), **fields})
    try:
        yield
    finally:
        _CONTEXT.reset(before)


class JsonLines(JsonFormatter):
    """Formats a record as one line of JSON; what was given as ``extra`` becomes a field."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "trace"},
            json_ensure_ascii=False,
        )

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        """Put the time first, and what the line is about last unless the record says itself."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        log_data["time"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        super().add_fields(log_data, record, message_dict)
        log_data["level"] = log_data["level"].lower()
        log_data.pop("color_message", None)  # uvicorn's message again, with terminal colours
        for name, value in _CONTEXT.get({}).items():
            log_data.setdefault(name, value)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Leave out fields that have no value."""
        return {name: value for name, value in log_data.items() if value is not None}


def log_as_json(level: str | int) -> None:
    """Send everything that is logged, and Python's warnings, to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
