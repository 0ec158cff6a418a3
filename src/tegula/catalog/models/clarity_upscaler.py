"""philz1337x/clarity-upscaler, in canvas mode."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tegula.catalog.adapters import found_lora
from tegula.catalog.inputs import (
    APPROXIMATED,
    ARRAY,
    BOOLEAN,
    FILE,
    INTEGER,
    NUMBER,
    REFUSED,
    STRING,
    Field,
    Model,
    Recipe,
    Situation,
    Values,
    Version,
    image_field,
    seed_field,
)
from tegula.options import MAX_SEED, Scheduler, Sigmas, UpscaleOptions

_TILES = tuple(range(16, 257, 16))
_LATENT = 8
_LARGEST_GUIDANCE = 30.0
_SOLVERS: Mapping[str, Scheduler] = {
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
SCHEDULERS = (
    "DPM++ 2M Karras", "DPM++ SDE Karras", "DPM++ 2M SDE Exponential", "DPM++ 2M SDE Karras",
    "Euler a", "Euler", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE",
    "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2M SDE Heun Karras",
    "DPM++ 2M SDE Heun Exponential", "DPM++ 3M SDE", "DPM++ 3M SDE Karras",
    "DPM++ 3M SDE Exponential", "DPM fast", "DPM adaptive", "LMS Karras", "DPM2 Karras",
    "DPM2 a Karras", "DPM++ 2S a Karras", "Restart", "DDIM", "PLMS", "UniPC",
)  # fmt: skip
_LORA_TAG = re.compile(r"<lora:([^<>:]*)(?::([^<>]*))?>")
_NO_DOWNLOADS = "tegula runs the bundle it was started with and fetches nothing for a request"
_NO_HANDS = "tegula does not mend hands; leave handfix at disabled"

FIELDS = (
    image_field(),
    Field(
        name="prompt", kind=STRING,
        default="masterpiece, best quality, highres, <lora:more_details:0.5> "
        "<lora:SDXLrender_v2.0:1>",
        description="What the picture shows or should look like.",
        fidelity=APPROXIMATED,
        remark="a LoRA tag counts where the `lora` folder of the models folder has a file of that "
        "name; otherwise it is left out, and the log says so",
    ),
    Field(
        name="negative_prompt", kind=STRING,
        default="(worst quality, low quality, normal quality:2) JuggernautNegative-neg",
        description="What to steer away from.",
        fidelity=APPROXIMATED, remark="the embedding counts where the bundle has it",
    ),
    Field(
        name="scale_factor", kind=NUMBER, default=2.0, low=1, high=16,
        description="How many times as wide and high the result is; above 2 in several passes.",
        fidelity=APPROXIMATED,
        remark="the same passes of at most 2; sizes are not rounded down to multiples of 8",
    ),
    Field(
        name="dynamic", kind=NUMBER, default=6.0, low=1, high=50,
        description="Guidance scale: more contrast and punch.",
        fidelity=APPROXIMATED, remark="above 30 it is 30",
    ),
    Field(
        name="creativity", kind=NUMBER, default=0.35, low=0, high=1,
        description="Denoise strength of the first pass.",
    ),
    Field(
        name="resemblance", kind=NUMBER, default=0.6, low=0, high=3,
        description="Strength of the ControlNet.",
        fidelity=APPROXIMATED,
        remark="alike in all blocks, where the original lets it fade towards the first ones",
    ),
    Field(
        name="tiling_width", kind=INTEGER, default=112, choices=_TILES,
        description="Fractality: smaller tiles invent more, locally. In latent pixels.",
        fidelity=APPROXIMATED,
        remark="windows are square: 8 times the geometric mean of both sides, in a size that "
        "the bundle takes, with an overlap of an eighth and feathered",
    ),
    Field(
        name="tiling_height", kind=INTEGER, default=144, choices=_TILES,
        description="As tiling_width.",
        fidelity=APPROXIMATED, remark="as tiling_width",
    ),
    Field(
        name="sd_model", kind=STRING, default="juggernaut_reborn.safetensors [338b85bc4f]",
        choices=(
            "epicrealism_naturalSinRC1VAE.safetensors [84d76a0328]",
            "juggernaut_reborn.safetensors [338b85bc4f]",
            "flat2DAnimerge_v45Sharp.safetensors",
        ),
        description="The checkpoint.",
        fidelity=REFUSED, remark=f"ignored: {_NO_DOWNLOADS}",
    ),
    Field(
        name="scheduler", kind=STRING, default="DPM++ 3M SDE Karras", choices=SCHEDULERS,
        description="The solver that walks from noise to picture, and how levels are spaced.",
        fidelity=APPROXIMATED,
        remark="Restart runs as Heun, PLMS as LMS, 2M SDE Heun as 2M SDE, DPM fast and "
        "adaptive as DPM-Solver++ of order 3",
    ),
    Field(
        name="num_inference_steps", kind=INTEGER, default=18, low=1, high=100,
        description="Length of the schedule; steps x creativity of them are run.",
    ),
    seed_field(1337),
    Field(
        name="multistep_factor", kind=NUMBER, default=0.8, low=0, high=2,
        description="What creativity is multiplied by from pass to pass.",
    ),
    Field(
        name="downscaling", kind=BOOLEAN, default=False,
        description="Bring the source to downscaling_resolution first.",
        fidelity=APPROXIMATED,
        remark="shrinks only, and without writing a JPEG in between",
    ),
    Field(
        name="downscaling_resolution", kind=INTEGER, default=768, low=64, high=8192,
        description="Length of the longer side that downscaling leaves, in pixels.",
    ),
    Field(
        name="lora_links", kind=STRING, default="", description="Addresses of LoRAs to fetch.",
        fidelity=REFUSED, remark=f"ignored: {_NO_DOWNLOADS}",
    ),
    Field(
        name="custom_sd_model", kind=STRING, default="",
        description="Address of a checkpoint to fetch.",
        fidelity=REFUSED, remark=f"ignored: {_NO_DOWNLOADS}",
    ),
    Field(
        name="sharpen", kind=NUMBER, default=0.0, low=0, high=10,
        description="Sharpens the result.",
    ),
    Field(
        name="mask", kind=FILE, description="White is kept as it is, black may change.",
        fidelity=APPROXIMATED, remark="the result keeps its full size",
    ),
    Field(
        name="handfix", kind=STRING, default="disabled",
        choices=("disabled", "hands_only", "image_and_hands"),
        refusals=dict.fromkeys(("hands_only", "image_and_hands"), _NO_HANDS),
        description="Mends hands.",
        fidelity=REFUSED, remark="there is no model for hands; only `disabled` is accepted",
    ),
    Field(
        name="pattern", kind=BOOLEAN, default=False,
        description="The picture is a pattern whose opposite edges meet.",
        fidelity=APPROXIMATED,
        remark="edges are wrapped around and joined softly, with no second diffusion",
    ),
    Field(
        name="output_format", kind=STRING, default="png", choices=("webp", "jpg", "png"),
        description="Of the result.",
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:
    """Return a pass for every doubling, each gentler than the one before."""
    prompt, loras, notes = _prompt(values, situation)
    shrink = _shrink(values, situation)
    first = _first_pass(values, situation, prompt)
    passes: list[UpscaleOptions] = []
    so_far = shrink
    for number, factor in enumerate(factors(values["scale_factor"])):
        so_far *= factor
        size = (round(situation.width * so_far), round(situation.height * so_far))
        passes.append(
            first.replaced(
                size=(max(1, size[0]), max(1, size[1])),
                creativity=min(1.0, values["creativity"] * values["multistep_factor"] ** number),
                seed=None if values["seed"] is None else (values["seed"] + number) % (MAX_SEED + 1),
            )
        )
    return Recipe(
        (*passes[:-1], passes[-1].replaced(sharpen=values["sharpen"])),
        format=values["output_format"],
        mask="mask",
        mask_keeps_white=True,
        seamless=values["pattern"],
        loras=loras,
        notes=notes,
    )


def _first_pass(values: Values, situation: Situation, prompt: str) -> UpscaleOptions:
    solver, spacing = _solver(values["scheduler"])
    return UpscaleOptions(
        prompt=prompt,
        negative_prompt=values["negative_prompt"],
        resemblance=values["resemblance"],
        guidance_scale=min(values["dynamic"], _LARGEST_GUIDANCE),
        window=_window(values, situation),
        steps=values["num_inference_steps"],
        scheduler=solver,
        sigmas=spacing,
        prescaler="realesrgan-x4plus",
    )


def factors(scale: float) -> tuple[float, ...]:
    """Return the enlargement of each pass: twice as often as possible, then the rest."""
    found = []
    rest = scale
    while rest >= 2:
        found.append(2.0)
        rest /= 2
    if rest > 1 or not found:
        found.append(rest)
    return tuple(found)


def _prompt(
    values: Values, situation: Situation
) -> tuple[str, tuple[tuple[str, float], ...], tuple[str, ...]]:
    """Return the prompt without LoRA tags, the LoRAs that are there, and what is left out."""
    loras, notes = [], []
    for name, weight in _LORA_TAG.findall(values["prompt"]):
        file = found_lora(name, situation)
        try:
            strength = float(weight or 1)
        except ValueError:
            file = None
        if file is None:
            notes.append(f"The LoRA {name} is left out: there is no file of it for this bundle.")
        else:
            loras.append((file, strength))
    fetched = [name for name in ("lora_links", "custom_sd_model") if values[name]]
    notes += [f"{name} is ignored: {_NO_DOWNLOADS}." for name in fetched]
    return _LORA_TAG.sub("", values["prompt"]).strip(), tuple(loras), tuple(notes)


def _shrink(values: Values, situation: Situation) -> float:
    if not values["downscaling"]:
        return 1.0
    longest = max(situation.width, situation.height)
    return float(min(1.0, values["downscaling_resolution"] / longest))


def _window(values: Values, situation: Situation) -> int:
    mean = (values["tiling_width"] * values["tiling_height"]) ** 0.5 * _LATENT
    multiple = situation.window_multiple
    return max(situation.minimum_window, int(round(mean / multiple) * multiple))


def _solver(name: str) -> tuple[Scheduler, Sigmas]:
    if name.endswith(" Karras"):
        return _SOLVERS[name.removesuffix(" Karras")], "karras"
    if name.endswith(" Exponential"):
        return _SOLVERS[name.removesuffix(" Exponential")], "exponential"
    return _SOLVERS[name], "own"


MODEL = Model(
    "philz1337x",
    "clarity-upscaler",
    "A creative upscaler with creativity, resemblance and fractality.",
    (Version("philz1337x/clarity-upscaler", "1", FIELDS, plan, output=ARRAY),),
    "Runs in canvas mode, which is what its tiled diffusion is, with feathered windows.",
)
