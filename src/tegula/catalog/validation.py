"""Checking inputs against a version, all of them at once, in Replicate's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tegula.catalog.model import Version
from tegula.catalog.schema import BOOLEAN, FILE, INTEGER, NUMBER, STRING, Field
from tegula.errors import OptionError

_SHOWN = 80


@dataclass(frozen=True)
class InvalidField:
    """One violation.

    type: the keyword of the schema that is violated, as Replicate calls it.
    field: ``input.scale``, or ``input`` where an input is missing.
    description: what is right.
    given: what was given, shortened; empty where nothing was.
    """

    type: str
    field: str
    description: str
    given: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the entry of a problem's ``invalid_fields``."""
        return {"type": self.type, "field": self.field, "description": self.description}


class InvalidInputsError(OptionError):
    """Inputs that violate the schema of a version; ``fields`` lists every violation."""

    code = "invalid_inputs"

    def __init__(self, fields: tuple[InvalidField, ...]) -> None:
        self.fields = fields
        super().__init__("; ".join(_told(field) for field in fields) + ".")

    @property
    def detail(self) -> str:
        """One line per violation, as in the ``detail`` of Replicate's problems."""
        return "".join(f"- {field.field}: {field.description}\n" for field in self.fields)


@dataclass(frozen=True)
class ValidInputs:
    """Inputs that fit their version.

    values: every input of the schema, with defaults where nothing was given.
    warnings: sentences on inputs that the version does not know.
    """

    values: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def validate(version: Version, inputs: Mapping[str, Any]) -> ValidInputs:
    """Check inputs and fill in defaults; None counts as not given.

    Args:
        version: whose schema holds.
        inputs: by name; a file is text (an address), a path, bytes or an open file.

    Raises:
        InvalidInputsError: lists all violations.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    errors = [
        InvalidField("required", "input", f"{known.name} is required")
        for known in version.fields
        if known.required and known.name not in given
    ]
    values: dict[str, Any] = {}
    for known in version.fields:
        values[known.name] = given.get(known.name, known.default)
        if known.name in given:
            error = _violation(known, given[known.name])
            values[known.name] = _plain(known, given[known.name])
            errors += [error] if error else []
    if errors:
        raise InvalidInputsError(tuple(errors))
    unknown = [name for name in given if version.field(name) is None]
    warnings = tuple(f"{version.name} has no input {name}; it is ignored." for name in unknown)
    return ValidInputs(values, warnings)


def from_text(version: Version, words: Mapping[str, str]) -> dict[str, Any]:
    """Turn the words of a command line into values of the kinds that the version asks for.

    What cannot be turned stays text, so that ``validate`` can tell what is wrong with it.
    """
    return {name: _from_word(version.field(name), word) for name, word in words.items()}


def _from_word(known: Field | None, word: str) -> Any:
    kind = known.kind if known else STRING
    if kind == BOOLEAN:
        return {"true": True, "1": True, "false": False, "0": False}.get(word.lower(), word)
    try:
        if kind == INTEGER:
            return int(word)
        if kind == NUMBER:
            return float(word)
    except ValueError:
        pass
    return word


def _violation(known: Field, value: Any) -> InvalidField | None:
    name, given = f"input.{known.name}", _shown(value)
    if not _fits(known.kind, value):
        expected = STRING if known.kind == FILE else known.kind
        description = f"Invalid type. Expected: {expected}, given: {_type_name(value)}"
        return InvalidField("invalid_type", name, description, given)
    if known.choices and value not in known.choices:
        listed = ", ".join(_quoted(choice) for choice in known.choices)
        description = f"{known.name} must be one of the following: {listed}"
        return InvalidField("enum", name, description, given)
    if value in known.refusals if isinstance(value, str) else False:
        return InvalidField("enum", name, known.refusals[value], given)
    if known.low is not None and value < known.low:
        description = f"Must be greater than or equal to {_number(known.low)}"
        return InvalidField("number_gte", name, description, given)
    if known.high is not None and value > known.high:
        description = f"Must be less than or equal to {_number(known.high)}"
        return InvalidField("number_lte", name, description, given)
    return None


def _fits(kind: str, value: Any) -> bool:
    if kind == STRING:
        return isinstance(value, str)
    if kind == BOOLEAN:
        return isinstance(value, bool)
    if kind == FILE:
        return isinstance(value, str | Path | bytes) or hasattr(value, "read")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return kind == NUMBER or value == int(value)


def _plain(known: Field, value: Any) -> Any:
    return int(value) if known.kind == INTEGER and _fits(INTEGER, value) else value


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int):
        return INTEGER
    if isinstance(value, float):
        return NUMBER
    if isinstance(value, Mapping):
        return "object"
    return "array" if isinstance(value, list | tuple) else STRING


def _told(field: InvalidField) -> str:
    given = f", not {field.given}" if field.given else ""
    return f"{field.field}: {field.description[:1].lower()}{field.description[1:]}{given}"


def _quoted(choice: str | int) -> str:
    return f'"{choice}"' if isinstance(choice, str) else str(choice)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)
