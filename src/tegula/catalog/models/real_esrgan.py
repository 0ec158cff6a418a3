"""nightmareai/real-esrgan: the prescaler alone."""

from __future__ import annotations

from tegula.catalog.adapters import needed_face_weights
from tegula.catalog.model import Model, Recipe, Situation, Values, Version, one_pass
from tegula.catalog.schema import BOOLEAN, NUMBER, REFUSED, Field, image_field
from tegula.options import UpscaleOptions

FIELDS = (
    image_field(),
    Field(
        name="scale", kind=NUMBER, default=4.0, low=0.05, high=10,
        description="How many times as wide and high the result is.",
    ),
    Field(
        name="face_enhance", kind=BOOLEAN, default=False,
        description="Restore faces with GFPGAN too.",
        fidelity=REFUSED, remark="tegula has no face weights; true says so",
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - the same for all
    """Return one upscale without diffusion."""
    if values["face_enhance"]:
        needed_face_weights("GFPGANv1.4", "GFPGAN, which face_enhance needs,")
    return one_pass(
        UpscaleOptions(scale=values["scale"], creativity=0.0, prescaler="realesrgan-x4plus")
    )


MODEL = Model(
    "nightmareai",
    "real-esrgan",
    "Real-ESRGAN: a feed-forward net that enlarges and cleans, without diffusion.",
    (Version("nightmareai/real-esrgan", "1", FIELDS, plan),),
    "The same weights, in tiles that cannot be told from the whole.",
)
