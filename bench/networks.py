"""Stable Diffusion's classes at a size that a CPU runs in a fraction of a second.

Time does not depend on the values of weights, so they are random and seeded. They are
scaled so that an untrained denoiser leaves most of the picture in place, which makes
distances between two ways of tiling mean something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from tegula.models.bundle import Bundle, BundleFacts
from tegula.models.sd15.assembly import Networks
from tegula.models.sd15.bundle import SdAutoencoder, make_denoiser
from tegula.models.sd15.facts import PRESETS, SCHEDULER
from tegula.models.sd15.text import SdTextEncoder
from tegula.models.sd15.tiny import tiny_networks

WINDOW = 256
_LEVELS: dict[str, Any] = {
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
}


@dataclass(frozen=True)
class SmallSd:
    """The same networks as diffusers takes them and as tegula does."""

    networks: Networks
    bundle: Bundle


def small_sd(seed: int = 0) -> SmallSd:
    """Build the networks twice from one seed: joining a ControlNet changes it."""
    return SmallSd(_networks(seed), _bundle(_networks(seed)))


def _networks(seed: int) -> Networks:
    tiny = tiny_networks(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=32,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **_LEVELS,
        )
        control = ControlNetModel(conditioning_embedding_out_channels=(8, 16, 32, 64), **_LEVELS)
        autoencoder = AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=WINDOW,
        )
    for module in (unet, control, autoencoder):
        module.eval().requires_grad_(requires_grad=False)
    return Networks(unet, control, autoencoder, tiny.text_model, tiny.tokenizer)


def _bundle(networks: Networks) -> Bundle:
    facts = BundleFacts(
        name="small-sd",
        family="sd15",
        latent_factor=8,
        latent_channels=4,
        window=WINDOW,
        minimum_window=64,
        window_multiple=32,
        presets=PRESETS,
        fingerprint="random",
        licence="Apache-2.0",
    )
    return Bundle(
        facts=facts,
        text=SdTextEncoder(networks.tokenizer, networks.text_model),
        denoiser=make_denoiser(networks.unet, networks.controlnet),
        autoencoder=SdAutoencoder(networks.autoencoder),
        scheduler=SCHEDULER,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
