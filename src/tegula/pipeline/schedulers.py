"""Schedulers by their usual names, and the steps that a denoise strength runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tegula.models.compiled import diffusers
from tegula.options import ResolvedOptions

Generators = torch.Generator | list[torch.Generator]
"""One source of noise for a whole stack of canvases, or one for each of them."""


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler and the settings that make it the one people mean.

    few_step: the strength shortens the range of noise levels and ``steps`` of them are
        run, as latent consistency models do; otherwise the strength skips the first ones.
    """

    scheduler: str
    settings: Mapping[str, object] = field(default_factory=dict)
    few_step: bool = False


_RHO = 7.0
_BH1: dict[str, object] = {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}
_KARRAS: dict[str, object] = {"use_karras_sigmas": True}
_SDE: dict[str, object] = {"algorithm_type": "sde-dpmsolver++"}

SOLVERS: Mapping[str, Solver] = {
    "ddim": Solver("DDIMScheduler"),
    "ddim-trailing": Solver("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "dpm++2m": Solver("DPMSolverMultistepScheduler"),
    "dpm++2m-karras": Solver("DPMSolverMultistepScheduler", _KARRAS),
    "dpm++2m-sde": Solver("DPMSolverMultistepScheduler", _SDE),
    "dpm++2m-sde-karras": Solver("DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "dpm++sde": Solver("DPMSolverSinglestepScheduler", _SDE),
    "dpm++sde-karras": Solver("DPMSolverSinglestepScheduler", _SDE | _KARRAS),
    "euler": Solver("EulerDiscreteScheduler"),
    "euler-ancestral": Solver("EulerAncestralDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler"),
    "dpm2": Solver("KDPM2DiscreteScheduler"),
    "dpm2-ancestral": Solver("KDPM2AncestralDiscreteScheduler"),
    "lms": Solver("LMSDiscreteScheduler"),
    "dpm++2s": Solver("DPMSolverSinglestepScheduler"),
    "dpm++3s": Solver("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "dpm++3m-sde": Solver("DPMSolverMultistepScheduler", _SDE | {"solver_order": 3}),
    "unipc": Solver("UniPCMultistepScheduler"),
    "unipc-bh1": Solver("UniPCMultistepScheduler", _BH1),
    "lcm": Solver("LCMScheduler", few_step=True),
    "tcd": Solver("TCDScheduler", few_step=True),
}

SIGMA_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "own": {},
    "normal": {"timestep_spacing": "linspace"},
    "karras": _KARRAS,
    "exponential": {"use_exponential_sigmas": True},
    "sgm-uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "ddim-uniform": {"timestep_spacing": "leading", "steps_offset": 1},
}
"""ComfyUI's names for how noise levels are spaced, as settings of diffusers' schedulers.

``sgm-uniform`` and ``simple`` differ by at most one training timestep and are one here.
"""

_WITHOUT_SAMPLE = (
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Schedulers that take the noise from a model, never the clean latents."""

_SECOND_ORDER = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Schedulers that divide by the last level, which must not be tiny for a model that answers
the clean latents."""

_COSINE = "squaredcos_cap_v2"
"""Noise levels that end in noise alone: Karras' spacing would spend its steps there."""

_SPACED_BY_EULER = ("ddim", "ddim-trailing")
"""Schedulers without Karras or exponential spacing that Euler's method equals in result."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A fresh scheduler and the timesteps of one run, from noise to picture.

    ``order`` is the number of evaluations of one solver step (2 for Heun).
    ``prediction_type`` is what the model answers, which the scheduler may not take.
    """

    scheduler: Any
    timesteps: Tensor
    order: int
    prediction_type: str

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
        if self.prediction_type != self.scheduler.config.prediction_type:
            prediction = self._as_noise(prediction, timestep, latents)
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
        kind = self.prediction_type
        if kind == "sample":
            return clean
        if kind == "epsilon":
            return noise
        share: Tensor = self.scheduler.alphas_cumprod[int(timestep)]
        return noise * share.sqrt() - clean * (1 - share).sqrt()

    def clean(self, prediction: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
        """Return the clean latents that a model's answer to scaled latents implies."""
        kind = self.prediction_type
        if kind == "sample":
            return prediction
        share: Tensor = self.scheduler.alphas_cumprod[int(timestep)]
        if kind == "epsilon":
            return (scaled - prediction * (1 - share).sqrt()) / share.sqrt()
        return scaled * share.sqrt() - prediction * (1 - share).sqrt()

    def _as_noise(self, clean: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """Return the noise in latents whose clean part the model answered.

        Latents are clean + sigma * noise. These schedulers keep sigma to themselves, and one
        has more of them than steps, but all shrink their input by sqrt(sigma**2 + 1): what
        they make of a one tells the sigma that they are at.
        """
        shrunk = self.scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep)
        sigma = (1 / shrunk.square() - 1).clamp_min(1e-8).sqrt()
        noise: Tensor = (latents - clean) / sigma.to(latents)
        return noise


def schedule_of(
    config: Mapping[str, object], options: ResolvedOptions, denoise_strength: float
) -> NoiseSchedule:
    """Return a fresh schedule of a bundle's settings, as ``make_schedule`` does by options."""
    choice = ScheduleChoice(options.scheduler, options.steps, options.sigmas, options.exact_steps)
    return make_schedule(choice, config, denoise_strength)


@dataclass(frozen=True)
class ScheduleChoice:
    """Which solver walks which noise levels.

    name: one of ``SOLVERS``; sigmas: one of ``SIGMA_SETTINGS``.
    steps: length of the whole schedule, at least 1.
    exact_steps: ``steps`` are those that are run, and the schedule is as much longer as
        the strength is below 1; ComfyUI counts like this.
    """

    name: str
    steps: int
    sigmas: str = "own"
    exact_steps: bool = False


def make_schedule(
    choice: ScheduleChoice, config: Mapping[str, object], denoise_strength: float
) -> NoiseSchedule:
    """Build a scheduler on a bundle's settings and cut it to the strength.

    Args:
        choice: solver, spacing and length.
        config: the bundle's diffusers scheduler settings (noise schedule, prediction type).
        denoise_strength: share of it that is run, 0 < strength <= 1; at least one step is.
    """
    solver, steps = SOLVERS[choice.name], choice.steps
    answers = str(config.get("prediction_type", "epsilon"))
    if solver.few_step:
        scheduler = _scheduler(solver, config)
        scheduler.set_timesteps(**_few_step_arguments(scheduler, steps, denoise_strength))
        return NoiseSchedule(scheduler, scheduler.timesteps, 1, answers)
    scheduler = _spaced_scheduler(choice, config)
    run = max(1, min(int(steps * denoise_strength), steps))
    if choice.exact_steps:
        longest = int(scheduler.config.num_train_timesteps)
        run, steps = min(steps, longest), int(min(steps / denoise_strength, longest))
    scheduler.set_timesteps(steps)
    ancestral = isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler)
    if ancestral and config.get("beta_schedule") != _COSINE:
        _respace(scheduler, choice.sigmas)
    first = (steps - run) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return NoiseSchedule(scheduler, scheduler.timesteps[first:], scheduler.order, answers)


def _spaced_scheduler(choice: ScheduleChoice, config: Mapping[str, object]) -> Any:
    respaced = choice.sigmas in ("karras", "exponential")
    name = "euler" if respaced and choice.name in _SPACED_BY_EULER else choice.name
    solver, spacing = SOLVERS[name], SIGMA_SETTINGS[choice.sigmas]
    if choice.sigmas not in ("own", "karras"):
        spacing = {**spacing, "use_karras_sigmas": False}
    known = inspect.signature(getattr(diffusers, solver.scheduler)).parameters
    settings = {key: value for key, value in spacing.items() if key in known}
    return _scheduler(solver, config, settings)


def _scheduler(
    solver: Solver,
    config: Mapping[str, object],
    spacing: Mapping[str, object] | None = None,
) -> Any:
    kind = getattr(diffusers, solver.scheduler)
    settings = {**solver.settings, **(spacing or {})}
    answers_clean = config.get("prediction_type") == "sample"
    if answers_clean and solver.scheduler in _WITHOUT_SAMPLE:
        settings["prediction_type"] = "epsilon"
    if answers_clean and solver.scheduler in _SECOND_ORDER:
        settings["timestep_spacing"] = "trailing"
        settings.pop("use_exponential_sigmas", None)
    if config.get("beta_schedule") == _COSINE:
        settings.pop("use_karras_sigmas", None)
    return kind.from_config(dict(config), **settings)


def _few_step_arguments(scheduler: Any, steps: int, strength: float) -> dict[str, object]:
    # The run is picked from a coarser list of levels, of which the strength must leave
    # at least `steps`; a finer list is used where it leaves fewer.
    levels, finer = scheduler.config.original_inference_steps, {}
    if int(levels * strength) < steps:
        levels = scheduler.config.num_train_timesteps
        finer = {"original_inference_steps": levels}
    within = max(1, int(levels * strength))
    return {
        "num_inference_steps": min(steps, within),
        "strength": max(strength, 1 / levels),
        **finer,
    }


def _respace(scheduler: Any, sigmas: str) -> None:
    """Give noise levels to a scheduler that cannot space them itself.

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models"
    (2022), equation 5, or even steps of the logarithm.
    """
    if sigmas not in ("karras", "exponential"):
        return
    high, low = scheduler.sigmas[0], scheduler.sigmas[-2]
    ramp = torch.linspace(0, 1, len(scheduler.timesteps), dtype=high.dtype)
    if sigmas == "karras":
        spaced = torch.lerp(high ** (1 / _RHO), low ** (1 / _RHO), ramp) ** _RHO
    else:
        spaced = torch.lerp(high.log(), low.log(), ramp).exp()
    known = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    at = torch.searchsorted(known, spaced).clamp(1, len(known) - 1)
    share = (spaced.log() - known[at - 1].log()) / (known[at].log() - known[at - 1].log())
    scheduler.timesteps = (at - 1 + share.clamp(0, 1)).to(torch.float32)
    scheduler.sigmas = torch.cat([spaced, spaced.new_zeros(1)]).to(torch.float32)


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
