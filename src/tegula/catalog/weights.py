"""Which of the weights that models by name need, or can use, are on this machine."""

from __future__ import annotations

import re
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
    error = _what_is_missing(version, given)
    if error is None:
        return ""
    if isinstance(error, MissingWeightsError):
        return "Cannot run here: its weights are not on this server."
    return "Cannot run here: this server lacks a package that it needs."


def how_it_could_run(version: Version, given: Mapping[str, Any]) -> str:
    """Return what to do so that a version runs on this machine; empty if it does.

    The sentence names the files and the folder below that of the models, but not where that is:
    users of a server read it, too.

    Args:
        version: of a model.
        given: as for ``why_it_cannot_run``.
    """
    error = _what_is_missing(version, given)
    folder = re.escape(str(models_folder()))
    there = r"\1/ of the models folder (`tegula doctor` shows where that is)"
    return "" if error is None else re.sub(rf"{folder}[/\\](\w+)", there, str(error))


def _what_is_missing(
    version: Version, given: Mapping[str, Any]
) -> MissingWeightsError | MissingExtraError | None:
    files = {known.name: "" for known in version.fields if known.required}
    try:
        inputs = version.inputs.model_validate({**files, **given})
        inputs.request(RunContext(width=64, height=64, family="mini"))
    except (MissingWeightsError, MissingExtraError) as error:
        return error
    except ValidationError:  # a preset of an older release, which says so when it is used
        return None
    return None


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
