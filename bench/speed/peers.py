"""Finegrain's refiners, where it is installed: its MultiUpscaler on random weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from PIL import Image

from bench.speed.job import NEGATIVE, PROMPT, SEED, Job
from tegula.images.pixels import to_image

NOT_INSTALLED = (
    "refiners' MultiUpscaler is not installed: the newest release on PyPI, 0.4.0, is older than "
    "it; install it from its repository, finegrain-ai/refiners"
)
NOT_THIS_SIZE = "refiners builds Stable Diffusion 1.5 in its full size alone"
_MODULE = "refiners.foundationals.latent_diffusion.stable_diffusion_1.multi_upscaler"
_TILE = (64, 64)


class MissingPeerError(Exception):
    """A peer cannot be run here; the message says why."""


def refiners_upscale(
    job: Job, device: torch.device, dtype: torch.dtype
) -> Callable[[], Image.Image]:
    """Return a run of MultiUpscaler over the prescaled picture of a job.

    It draws its own tiles of 64 latent pixels, overlapping by at least 8, one at a time.

    Raises:
        MissingPeerError: it is not installed, or does not come in the size of the job.
    """
    try:
        multi_upscaler = import_module(_MODULE)
    except ImportError as error:
        raise MissingPeerError(NOT_INSTALLED) from error
    if job.size != "full":
        raise MissingPeerError(NOT_THIS_SIZE)
    upscaler = _random_upscaler(multi_upscaler, device, dtype)
    picture = to_image(job.picture)

    def run() -> Image.Image:
        result: Image.Image = upscaler.upscale(
            picture,
            PROMPT,
            NEGATIVE,
            upscale_factor=1,
            tile_size=_TILE,
            denoise_strength=job.creativity,
            condition_scale=job.guidance_scale,
            controlnet_scale=1.0,
            num_inference_steps=job.steps,
            generator=torch.Generator(device).manual_seed(SEED),
        )
        return result

    return run


def _random_upscaler(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    class RandomUpscaler(module.MultiUpscaler):  # type: ignore[misc]
        """Leaves the weights as torch draws them, where the original reads files."""

        def load_stable_diffusion(self, checkpoints: Any) -> Any:  # noqa: ARG002
            return module.StableDiffusion_1(device=device, dtype=dtype)

        def load_controlnet(self, checkpoints: Any) -> Any:  # noqa: ARG002
            return module.SD1ControlnetAdapter(target=self.sd.unet, name="tile").inject()

    paths = dict.fromkeys(("unet", "clip_text_encoder", "lda", "controlnet_tile"))
    return RandomUpscaler(module.UpscalerCheckpoints(**paths), device, dtype)
