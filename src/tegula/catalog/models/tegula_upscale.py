"""tegula/upscale: our own model, with the few options that most people need."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tegula.catalog.inputs import (
    File,
    Image,
    Inputs,
    Model,
    RunContext,
    UpscaleRequest,
    Version,
    Whole,
)
from tegula.errors import OptionError
from tegula.options import OPTIONS, Creativity, Preset, Resemblance, Seed, Share, UpscaleOptions
from tegula.regions import parse_region


class TegulaUpscale(Inputs):
    """Options under their own names, with the bounds that a public server can offer."""

    image: Image
    scale: float = Field(
        default=2.0, ge=1, le=8, description="How many times as wide and high the result is."
    )
    preset: Preset = Field(
        default="balanced",
        description="Balanced suits most pictures, fast is quicker, best takes its time, exact "
        "invents nothing.",
    )
    prompt: str = Field(default="", description="What the picture shows or should look like.")
    negative_prompt: str | None = Field(default=None, description="What to steer away from.")
    creativity: Creativity | None = Field(
        default=None,
        description="How much may change: 0 nothing, 1 everything. Left out, the preset says.",
    )
    resemblance: Resemblance | None = Field(
        default=None,
        description="How firmly the structure of the source is kept. Left out, the preset says.",
    )
    hdr: Share = Field(default=0.0, description="Opens shadows and highlights; 0 changes nothing.")
    mask: File | None = Field(
        default=None, description="White where the picture may change, black where it stays."
    )
    seamless: bool = Field(
        default=False, description="The picture is a pattern whose opposite edges meet."
    )
    seed: Annotated[Seed, Whole] | None = Field(
        default=None, description="The same seed gives the same picture; random when left out."
    )
    format: Literal["png", "jpg", "webp"] = Field(default="png", description="Of the result.")
    strength_map: File | None = Field(
        default=None,
        description="How much of the creativity each place gets: white all of it, black none.",
    )
    regions: str = Field(
        default="",
        description="Prompts for parts of the picture, a line each: x,y,width,height:prompt, in "
        "pixels or shares of the source.",
    )

    @field_validator("regions")
    @classmethod
    def _are_regions(cls, text: str) -> str:
        try:
            for line in _lines(text):
                parse_region(line)
        except OptionError as error:
            raise ValueError(
                "a region is x,y,width,height:prompt in pixels or shares of the source, a line each"
            ) from error
        return text

    def request(self, context: RunContext) -> UpscaleRequest:  # noqa: ARG002 - the same for all
        """Return one upscale."""
        options = {name: value for name, value in self if name in OPTIONS}
        options["regions"] = _lines(self.regions)
        return UpscaleRequest(
            (UpscaleOptions(**options),),
            format=self.format,
            mask="mask",
            strength_map="strength_map",
            seamless=self.seamless,
        )


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


MODEL = Model(
    "tegula",
    "upscale",
    "Makes pictures 1 to 8 times as large, with new, coherent detail.",
    (Version("tegula/upscale", "1", TegulaUpscale),),
)
