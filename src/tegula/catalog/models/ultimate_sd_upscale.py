"""fewjative/ultimate-sd-upscale and juergengunz/ultimate-portrait-upscale, in redraw mode.

Both run ComfyUI's node "Ultimate SD Upscale", and differ in defaults and in the upscalers
on offer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tegula.catalog.inputs import (
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
)
from tegula.catalog.weights import find_prescaler
from tegula.options import Scheduler, SeamFix, Sigmas, TileOrder, UpscaleOptions

_PRESCALERS: Mapping[str, str] = {
    "4x_NMKD-Siax_200k": "realesrgan-x4plus",
    "4x-UltraSharp": "realesrgan-x4plus",
    "RealESRGAN_x4plus": "realesrgan-x4plus",
    "RealESRGAN_x4plus_anime_6B": "realesrgan-x4plus-anime",
}
_SCHEDULERS: Mapping[str, Scheduler] = {
    "euler": "euler",
    "euler_ancestral": "euler-ancestral",
    "heun": "heun",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2-ancestral",
    "lms": "lms",
    "dpm_fast": "dpm++3s",
    "dpm_adaptive": "dpm++3s",
    "dpmpp_2s_ancestral": "dpm++2s",
    "dpmpp_sde": "dpm++sde",
    "dpmpp_sde_gpu": "dpm++sde",
    "dpmpp_2m": "dpm++2m",
    "dpmpp_2m_sde": "dpm++2m-sde",
    "dpmpp_2m_sde_gpu": "dpm++2m-sde",
    "dpmpp_3m_sde": "dpm++3m-sde",
    "dpmpp_3m_sde_gpu": "dpm++3m-sde",
    "ddim": "ddim",
    # ComfyUI's uni_pc is the variant bh1; diffusers' own default is bh2.
    "uni_pc": "unipc-bh1",
    "uni_pc_bh2": "unipc",
}
_SIGMAS: Mapping[str, Sigmas] = {
    "normal": "normal",
    "karras": "karras",
    "exponential": "exponential",
    "sgm_uniform": "sgm-uniform",
    "simple": "simple",
    "ddim_uniform": "ddim-uniform",
}
_TILE_ORDERS: Mapping[str, TileOrder] = {"Linear": "linear", "Chess": "chess", "None": "none"}
_SEAM_FIXES: Mapping[str, SeamFix] = {
    "None": "none",
    "Band Pass": "band",
    "Half Tile": "half-tile",
    "Half Tile + Intersections": "half-tile+intersections",
}
_LARGEST_GUIDANCE = 30.0
_MULTIPLE = 8
"""ComfyUI rounds the sides of the result to multiples of a latent pixel."""

_PROMPT = Field(
    description="What every tile shows or should look like.",
    json_schema_extra=approximated("the same but for <lora:name:0.7>, which adds a LoRA here"),
)
_NEGATIVE_PROMPT = Field(description="What to steer away from.")
_UPSCALER = Field(
    description="The net that enlarges before diffusion.",
    json_schema_extra=approximated(
        "UltraSharp and Siax run where `tegula models` lists their file among the "
        "prescalers; otherwise RealESRGAN_x4plus takes their place, and the log says so"
    ),
)
_Denoise = Annotated[float, Field(ge=0, le=1, description="Denoise strength of the tiles.")]
_TileSide = Annotated[int, Field(ge=64, le=8192), Whole]
_Padding = Annotated[int, Field(ge=0, le=8192), Whole]
_Blur = Annotated[int, Field(ge=0, le=64), Whole]


class _UltimateInputs(Inputs):
    image: Image
    positive_prompt: Annotated[str, _PROMPT]
    negative_prompt: Annotated[str, _NEGATIVE_PROMPT]
    upscaler: Annotated[str, _UPSCALER]
    upscale_by: float = Field(
        default=2.0, ge=0.05, le=4, description="How many times as wide and high the result is."
    )
    use_controlnet_tile: bool = Field(
        default=True, description="Hold tiles to the picture with the tile ControlNet."
    )
    controlnet_strength: float = Field(
        default=1.0,
        ge=0,
        le=3,
        description="Strength of that ControlNet.",
        json_schema_extra=approximated(
            "its picture is the prescaled one, where the original takes the source, and "
            "it holds both halves of guidance"
        ),
    )
    seed: RandomSeed | None = None
    steps: Integer = Field(
        default=20,
        ge=1,
        le=1000,
        description="Steps that are run, whatever the denoise strength.",
    )
    cfg: float = Field(
        default=8.0,
        ge=0,
        le=100,
        description="How firmly the prompt is followed.",
        json_schema_extra=approximated("above 30 it is 30"),
    )
    sampler_name: Literal[
        "euler",
        "euler_ancestral",
        "heun",
        "dpm_2",
        "dpm_2_ancestral",
        "lms",
        "dpm_fast",
        "dpm_adaptive",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "dpmpp_sde_gpu",
        "dpmpp_2m",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "dpmpp",
        "ddim",
        "uni_pc",
        "uni_pc_bh2",
    ] = Field(
        default="euler",
        description="The solver that walks from noise to picture.",
        json_schema_extra=approximated(
            "the same noise levels; dpm_fast and dpm_adaptive, which choose theirs themselves in "
            "ComfyUI, are DPM-Solver++ of order 3; dpmpp_2s_ancestral is without its added noise, "
            "and like dpmpp_sde evaluates the model once a step, not twice; uni_pc is of order 2, "
            "not 3; names with _gpu are those without; "
            "`dpmpp` is refused: it never existed"
        ),
    )
    scheduler: Literal[
        "normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform"
    ] = Field(
        default="normal",
        description="How the noise levels are spaced.",
    )
    denoise: _Denoise
    mode_type: Literal["Linear", "Chess", "None"] = Field(
        default="Linear", description="Order of the tiles; None runs the seam fix alone."
    )
    tile_width: _TileSide = Field(
        default=512, description="Width of a tile in pixels, without its padding."
    )
    tile_height: _TileSide = Field(
        default=512, description="Height of a tile in pixels, without its padding."
    )
    mask_blur: _Blur = Field(default=8, description="How softly tiles are pasted, in pixels.")
    tile_padding: _Padding = Field(
        default=32,
        description="Surroundings that a tile sees, in pixels.",
        json_schema_extra=approximated(
            "a tile keeps its scale and sees at least as far as its mask is blurred, "
            "where the original resamples it to a fixed size"
        ),
    )
    seam_fix_mode: Literal["None", "Band Pass", "Half Tile", "Half Tile + Intersections"] = Field(
        default="None",
        description="What is painted once more over the borders of the tiles.",
        json_schema_extra=approximated(
            "long bands are diffused in overlapping windows, to bound memory"
        ),
    )
    seam_fix_denoise: float = Field(
        default=1.0, ge=0, le=1, description="Denoise strength of the seam fix."
    )
    seam_fix_width: Integer = Field(
        default=64, ge=2, le=8192, description="Width of the bands in pixels."
    )
    seam_fix_mask_blur: _Blur = Field(
        default=8, description="How softly the shifted tiles are pasted, in pixels."
    )
    seam_fix_padding: _Padding = Field(
        default=16, description="Surroundings that the seam fix sees, in pixels."
    )
    force_uniform_tiles: bool = Field(
        default=True, description="Tiles at the edge see as much as all others."
    )

    @field_validator("sampler_name")
    @classmethod
    def _exists(cls, name: str) -> str:
        if name not in _SCHEDULERS:
            raise ValueError(
                "dpmpp is not a sampler: the name never existed; choose dpmpp_2m, dpmpp_2m_sde or "
                "dpmpp_sde"
            )
        return name

    def request(self, context: RunContext) -> UpscaleRequest:
        """Return one upscale in redraw mode."""
        prescaler, notes = _prescaler(self.upscaler)
        width, height = (
            max(1, round(side * self.upscale_by / _MULTIPLE)) * _MULTIPLE
            for side in (context.width, context.height)
        )
        options = UpscaleOptions(
            auto=False,
            mode="redraw",
            size=(width, height),
            prompt=self.positive_prompt,
            negative_prompt=self.negative_prompt,
            prompt_weighting="comfyui",
            prescaler=prescaler,
            resemblance=self.controlnet_strength if self.use_controlnet_tile else 0.0,
            seed=self.seed,
            steps=self.steps,
            exact_steps=True,
            guidance_scale=min(self.cfg, _LARGEST_GUIDANCE),
            scheduler=_SCHEDULERS[self.sampler_name],
            sigmas=_SIGMAS[self.scheduler],
            creativity=self.denoise,
            tile_order=_TILE_ORDERS[self.mode_type],
            tile_width=self.tile_width,
            tile_height=self.tile_height,
            tile_blur=self.mask_blur,
            tile_padding=self.tile_padding,
            tile_uniform=self.force_uniform_tiles,
            seam_fix=_SEAM_FIXES[self.seam_fix_mode],
            seam_fix_denoise=self.seam_fix_denoise,
            seam_fix_width=self.seam_fix_width,
            seam_fix_blur=self.seam_fix_mask_blur,
            seam_fix_padding=self.seam_fix_padding,
        )
        return UpscaleRequest((options,), notes=notes)


def _prescaler(upscaler: str) -> tuple[str, tuple[str, ...]]:
    """Return the user's file of an upscaler or the packaged net in its place, and notes."""
    packaged = _PRESCALERS[upscaler]
    if upscaler.startswith("RealESRGAN"):
        return packaged, ()
    if file := find_prescaler(upscaler):
        return str(file), ()
    return packaged, (
        f"The file of {upscaler} is not on this machine; {packaged} takes its place.",
    )


