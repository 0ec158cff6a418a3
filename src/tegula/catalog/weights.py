"""Which of the weights that models by name need, or can use, are on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tegula.catalog.inputs import RunContext, Version
from tegula.errors import MissingExtraError, MissingWeightsError
from tegula.folders import models_folder
from tegula.models.faces import detector_folder, named_face_file
from tegula.models.library import FileKind, find_file


def why_it_cannot_run(version: Version, given: Mapping[str, Any]) -> str:
    """Return what a version lacks on this machine, as a sentence without paths; empty if nothing.

    Whether it can run may depend on the inputs, and is asked of those that are given, with the
    defaults of the others.

    Args:
        version: of a model.
        given: inputs that are known already, such as those that a preset pins.
    """
    files = {known.name: "" for known in version.fields if known.required}
    try:
        inputs = version.inputs.model_validate({**files, **given})
        inputs.request(RunContext(width=64, height=64, family="mini"))
    except MissingWeightsError:
        return "Cannot run here: its weights are not on this server."
    except MissingExtraError:
        return "Cannot run here: this server lacks a package that it needs."
    except ValidationError:  # a preset of an older release, which says so when it is used
        return ""
    return ""


def find_lora(name: str, context: RunContext) -> str | None:
    """Return the file of a LoRA by its name without the ending.

    None where it is not on this machine, or the bundle takes no LoRAs.
    """
    path = find_file(name, FileKind.LORA) if context.family == "sd15" else None
    return None if path is None else str(path)


def find_prescaler(name: str) -> Path | None:
    """Return the file of a prescaler by its name without the ending, None if it is not there."""
    return find_file(name, FileKind.PRESCALER)


def need_prescaler(name: str, what: str) -> Path:
    """Return the file of a prescaler by its name without the ending.

    Args:
        name: of the file.
        what: what the message calls the model.

    Raises:
        MissingWeightsError: it is not there; says where to put it.
    """
    path = find_prescaler(name)
    if path is None:
        raise MissingWeightsError(
            f"The weights of {what} are not on this machine; put {name}.pth or "
            f"{name}.safetensors into {models_folder() / 'prescalers'}."
        )
    return path


def check_faces(name: str) -> None:
    """Check that a face model and the detector of faces are here, before any work is done.

    Raises:
        MissingWeightsError: the file of the face model is not there; says where to put it.
        MissingExtraError: the detector is not installed.
    """
    named_face_file(name)
    detector_folder()
