"""Between rows of the tables and frozen records, and what is inside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import Row

from tegula.predictions.records import FILE_KEY, Prediction
from tegula.predictions.states import State

R = TypeVar("R")


def record(kind: type[R], row: Row[Any]) -> R:
    """Return a row as a record; columns that the record does not have are left out."""
    return kind(**_values(kind, row))


def prediction_of(row: Row[Any]) -> Prediction:
    """Return a row of the predictions as a record."""
    values = _values(Prediction, row)
    values["status"] = State(values["status"])
    values["webhook_events"] = tuple(values["webhook_events"])
    return Prediction(**values)


def _values(kind: Any, row: Row[Any]) -> dict[str, Any]:
    mapping = row._mapping
    return {name: mapping[name] for name in _names(kind)}


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def columns_of(value: Any) -> dict[str, Any]:
    """Return the values of a record by column, as the database takes them."""
    columns = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: _plain(column) for name, column in columns.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, State):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def file_ids(value: Any) -> Iterator[str]:
    """Yield the ids of the kept files inside a JSON value."""
    if isinstance(value, Mapping):
        if FILE_KEY in value:
            yield value[FILE_KEY]
        else:
            for item in value.values():
                yield from file_ids(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from file_ids(item)
