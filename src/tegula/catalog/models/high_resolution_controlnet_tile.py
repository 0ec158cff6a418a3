"""batouresearch/high-resolution-controlnet-tile, in its two generations."""

from __future__ import annotations

from collections.abc import Mapping

from tegula.catalog.adapters import found_loras
from tegula.catalog.inputs import (
    APPROXIMATED,
    ARRAY,
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
from tegula.options import Scheduler, UpscaleOptions

NAME = "batouresearch/high-resolution-controlnet-tile"
SCHEDULERS: Mapping[str, Scheduler] = {
    "DDIM": "ddim",
    "DPMSolverMultistep": "dpm++2m",
    "K_EULER_ANCESTRAL": "euler-ancestral",
    "K_EULER": "euler",
}
NEGATIVE_PROMPT = (
    "teeth, tooth, open mouth, longbody, lowres, bad anatomy, bad hands, missing fingers, "
    "extra digit, fewer digits, cropped, worst quality, low quality, mutant"
)
_DETAIL_PER_STRENGTH = 0.25
_SHARPEN_PER_STRENGTH = 0.2
_TILED = "in windows of one canvas, where the original makes one pass over all of it"


def _fields(
    resolutions: tuple[int, ...],
    *,
    resolution: int,
    resemblance: float,
    creativity: tuple[float, float],
    steps: int,
    guidance: tuple[float, float],
) -> tuple[Field, ...]:
    """Return what both generations have; pairs are (default, lowest)."""
    return (
        Field(name="prompt", kind=STRING, default="", description="What the picture shows."),
        image_field(),
        Field(
            name="resolution", kind=INTEGER, default=resolution, choices=resolutions,
            description="Length of the shorter side of the result, in pixels.",
            fidelity=APPROXIMATED,
            remark="the aspect ratio is kept, where the original rounds both sides to "
            "multiples of 128",
        ),
        Field(
            name="resemblance", kind=NUMBER, default=resemblance, low=0, high=1,
            description="Strength of the ControlNet: how firmly the structure is kept.",
        ),
        Field(
            name="creativity", kind=NUMBER, default=creativity[0], low=creativity[1], high=1,
            description="Denoise strength: 1 keeps nothing of the source.",
            fidelity=APPROXIMATED, remark=_TILED,
        ),
        Field(
            name="hdr", kind=NUMBER, default=0.0, low=0, high=1,
            description="Fuses exposures to open shadows and highlights.",
            fidelity=APPROXIMATED,
            remark="the same nine exposures; 0 really changes nothing, and colours are held "
            "to the fused picture",
        ),
        Field(
            name="scheduler", kind=STRING, default="DDIM", choices=tuple(SCHEDULERS),
            description="The solver that walks from noise to picture.",
        ),
        Field(
            name="steps", kind=INTEGER, default=steps, low=1, high=1000,
            description="Length of the schedule; steps x creativity of them are run.",
        ),
        Field(
            name="guidance_scale", kind=NUMBER, default=guidance[0], low=guidance[1], high=30,
            description="How firmly the prompt is followed; up to 1 it is off.",
        ),
        seed_field(),
        Field(
            name="negative_prompt", kind=STRING, default=NEGATIVE_PROMPT,
            description="What to steer away from.",
        ),
        Field(
            name="guess_mode", kind=BOOLEAN, default=False,
            description="Control from the picture alone, fading over the blocks.",
        ),
    )  # fmt: skip


OLDER = _fields(
    (2048, 2560),
    resolution=2048,
    resemblance=0.5,
    creativity=(0.5, 0.0),
    steps=20,
    guidance=(7.0, 0.1),
)
CURRENT = (
    *_fields(
        (2048, 2560, 4096),
        resolution=2560,
        resemblance=0.85,
        creativity=(0.35, 0.1),
        steps=8,
        guidance=(0.0, 0.0),
    ),
    Field(
        name="lora_details_strength", kind=NUMBER, default=1.0, low=-5, high=3,
        description="How much fine detail there is; below 0 there is less.",
        fidelity=APPROXIMATED,
        remark="drives the LoRA `more_details.safetensors` where the `lora` folder of the models "
        "folder has it; otherwise scales what diffusion changed, by 1 + (strength - 1) / 4",
    ),
    Field(
        name="lora_sharpness_strength", kind=NUMBER, default=1.25, low=-5, high=10,
        description="How sharp the picture is; above 2 it looks overdone.",
        fidelity=APPROXIMATED,
        remark="drives the LoRA `add_sharpness.safetensors` where it is there; otherwise "
        "sharpens the result by strength / 5, and below 0 not at all",
    ),
    Field(
        name="format", kind=STRING, default="jpg", choices=("jpg", "png"),
        description="Of the result.",
    ),
)  # fmt: skip


def _options(values: Values, *, detail: float = 0.0, sharpen: float = 0.0) -> UpscaleOptions:
    return UpscaleOptions(
        resolution=values["resolution"],
        prompt=values["prompt"],
        negative_prompt=values["negative_prompt"],
        creativity=values["creativity"],
        resemblance=values["resemblance"],
        guidance_scale=values["guidance_scale"],
        guess_mode=values["guess_mode"],
        scheduler=SCHEDULERS[values["scheduler"]],
        steps=values["steps"],
        seed=values["seed"],
        hdr=values["hdr"],
        prescaler="realesrgan-x4plus",
        detail=detail,
        sharpen=sharpen,
    )


def plan_older(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001
    """Return one upscale to a PNG file."""
    return one_pass(_options(values))


def plan_current(values: Values, situation: Situation) -> Recipe:
    """Return one upscale, with the two strengths on LoRAs or on controls of ours."""
    details, sharpness = values["lora_details_strength"], values["lora_sharpness_strength"]
    loras = found_loras(
        {"more_details.safetensors": details, "add_sharpness.safetensors": sharpness}, situation
    )
    if loras:
        return one_pass(_options(values), format=values["format"], loras=loras)
    detail = max(-1.0, (details - 1) * _DETAIL_PER_STRENGTH)
    sharpen = max(0.0, sharpness * _SHARPEN_PER_STRENGTH)
    note = (
        f"Without the LoRAs, lora_details_strength sets detail to {detail:g} and "
        f"lora_sharpness_strength sets sharpen to {sharpen:g}."
    )
    options = _options(values, detail=detail, sharpen=sharpen)
    return one_pass(options, [note], format=values["format"])


MODEL = Model(
    "batouresearch",
    "high-resolution-controlnet-tile",
    "Redraws a picture at 2048 to 4096 pixels with a tile ControlNet.",
    (
        Version(NAME, "2", CURRENT, plan_current),
        Version(NAME, "1", OLDER, plan_older, output=ARRAY),
    ),
    "The prompt, the strengths and the sizes mean the same; the pictures are those of the "
    "bundle in use. Realistic Vision 5.1 with its ControlNet comes nearest.",
)
