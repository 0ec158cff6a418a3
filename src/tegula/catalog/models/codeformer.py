"""sczhou/codeformer: faces restored with weights that the user brings."""

from __future__ import annotations

from tegula.catalog.adapters import check_faces
from tegula.catalog.inputs import (
    APPROXIMATED,
    BOOLEAN,
    INTEGER,
    NUMBER,
    Field,
    Model,
    Recipe,
    Situation,
    Values,
    Version,
    image_field,
    one_pass,
)
from tegula.options import UpscaleOptions

_FILE = "codeformer"

FIELDS = (
    image_field(description="The picture with faces."),
    Field(
        name="codeformer_fidelity", kind=NUMBER, default=0.5, low=0, high=1,
        description="0 restores most, 1 keeps most of the face.",
        fidelity=APPROXIMATED,
        remark="the same weight in the same net; faces are found by another detector, fade out "
        "towards a square instead of an outline, and keep their coarse tones",
    ),
    Field(
        name="background_enhance", kind=BOOLEAN, default=True,
        description="Enlarge what is no face with Real-ESRGAN.",
        fidelity=APPROXIMATED, remark="with Real-ESRGAN x4plus instead of x2plus",
    ),
    Field(
        name="face_upsample", kind=BOOLEAN, default=True,
        description="Enlarge restored faces with Real-ESRGAN.",
        fidelity=APPROXIMATED,
        remark="with x4plus, and only faces that the result shows larger than 512 pixels",
    ),
    Field(
        name="upscale", kind=INTEGER, default=2, low=1, high=16,
        description="How many times as wide and high the result is.",
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - the same for all
    """Return one upscale without diffusion.

    Raises:
        MissingWeightsError: the file is not in the models folder.
        MissingExtraError: the detector of faces is not installed.
    """
    check_faces(_FILE)
    return one_pass(
        UpscaleOptions(
            scale=values["upscale"],
            creativity=0.0,
            prescaler="realesrgan-x4plus" if values["background_enhance"] else "lanczos",
            faces=_FILE,
            face_fidelity=values["codeformer_fidelity"],
            face_upsample=values["face_upsample"],
        )
    )


MODEL = Model(
    "sczhou",
    "codeformer",
    "CodeFormer: restores faces, and enlarges the rest with Real-ESRGAN.",
    (Version("sczhou/codeformer", "1", FIELDS, plan),),
    "Needs the extra `faces`, the project's file, and a package of its network that may be "
    "used for non-commercial purposes only and is never installed along.",
)
