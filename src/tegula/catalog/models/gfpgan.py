"""tencentarc/gfpgan: the prescaler, and faces restored with weights that the user brings."""

from __future__ import annotations

from tegula.catalog.adapters import check_faces
from tegula.catalog.inputs import (
    APPROXIMATED,
    NUMBER,
    STRING,
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

_FILES = {
    "v1.2": "GFPGANv1.2",
    "v1.3": "GFPGANv1.3",
    "v1.4": "GFPGANv1.4",
    "RestoreFormer": "RestoreFormer",
}

FIELDS = (
    image_field("img", "The picture with faces."),
    Field(
        name="version", kind=STRING, default="v1.4", choices=tuple(_FILES),
        description="Which weights restore the faces.",
        fidelity=APPROXIMATED,
        remark="runs where the `faces` folder of the models folder has the file of that "
        "version; faces are found by another detector, keep their coarse tones, and come out "
        "the same each time",
    ),
    Field(
        name="scale", kind=NUMBER, default=2.0, low=0.05, high=10,
        description="How many times as wide and high the result is.",
        fidelity=APPROXIMATED,
        remark="Real-ESRGAN x4plus enlarges what is no face, where the original has a smaller "
        "net; it goes straight to the size, where the original resamples what it made at 2x",
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - the same for all
    """Return one upscale without diffusion.

    Raises:
        MissingWeightsError: the file of the version is not in the models folder.
        MissingExtraError: the detector of faces is not installed.
    """
    name = _FILES[values["version"]]
    check_faces(name)
    return one_pass(
        UpscaleOptions(
            scale=values["scale"], creativity=0.0, prescaler="realesrgan-x4plus", faces=name
        )
    )


MODEL = Model(
    "tencentarc",
    "gfpgan",
    "GFPGAN: restores faces, and enlarges the rest with Real-ESRGAN.",
    (Version("tencentarc/gfpgan", "1", FIELDS, plan, image="img"),),
    "Needs the extra `faces` and the project's file.",
)
