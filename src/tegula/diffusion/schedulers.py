"""Schedulers by their usual names, and the noise levels that a denoise strength runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor


Generators = torch.Generator | list[torch.Generator]
"""One source of noise for a whole stack of canvases, or one for each of them."""


@dataclass(frozen=True)
class SchedulerRecipe:
    """A diffusers scheduler and the settings that make it the one people mean.

    few_step: the strength shortens the range of noise levels and ``steps`` of them are
        run, as latent consistency models do; otherwise the strength skips the first ones.
    """

    scheduler: str
    settings: Mapping[str, object] = field(default_factory=dict)
    few_step: bool = False


_KARRAS: dict[str, object] = {"use_karras_sigmas": True}
_SDE: dict[str, object] = {"algorithm_type": "sde-dpmsolver++"}

RECIPES: Mapping[str, SchedulerRecipe] = {
    "ddim": SchedulerRecipe("DDIMScheduler"),
    "dpm++2m": SchedulerRecipe("DPMSolverMultistepScheduler"),
    "dpm++2m-karras": SchedulerRecipe("DPMSolverMultistepScheduler", _KARRAS),
    "dpm++2m-sde": SchedulerRecipe("DPMSolverMultistepScheduler", _SDE),
    "dpm++2m-sde-karras": SchedulerRecipe("DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "dpm++sde": SchedulerRecipe("DPMSolverSinglestepScheduler", _SDE),
    "dpm++sde-karras": SchedulerRecipe("DPMSolverSinglestepScheduler", _SDE | _KARRAS),
    "euler": SchedulerRecipe("EulerDiscreteScheduler"),
    "euler-ancestral": SchedulerRecipe("EulerAncestralDiscreteScheduler"),
    "heun": SchedulerRecipe("HeunDiscreteScheduler"),
    "unipc": SchedulerRecipe("UniPCMultistepScheduler"),
    "lcm": SchedulerRecipe("LCMScheduler", few_step=True),
    "tcd": SchedulerRecipe("TCDScheduler", few_step=True),
}


@dataclass(frozen=True)
class NoiseSchedule:
    """A fresh scheduler and the timesteps of one run, from noise to picture.

    ``order`` is the number of evaluations of one solver step (2 for Heun).
    """

    scheduler: Any
    timesteps: Tensor
    order: int

    def __len__(self) -> int:
        return len(self.timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Return the latents at the first noise level of the run."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, self.timesteps[:1])
        return noisy

    def scale_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return the latents as the model expects them at this noise level."""
        scaled: Tensor = self.scheduler.scale_model_input(latents, timestep)
        return scaled

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: Generators
    ) -> Tensor:
        """Return the latents at the next noise level."""
        random = {"generator": generator} if _takes_generator(self.scheduler) else {}
        stepped: Tensor = self.scheduler.step(prediction, timestep, latents, **random).prev_sample
        return stepped


    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return clean latents at the noise level of a step; after the last one, themselves."""
        if step >= len(self):
            return clean
        noisy: Tensor = self.scheduler.add_noise(clean, noise, self.timesteps[step : step + 1])
        return noisy

    def exact_prediction(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return what a model that knew the clean latents would answer at this level."""
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return clean
        if kind == "epsilon":
            return noise
        share = self.scheduler.alphas_cumprod[int(timestep)]
        return noise * share.sqrt() - clean * (1 - share).sqrt()


def make_schedule(
    name: str, config: Mapping[str, object], steps: int, denoise_strength: float
) -> NoiseSchedule:
    """Build the scheduler of this name on a bundle's settings and cut it to the strength.

    Args:
        name: one of ``RECIPES``.
        config: the bundle's diffusers scheduler settings (noise schedule, prediction type).
        steps: length of the whole schedule, at least 1.
        denoise_strength: share of it that is run, 0 < strength <= 1; at least one step is.
    """
    recipe = RECIPES[name]
    kind = getattr(diffusers, recipe.scheduler)
    scheduler = kind.from_config(dict(config), **recipe.settings)
    if recipe.few_step:
        scheduler.set_timesteps(**_few_step_arguments(scheduler, steps, denoise_strength))
        return NoiseSchedule(scheduler, scheduler.timesteps, 1)
    scheduler.set_timesteps(steps)
    run = max(1, min(int(steps * denoise_strength), steps))
    first = (steps - run) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return NoiseSchedule(scheduler, scheduler.timesteps[first:], scheduler.order)


def _few_step_arguments(scheduler: Any, steps: int, strength: float) -> dict[str, object]:
    # The run is picked from a coarser list of levels, of which the strength must leave
    # at least `steps`; a finer list is used where it leaves fewer.
    levels, finest = scheduler.config.original_inference_steps, scheduler.config.num_train_timesteps
    if int(levels * strength) < steps:
        levels = finest
    within = max(1, int(levels * strength))
    return {
        "num_inference_steps": min(steps, within),
        "original_inference_steps": levels,
        "strength": max(strength, 1 / levels),
    }


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
