"""Numbers that hold for every Stable Diffusion 1.5 fine-tune."""

from __future__ import annotations

from collections.abc import Mapping

from tegula.options import PresetValues

TEXT_WIDTH = 768
LICENCE = "creativeml-openrail-m"

DEFAULT_MODEL = "SG161222/Realistic_Vision_V5.1_noVAE"
DEFAULT_CONTROLNET = "lllyasviel/control_v11f1e_sd15_tile"
DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
DEFAULT_CONTROLNET_FILE = r"^control_v11f1e_sd15_tile"
DEFAULT_VAE_FILE = r"^vae-?ft-?mse-?840000"
"""Patterns of the names that their single files were released by."""
LIGHT_VAE = "madebyollin/taesd"

TOKENIZER_FILES = ("vocab.json", "merges.txt")
PART_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
FOLDER_FILES = (
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
)
TEXT_ENCODER_FILES = ("config.json", "model.safetensors")
TEXT_ENCODER_REPOSITORIES = (
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "text_encoder"),
    ("runwayml/stable-diffusion-v1-5", "text_encoder"),
    (DEFAULT_MODEL, "text_encoder"),
    ("openai/clip-vit-large-patch14", ""),
)
"""Where the release's text encoder is looked for if a checkpoint has none: hub id and folder."""

_AVOID = "blurry, out of focus, noisy, jpeg artifacts, oversmoothed, lowres, watermark"

PRESETS: Mapping[str, PresetValues] = {
    "faithful": PresetValues(
        creativity=0.2,
        resemblance=1.0,
        guidance_scale=4.0,
        steps=20,
        scheduler="dpm++2m-karras",
        prescaler="realesrgan-x4plus",
        negative_prompt=_AVOID,
    ),
    "balanced": PresetValues(
        creativity=0.35,
        resemblance=0.75,
        guidance_scale=5.0,
        steps=20,
        scheduler="dpm++2m-karras",
        prescaler="realesrgan-x4plus",
        negative_prompt=_AVOID,
    ),
    "creative": PresetValues(
        creativity=0.6,
        resemblance=0.6,
        guidance_scale=7.0,
        steps=30,
        scheduler="dpm++2m-karras",
        prescaler="realesrgan-x4plus",
        negative_prompt=_AVOID,
    ),
    "fast": PresetValues(
        creativity=0.3,
        resemblance=0.8,
        guidance_scale=1.0,
        steps=12,
        scheduler="dpm++2m-karras",
        prescaler="realesrgan-x4plus",
    ),
}

SCHEDULER: Mapping[str, object] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "prediction_type": "epsilon",
}
"""The settings of the release; the class name lets other schedulers drop what is not theirs."""

_NOISE_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def scheduler_settings(found: Mapping[str, object]) -> Mapping[str, object]:
    """Return the release's scheduler settings with the noise that a model was trained with.

    A folder's file also says which algorithm, order and spacing its author sampled with.
    These belong to the scheduler that is asked for by name: DEIS's last level is refused by
    others, and Karras' spacing or an SDE would be taken in silence.

    Args:
        found: the settings of a diffusers folder.
    """
    return {**SCHEDULER, **{name: found[name] for name in _NOISE_SETTINGS if name in found}}
