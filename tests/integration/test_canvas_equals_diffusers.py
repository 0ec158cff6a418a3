"""With one window over the image, canvas mode is diffusers' own img2img pipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from support import options, photograph, refine_canvas

from bench.speed.loop import pipeline_of
from tegula.models.sd15.networks import SdAutoencoder, make_denoiser
from tegula.pipeline.refine import RefineJob
from tests.tiny.networks import tiny_bundle, tiny_networks

KARRAS = {"use_karras_sigmas": True}
SCHEDULERS = {
    ("ddim", "own"): (DDIMScheduler, {}),
    ("dpm++2m", "karras"): (DPMSolverMultistepScheduler, KARRAS),
    ("euler", "own"): (EulerDiscreteScheduler, {}),
    ("unipc", "karras"): (UniPCMultistepScheduler, KARRAS),
}
"""Scheduler and spacing: diffusers and we agree on Karras' levels; each has its own "normal"."""


def diffusers_result(picture, scheduler, resemblance, guess_mode, guidance_scale):
    kind, settings = SCHEDULERS[scheduler]
    pipeline = pipeline_of(tiny_networks(), kind, **settings)
    image = torch.tensor(picture.transpose(2, 0, 1)[None])
    return pipeline(
        prompt="a red cat",
        negative_prompt="blurry",
        image=image,
        control_image=image,
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        controlnet_conditioning_scale=resemblance,
        guess_mode=guess_mode,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("resemblance", [0.5, 1.0])
def test_one_window_equals_the_diffusers_pipeline(scheduler, guess_mode, resemblance):
    guidance_scale = 5.0
    picture = photograph(64, 64)
    expected = diffusers_result(picture, scheduler, resemblance, guess_mode, guidance_scale)
    chosen = options(
        width=64,
        height=64,
        prompt="a red cat",
        negative_prompt="blurry",
        creativity=0.6,
        steps=10,
        scheduler=scheduler[0],
        sigmas=scheduler[1],
        resemblance=resemblance,
        guess_mode=guess_mode,
        guidance_scale=guidance_scale,
        seed=7,
    )
    ours = refine_canvas(RefineJob(tiny_bundle(), picture, picture, chosen))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - picture).max() > 0.05


def test_the_tiny_bundle_of_the_comparison_is_made_of_the_same_networks():
    bundle, networks = tiny_bundle(), tiny_networks()
    assert isinstance(bundle.autoencoder, SdAutoencoder)
    other = make_denoiser(networks.unet, networks.controlnet)
    for ours, theirs in zip(
        bundle.denoiser.unet.parameters(), other.unet.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
