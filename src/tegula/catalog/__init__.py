"""The models that tegula answers to by name, without torch until one runs.

Example:
    >>> from tegula.catalog import find, validate
    >>> version = find("batouresearch/high-resolution-controlnet-tile")
    >>> validate(version, {"image": "photo.jpg"}).values.steps
    8
"""

from __future__ import annotations

from tegula.catalog.inputs import (
    Model,
    RunContext,
    UpscaleRequest,
    ValidInputs,
    Version,
    from_text,
    openapi_schema,
    validate,
)
from tegula.catalog.lookup import Catalog, find, models, packaged_fingerprint
from tegula.catalog.run import Output, run
from tegula.catalog.violations import InvalidField, InvalidInputsError

__all__ = [
    "Catalog",
    "InvalidField",
    "InvalidInputsError",
    "Model",
    "Output",
    "RunContext",
    "UpscaleRequest",
    "ValidInputs",
    "Version",
    "find",
    "from_text",
    "models",
    "openapi_schema",
    "packaged_fingerprint",
    "run",
    "validate",
]
