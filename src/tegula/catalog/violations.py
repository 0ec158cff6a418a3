"""What is wrong with the inputs of a model or the body of a request, in Replicate's words.

pydantic finds the faults. Replicate's clients know them by the keywords and the sentences of a
JSON schema validator, which stand here once for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tegula.errors import OptionError
from tegula.schema import plain


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


class InvalidInputsError(OptionError):
    """Inputs that violate the schema of a version; ``fields`` lists every violation."""

    code = "invalid_inputs"

    def __init__(self, fields: Sequence[InvalidField]) -> None:
        # The arguments of an exception are what copies and pickles of it are made from.
        super().__init__(fields)
        self.fields = tuple(fields)

    def __str__(self) -> str:
        sentences = (
            f"{wrong.field}: {wrong.description[:1].lower()}{wrong.description[1:]}"
            + (f", not {wrong.given}" if wrong.given else "")
            for wrong in self.fields
        )
        return "; ".join(sentences) + "."

    @property
    def detail(self) -> str:
        """One line per violation, as in the ``detail`` of Replicate's problems."""
        return "".join(f"- {wrong.field}: {wrong.description}\n" for wrong in self.fields)


_RULES: Mapping[str, tuple[str, str]] = {
    "missing": ("required", "{name} is required"),
    "extra_forbidden": (
        "additional_property_not_allowed",
        "Additional property {name} is not allowed",
    ),
    "greater_than_equal": ("number_gte", "Must be greater than or equal to {ge}"),
    "less_than_equal": ("number_lte", "Must be less than or equal to {le}"),
    "literal_error": ("enum", "{name} must be one of the following: {expected}"),
    "string_pattern_mismatch": ("pattern", "Does not match pattern '{pattern}'"),
    "string_too_long": (
        "string_lte",
        "String length must be less than or equal to {max_length}",
    ),
    "value_error": ("format", "{error}"),
    "datetime_from_date_parsing": ("format", "Does not match format 'date-time'"),
}
"""Keyword and sentence of each kind of fault, by pydantic's name of the kind."""

_TYPES: Mapping[str, str] = {
    "string_type": "string",
    "dict_type": "object",
    "model_attributes_type": "object",
    "model_type": "object",
    "list_type": "array",
    "bool_type": "boolean",
    "bool_parsing": "boolean",
    "int_type": "integer",
    "int_parsing": "integer",
    "int_from_float": "integer",
}
"""The type that was expected, by pydantic's name of the fault."""


def violation(error: Mapping[str, Any], name: str, expected: str | None = None) -> tuple[str, str]:
    """Return the keyword that a fault violates, and the sentence on what is right.

    Args:
        error: one of those that pydantic lists.
        name: of the field.
        expected: the type of the field in JSON Schema; None leaves it to the error to tell.
    """
    kind, given = error["type"], json_type(error.get("input"))
    is_other_type = kind == "literal_error" and expected not in (None, given)
    if kind in _RULES and not is_other_type:
        keyword, words = _RULES[kind]
        context = dict(error.get("ctx", {}))
        bounds = {key: plain(context[key]) for key in ("ge", "le") if key in context}
        sentence = words.format(**{**context, **bounds, "name": name})
        return keyword, sentence.replace("'", '"')
    expected = expected or _TYPES.get(kind)
    if expected is None:
        return "format", str(error["msg"]).replace("'", '"')
    return "invalid_type", f"Invalid type. Expected: {expected}, given: {given}"


def json_type(value: object) -> str:
    """Return what JSON Schema calls the type of a value."""
    names = {
        type(None): "null",
        bool: "boolean",
        int: "integer",
        float: "number",
        list: "array",
        tuple: "array",
    }
    return "object" if isinstance(value, Mapping) else names.get(type(value), "string")
