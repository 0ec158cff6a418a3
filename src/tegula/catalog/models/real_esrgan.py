"""nightmareai/real-esrgan: the prescaler, and faces restored if asked for."""

from __future__ import annotations

from tegula.catalog.adapters import check_faces
from tegula.catalog.inputs import (
    APPROXIMATED,
    BOOLEAN,
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

_FACES = "GFPGANv1.4"

FIELDS = (
    image_field(),
    Field(
        name="scale", kind=NUMBER, default=4.0, low=0.05, high=10,
        description="How many times as wide and high the result is.",
    ),
    Field(
        name="face_enhance", kind=BOOLEAN, default=False,
        description="Restore faces with GFPGAN too.",
        fidelity=APPROXIMATED,
        remark="needs the extra `faces`, and GFPGANv1.4.pth in the `faces` folder of the models "
        "folder. The default is that of the project's own schema; a copy in circulation says "
        "true",
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - the same for all
    """Return one upscale without diffusion.

    Raises:
        MissingWeightsError: faces are asked for, and their file is not in the models folder.
        MissingExtraError: faces are asked for, and their detector is not installed.
    """
    faces = _FACES if values["face_enhance"] else ""
    if faces:
        check_faces(faces)
    return one_pass(
        UpscaleOptions(
            scale=values["scale"], creativity=0.0, prescaler="realesrgan-x4plus", faces=faces
        )
    )


MODEL = Model(
    "nightmareai",
    "real-esrgan",
    "Real-ESRGAN: a feed-forward net that enlarges and cleans, without diffusion.",
    (Version("nightmareai/real-esrgan", "1", FIELDS, plan),),
    "The same weights, in tiles that cannot be told from the whole.",
)
