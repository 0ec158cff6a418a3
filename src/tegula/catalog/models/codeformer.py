"""sczhou/codeformer: face restoration, whose weights tegula does not have."""

from __future__ import annotations

from tegula.catalog.model import Model, Recipe, Situation, Values, Version
from tegula.catalog.schema import BOOLEAN, INTEGER, NUMBER, REFUSED, Field, image_field
from tegula.errors import MissingWeightsError

_WHY = "tegula has no face weights and says so"

FIELDS = (
    image_field(description="The picture with faces."),
    Field(
        name="codeformer_fidelity", kind=NUMBER, default=0.5, low=0, high=1,
        description="0 restores most, 1 keeps most of the face.",
        fidelity=REFUSED, remark=_WHY,
    ),
    Field(
        name="background_enhance", kind=BOOLEAN, default=True,
        description="Enlarge what is no face with Real-ESRGAN.",
        fidelity=REFUSED, remark=_WHY,
    ),
    Field(
        name="face_upsample", kind=BOOLEAN, default=True,
        description="Enlarge restored faces with Real-ESRGAN.",
        fidelity=REFUSED, remark=_WHY,
    ),
    Field(
        name="upscale", kind=INTEGER, default=2, low=1, high=16,
        description="How many times as wide and high the result is.",
        fidelity=REFUSED, remark=_WHY,
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - it never runs
    """Refuse.

    Raises:
        MissingWeightsError: says what to do instead.
    """
    raise MissingWeightsError(
        "Face restoration with codeformer.pth is not part of tegula; upscale with tegula/upscale "
        "or nightmareai/real-esrgan, which leave faces as they are."
    )


MODEL = Model(
    "sczhou",
    "codeformer",
    "CodeFormer: face restoration.",
    (Version("sczhou/codeformer", "1", FIELDS, plan),),
)
