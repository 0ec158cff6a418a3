"""The models that tegula answers to by name, without torch until one runs.

Example:
    >>> from tegula.catalog import find, validate
    >>> version = find("batouresearch/high-resolution-controlnet-tile")
    >>> validate(version, {"image": "photo.jpg"}).values["steps"]
    8
"""

from __future__ import annotations

from tegula.catalog.lookup import Catalog, find, models
from tegula.catalog.model import Model, Recipe, Situation, Version
from tegula.catalog.openapi import openapi_schema
from tegula.catalog.running import Output, run
from tegula.catalog.validation import (
    InvalidField,
    InvalidInputsError,
    ValidInputs,
    from_text,
    validate,
)

__all__ = [
    "Catalog",
    "InvalidField",
    "InvalidInputsError",
    "Model",
    "Output",
    "Recipe",
    "Situation",
    "ValidInputs",
    "Version",
    "find",
    "from_text",
    "models",
    "openapi_schema",
    "run",
    "validate",
]
