"""batouresearch/high-resolution-controlnet-tile, in its two generations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from tegula.catalog.inputs import (
    ARRAY,
    Image,
    Inputs,
    Model,
    RandomSeed,
    RunContext,
    UpscaleRequest,
    Version,
    Whole,
    approximated,
)
from tegula.catalog.weights import find_lora
from tegula.options import Scheduler, Sigmas, UpscaleOptions

_NAME = "batouresearch/high-resolution-controlnet-tile"
# diffusers spaces the levels of its DPM-Solvers as ComfyUI's sgm_uniform does.
_SCHEDULERS: Mapping[str, tuple[Scheduler, Sigmas]] = {
    "DDIM": ("ddim", "own"),
    "DPMSolverMultistep": ("dpm++2m", "sgm-uniform"),
    "K_EULER_ANCESTRAL": ("euler-ancestral", "normal"),
    "K_EULER": ("euler", "normal"),
}
_DETAIL_PER_STRENGTH = 0.25
_SHARPEN_PER_STRENGTH = 0.2

# The generations have the same inputs in the same order, with other defaults and bounds.
_RESOLUTION = Field(
    description="Length of the shorter side of the result, in pixels.",
    json_schema_extra=approximated(
        "the aspect ratio is kept, where the original rounds both sides to multiples of 128"
    ),
)
_Resemblance = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Strength of the ControlNet: how firmly the structure is kept.",
    ),
]
_Creativity = Annotated[
    float,
    Field(
        le=1,
        description="Denoise strength: 1 keeps nothing of the source.",
        json_schema_extra=approximated(
            "in windows of one canvas, where the original makes one pass over all of it"
        ),
    ),
]
_Steps = Annotated[
    int,
    Field(
        ge=1,
        le=1000,
        description="Length of the schedule; steps x creativity of them are run.",
    ),
    Whole,
]
_GuidanceScale = Annotated[
    float, Field(le=30, description="How firmly the prompt is followed; up to 1 it is off.")
]


class _TileInputs(Inputs):
    prompt: str = Field(default="", description="What the picture shows.")
    image: Image
    resolution: Annotated[int, _RESOLUTION]
    resemblance: _Resemblance
    creativity: _Creativity
    hdr: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fuses exposures to open shadows and highlights.",
        json_schema_extra=approximated(
            "the same nine exposures; 0 really changes nothing, and colours are held "
            "to the fused picture"
        ),
    )
    scheduler: Literal["DDIM", "DPMSolverMultistep", "K_EULER_ANCESTRAL", "K_EULER"] = Field(
        default="DDIM",
        description="The solver that walks from noise to picture.",
        json_schema_extra=approximated(
            "the same noise levels, those of DPMSolverMultistep within 0.5%: the original rounds "
            "their timesteps"
        ),
    )
    steps: _Steps
    guidance_scale: _GuidanceScale
    seed: RandomSeed | None = None
    negative_prompt: str = Field(
        default="teeth, tooth, open mouth, longbody, lowres, bad anatomy, bad hands, missing "
        "fingers, extra digit, fewer digits, cropped, worst quality, low quality, mutant",
        description="What to steer away from.",
    )
    guess_mode: bool = Field(
        default=False, description="Control from the picture alone, fading over the blocks."
    )

    def _options(self, *, detail: float = 0.0, sharpen: float = 0.0) -> UpscaleOptions:
        scheduler, sigmas = _SCHEDULERS[self.scheduler]
        return UpscaleOptions(
            auto=False,
            resolution=self.resolution,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            creativity=self.creativity,
            resemblance=self.resemblance,
            guidance_scale=self.guidance_scale,
            guess_mode=self.guess_mode,
            scheduler=scheduler,
            sigmas=sigmas,
            steps=self.steps,
            seed=self.seed,
            hdr=self.hdr,
            prescaler="realesrgan-x4plus",
            detail=detail,
            sharpen=sharpen,
        )


class OlderTile(_TileInputs):
    """The generation that answers with a list of one PNG file."""

    resolution: Annotated[Literal[2048, 2560], Whole, _RESOLUTION] = 2048
    resemblance: _Resemblance = 0.5
    creativity: _Creativity = Field(default=0.5, ge=0.0)
    steps: _Steps = 20
    guidance_scale: _GuidanceScale = Field(default=7.0, ge=0.1)

    def request(self, context: RunContext) -> UpscaleRequest:  # noqa: ARG002 - the same for all
        """Return one upscale to a PNG file."""
        return UpscaleRequest((self._options(),))


class CurrentTile(_TileInputs):
    """The generation with LoRAs for detail and sharpness."""

    resolution: Annotated[Literal[2048, 2560, 4096], Whole, _RESOLUTION] = 2560
    resemblance: _Resemblance = 0.85
    creativity: _Creativity = Field(default=0.35, ge=0.1)
    steps: _Steps = 8
    guidance_scale: _GuidanceScale = Field(default=0.0, ge=0.0)
    lora_details_strength: float = Field(
        default=1.0,
        ge=-5,
        le=3,
        description="How much fine detail there is; below 0 there is less.",
        json_schema_extra=approximated(
            "drives the LoRA `more_details.safetensors` where `tegula models` lists it; "
            "otherwise scales what diffusion changed, by 1 + (strength - 1) / 4"
        ),
    )
    lora_sharpness_strength: float = Field(
        default=1.25,
        ge=-5,
        le=10,
        description="How sharp the picture is; above 2 it looks overdone.",
        json_schema_extra=approximated(
            "drives the LoRA `add_sharpness.safetensors` where it is there; otherwise "
            "sharpens the result by strength / 5, and below 0 not at all"
        ),
    )
    format: Literal["jpg", "png"] = Field(default="jpg", description="Of the result.")

    def request(self, context: RunContext) -> UpscaleRequest:
        """Return one upscale, with the two strengths on LoRAs or on options of ours."""
        strengths = {
            "more_details": self.lora_details_strength,
            "add_sharpness": self.lora_sharpness_strength,
        }
        found = [(find_lora(name, context), strength) for name, strength in strengths.items()]
        loras = tuple((file, strength) for file, strength in found if file is not None)
        if len(loras) == len(strengths):
            return UpscaleRequest((self._options(),), format=self.format, loras=loras)
        detail = max(-1.0, (self.lora_details_strength - 1) * _DETAIL_PER_STRENGTH)
        sharpen = max(0.0, self.lora_sharpness_strength * _SHARPEN_PER_STRENGTH)
        note = (
            f"Without the LoRAs, lora_details_strength sets detail to {detail:g} and "
            f"lora_sharpness_strength sets sharpen to {sharpen:g}."
        )
        options = self._options(detail=detail, sharpen=sharpen)
        return UpscaleRequest((options,), format=self.format, notes=(note,))


MODEL = Model(
    "batouresearch",
    "high-resolution-controlnet-tile",
    "Redraws a picture at 2048 to 4096 pixels with a tile ControlNet.",
    (
        Version(_NAME, "2", CurrentTile),
        Version(_NAME, "1", OlderTile, output=ARRAY),
    ),
    "The prompt, the strengths and the sizes mean the same; the pictures are those of the "
    "bundle in use. Realistic Vision 5.1 with its ControlNet comes nearest.",
)
