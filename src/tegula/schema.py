"""Declaring options once: frozen pydantic models that report all faults in one sentence.

Such a model is the only place where an option has its type, bounds, choices, unit, default
and effect. The command line, forms, docs and the sentences of errors take them from its
JSON schema, which ``properties_of`` gives in a form that is easy to read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from tegula.errors import OptionError

_LONGEST_SHOWN = 80
_OUT_OF_BOUNDS = ("greater_than_equal", "less_than_equal", "finite_number")


class _PlainSchema(GenerateJsonSchema):
    """JSON schemas without ``null``, with ``enum`` for a single choice, in the order declared."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """Describe the value, not that it may be left out."""
        return self.generate_inner(schema["schema"])

    def literal_schema(self, schema: core_schema.LiteralSchema) -> JsonSchemaValue:
        """List the choices."""
        choices = list(schema["expected"])
        return {"type": "string" if isinstance(choices[0], str) else "integer", "enum": choices}

    def sort(
        self,
        value: JsonSchemaValue,
        parent_key: str | None = None,  # noqa: ARG002 - the signature is pydantic's
    ) -> JsonSchemaValue:
        """Keep the order of the declaration."""
        return value


def properties_of(model: type[BaseModel]) -> Mapping[str, Mapping[str, Any]]:
    """Return the JSON schema of each field of a model, in the order of their declaration."""
    properties: Mapping[str, Mapping[str, Any]] = model.model_json_schema(
        schema_generator=_PlainSchema
    )["properties"]
    return properties


_T = TypeVar("_T", bound="CheckedOptions")


class CheckedOptions(BaseModel):
    """Immutable, keyword-only options, every one of which is checked for type and bounds.

    Raises:
        OptionError: one sentence that names every option that is wrong, and what is right.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def replaced(self: _T, **changes: Any) -> _T:
        """Return these options with some changed, checked anew.

        Raises:
            OptionError: as above.
        """
        return type(self)(**{**dict(self), **changes})

    __replace__ = replaced
    """So that Python's own ``copy.replace`` checks, too."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """Take lists for tuples, and the scalars of numpy and torch for numbers."""
        if isinstance(value, list):
            return tuple(value)
        return value.item() if getattr(value, "shape", None) == () else value

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, values: Any, check: ModelWrapValidatorHandler[_T]) -> _T:
        try:
            return check(values)
        except ValidationError as error:
            raise OptionError(faults(cls, error)) from None


def faults(model: type[BaseModel], error: ValidationError, noun: str = "option") -> str:
    """Return all that pydantic found wrong in one sentence.

    Args:
        model: the class that was to be made.
        error: what pydantic raised.
        noun: what a field of the model is called.
    """
    known = properties_of(model)
    return "; ".join(dict.fromkeys(_fault(known, each, noun) for each in error.errors())) + "."


def _fault(known: Mapping[str, Any], error: Mapping[str, Any], noun: str) -> str:
    kind = error["type"]
    if not error["loc"]:
        return f"{noun}s are an object, not {shown(error['input'])}"
    name = str(error["loc"][0])
    if kind == "value_error":
        return str(error["ctx"]["error"]).removesuffix(".")
    if kind == "extra_forbidden":
        similar = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {similar[0]}?)" if similar else ""
        return f"there is no {noun} {name}{hint}"
    if kind == "missing" and len(error["loc"]) == 1:
        return f"{name} is missing"
    right = _requirement(known[name], of_its_type=kind in _OUT_OF_BOUNDS)
    return f"{name} is {right}, not {shown(error['input'])}"


def _requirement(schema: Mapping[str, Any], *, of_its_type: bool) -> str:
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    items = schema.get("items", {}).get("type", "string")
    words = {
        "boolean": "true or false",
        "string": "text",
        "number": "a number",
        "integer": "a whole number",
        "object": "an object",
        "array": f"{len(schema['prefixItems'])} whole numbers"
        if "prefixItems" in schema
        else f"a list of {'texts' if items == 'string' else 'whole numbers'}",
    }[schema["type"]]
    low, high, unit = _bounds(schema)
    if low is None:
        return words
    if high is None:
        return f"at least {plain(low)}{unit}" if of_its_type else f"{words} from {plain(low)}{unit}"
    within = f"between {plain(low)} and {plain(high)}{unit}"
    return within if of_its_type else f"{words} {within}"


def span(schema: Mapping[str, Any]) -> str:
    """Return the bounds of an option with their unit: ``1 to 16 times``, ``from 1 px``, or nothing.

    Args:
        schema: of one field, from ``properties_of``.
    """
    low, high, unit = _bounds(schema)
    if low is None:
        return ""
    if high is None:
        return f"from {plain(low)}{unit}"
    return f"{plain(low)} to {'2^63 - 1' if high == 2**63 - 1 else plain(high)}{unit}"


def _bounds(schema: Mapping[str, Any]) -> tuple[float | None, float | None, str]:
    """Return minimum and maximum of a number, or of each one in a tuple, and the unit."""
    number = schema.get("prefixItems", (schema,))[0]
    unit = f" {schema['unit']}" if "unit" in schema else ""
    return number.get("minimum"), number.get("maximum"), unit


def plain(number: float) -> str:
    """Return a bound as people write it: no exponent, no needless decimals."""
    return str(number) if isinstance(number, int) else f"{number:.6f}".rstrip("0").rstrip(".")


def shown(value: object) -> str:
    """Return a value as messages quote it, shortened where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
