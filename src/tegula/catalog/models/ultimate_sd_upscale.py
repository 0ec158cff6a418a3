"""fewjative/ultimate-sd-upscale: tiles in redraw mode, with all 24 inputs."""

from __future__ import annotations

from collections.abc import Mapping

from tegula.catalog.adapters import found_prescaler
from tegula.catalog.inputs import (
    APPROXIMATED,
    BOOLEAN,
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
    seed_field,
)
from tegula.options import Scheduler, SeamFix, Sigmas, TileOrder, UpscaleOptions

NAME = "fewjative/ultimate-sd-upscale"
UPSCALERS: Mapping[str, str] = {
    "4x_NMKD-Siax_200k": "realesrgan-x4plus",
    "4x-UltraSharp": "realesrgan-x4plus",
    "RealESRGAN_x4plus": "realesrgan-x4plus",
    "RealESRGAN_x4plus_anime_6B": "realesrgan-x4plus-anime",
}
SAMPLERS: Mapping[str, Scheduler] = {
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
    "dpmpp": "dpm++2m",
    "ddim": "ddim",
    "uni_pc": "unipc-bh1",
    "uni_pc_bh2": "unipc",
}
_NEVER_EXISTED = (
    "dpmpp is no sampler: the name never existed; choose dpmpp_2m, dpmpp_2m_sde or dpmpp_sde"
)
SPACINGS: Mapping[str, Sigmas] = {
    "normal": "normal",
    "karras": "karras",
    "exponential": "exponential",
    "sgm_uniform": "sgm-uniform",
    "simple": "simple",
    "ddim_uniform": "ddim-uniform",
}
ORDERS: Mapping[str, TileOrder] = {"Linear": "linear", "Chess": "chess", "None": "none"}
SEAM_FIXES: Mapping[str, SeamFix] = {
    "None": "none",
    "Band Pass": "band",
    "Half Tile": "half-tile",
    "Half Tile + Intersections": "half-tile+intersections",
}
_LARGEST_GUIDANCE = 30.0
_MULTIPLE = 8


def fields(
    *, prompt: str, negative_prompt: str, denoise: float, upscalers: tuple[str, ...]
) -> tuple[Field, ...]:
    """Return the inputs with the defaults in which models of this kind differ."""
    return (
        image_field(),
        Field(
            name="positive_prompt", kind=STRING, default=prompt,
            description="What every tile shows or should look like.",
        ),
        Field(
            name="negative_prompt", kind=STRING, default=negative_prompt,
            description="What to steer away from.",
        ),
        Field(
            name="upscaler", kind=STRING, default="4x-UltraSharp", choices=upscalers,
            description="The net that enlarges before diffusion.",
            fidelity=APPROXIMATED,
            remark="UltraSharp and Siax run where the `prescalers` folder of the models folder has "
            "their file; otherwise RealESRGAN_x4plus takes their place, and the log says so",
        ),
        Field(
            name="upscale_by", kind=NUMBER, default=2.0, low=0.05, high=4,
            description="How many times as wide and high the result is.",
        ),
        Field(
            name="use_controlnet_tile", kind=BOOLEAN, default=True,
            description="Hold tiles to the picture with the tile ControlNet.",
        ),
        Field(
            name="controlnet_strength", kind=NUMBER, default=1.0, low=0, high=3,
            description="Strength of that ControlNet.",
            fidelity=APPROXIMATED,
            remark="its picture is the prescaled one, where the original takes the source, and "
            "it holds both halves of guidance",
        ),
        seed_field(),
        Field(
            name="steps", kind=INTEGER, default=20, low=1, high=1000,
            description="Steps that are run, whatever the denoise strength.",
        ),
        Field(
            name="cfg", kind=NUMBER, default=8.0, low=0, high=100,
            description="How firmly the prompt is followed.",
            fidelity=APPROXIMATED, remark="above 30 it is 30",
        ),
        Field(
            name="sampler_name", kind=STRING, default="euler", choices=tuple(SAMPLERS),
            refusals={"dpmpp": _NEVER_EXISTED},
            description="The solver that walks from noise to picture.",
            fidelity=APPROXIMATED,
            remark="dpm_fast and dpm_adaptive are DPM-Solver++ of order 3 with even steps, "
            "dpmpp_2s_ancestral is without its added noise, names with _gpu are those without; "
            "`dpmpp` is refused: it never existed",
        ),
        Field(
            name="scheduler", kind=STRING, default="normal", choices=tuple(SPACINGS),
            description="How the noise levels are spaced.",
            fidelity=APPROXIMATED,
            remark="sgm_uniform and simple are the same here; they differ by one training step",
        ),
        Field(
            name="denoise", kind=NUMBER, default=denoise, low=0, high=1,
            description="Denoise strength of the tiles.",
        ),
        Field(
            name="mode_type", kind=STRING, default="Linear", choices=tuple(ORDERS),
            description="Order of the tiles; None runs the seam fix alone.",
        ),
        *_tile_fields(),
        *_seam_fix_fields(),
        Field(
            name="force_uniform_tiles", kind=BOOLEAN, default=True,
            description="Tiles at the edge see as much as all others.",
        ),
    )  # fmt: skip


