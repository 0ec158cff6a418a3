"""philz1337x/clarity-upscaler, in canvas mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tegula.catalog.inputs import (
    ARRAY,
    File,
    Image,
    Inputs,
    Integer,
    Model,
    RandomSeed,
    RunContext,
    UpscaleRequest,
    Version,
    Whole,
    approximated,
    refused,
)
from tegula.catalog.weights import find_lora
from tegula.models.prompt import split_tags
from tegula.options import MAX_SEED, Scheduler, Sigmas, UpscaleOptions

_LATENT_PIXEL = 8
_LARGEST_GUIDANCE = 30.0
# AUTOMATIC1111's samplers without the ending that says how the steps are spaced.
_SCHEDULERS: Mapping[str, Scheduler] = {
    "DPM++ 2M": "dpm++2m",
    "DPM++ SDE": "dpm++sde",
    "DPM++ 2M SDE": "dpm++2m-sde",
    "DPM++ 2M SDE Heun": "dpm++2m-sde",
    "DPM++ 3M SDE": "dpm++3m-sde",
    "DPM++ 2S a": "dpm++2s",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2-ancestral",
    "DPM fast": "dpm++3s",
    "DPM adaptive": "dpm++3s",
    "Euler": "euler",
    "Euler a": "euler-ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "Restart": "heun",
    "DDIM": "ddim",
    "PLMS": "lms",
    "UniPC": "unipc",
}
_SIGMAS: Mapping[str, Sigmas] = {" Karras": "karras", " Exponential": "exponential"}
# Those of the web UI that are spaced otherwise than by its "automatic".
_OWN_SIGMAS: Mapping[str, Sigmas] = {"Restart": "karras"}
_NO_DOWNLOADS = "tegula runs the bundle it was started with and fetches nothing for a request"

# Sides of its windows in latent pixels.
_Tile = Annotated[
    Literal[16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256], Whole
]


class ClarityUpscaler(Inputs):
    """A pass for every doubling, each gentler than the one before."""

    image: Image
    prompt: str = Field(
        default="masterpiece, best quality, highres, <lora:more_details:0.5> "
        "<lora:SDXLrender_v2.0:1>",
        description="What the picture shows or should look like.",
        json_schema_extra=approximated(
            "a LoRA tag counts where `tegula models` lists a LoRA of that "
            "name; otherwise it is left out, and the log says so"
        ),
    )
    negative_prompt: str = Field(
        default="(worst quality, low quality, normal quality:2) JuggernautNegative-neg",
        description="What to steer away from.",
        json_schema_extra=approximated("the embedding counts where the bundle has it"),
    )
    scale_factor: float = Field(
        default=2.0,
        ge=1,
        le=16,
        description="How many times as wide and high the result is; above 2 in several passes.",
        json_schema_extra=approximated(
            "the same passes of at most 2; sizes are not rounded down to multiples of 8"
        ),
    )
    dynamic: float = Field(
        default=6.0,
        ge=1,
        le=50,
        description="Guidance scale: more contrast and punch.",
        json_schema_extra=approximated("above 30 it is 30"),
    )
    creativity: float = Field(
        default=0.35,
        ge=0,
        le=1,
        description="Denoise strength of the first pass.",
        json_schema_extra=approximated(
            "the same noise levels and steps, one more than num_inference_steps x creativity; at "
            "0 nothing is redrawn, where the original runs that one"
        ),
    )
    resemblance: float = Field(
        default=0.6,
        ge=0,
        le=3,
        description="Strength of the ControlNet.",
        json_schema_extra=approximated(
            "alike in all blocks, where the original lets it fade towards the first ones"
        ),
    )
    tiling_width: _Tile = Field(
        default=112,
        description="Fractality: smaller tiles invent more, locally. In latent pixels.",
        json_schema_extra=approximated(
            "windows are square: 8 times the geometric mean of both sides, in a size that "
            "the bundle takes, with an overlap of an eighth and feathered"
        ),
    )
    tiling_height: _Tile = Field(
        default=144,
        description="As tiling_width.",
        json_schema_extra=approximated("as tiling_width"),
    )
    sd_model: Literal[
        "epicrealism_naturalSinRC1VAE.safetensors [84d76a0328]",
        "juggernaut_reborn.safetensors [338b85bc4f]",
        "flat2DAnimerge_v45Sharp.safetensors",
    ] = Field(
        default="juggernaut_reborn.safetensors [338b85bc4f]",
        description="The checkpoint.",
        json_schema_extra=refused(f"ignored: {_NO_DOWNLOADS}"),
    )
    scheduler: Literal[
        "DPM++ 2M Karras",
        "DPM++ SDE Karras",
        "DPM++ 2M SDE Exponential",
        "DPM++ 2M SDE Karras",
        "Euler a",
        "Euler",
        "LMS",
        "Heun",
        "DPM2",
        "DPM2 a",
        "DPM++ 2S a",
        "DPM++ 2M",
        "DPM++ SDE",
        "DPM++ 2M SDE",
        "DPM++ 2M SDE Heun",
        "DPM++ 2M SDE Heun Karras",
        "DPM++ 2M SDE Heun Exponential",
        "DPM++ 3M SDE",
        "DPM++ 3M SDE Karras",
        "DPM++ 3M SDE Exponential",
        "DPM fast",
        "DPM adaptive",
        "LMS Karras",
        "DPM2 Karras",
        "DPM2 a Karras",
        "DPM++ 2S a Karras",
        "Restart",
        "DDIM",
        "PLMS",
        "UniPC",
    ] = Field(
        default="DPM++ 3M SDE Karras",
        description="The solver that walks from noise to picture, and how levels are spaced.",
        json_schema_extra=approximated(
            "the same noise levels, but for DDIM, PLMS, UniPC and DPM fast and adaptive, which "
            "choose theirs otherwise there; Restart runs as Heun, which it is below 20 steps, PLMS "
            "as LMS, 2M SDE Heun as 2M SDE, DPM fast and adaptive as DPM-Solver++ of order 3, 2S a "
            "without its added noise; SDE and 2S a evaluate the model once a step, where the "
            "original does twice"
        ),
    )
    num_inference_steps: Integer = Field(
        default=18,
        ge=1,
        le=100,
        description="Length of the schedule; steps x creativity of them are run.",
    )
    seed: RandomSeed = 1337
    multistep_factor: float = Field(
        default=0.8,
        ge=0,
        le=2,
        description="What creativity is multiplied by from pass to pass.",
    )
    downscaling: bool = Field(
        default=False,
        description="Bring the source to downscaling_resolution first.",
        json_schema_extra=approximated("shrinks only, and without writing a JPEG in between"),
    )
    downscaling_resolution: Integer = Field(
        default=768,
        ge=64,
        le=8192,
        description="Length of the longer side that downscaling leaves, in pixels.",
    )
    lora_links: str = Field(
        default="",
        description="Addresses of LoRAs to fetch.",
        json_schema_extra=refused(f"ignored: {_NO_DOWNLOADS}"),
    )
    custom_sd_model: str = Field(
        default="",
        description="Address of a checkpoint to fetch.",
        json_schema_extra=refused(f"ignored: {_NO_DOWNLOADS}"),
    )
    sharpen: float = Field(default=0.0, ge=0, le=10, description="Sharpens the result.")
    mask: File | None = Field(
        default=None,
        description="White is kept as it is, black may change.",
        json_schema_extra=approximated("the result keeps its full size"),
    )
    handfix: Literal["disabled", "hands_only", "image_and_hands"] = Field(
        default="disabled",
        description="Mends hands.",
        json_schema_extra=refused("there is no model for hands; only `disabled` is accepted"),
    )
    pattern: bool = Field(
        default=False,
        description="The picture is a pattern whose opposite edges meet.",
        json_schema_extra=approximated(
            "edges are wrapped around and joined softly, with no second diffusion"
        ),
    )
    output_format: Literal["webp", "jpg", "png"] = Field(
        default="png", description="Of the result."
    )

    @field_validator("handfix")
    @classmethod
    def _no_hands(cls, mode: str) -> str:
        if mode != "disabled":
            raise ValueError("tegula does not mend hands; leave handfix at disabled")
        return mode

    def request(self, context: RunContext) -> UpscaleRequest:
        """Return a pass for every doubling."""
        prompt, loras, notes = self._prompt_and_loras(context)
        scheduler, sigmas = _scheduler(self.scheduler)
        first = UpscaleOptions(
            auto=False,
            prompt=prompt,
            negative_prompt=self.negative_prompt,
            resemblance=self.resemblance,
            guidance_scale=min(self.dynamic, _LARGEST_GUIDANCE),
            window=self._window(context),
            steps=self.num_inference_steps,
            webui_steps=True,
            scheduler=scheduler,
            sigmas=sigmas,
            prescaler="realesrgan-x4plus",
        )
        scale = 1.0
        if self.downscaling:
            longest = max(context.width, context.height)
            scale = min(1.0, self.downscaling_resolution / longest)
        passes, creativity = [], self.creativity
        factors = pass_factors(self.scale_factor)
        for number, factor in enumerate(factors):
            scale *= factor
            last = number == len(factors) - 1
            passes.append(
                first.replaced(
                    size=(
                        max(1, round(context.width * scale)),
                        max(1, round(context.height * scale)),
                    ),
                    creativity=min(1.0, creativity),
                    # Of the largest seed the second pass has none above it.
                    seed=(self.seed + number) % (MAX_SEED + 1),
                    sharpen=self.sharpen if last else 0.0,
                )
            )
            creativity *= self.multistep_factor
        return UpscaleRequest(
            tuple(passes),
            format=self.output_format,
            mask="mask",
            mask_keeps_white=True,
            seamless=self.pattern,
            loras=loras,
            notes=notes,
        )

    def _prompt_and_loras(
        self, context: RunContext
    ) -> tuple[str, tuple[tuple[str, float], ...], tuple[str, ...]]:
        """Return the prompt without LoRA tags, the LoRAs that are there, and notes on the rest."""
        loras, notes = [], []
        prompt, tags = split_tags(self.prompt)
        for tag in tags:
            file = None if tag.fault else find_lora(tag.name, context)
            if file is not None and tag.weight is not None:
                loras.append((file, tag.weight))
            else:
                reason = tag.fault or "there is no file of it for this bundle"
                notes.append(tag.left_out(reason))
        fetched = {"lora_links": self.lora_links, "custom_sd_model": self.custom_sd_model}
        notes += [
            f"{name} is ignored: {_NO_DOWNLOADS}." for name, links in fetched.items() if links
        ]
        return prompt.strip(), tuple(loras), tuple(notes)

    def _window(self, context: RunContext) -> int:
        """Return the side of a square window as large as its tiles, in a size of the bundle."""
        side = (self.tiling_width * self.tiling_height) ** 0.5 * _LATENT_PIXEL
        multiple = context.window_multiple
        return max(context.minimum_window, int(round(side / multiple) * multiple))


def pass_factors(scale: float) -> tuple[float, ...]:
    """Return the enlargement of each pass: twice as often as possible, then the rest."""
    factors = []
    while scale >= 2:
        factors.append(2.0)
        scale /= 2
    if scale > 1 or not factors:
        factors.append(scale)
    return tuple(factors)


def _scheduler(name: str) -> tuple[Scheduler, Sigmas]:
    for ending, sigmas in _SIGMAS.items():
        if name.endswith(ending):
            return _SCHEDULERS[name.removesuffix(ending)], sigmas
    return _SCHEDULERS[name], _OWN_SIGMAS.get(name, "own")


MODEL = Model(
    "philz1337x",
    "clarity-upscaler",
    "A creative upscaler with creativity, resemblance and fractality.",
    (Version("philz1337x/clarity-upscaler", "1", ClarityUpscaler, output=ARRAY),),
    "Runs in canvas mode, which is what its tiled diffusion is, with feathered windows.",
)
