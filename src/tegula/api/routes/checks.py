"""Checks that models and deployments share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tegula.api.library import Edition
from tegula.api.problems import InvalidField, invalid
from tegula.api.service import Service
from tegula.catalog import InvalidInputsError, validate


def check_hardware(service: Service, sku: str) -> None:
    """Refuse hardware that is not here.

    Raises:
        ProblemError: names what there is.
    """
    known = [device.sku for device in service.hardware]
    if sku not in known:
        listed = ", ".join(f'"{one}"' for one in known)
        wrong = f"hardware must be one of the following: {listed}"
        raise invalid(InvalidField("enum", "hardware", wrong))


def check_defaults(base: Edition, defaults: Mapping[str, Any]) -> None:
    """Refuse defaults that no request could be valid with.

    Raises:
        ProblemError: names every one of them.
    """
    needed = {known.name: "" for known in base.base.fields if known.required}
    try:
        unknown = validate(base.base, {**needed, **defaults}).warnings
    except InvalidInputsError as error:
        wrong = [
            InvalidField(one.type, one.field.replace("input", "defaults", 1), one.description)
            for one in error.fields
        ]
        raise invalid(*wrong) from error
    if unknown:
        raise invalid(InvalidField("additional_property_not_allowed", "defaults", unknown[0]))
