"""Stable Diffusion's networks with random weights, at full size and at a small one.

Time does not depend on the values of weights, so they are random and seeded. The small
ones run on a CPU in a fraction of a second; their untrained denoiser leaves most of the
picture in place, which makes distances between two ways of tiling mean something.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tegula.models.bundle import Bundle
from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.networks import Networks, assemble
from tests.tiny.networks import tiny_networks

_LEVELS: dict[str, Any] = {
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
}
_SILENT_STD = 0.01


def small_networks(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Networks:
    """Return the classes of Stable Diffusion with 13 million weights; windows of 256 px."""
    with _seeded(seed):
        tiny = tiny_networks(seed)
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
            sample_size=256,
        )
    return _ready(
        Networks(unet, control, autoencoder, tiny.text_model, tiny.tokenizer), device, dtype
    )


def full_networks(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Networks:
    """Return Stable Diffusion 1.5 in its own size, made on the device; windows of 512 px."""
    with _seeded(seed), device:
        return _ready(
            Networks(
                UNet2DConditionModel.from_config(sd15_config("unet")),
                ControlNetModel.from_config(sd15_config("controlnet")),
                AutoencoderKL.from_config(sd15_config("vae")),
                CLIPTextModel(CLIPTextConfig(**sd15_config("text_encoder"))),
                tiny_networks(seed).tokenizer,
            ),
            device,
            dtype,
        )


def smallest_networks(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Networks:
    """Return the classes with a few thousand weights, to try the bench itself; 64 px."""
    return _ready(tiny_networks(seed), device, dtype)


NETWORKS: Mapping[str, Callable[[torch.device, torch.dtype], Networks]] = {
    "full": full_networks,
    "small": small_networks,
    "tiny": smallest_networks,
}


def random_bundle(size: str, device: torch.device, dtype: torch.dtype) -> Bundle:
    """Join the networks of a size of ``NETWORKS`` as tegula takes them."""
    networks = NETWORKS[size](device, dtype)
    return assemble(
        networks,
        SCHEDULER,
        name=f"random-{size}",
        licence="Apache-2.0",
        device=device,
        dtype=dtype,
    )


def sd15_config(part: str) -> dict[str, Any]:
    """Return the configuration of a part of Stable Diffusion 1.5, such as ``unet``."""
    path = files("tegula.models.sd15") / "config" / part / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _ready(networks: Networks, device: torch.device, dtype: torch.dtype) -> Networks:
    for layer in (networks.controlnet.controlnet_mid_block, *_silent(networks.controlnet)):
        nn.init.normal_(layer.weight, std=_SILENT_STD)
    for module in networks.modules:
        nn.Module.to(module, device=device, dtype=dtype)
        module.eval().requires_grad_(requires_grad=False)
    return networks


def _silent(controlnet: Any) -> Iterator[nn.Module]:
    """Yield what starts at zero: a processor may multiply zeros faster."""
    yield from controlnet.controlnet_down_blocks
    yield controlnet.controlnet_cond_embedding.conv_out
