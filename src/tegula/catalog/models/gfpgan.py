"""tencentarc/gfpgan: face restoration, whose weights tegula does not have."""

from __future__ import annotations

from tegula.catalog.model import Model, Recipe, Situation, Values, Version
from tegula.catalog.schema import NUMBER, REFUSED, STRING, Field, image_field
from tegula.errors import MissingWeightsError

_WHY = "tegula has no face weights and says so"
_FILES = {"v1.2": "GFPGANCleanv1-NoCE-C2", "v1.3": "GFPGANv1.3", "v1.4": "GFPGANv1.4"}

FIELDS = (
    image_field("img", "The picture with faces."),
    Field(
        name="version", kind=STRING, default="v1.4", choices=tuple(_FILES),
        description="Which weights.", fidelity=REFUSED, remark=_WHY,
    ),
    Field(
        name="scale", kind=NUMBER, default=2.0, low=0.05, high=10,
        description="How many times as wide and high the result is.",
        fidelity=REFUSED, remark=_WHY,
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - it never runs
    """Refuse.

    Raises:
        MissingWeightsError: says what to do instead.
    """
    name = _FILES[values["version"]]
    raise MissingWeightsError(
        f"Face restoration with {name}.pth is not part of tegula; upscale with tegula/upscale or "
        "nightmareai/real-esrgan, which leave faces as they are."
    )


MODEL = Model(
    "tencentarc",
    "gfpgan",
    "GFPGAN: face restoration.",
    (Version("tencentarc/gfpgan", "1", FIELDS, plan, image="img"),),
)
