"""Noise levels: how the spacings that people know by name lie, and how many of them are run.

A noise level is a sigma: the deviation of the noise for clean latents of deviation one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Levels = NDArray[np.float64]
"""Sigmas, or timesteps that may lie between two that a model was trained at."""

Walk = TypeVar("Walk", Levels, Tensor)


# Spacings. Each takes the sigmas of all training timesteps, rising, and a number of steps,
# and returns that many sigmas, falling, without the end of the run.


def _at(trained: Levels, timesteps: Levels) -> Levels:
    """Return the sigmas of timesteps, whose logarithm is linear in between."""
    return np.exp(np.interp(timesteps, np.arange(len(trained)), np.log(trained)))


def _normal(trained: Levels, steps: int) -> Levels:
    return _at(trained, np.linspace(len(trained) - 1, 0, steps))


def _sgm_uniform(trained: Levels, steps: int) -> Levels:
    return _at(trained, np.linspace(len(trained) - 1, 0, steps + 1)[:-1])


def _simple(trained: Levels, steps: int) -> Levels:
    skipped = (np.arange(steps) * (len(trained) / steps)).astype(int)
    return np.asarray(trained[len(trained) - 1 - skipped])


def _ddim_uniform(trained: Levels, steps: int) -> Levels:
    # Where the steps do not divide the timesteps this gives more levels than steps, as it
    # does in ComfyUI; a run begins that much later, unless it is a whole one.
    return trained[1 :: max(1, len(trained) // steps)][::-1]


def _karras(trained: Levels, steps: int) -> Levels:
    # Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models"
    # (2022), equation 5.
    rho = 7.0
    high, low = trained[-1] ** (1 / rho), trained[0] ** (1 / rho)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** rho)


def _exponential(trained: Levels, steps: int) -> Levels:
    return np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), steps))


SPACINGS: Mapping[str, Callable[[Levels, int], Levels]] = {
    "normal": _normal,
    "karras": _karras,
    "exponential": _exponential,
    "sgm-uniform": _sgm_uniform,
    "simple": _simple,
    "ddim-uniform": _ddim_uniform,
}
"""Spacings of noise levels by ComfyUI's names and as ComfyUI, k-diffusion and AUTOMATIC1111's
web UI define them; what the web UI calls automatic is ``normal``."""


# Steps.

_LONGEST = 1_000_000
"""Steps of the longest schedule. A strength so small that it would be longer runs the last
steps of this one, which are next to no noise anyway."""


@dataclass(frozen=True)
class StepRule:
    """How a program gets from steps and a denoise strength to the noise levels of a run.

    length: steps of the whole schedule; of steps and strength.
    first: the first level that is run; of steps, strength, and how many levels there are.
    without_last: solvers whose schedule is one level longer and goes without the smallest.
    whole_timesteps: the model is given the training timestep nearest to a level, not one
        between two.
    """

    length: Callable[[int, float], int]
    first: Callable[[int, float, int], int]
    without_last: frozenset[str] = frozenset()
    whole_timesteps: bool = True

    def cut(self, levels: Walk, steps: int, strength: float) -> Walk:
        """Return the levels of a schedule that are run, at least one."""
        first = self.first(steps, strength, len(levels))
        return levels[min(max(first, 0), len(levels) - 1) :]


STEP_RULES: Mapping[str, StepRule] = {
    # diffusers' img2img pipelines.
    "share": StepRule(
        length=lambda steps, _: steps,
        first=lambda steps, strength, levels: levels - max(1, int(steps * strength)),
    ),
    # ComfyUI's KSampler.
    "exact": StepRule(
        length=lambda steps, strength: int(min(steps / strength, _LONGEST)),
        first=lambda steps, strength, levels: 0 if strength > 0.9999 else levels - steps,
        without_last=frozenset({"dpm2", "dpm2-ancestral", "unipc", "unipc-bh1"}),
    ),
    # AUTOMATIC1111's web UI, which runs one step more than the others.
    "webui": StepRule(
        length=lambda steps, _: steps,
        first=lambda steps, strength, _: steps - 1 - int(min(strength, 0.999) * steps),
        without_last=frozenset({"dpm2", "dpm2-ancestral", "dpm++3m-sde"}),
        whole_timesteps=False,
    ),
}
