"""The noise schedule of training: diffusers' ``squaredcos_cap_v2`` with 1000 timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIMESTEPS = 1000


def signal_shares(*, device: torch.device | None = None) -> Tensor:
    """Return the cumulative product of alphas per timestep (Nichol and Dhariwal, 2021)."""
    steps = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
    share = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - share[1:] / share[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0).float().to(device)


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor, shares: Tensor) -> Tensor:
    """Return the noisy latents at integer ``timesteps`` [n]."""
    share = shares[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * clean + (1 - share).sqrt() * noise