def _tile_fields() -> tuple[Field, ...]:
    return (
        Field(
            name="tile_width", kind=INTEGER, default=512, low=64, high=8192,
            description="Width of a tile in pixels, without its padding.",
        ),
        Field(
            name="tile_height", kind=INTEGER, default=512, low=64, high=8192,
            description="Height of a tile in pixels, without its padding.",
        ),
        Field(
            name="mask_blur", kind=INTEGER, default=8, low=0, high=64,
            description="How softly tiles are pasted, in pixels.",
        ),
        Field(
            name="tile_padding", kind=INTEGER, default=32, low=0, high=8192,
            description="Surroundings that a tile sees, in pixels.",
            fidelity=APPROXIMATED,
            remark="a tile keeps its scale and sees at least as far as its mask is blurred, "
            "where the original resamples it to a fixed size",
        ),
    )  # fmt: skip


def _seam_fix_fields() -> tuple[Field, ...]:
    return (
        Field(
            name="seam_fix_mode", kind=STRING, default="None", choices=tuple(SEAM_FIXES),
            description="What is painted once more over the borders of the tiles.",
            fidelity=APPROXIMATED,
            remark="long bands are diffused in overlapping windows, to bound memory",
        ),
        Field(
            name="seam_fix_denoise", kind=NUMBER, default=1.0, low=0, high=1,
            description="Denoise strength of the seam fix.",
        ),
        Field(
            name="seam_fix_width", kind=INTEGER, default=64, low=2, high=8192,
            description="Width of the bands in pixels.",
        ),
        Field(
            name="seam_fix_mask_blur", kind=INTEGER, default=8, low=0, high=64,
            description="How softly the shifted tiles are pasted, in pixels.",
        ),
        Field(
            name="seam_fix_padding", kind=INTEGER, default=16, low=0, high=8192,
            description="Surroundings that the seam fix sees, in pixels.",
        ),
    )  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:
    """Return one upscale in redraw mode."""
    prescaler, notes = _prescaler(values["upscaler"])
    options = UpscaleOptions(
        mode="redraw",
        size=_size(situation, values["upscale_by"]),
        prompt=values["positive_prompt"],
        negative_prompt=values["negative_prompt"],
        prescaler=prescaler,
        resemblance=values["controlnet_strength"] if values["use_controlnet_tile"] else 0.0,
        seed=values["seed"],
        steps=values["steps"],
        exact_steps=True,
        guidance_scale=min(values["cfg"], _LARGEST_GUIDANCE),
        scheduler=SAMPLERS[values["sampler_name"]],
        sigmas=SPACINGS[values["scheduler"]],
        creativity=values["denoise"],
        tile_order=ORDERS[values["mode_type"]],
        tile_width=values["tile_width"],
        tile_height=values["tile_height"],
        tile_blur=values["mask_blur"],
        tile_padding=values["tile_padding"],
        tile_uniform=values["force_uniform_tiles"],
        seam_fix=SEAM_FIXES[values["seam_fix_mode"]],
        seam_fix_denoise=values["seam_fix_denoise"],
        seam_fix_width=values["seam_fix_width"],
        seam_fix_blur=values["seam_fix_mask_blur"],
        seam_fix_padding=values["seam_fix_padding"],
    )
    return one_pass(options, notes)


def _prescaler(upscaler: str) -> tuple[str, tuple[str, ...]]:
    own = upscaler.startswith("RealESRGAN")
    file = None if own else found_prescaler(upscaler)
    if own or file is not None:
        return str(file or UPSCALERS[upscaler]), ()
    note = f"The file of {upscaler} is not on this machine; {UPSCALERS[upscaler]} takes its place."
    return UPSCALERS[upscaler], (note,)


def _size(situation: Situation, factor: float) -> tuple[int, int]:
    sides = (situation.width, situation.height)
    width, height = (max(1, round(side * factor / _MULTIPLE)) * _MULTIPLE for side in sides)
    return width, height


MODEL = Model(
    "fewjative",
    "ultimate-sd-upscale",
    "Ultimate SD Upscale: tiles redrawn one after the other, with a seam fix.",
    (
        Version(
            NAME,
            "1",
            fields(
                prompt="Hey! Have a nice day :D",
                negative_prompt="",
                denoise=0.2,
                upscalers=tuple(UPSCALERS),
            ),
            plan,
        ),
    ),
    "Runs in redraw mode. The checkpoint is that of the bundle in use, where the original "
    "has Deliberate v2.",
)
