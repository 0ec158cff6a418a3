"""Solvers by their usual names, and the run that one of them makes from noise to picture.

diffusers' schedulers do the arithmetic of a step, but for that of consistency models, which
the packaged bundle runs by and which is in ``lcm.py``. Which noise levels they walk is
given to them, since they space them in other ways than the programs whose names for spacings
people know. Latents at a level are clean + sigma * noise, as k-diffusion writes them ("variance
exploding"), or these over sqrt(sigma**2 + 1) ("variance preserving").
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tegula.models.diffusers_import import import_diffusers
from tegula.options import ResolvedOptions
from tegula.pipeline.lcm import LcmConfig, LcmScheduler
from tegula.pipeline.noise_levels import SPACINGS, STEP_RULES, Levels, StepRule

Generators = torch.Generator | list[torch.Generator]
"""One source of noise for a whole stack of canvases, or one for each of them."""


@dataclass(frozen=True)
class Solver:
    """A scheduler by diffusers' name, and the settings that make it the one people mean.

    spacing: one of ``SPACINGS``, for ``own``; None leaves the timesteps to diffusers.
    last: the sigma at which the run ends.
    few_step: the strength shortens the range of noise levels and ``steps`` of them are
        run, as latent consistency models do; otherwise the strength skips the first ones.
    """

    scheduler: str
    settings: Mapping[str, object] = field(default_factory=dict)
    spacing: str | None = "normal"
    last: float = 0.0
    few_step: bool = False


_SDE: dict[str, object] = {"algorithm_type": "sde-dpmsolver++"}
_SINGLE_STEP: dict[str, object] = {"lower_order_final": True}
"""Without it these cannot end at no noise: diffusers would change it with a warning."""

SOLVERS: Mapping[str, Solver] = {
    "ddim": Solver("DDIMScheduler", spacing=None),
    "ddim-trailing": Solver("DDIMScheduler", {"timestep_spacing": "trailing"}, spacing=None),
    "dpm++2m": Solver("DPMSolverMultistepScheduler"),
    "dpm++2m-karras": Solver("DPMSolverMultistepScheduler", spacing="karras"),
    "dpm++2m-sde": Solver("DPMSolverMultistepScheduler", _SDE),
    "dpm++2m-sde-karras": Solver("DPMSolverMultistepScheduler", _SDE, "karras"),
    "dpm++sde": Solver("DPMSolverSinglestepScheduler", _SDE | _SINGLE_STEP),
    "dpm++sde-karras": Solver("DPMSolverSinglestepScheduler", _SDE | _SINGLE_STEP, "karras"),
    "euler": Solver("EulerDiscreteScheduler"),
    "euler-ancestral": Solver("EulerAncestralDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler"),
    "dpm2": Solver("KDPM2DiscreteScheduler"),
    "dpm2-ancestral": Solver("KDPM2AncestralDiscreteScheduler"),
    "lms": Solver("LMSDiscreteScheduler"),
    "dpm++2s": Solver("DPMSolverSinglestepScheduler", _SINGLE_STEP),
    "dpm++3s": Solver("DPMSolverSinglestepScheduler", _SINGLE_STEP | {"solver_order": 3}),
    "dpm++3m-sde": Solver("DPMSolverMultistepScheduler", _SDE | {"solver_order": 3}),
    "unipc": Solver("UniPCMultistepScheduler"),
    # It divides by the logarithm of the last level, which is ComfyUI's.
    "unipc-bh1": Solver("UniPCMultistepScheduler", {"solver_type": "bh1"}, last=0.001),
    "lcm": Solver("LCMScheduler", spacing=None, few_step=True),
    "tcd": Solver("TCDScheduler", spacing=None, few_step=True),
}

_VARIANCE_PRESERVING = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
)

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
"""Schedulers that evaluate the model twice a step. They divide by the last level, which must
not be tiny for a model that answers the clean latents."""

_COSINE = "squaredcos_cap_v2"
"""Noise levels that end in noise alone: Karras' spacing would spend its steps there."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A fresh scheduler and the levels of one run, from noise to picture, by number of step.

    timesteps, sigmas: what the model is evaluated at, one for each step.
    preserving: the latents are variance preserving.
    prediction_type: what the model answers, which the scheduler may not take.
    """

    scheduler: Any
    timesteps: Tensor
    sigmas: Tensor
    preserving: bool
    prediction_type: str

    def __len__(self) -> int:
        return len(self.timesteps)

    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return clean latents at the noise level of a step; after the last one, themselves."""
        if step >= len(self):
            return clean
        sigma = self.sigmas[step]
        noisy = clean + sigma * noise
        return noisy / (sigma.square() + 1).sqrt() if self.preserving else noisy

    def scale_input(self, latents: Tensor, step: int) -> Tensor:
        """Return the latents as the model expects them at a step, variance preserving."""
        scaled: Tensor = self.scheduler.scale_model_input(latents, self.timesteps[step])
        return scaled

    def step(self, prediction: Tensor, step: int, latents: Tensor, generator: Generators) -> Tensor:
        """Return the latents at the next noise level."""
        if self.prediction_type != self.scheduler.config.prediction_type:
            # The scheduler wants the noise; the model answered the clean latents.
            prediction = (latents - prediction) / self.sigmas[step].clamp_min(1e-4)
        random = {"generator": generator} if _takes_generator(self.scheduler) else {}
        stepped = self.scheduler.step(prediction, self.timesteps[step], latents, **random)
        following: Tensor = stepped.prev_sample
        return following

    def exact_prediction(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return what a model that knew the clean latents would answer at a step."""
        kind = self.prediction_type
        if kind == "sample":
            return clean
        if kind == "epsilon":
            return noise
        sigma = self.sigmas[step]
        return (noise - clean * sigma) / (sigma.square() + 1).sqrt()

    def clean(self, prediction: Tensor, scaled: Tensor, step: int) -> Tensor:
        """Return the clean latents that a model's answer to scaled latents implies."""
        kind = self.prediction_type
        if kind == "sample":
            return prediction
        sigma = self.sigmas[step]
        scale = (sigma.square() + 1).sqrt()
        if kind == "epsilon":
            return scaled * scale - prediction * sigma
        return (scaled - prediction * sigma) / scale


def schedule_of(
    config: Mapping[str, object], options: ResolvedOptions, denoise_strength: float
) -> NoiseSchedule:
    """Return a fresh schedule of a bundle's settings, as ``make_schedule`` does by options."""
    rule = "exact" if options.exact_steps else "webui" if options.webui_steps else "share"
    choice = ScheduleChoice(options.scheduler, options.steps, options.sigmas, rule)
    return make_schedule(choice, config, denoise_strength)


@dataclass(frozen=True)
class ScheduleChoice:
    """Which solver walks which noise levels.

    name: one of ``SOLVERS``; sigmas: one of ``SPACINGS``, or ``own`` for the solver's.
    steps: as ``rule``, one of ``STEP_RULES``, takes them, at least 1.
    """

    name: str
    steps: int
    sigmas: str = "own"
    rule: str = "share"


def make_schedule(
    choice: ScheduleChoice, config: Mapping[str, object], denoise_strength: float
) -> NoiseSchedule:
    """Build a scheduler for the noise that a model was trained with, and cut it to the strength.

    Args:
        choice: solver, spacing and length.
        config: the bundle's diffusers scheduler settings (noise schedule, prediction type).
        denoise_strength: share of it that is run, 0 < strength <= 1; at least one step is.
    """
    solver, rule = SOLVERS[choice.name], STEP_RULES[choice.rule]
    spacing = solver.spacing if choice.sigmas == "own" or solver.few_step else choice.sigmas
    if spacing is not None and solver.spacing is None:
        # diffusers' DDIM counts in timesteps; Euler's method, which equals it in result, walks
        # any levels.
        solver = SOLVERS["euler"]
    scheduler = _scheduler(solver, config)
    preserving = solver.scheduler in _VARIANCE_PRESERVING
    shares = scheduler.alphas_cumprod.double()
    trained = ((1 - shares) / shares).sqrt().numpy()
    schedule = partial(
        NoiseSchedule,
        scheduler,
        preserving=preserving,
        prediction_type=str(config.get("prediction_type", "epsilon")),
    )
    if spacing is None:
        timesteps = _own_timesteps(scheduler, solver, rule, choice.steps, denoise_strength)
        return schedule(timesteps, torch.from_numpy(trained).float()[timesteps])
    length = rule.length(choice.steps, denoise_strength)
    space = _spacing(spacing, solver, config)
    if choice.name in rule.without_last:
        levels = space(trained, length + 1)[:-1]
    else:
        levels = space(trained, length)
    levels = rule.cut(levels, choice.steps, denoise_strength)
    sigmas = _walk(scheduler, torch.tensor([*levels, solver.last], dtype=torch.float64))
    seen = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
    if rule.whole_timesteps and config.get("beta_schedule") != _COSINE:
        seen = seen.round()
    scheduler.timesteps = torch.from_numpy(seen).float()
    scheduler.set_begin_index(0)
    return schedule(scheduler.timesteps, sigmas.float())


def _spacing(
    name: str, solver: Solver, config: Mapping[str, object]
) -> Callable[[Levels, int], Levels]:
    if config.get("prediction_type") == "sample" and solver.scheduler in _SECOND_ORDER:
        return SPACINGS["simple"]
    if config.get("beta_schedule") == _COSINE and name == "karras":
        return SPACINGS["normal"]
    return SPACINGS[name]


def _scheduler(solver: Solver, config: Mapping[str, object]) -> Any:
    settings = dict(solver.settings)
    if config.get("prediction_type") == "sample" and solver.scheduler in _WITHOUT_SAMPLE:
        settings["prediction_type"] = "epsilon"
    if solver.scheduler == "LCMScheduler":
        return LcmScheduler(LcmConfig.of(_noise_of(config)))
    return copy.deepcopy(_new_scheduler(solver.scheduler, json.dumps([dict(config), settings])))


@lru_cache(maxsize=16)
def _new_scheduler(name: str, described: str) -> Any:
    """Return a scheduler of diffusers for a noise schedule and settings, as JSON; to be copied.

    It is built once because an upscale needs a schedule for its plan and for each pass.
    """
    config, settings = json.loads(described)
    kind = getattr(import_diffusers(), name)
    if name not in _SECOND_ORDER:
        return kind.from_config(_noise_of(config), **settings)
    # When they are made, these look up the timestep of every trained level, one by one: a third
    # of a second, for timesteps that ``make_schedule`` replaces.
    quick: Any = type(name, (kind,), {"_sigma_to_t": lambda *_: 0.0})
    scheduler = quick.from_config(_noise_of(config), **settings)
    scheduler.__class__ = kind
    return scheduler


def _noise_of(config: Mapping[str, object]) -> dict[str, object]:
    noise = dict(config)
    if noise.pop("rescale_betas_zero_snr", False):
        noise["trained_betas"] = _rescaled_betas(noise)
    return noise


_LEAST_SIGNAL = 4.8973451890853435e-08
"""Share of the signal at the last timestep in ComfyUI and AUTOMATIC1111's web UI: sigma 4519.
At none, sigma would be infinite, and most solvers and spacings could not begin there."""


def _rescaled_betas(config: Mapping[str, object]) -> list[float]:
    """Return the betas of scheduler settings, changed to zero terminal signal-to-noise ratio.

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2024),
    algorithm 1. Some of diffusers' schedulers do this by themselves, and others ignore that
    they are asked to.
    """
    training = import_diffusers().DDPMScheduler.from_config(dict(config))
    signal = training.alphas_cumprod.double().sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    shares = signal.square()
    shares[-1] = _LEAST_SIGNAL
    before = torch.cat([shares.new_ones(1), shares[:-1]])
    betas: list[float] = (1 - shares / before).tolist()
    return betas


def _own_timesteps(
    scheduler: Any, solver: Solver, rule: StepRule, steps: int, strength: float
) -> Tensor:
    """Return the timesteps of a run of a scheduler that spaces them itself."""
    if solver.few_step:
        scheduler.set_timesteps(**_few_step_arguments(scheduler, steps, strength))
        few: Tensor = scheduler.timesteps
        return few
    longest = int(scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(min(rule.length(steps, strength), longest))
    timesteps: Tensor = scheduler.timesteps
    return rule.cut(timesteps, steps, strength)


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


def _walk(scheduler: Any, levels: Tensor) -> Tensor:
    """Give a scheduler its levels, and return those that the model is evaluated at.

    Only the levels of the run are given, so that it begins at the first one: LMS and the
    single-step solvers count on that, and go wrong when they begin in the middle.

    Args:
        scheduler: of diffusers, with sigmas.
        levels: [steps + 1], falling, with the end of the run.
    """
    starts, ends = levels[:-1], levels[1:]
    scheduler.set_timesteps(len(starts))
    kind = type(scheduler).__name__
    if kind not in _SECOND_ORDER:
        scheduler.sigmas = levels.float()
        return starts
    scheduler.sigmas = _twice(levels)
    if kind == "HeunDiscreteScheduler":
        between = ends
    elif kind == "KDPM2DiscreteScheduler":
        between = (starts * ends).sqrt()
        scheduler.sigmas_interpol = _twice(torch.cat([starts[:1], between]))
    else:
        # Of the way down to `ends` some is noise that is added anew; the model is evaluated
        # half way to what remains, in the logarithm, which happens to be `ends`.
        between, end = ends, levels.new_zeros(1)
        added = ends * (1 - (ends / starts).square()).clamp_min(0).sqrt()
        scheduler.sigmas_interpol = _twice(torch.cat([between, end]))
        scheduler.sigmas_up = _twice(torch.cat([added, end]))
        scheduler.sigmas_down = _twice(torch.cat([ends.square() / starts, end]))
    # The last step goes straight to the end, where nothing can be evaluated.
    return torch.stack([starts, between], dim=1).flatten()[:-1]


def _twice(levels: Tensor) -> Tensor:
    """Return the levels as a scheduler of two evaluations a step counts them."""
    doubled = torch.cat([levels[:1], levels[1:].repeat_interleave(2), levels[-1:]])
    return doubled.float()


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
