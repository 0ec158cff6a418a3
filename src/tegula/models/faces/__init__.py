"""Finding faces and restoring them with weights that the user brings.

What is installed can be told without torch or OpenCV; the two functions that load need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tegula.models.faces.catalogue import (
    FaceModel,
    detector_folder,
    face_file,
    is_here,
    list_face_models,
    named_face_file,
)

if TYPE_CHECKING:
    import torch

    from tegula.models.faces.networks import FaceDetector, FaceRestorer

__all__ = [
    "FaceModel",
    "detector_folder",
    "face_file",
    "is_here",
    "list_face_models",
    "load_detector",
    "load_restorer",
    "named_face_file",
]


def load_detector() -> FaceDetector:
    """Read the nets that find faces.

    Raises:
        MissingExtraError: the package with their weights is not installed.
    """
    from tegula.models.faces.networks import load

    return load()


def load_restorer(name_or_path: str, device: torch.device) -> FaceRestorer:
    """Load a face restorer by its name or from a file, in float32.

    Args:
        name_or_path: a name of ``list_face_models``, or the path of a ``.pth`` or
            ``.safetensors`` file of GFPGAN, RestoreFormer or CodeFormer.
        device: where to compute.

    Raises:
        UnknownModelError: no face model has that name.
        MissingWeightsError: the file is not there.
        BrokenWeightsError: the file is damaged or holds another network.
        MissingExtraError: the libraries that know the network are not installed.
    """
    from tegula.models.faces.networks import restorer_load as load

    return load(face_file(name_or_path), device)
