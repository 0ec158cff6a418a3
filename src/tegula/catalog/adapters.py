"""Files that a model would like to have: looked for in the models folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tegula.catalog.inputs import Situation
from tegula.errors import MissingWeightsError
from tegula.folders import models_folder
from tegula.models.faces import detector_folder, named_face_file

LORAS, PRESCALERS = "lora", "prescalers"
SUFFIXES = (".safetensors", ".pth")


def found_loras(
    strengths: Mapping[str, float], situation: Situation
) -> tuple[tuple[str, float], ...]:
    """Return (path, strength) of LoRAs by file name; all of them, or none at all."""
    paths = [models_folder() / LORAS / name for name in strengths]
    if situation.family != "sd15" or not all(path.is_file() for path in paths):
        return ()
    return tuple(
        (str(path), strength) for path, strength in zip(paths, strengths.values(), strict=True)
    )


def found_lora(name: str, situation: Situation) -> str | None:
    """Return the file of a LoRA by its name without the ending, None if it is not there."""
    path = models_folder() / LORAS / f"{name}.safetensors"
    return str(path) if situation.family == "sd15" and path.is_file() else None


def found_prescaler(name: str) -> Path | None:
    """Return the file of a prescaler by its name without the ending, None if it is not there."""
    return _found(PRESCALERS, name)


def needed_prescaler(name: str, what: str) -> Path:
    """Return the file of a prescaler.

    Raises:
        MissingWeightsError: it is not there; says where to put it.
    """
    return _needed(PRESCALERS, name, what)


def check_faces(name: str) -> None:
    """Check that a face model and the detector of faces are here, before any work is done.

    Raises:
        MissingWeightsError: the file of the face model is not there; says where to put it.
        MissingExtraError: the detector is not installed.
    """
    named_face_file(name)
    detector_folder()


def _found(folder: str, name: str) -> Path | None:
    candidates = [models_folder() / folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in candidates if path.is_file()), None)


def _needed(folder: str, name: str, what: str) -> Path:
    path = _found(folder, name)
    if path is None:
        raise MissingWeightsError(
            f"The weights of {what} are not on this machine; put {name}.pth or "
            f"{name}.safetensors into {models_folder() / folder}."
        )
    return path
