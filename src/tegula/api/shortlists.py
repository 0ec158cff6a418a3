"""Pages of lists that lie in memory, by the key of the row to go on from."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from tegula.errors import OptionError
from tegula.predictions.records import Page

T = TypeVar("T")
_LONGEST = 512


def page_of(items: Sequence[T], key: Callable[[T], str], cursor: str | None, limit: int) -> Page[T]:
    """Return one page of a list in its order.

    Raises:
        OptionError: the cursor is none of ours.
    """
    keys = [key(item) for item in items]
    wanted = _decode(cursor) if cursor else ""
    start = keys.index(wanted) if wanted in keys else 0
    end = start + limit
    return Page(
        tuple(items[start:end]),
        next=_encode(keys[end]) if end < len(items) else None,
        previous=_encode(keys[max(0, start - limit)]) if start else None,
    )


def _encode(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def _decode(cursor: str) -> str:
    try:
        padded = cursor[:_LONGEST] + "=" * (-len(cursor[:_LONGEST]) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise OptionError("cursor is taken from next or previous of a page.") from error
