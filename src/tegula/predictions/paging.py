"""Pages of long lists, newest first, by the place of a row and never by an offset."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, Select, Table, literal, tuple_

from tegula.errors import OptionError
from tegula.predictions.records import Page
from tegula.predictions.tables import UtcTime

R = TypeVar("R")

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_LONGEST = 256

Place = tuple[str, datetime, str]
"""Direction (``older`` or ``newer``), time and id of the row to go on from."""


def read_page(
    connection: Connection,
    table: Table,
    query: Select[Any],
    make: Callable[[Row[Any]], R],
    *,
    cursor: str | None,
    limit: int,
) -> Page[R]:
    """Return one page of a query over a table that has ``created_at`` and ``id``.

    Raises:
        OptionError: the cursor is none of ours.
    """
    direction, *place = decode_cursor(cursor) if cursor else ("older",)
    key = tuple_(table.c.created_at, table.c.id)
    newer = direction == "newer"
    if place:
        start = tuple_(literal(place[0], UtcTime), literal(place[1]))
        query = query.where(key > start if newer else key < start)
    order = [
        column.asc() if newer else column.desc() for column in (table.c.created_at, table.c.id)
    ]
    rows = connection.execute(query.order_by(*order).limit(limit + 1)).all()
    more, rows = len(rows) > limit, rows[:limit]
    rows = rows[::-1] if newer else rows
    return Page(
        tuple(make(row) for row in rows),
        next=encode_cursor("older", rows[-1]) if rows and (more or newer) else None,
        previous=encode_cursor("newer", rows[0]) if rows and (more if newer else place) else None,
    )


def encode_cursor(direction: str, row: Row[Any]) -> str:
    """Return the place of a row as url-safe text."""
    microseconds = (row._mapping["created_at"] - _EPOCH) // _MICROSECOND
    text = json.dumps([direction, microseconds, row._mapping["id"]], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> Place:
    """Return the place that a cursor stands for.

    Raises:
        OptionError: the cursor is none of ours.
    """
    try:
        padded = cursor[:_LONGEST] + "=" * (-len(cursor[:_LONGEST]) % 4)
        direction, microseconds, name = json.loads(base64.urlsafe_b64decode(padded))
        if direction not in ("older", "newer") or not isinstance(name, str):
            raise ValueError(direction)
        return direction, _EPOCH + int(microseconds) * _MICROSECOND, name
    except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise OptionError("cursor is taken from next or previous of a page.") from error
