"""The solver of latent consistency models, which the packaged bundle runs by.

A consistency model answers the clean latents from every noise level; each step but the last adds
fresh noise of the next level to its answer. Formulas: Luo et al., "Latent Consistency Models"
(2023), arXiv:2310.04378. What it returns equals diffusers' ``LCMScheduler``, whose calls it takes,
to the bit. It stands here because diffusers takes longer to import than a small picture to
enlarge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SIGMA_DATA = 0.5
_TIMESTEP_SCALING = 10.0
"""They shape the boundary condition, by which a model leaves clean latents as they are."""
_LARGEST_BETA = 0.999


@dataclass(frozen=True)
class LcmConfig:
    """Settings of a bundle's scheduler that count here, with diffusers' names and defaults.

    original_inference_steps: levels that models were distilled with, of which a run takes some.
    trained_betas: replaces what ``beta_schedule`` says.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: Sequence[float] | None = None
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    prediction_type: str = "epsilon"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LcmConfig:
        """Return the settings that count, of all that a scheduler may have."""
        return cls(**{k: v for k, v in settings.items() if k in cls.__dataclass_fields__})

    def betas(self) -> Tensor:
        """Return how much of the noise each timestep adds, float32 [num_train_timesteps]."""
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float32)
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, count, dtype=torch.float32)
        if self.beta_schedule == "scaled_linear":
            ends = self.beta_start**0.5, self.beta_end**0.5
            return torch.linspace(*ends, count, dtype=torch.float32) ** 2
        if self.beta_schedule != "squaredcos_cap_v2":
            raise NotImplementedError(f"The noise schedule {self.beta_schedule} is not known.")
        signal = [
            math.cos((n / count + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(count + 1)
        ]
        betas = [
            min(1 - after / before, _LARGEST_BETA) for before, after in itertools.pairwise(signal)
        ]
        return torch.tensor(betas, dtype=torch.float32)


@dataclass(frozen=True)
class Step:
    """What a step of a scheduler returns."""

    prev_sample: Tensor


class LcmScheduler:
    """A run of a latent consistency model."""

    def __init__(self, config: LcmConfig) -> None:
        self.config = config
        self.alphas_cumprod = torch.cumprod(1.0 - config.betas(), dim=0)
        self.timesteps = torch.arange(config.num_train_timesteps).flip(0)
        self._done = 0

    def set_timesteps(
        self,
        num_inference_steps: int,
        *,
        strength: float = 1.0,
        original_inference_steps: int | None = None,
    ) -> None:
        """Choose the timesteps of a run, evenly among those of the distillation.

        Args:
            num_inference_steps: how many, at most those that the strength leaves.
            strength: how far the distillation's timesteps are used, from the clean end.
            original_inference_steps: how many timesteps the distillation had.
        """
        levels = original_inference_steps or self.config.original_inference_steps
        every = self.config.num_train_timesteps // levels
        left = (np.arange(1, int(levels * strength) + 1) * every - 1)[::-1]
        chosen = np.linspace(0, len(left), num=num_inference_steps, endpoint=False)
        self.timesteps = torch.from_numpy(left[np.floor(chosen).astype(np.int64)].copy())
        self._done = 0

    def scale_model_input(self, sample: Tensor, _: Tensor) -> Tensor:
        """Return the latents as they are."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Step:
        """Return the latents of the next timestep.

        Args:
            model_output: what the model answers, [n, channels, h, w].
            timestep: at which it was asked; timesteps follow each other as they are chosen.
            sample: the latents that it was given.
            generator: one for all rows, or one for each.
        """
        config, shares = self.config, self.alphas_cumprod
        share = shares[timestep]
        clean = model_output
        if config.prediction_type == "epsilon":
            clean = (sample - (1 - share).sqrt() * model_output) / share.sqrt()
        elif config.prediction_type == "v_prediction":
            clean = share.sqrt() * sample - (1 - share).sqrt() * model_output
        if config.clip_sample:
            clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
        scaled = timestep * _TIMESTEP_SCALING
        skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        out = scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5
        clean = out * clean + skip * sample
        self._done += 1
        if self._done >= len(self.timesteps):
            return Step(clean)
        following = shares[self.timesteps[self._done]]
        noise = _noise(model_output, generator, clean.dtype)
        return Step(following.sqrt() * clean + (1 - following).sqrt() * noise)


def _noise(
    like: Tensor, generator: torch.Generator | list[torch.Generator] | None, dtype: torch.dtype
) -> Tensor:
    """Draw noise where the generators are: on the processor it is the same for every device."""
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) == 1:
        shapes = [like.shape]
    else:
        shapes = [torch.Size((1, *like.shape[1:]))] * len(like)
    drawn = [
        torch.randn(
            shape, generator=each, device=like.device if each is None else each.device, dtype=dtype
        )
        for shape, each in zip(shapes, generators, strict=False)
    ]
    return torch.cat(drawn).to(like.device)