class UltimateSDUpscale(_UltimateInputs):
    """All four upscalers, and a denoise strength that shows."""

    positive_prompt: Annotated[str, _PROMPT] = "Hey! Have a nice day :D"
    negative_prompt: Annotated[str, _NEGATIVE_PROMPT] = ""
    upscaler: Annotated[
        Literal[
            "4x_NMKD-Siax_200k", "4x-UltraSharp", "RealESRGAN_x4plus", "RealESRGAN_x4plus_anime_6B"
        ],
        _UPSCALER,
    ] = "4x-UltraSharp"
    denoise: _Denoise = 0.2


class UltimatePortraitUpscale(_UltimateInputs):
    """One upscaler, and gentle defaults for portraits."""

    positive_prompt: Annotated[str, _PROMPT] = (
        "business portrait, detailed skin, perfect skin, soft lighting, beautiful eyes, "
        "photorealistic, perfect teeth"
    )
    negative_prompt: Annotated[str, _NEGATIVE_PROMPT] = (
        "cartoon, cgi, render, painting, illustration, drawing"
    )
    upscaler: Annotated[Literal["4x-UltraSharp"], _UPSCALER] = "4x-UltraSharp"
    denoise: _Denoise = 0.1


MODEL = Model(
    "fewjative",
    "ultimate-sd-upscale",
    "Ultimate SD Upscale: tiles redrawn one after the other, with a seam fix.",
    (Version("fewjative/ultimate-sd-upscale", "1", UltimateSDUpscale),),
    "Runs in redraw mode. The checkpoint is that of the bundle in use, where the original "
    "has Deliberate v2. Prompts are read as ComfyUI reads them: (word:1.2) weighs towards the "
    "empty prompt, [word] is text.",
)
PORTRAIT_MODEL = Model(
    "juergengunz",
    "ultimate-portrait-upscale",
    "Ultimate SD Upscale with gentle defaults for portraits.",
    (Version("juergengunz/ultimate-portrait-upscale", "1", UltimatePortraitUpscale),),
    "As fewjative/ultimate-sd-upscale, with other defaults. Which checkpoint the original "
    "has is not known.",
)
