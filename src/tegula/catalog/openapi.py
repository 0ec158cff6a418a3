"""A version's schema as an OpenAPI document in the form that Replicate's models have."""

from __future__ import annotations

from typing import Any

from tegula.catalog.model import ARRAY, Version
from tegula.catalog.schema import FILE, STRING, Field

_URI: dict[str, Any] = {"type": "string", "format": "uri"}


def openapi_schema(version: Version) -> dict[str, Any]:
    """Return the document; ``components.schemas`` holds Input, Output and the enums."""
    enums = {known.name: _enum(known) for known in version.fields if known.choices}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {},
        "components": {"schemas": {"Input": _input(version), "Output": _output(version), **enums}},
    }


def _input(version: Version) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "title": "Input",
        "properties": {
            known.name: _property(known, order) for order, known in enumerate(version.fields)
        },
    }
    required = [known.name for known in version.fields if known.required]
    return {**schema, "required": required} if required else schema


def _property(known: Field, order: int) -> dict[str, Any]:
    schema: dict[str, Any]
    if known.choices:
        schema = {"allOf": [{"$ref": f"#/components/schemas/{known.name}"}]}
    elif known.kind == FILE:
        schema = {**_URI, "title": _title(known.name)}
    else:
        schema = {"type": known.kind, "title": _title(known.name)}
    optional = {"default": known.default, "minimum": known.low, "maximum": known.high}
    schema |= {key: value for key, value in optional.items() if value is not None}
    return {**schema, "x-order": order, "description": known.description}


def _enum(known: Field) -> dict[str, Any]:
    kind = STRING if isinstance(known.choices[0], str) else "integer"
    return {
        "type": kind,
        "title": known.name,
        "enum": list(known.choices),
        "description": "An enumeration.",
    }


def _output(version: Version) -> dict[str, Any]:
    if version.output == ARRAY:
        return {"type": "array", "items": dict(_URI), "title": "Output"}
    return {**_URI, "title": "Output"}


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()
