"""tegula/upscale: our own model, with the few knobs that most people need."""

from __future__ import annotations

from tegula.catalog.inputs import (
    BOOLEAN,
    FILE,
    INTEGER,
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
from tegula.options import MAX_SEED, PRESETS, UpscaleOptions

_KNOBS = ("scale", "preset", "prompt", "negative_prompt", "creativity", "resemblance", "seed")

FIELDS = (
    image_field(),
    Field(
        name="scale", kind=NUMBER, default=2.0, low=1, high=8,
        description="How many times as wide and high the result is.",
    ),
    Field(
        name="preset", kind=STRING, default="balanced", choices=PRESETS,
        description="Near the source, in between, inventive, or quick.",
    ),
    Field(
        name="prompt", kind=STRING, default="",
        description="What the picture shows or should look like.",
    ),
    Field(name="negative_prompt", kind=STRING, description="What to steer away from."),
    Field(
        name="creativity", kind=NUMBER, low=0, high=1,
        description="How much may change: 0 nothing, 1 everything. Left out, the preset says.",
    ),
    Field(
        name="resemblance", kind=NUMBER, low=0, high=3,
        description="How firmly the structure of the source is kept. Left out, the preset says.",
    ),
    Field(
        name="hdr", kind=NUMBER, default=0.0, low=0, high=1,
        description="Opens shadows and highlights; 0 changes nothing.",
    ),
    Field(
        name="mask", kind=FILE,
        description="White where the picture may change, black where it stays.",
    ),
    Field(
        name="seamless", kind=BOOLEAN, default=False,
        description="The picture is a pattern whose opposite edges meet.",
    ),
    Field(
        name="seed", kind=INTEGER, low=0, high=MAX_SEED,
        description="The same seed gives the same picture; random when left out.",
    ),
    Field(
        name="format", kind=STRING, default="png", choices=("png", "jpg", "webp"),
        description="Of the result.",
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - the same for all
    """Return one upscale."""
    options = UpscaleOptions(**{name: values[name] for name in _KNOBS}, hdr=values["hdr"])
    return one_pass(
        options, format=values["format"], mask="mask", seamless=bool(values["seamless"])
    )


MODEL = Model(
    "tegula",
    "upscale",
    "Makes pictures 1 to 8 times as large, with new, coherent detail.",
    (Version("tegula/upscale", "1", FIELDS, plan),),
)
