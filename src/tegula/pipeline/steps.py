"""What happens at which step: guidance, control, encoder propagation, strength by place.

A step is one evaluation of the model at one noise level; a Heun step of a solver is two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tegula.models.bundle import ControlScale
from tegula.options import ResolvedOptions
from tegula.pipeline.schedulers import NoiseSchedule


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

    Classifier-free guidance is by Ho and Salimans (2022); limiting it to an interval of the
    steps by Kynkäänniemi et al. (2024).

    scale: guidance scale; at 1 or below only the prompt itself is evaluated.
    interval: the steps that are guided.
    control: conditioning scale of the control path; 0 never runs it.
    control_interval: the steps that are controlled.
    """

    scale: float
    interval: Interval
    control: ControlScale
    control_interval: Interval

    @classmethod
    def of(cls, options: ResolvedOptions) -> Guidance:
        """Return how prompt and control steer a run with these options."""
        return cls(
            options.guidance_scale,
            Interval(options.guidance_start, options.guidance_end),
            ControlScale(options.resemblance, options.guess_mode),
            Interval(options.control_start, options.control_end),
        )

    def guided(self, step: int, steps: int) -> bool:
        """Tell whether this step evaluates the negative prompt too."""
        return self.scale > 1 and self.interval.covers(step, steps)

    def control_at(self, step: int, steps: int) -> ControlScale | None:
        """Return the control scale of this step, None where the control path does not run."""
        on = self.control.scale > 0 and self.control_interval.covers(step, steps)
        return self.control if on else None

    def combine(self, prediction: Tensor) -> Tensor:
        """Merge [2n, ...] of negative rows before positive ones into n guided rows."""
        negative, positive = prediction.chunk(2)
        return torch.lerp(negative, positive, self.scale)


@dataclass(frozen=True)
class Step:
    """One step: its number, timestep, and whether guidance and control are on.

    key: the denoiser runs whole here, elsewhere on the features of the key step before.
    """

    number: int
    timestep: Tensor
    guided: bool
    control: ControlScale | None
    key: bool


def plan_steps(guidance: Guidance, timesteps: Tensor, every: int) -> Sequence[Step]:
    """Return the steps of a run.

    Args:
        guidance: how prompt and control steer the run.
        timesteps: of its noise schedule.
        every: of encoder propagation, as ``key_steps`` takes it.
    """
    steps = len(timesteps)
    return [
        Step(
            number,
            timestep,
            guidance.guided(number, steps),
            guidance.control_at(number, steps),
            key,
        )
        for number, (timestep, key) in enumerate(
            zip(timesteps, key_steps(guidance, steps, every), strict=True)
        )
    ]


# Encoder propagation, "Faster Diffusion" (Li et al., 2023): the features of the encoder and
# of the ControlNet change slowly, so the steps between two key steps run the decoder alone,
# on the features of the key step before them. A ControlNet is part of what is saved.


def key_steps(guidance: Guidance, steps: int, every: int) -> tuple[bool, ...]:
    """Return for every step whether the denoiser runs whole.

    It does at the first two steps, where features change most, at the last one, which
    decides on the finest detail, and at every ``every``-th between; besides wherever
    guidance sets in or control is switched, since older features lack it.

    Args:
        guidance: how prompt and control steer the run.
        steps: of the run.
        every: 1 makes all steps key steps.
    """

    def steered_anew(step: int) -> bool:
        sets_in = guidance.guided(step, steps) and not guidance.guided(step - 1, steps)
        return sets_in or guidance.control_at(step, steps) != guidance.control_at(step - 1, steps)

    return tuple(
        step in (0, steps - 1) or (step - 1) % every == 0 or steered_anew(step)
        for step in range(steps)
    )


@dataclass(frozen=True)
class Rows:
    """Rows of one window over a whole run, for each half of the denoiser.

    Guidance makes two rows of a window. The ControlNet belongs to the encoder.
    """

    encoder: int
    decoder: int


def rows_of(guidance: Guidance, steps: int, every: int) -> Rows:
    """Count what one window takes that changes from the first step on."""
    rows = [2 if guidance.guided(step, steps) else 1 for step in range(steps)]
    keys = key_steps(guidance, steps, every)
    return Rows(sum(n for n, key in zip(rows, keys, strict=True) if key), sum(rows))


@dataclass(frozen=True)
class MaskSchedule:
    """From which step on each part of a canvas may change.

    Differential diffusion (Levin and Fried, 2023): until its step comes, a part follows the
    noised initial latents, so what is around it sees the picture as it was; from then on it
    is denoised like the rest. Windows in which nothing may change are not evaluated at all.

    initial, noise: [canvases, channels, height, width], of the start of the run.
    first: [canvases, 1, height, width], the step at which each latent pixel begins to
        change; the number of steps or more means never.
    """

    initial: Tensor
    noise: Tensor
    first: Tensor

    def predict(self, prediction: Tensor, step: int, schedule: NoiseSchedule) -> Tensor:
        """Put the exact prediction where nothing may change yet."""
        exact = schedule.exact_prediction(self.initial, self.noise, step)
        return torch.where(self.first > step, exact, prediction)

    def keep(self, latents: Tensor, step: int, schedule: NoiseSchedule) -> Tensor:
        """Put the initial latents, noised for a step, where nothing may change before it."""
        kept = schedule.noised(self.initial, self.noise, step)
        return torch.where(self.first >= step, kept, latents)


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
