"""Classifier-free guidance, its interval, and the control interval.

Guidance: Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022). Its interval:
Kynkäänniemi et al., "Applying Guidance in a Limited Interval" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tegula.models.bundle import ControlScale


@dataclass(frozen=True)
class Interval:
    """A share of the steps: ``start`` and ``end`` in 0..1."""

    start: float = 0.0
    end: float = 1.0

    def covers(self, step: int, steps: int) -> bool:
        """Tell whether a step lies wholly inside, as diffusers counts for ControlNets."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


@dataclass(frozen=True)
class Guidance:
    """How the prompt and the control image steer the denoiser.

    scale: guidance scale; at 1 or below only the prompt itself is evaluated.
    interval: the steps that are guided.
    control: conditioning scale of the control path; 0 never runs it.
    control_interval: the steps that are controlled.
    """

    scale: float
    interval: Interval
    control: ControlScale
    control_interval: Interval

    def guided(self, step: int, steps: int) -> bool:
        """Tell whether this step evaluates the negative prompt too."""
        return self.scale > 1 and self.interval.covers(step, steps)

    def control_at(self, step: int, steps: int) -> ControlScale | None:
        """Return the control scale of this step, None where control is off."""
        if self.control.scale == 0 or not self.control_interval.covers(step, steps):
            return None
        return self.control


def combine(prediction: Tensor, scale: float) -> Tensor:
    """Merge [2n, ...] of negative rows before positive ones into n guided rows."""
    negative, positive = prediction.chunk(2)
    return torch.lerp(negative, positive, scale)
