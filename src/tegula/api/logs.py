"""The server's log: one JSON object a line, with the prediction it is about."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

_FIELDS = ("prediction", "account", "seconds")


class JsonLines(logging.Formatter):
    """Formats records for machines; what was given as ``extra`` becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        line |= {name: value for name, value in extra.items() if value is not None}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json(level: str) -> None:
    """Send everything that is logged to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
