"""Strength by place: parts of a canvas that may change only from a later noise level on.

Differential diffusion (Levin and Fried, 2023): until its level comes, a part follows the
noised initial latents, so what is around it sees the picture as it was; from then on it
is denoised like the rest. Windows that hold still are not evaluated at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tegula.diffusion.schedulers import NoiseSchedule


@dataclass(frozen=True)
class Hold:
    """What keeps the parts of a canvas that may not change yet.

    initial, noise: [canvases, channels, height, width], of the start of the run.
    first: [canvases, 1, height, width], the step at which each latent pixel begins to
        change; the number of steps or more means never.
    """

    initial: Tensor
    noise: Tensor
    first: Tensor
    _firsts: dict[object, int] = field(default_factory=dict, repr=False)

    def moves(self, index: tuple[slice, ...], step: int) -> bool:
        """Tell whether anything in a window may change at a step."""
        key = tuple((part.start, part.stop) for part in index)
        if key not in self._firsts:
            self._firsts[key] = int(self.first[index].min())
        return self._firsts[key] <= step

    def predict(
        self, prediction: Tensor, step: int, timestep: Tensor, schedule: NoiseSchedule
    ) -> Tensor:
        """Put the exact prediction where nothing may change yet."""
        exact = schedule.exact_prediction(self.initial, self.noise, timestep)
        return torch.where(self.first > step, exact, prediction)

    def keep(self, latents: Tensor, step: int, schedule: NoiseSchedule) -> Tensor:
        """Put the initial latents, noised to the level of a step, where it is held."""
        held = schedule.noised(self.initial, self.noise, step)
        return torch.where(self.first >= step, held, latents)


def first_steps(strength: Tensor, steps: int, factor: int) -> Tensor:
    """Return the step at which each latent pixel begins to change.

    Args:
        strength: [canvases, 1, height, width] in 0..1 at image size, as a share of the
            denoise strength; of the pixels of a latent pixel the strongest counts.
        steps: of the run. Where the share is less than one step, the last one runs and
            ``blend_weights`` does the rest.
        factor: image pixels per latent pixel.
    """
    strongest = functional.max_pool2d(strength, factor)
    run = torch.where(strongest > 0, (strongest * steps).round().clamp_min(1), 0.0)
    return (steps - run).to(torch.long)


def blend_weights(strength: Tensor, steps: int) -> Tensor:
    """Return how far each pixel of the refined picture replaces the prescaled one.

    It is all the way, except where the strength amounts to less than one step.
    """
    return (strength * steps).clamp(0, 1)
