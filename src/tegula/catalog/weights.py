"""Which of the weights that models by name need, or can use, are on this machine."""

from __future__ import annotations

from pathlib import Path

from tegula.catalog.inputs import RunContext
from tegula.errors import MissingWeightsError
from tegula.folders import models_folder
from tegula.models.faces import detector_folder, named_face_file
from tegula.models.library import FileKind, find_file


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
