"""Solvers, spacings and rules of steps: every pair runs, at the levels of the definitions."""

import itertools

import diffusers
import numpy as np
import pytest
import torch

from tegula.catalog import RunContext, find, validate
from tegula.models.mini.bundle import SCHEDULER as MINI
from tegula.models.sd15.facts import SCHEDULER, scheduler_settings
from tegula.options import SCHEDULERS, SIGMAS
from tegula.pipeline.noise_levels import SPACINGS, STEP_RULES
from tegula.pipeline.schedulers import (
    SOLVERS,
    ScheduleChoice,
    make_schedule,
    schedule_of,
)

SPACED = [name for name in SCHEDULERS if not SOLVERS[name].few_step]
OF_DIFFUSERS = ("ddim", "ddim-trailing")
TWICE = ("heun", "dpm2", "dpm2-ancestral")
ZERO_SNR = {**SCHEDULER, "rescale_betas_zero_snr": True}
V_PREDICTION = {**SCHEDULER, "prediction_type": "v_prediction"}
CONFIGS = {
    "epsilon": SCHEDULER,
    "v": V_PREDICTION,
    "epsilon of zero-SNR": ZERO_SNR,
    "v of zero-SNR": {**ZERO_SNR, "prediction_type": "v_prediction"},
    "sample": MINI,
}


def schedule(name, sigmas="own", steps=10, strength=1.0, config=SCHEDULER, **others):
    return make_schedule(ScheduleChoice(name, steps, sigmas, **others), config, strength)


def levels(walk):
    """Return the sigmas that steps of the solver begin at, of its evaluations."""
    twice = type(walk.scheduler).__name__ in (SOLVERS[name].scheduler for name in TWICE)
    return walk.sigmas[:: 2 if twice else 1].double().numpy()


def sd15_sigmas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    shares = (1 - betas).cumprod(0)
    return ((1 - shares) / shares).sqrt()


# The definitions, as k-diffusion, ComfyUI and AUTOMATIC1111's web UI have them: a table of a
# thousand sigmas, whose logarithm is linear between two timesteps.


def sigma_at(timestep):
    table = sd15_sigmas().log()
    low = int(timestep)
    high, share = min(low + 1, 999), timestep - int(timestep)
    return float(((1 - share) * table[low] + share * table[high]).exp())


def defined(spacing, steps):
    table = sd15_sigmas()
    low, high = float(table[0]), float(table[-1])
    match spacing:
        case "normal":
            return [sigma_at(999 - 999 * i / (steps - 1)) for i in range(steps)]
        case "sgm-uniform":
            return [sigma_at(999 - 999 * i / steps) for i in range(steps)]
        case "simple":
            return [float(table[-(1 + int(i * 1000 / steps))]) for i in range(steps)]
        case "ddim-uniform":
            return [float(table[i]) for i in range(1, 1000, 1000 // steps)][::-1]
        case "exponential":
            return [high * (low / high) ** (i / (steps - 1)) for i in range(steps)]
        case "karras":
            roots = high ** (1 / 7), low ** (1 / 7)
            shares = [i / (steps - 1) for i in range(steps)]
            return [(roots[0] + share * (roots[1] - roots[0])) ** 7 for share in shares]
    raise ValueError(spacing)


def own(name):
    return "karras" if name.endswith("-karras") else "normal"


def test_the_options_name_every_solver_and_spacing():
    assert set(SCHEDULERS) == set(SOLVERS)
    assert set(SIGMAS) == {"own", *SPACINGS}


@pytest.mark.parametrize(("name", "sigmas"), list(itertools.product(SPACED, SIGMAS)))
def test_the_levels_are_those_of_the_definition(name, sigmas):
    steps = 15  # does not divide the timesteps, so ddim-uniform has a level more
    if sigmas == "own" and name in OF_DIFFUSERS:
        pytest.skip("timesteps of diffusers' own")
    expected = defined(own(name) if sigmas == "own" else sigmas, steps)[-steps:]
    found = levels(schedule(name, sigmas, steps))
    assert len(found) == steps
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_the_ends_of_the_spacings_in_numbers():
    ends = {name: levels(schedule("dpm++2m", name, 10))[[0, -1]].round(4) for name in SPACINGS}
    assert {name: tuple(map(float, pair)) for name, pair in ends.items()} == {
        "normal": (14.6146, 0.0292),
        "karras": (14.6146, 0.0292),
        "exponential": (14.6146, 0.0292),
        "sgm-uniform": (14.6146, 0.3437),
        "simple": (14.6146, 0.3417),
        "ddim-uniform": (8.3907, 0.0413),
    }


@pytest.mark.parametrize("name", SPACED)
def test_the_run_is_what_the_scheduler_walks(name):
    if name in OF_DIFFUSERS:
        pytest.skip("timesteps of diffusers' own")
    walk = schedule(name, strength=0.6)
    kept = walk.scheduler.sigmas
    assert kept[0] == walk.sigmas[0]
    assert float(kept[-1]) == pytest.approx(SOLVERS[name].last)
    assert len(walk) == (11 if name in TWICE else 6)


def test_timesteps_of_ddims_own_are_diffusers():
    for name, spacing in {"ddim": "leading", "ddim-trailing": "trailing"}.items():
        theirs = diffusers.DDIMScheduler.from_config(dict(SCHEDULER), timestep_spacing=spacing)
        theirs.set_timesteps(10)
        walk = schedule(name, strength=0.6)
        assert walk.timesteps.tolist() == theirs.timesteps[4:].tolist()


def test_dpm_solvers_of_diffusers_are_spaced_like_sgm_uniform():
    # So a model that was built on diffusers keeps its levels, to the rounding of timesteps.
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(dict(SCHEDULER))
    theirs.set_timesteps(20)
    found = schedule("dpm++2m", "sgm-uniform", 20)
    np.testing.assert_allclose(levels(found), theirs.sigmas[:-1], rtol=4e-3)
    assert (found.timesteps - theirs.timesteps).abs().max() <= 1


# Rules of steps.


def webui_run(spacing, steps, strength, discards):
    """Return the sigmas of img2img in AUTOMATIC1111's web UI, without the 0."""
    sigmas = [*defined(spacing, steps + discards), 0.0]
    if discards:
        sigmas = [*sigmas[:-2], 0.0]
    encoded = int(min(strength, 0.999) * steps)
    return sigmas[steps - encoded - 1 :][:-1]


def comfyui_run(spacing, steps, strength, discards):
    """Return the sigmas of ComfyUI's KSampler, without the 0."""
    whole = strength > 0.9999
    sigmas = [*defined(spacing, (steps if whole else int(steps / strength)) + discards), 0.0]
    if discards:
        sigmas = [*sigmas[:-2], 0.0]
    return (sigmas if whole else sigmas[-(steps + 1) :])[:-1]


@pytest.mark.parametrize("strength", [0.35, 1.0])
@pytest.mark.parametrize("sigmas", SPACINGS)
@pytest.mark.parametrize(
    ("name", "discards"),
    [("dpm++3m-sde", True), ("dpm2", True), ("dpm++2m", False),
     ("euler", False), ("heun", False), ("unipc", False)],
)  # fmt: skip
def test_the_web_ui_runs_one_step_more(name, discards, sigmas, strength):
    expected = webui_run(sigmas, 18, strength, discards)
    found = levels(schedule(name, sigmas, 18, strength, rule="webui"))
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.mark.parametrize("strength", [0.01, 0.35, 1.0])
@pytest.mark.parametrize("sigmas", SPACINGS)
@pytest.mark.parametrize(
    ("name", "discards"),
    [("dpm++3m-sde", False), ("dpm2", True), ("unipc", True),
     ("unipc-bh1", True), ("dpm++2m", False), ("euler", False), ("ddim", False)],
)  # fmt: skip
def test_comfyui_runs_all_steps_of_a_longer_schedule(name, discards, sigmas, strength):
    if sigmas == "ddim-uniform" and strength == 0.01:
        pytest.skip("more levels than timesteps: ComfyUI stops there with an error")
    expected = comfyui_run(sigmas, 15, strength, discards)
    found = levels(schedule(name, sigmas, 15, strength, rule="exact"))
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def run_of(reference, **inputs):
    """Return the sigmas that the first pass of a model by name runs, and their number."""
    version = find(reference)
    values = validate(version, {version.image: "photo.png", **inputs}).values
    options = values.request(RunContext(300, 200, "sd15", 512, 64)).passes[0]
    return levels(schedule_of(SCHEDULER, options, options.creativity))


CLARITY = [
    ({}, "karras", 18, 0.35, True),
    ({"scheduler": "DPM++ 2M Karras"}, "karras", 18, 0.35, False),
    ({"scheduler": "DPM++ 2M SDE Exponential"}, "exponential", 18, 0.35, False),
    ({"scheduler": "DPM++ SDE", "creativity": 0.6}, "normal", 18, 0.6, False),
    ({"scheduler": "DPM2", "num_inference_steps": 30}, "normal", 30, 0.35, True),
    ({"scheduler": "Euler a", "creativity": 1.0}, "normal", 18, 1.0, False),
    ({"scheduler": "Restart", "creativity": 0.5}, "karras", 18, 0.5, False),
    ({"scheduler": "Heun", "creativity": 0.01}, "normal", 18, 0.01, False),
]


@pytest.mark.parametrize(("inputs", "spacing", "steps", "strength", "discards"), CLARITY)
def test_clarity_runs_the_levels_of_the_web_ui(inputs, spacing, steps, strength, discards):
    found = run_of("philz1337x/clarity-upscaler", **inputs)
    expected = webui_run(spacing, steps, strength, discards)
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_claritys_defaults_in_numbers():
    # The web UI leaves out the smallest level of 3M SDE: of 19 levels it takes the 12th.
    found = run_of("philz1337x/clarity-upscaler")
    assert found.round(3).tolist() == [0.645, 0.447, 0.303, 0.201, 0.13, 0.082, 0.05]
    plain = run_of("philz1337x/clarity-upscaler", scheduler="DPM++ 2M Karras")
    assert plain.round(3).tolist() == [0.51, 0.341, 0.222, 0.141, 0.087, 0.051, 0.029]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc", "dpm_2", "ddim"])
@pytest.mark.parametrize("scheduler", ["normal", "karras", "simple", "ddim_uniform"])
def test_ultimate_sd_upscale_runs_the_levels_of_comfyui(sampler, scheduler):
    found = run_of("fewjative/ultimate-sd-upscale", sampler_name=sampler, scheduler=scheduler)
    discards = sampler in ("uni_pc", "dpm_2")
    expected = comfyui_run(scheduler.replace("_", "-"), 20, 0.2, discards)
    assert len(found) == len(expected) == 20
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_the_tile_model_runs_the_levels_of_diffusers():
    kinds = {
        "DDIM": diffusers.DDIMScheduler,
        "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler,
        "K_EULER": diffusers.EulerDiscreteScheduler,
        "K_EULER_ANCESTRAL": diffusers.EulerAncestralDiscreteScheduler,
    }
    for name, kind in kinds.items():
        theirs = kind.from_config(dict(SCHEDULER))
        theirs.set_timesteps(20)
        timesteps = theirs.timesteps[-7:].tolist()
        found = run_of("batouresearch/high-resolution-controlnet-tile", scheduler=name, steps=20)
        np.testing.assert_allclose(found, [sigma_at(each) for each in timesteps], rtol=4e-3)


def test_models_see_whole_timesteps_but_for_the_web_ui():
    for rule in STEP_RULES:
        timesteps = schedule("dpm++2m", "karras", rule=rule).timesteps
        assert bool((timesteps == timesteps.round()).all()) == (rule != "webui")


@pytest.mark.parametrize("sigmas", ["own", "ddim-uniform", "simple", "normal"])
def test_the_smallest_strength_is_the_end_of_the_longest_schedule(sigmas):
    for name in ("dpm++2m", "ddim"):
        walk = schedule(name, sigmas, steps=4, strength=5e-324, rule="exact")
        assert len(walk) == 4
        assert walk.timesteps.max() < 5


def test_exact_steps_are_all_run_on_a_longer_schedule():
    assert len(schedule("ddim", steps=20, strength=0.2)) == 4
    exact = schedule("ddim", steps=20, strength=0.2, rule="exact")
    assert len(exact) == 20
    assert exact.timesteps[0] < 210
    assert len(schedule("ddim", steps=20, strength=0.001, rule="exact")) == 20


def test_ddim_with_a_spacing_is_eulers_method():
    for sigmas in SPACINGS:
        walk = schedule("ddim", sigmas)
        assert type(walk.scheduler).__name__ == "EulerDiscreteScheduler"


# An oracle: a model that knows the clean latents leads every solver to them, whatever the form
# of its answer.


def led_by_an_oracle(walk, clean):
    generator = torch.Generator().manual_seed(0)
    latents = walk.noised(clean, torch.randn(clean.shape, generator=generator), 0)
    for step in range(len(walk)):
        scaled, sigma = walk.scale_input(latents, step).double(), walk.sigmas[step].double()
        noise = (scaled * (sigma.square() + 1).sqrt() - clean) / sigma
        answer = walk.exact_prediction(clean.double(), noise, step)
        assert (walk.clean(answer, scaled, step) - clean).abs().max() < 1e-3
        latents = walk.step(answer.float(), step, latents, generator)
    return latents


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_oracle_leads_every_solver_to_the_picture(name, config):
    clean = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    # diffusers' DDIM and TCD end at the first training timestep, where a little noise is left.
    ends_early = name == "tcd"
    others = [] if config != "epsilon" or SOLVERS[name].few_step else SPACINGS
    for sigmas, strength in [("own", 1.0), *((each, 0.6) for each in ("own", *others))]:
        walk = schedule(name, sigmas, strength=strength, config=CONFIGS[config])
        found = led_by_an_oracle(walk, clean)
        allowed = 0.2 if ends_early or (sigmas == "own" and name in OF_DIFFUSERS) else 5e-3
        assert (found - clean).abs().max() < allowed, (sigmas, strength)


@pytest.mark.parametrize("name", ["lms", "dpm++2s", "dpm++3s", "heun", "dpm2"])
def test_a_run_that_begins_in_the_middle_keeps_to_its_levels(name):
    walk = schedule(name, steps=20, strength=0.5)
    clean, noise = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    latents = walk.noised(clean, noise, 0)
    for step in range(len(walk)):
        if name not in TWICE or step % 2 == 0:
            expected = walk.noised(clean, noise, step)
            torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        walk.scale_input(latents, step)
        answer = walk.exact_prediction(clean, noise, step)
        latents = walk.step(answer, step, latents, torch.Generator())
    torch.testing.assert_close(latents, clean, rtol=1e-4, atol=1e-4)


# What a folder says of the noise.


@pytest.mark.parametrize("name", SCHEDULERS)
def test_zero_snr_holds_for_every_scheduler(name):
    walk = schedule(name, config=ZERO_SNR)
    shares = walk.scheduler.alphas_cumprod.double()
    # Rescaled as Lin et al. say, but for the end, which k-diffusion could not begin at.
    plain = (1 / (1 + sd15_sigmas().square())).sqrt()
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(shares[:-1].sqrt(), expected[:-1], rtol=1e-3, atol=1e-6)
    assert float(shares[-1]) == pytest.approx(4.8973e-8, rel=1e-2)
    if name != "ddim":
        assert float(walk.sigmas[0]) == pytest.approx(4518.6, rel=1e-2)
    assert float(schedule(name).sigmas[0]) < 15


NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
FOLDERS = {
    "deis": {
        "_class_name": "DEISMultistepScheduler",
        "algorithm_type": "deis",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "solver_order": 2,
        "solver_type": "logrho",
        "steps_offset": 1,
        "use_karras_sigmas": False,
    },
    "sde-karras": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "timestep_spacing": "trailing",
        "use_karras_sigmas": True,
    },
    "lcm": {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 30,
        "timestep_spacing": "leading",
        "timestep_scaling": 5.0,
    },
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1},
}
"""Settings that folders of fine-tunes have, by the scheduler that their authors sampled with."""


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_of_a_folders_settings_only_the_noise_counts(folder, name):
    choice = ScheduleChoice(name, 8)
    usual = make_schedule(choice, SCHEDULER, 0.6)
    found = make_schedule(choice, scheduler_settings({**NOISE, **FOLDERS[folder]}), 0.6)
    assert type(found.scheduler) is type(usual.scheduler)
    assert found.scheduler.config == usual.scheduler.config
    torch.testing.assert_close(found.timesteps, usual.timesteps, rtol=0, atol=0)
    torch.testing.assert_close(found.sigmas, usual.sigmas, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_prediction_type_and_zero_snr_of_a_folder_are_kept(name):
    trained = {**NOISE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    found = make_schedule(ScheduleChoice(name, 8), scheduler_settings(trained), 0.6)
    assert found.prediction_type == "v_prediction"
    assert found.scheduler.config.prediction_type == "v_prediction"
    assert found.scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("name", ["one", "each"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    "config",
    [MINI, *CONFIGS.values(), {**NOISE, "beta_schedule": "linear", "clip_sample": True}],
)
def test_the_consistency_solver_is_diffusers_own_to_the_bit(config, steps, name):
    walk = make_schedule(ScheduleChoice("lcm", steps), config, 0.7)
    noise = {k: v for k, v in config.items() if k != "rescale_betas_zero_snr"}
    if "rescale_betas_zero_snr" in config:
        noise["trained_betas"] = walk.scheduler.config.trained_betas
    theirs = diffusers.LCMScheduler.from_config(noise)
    theirs.set_timesteps(steps, strength=0.7)
    assert theirs.timesteps.tolist() == walk.timesteps.tolist()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mine = latents

    def generators():
        seeds = [5] if name == "one" else [5, 6]
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        return made[0] if name == "one" else made

    ours, others = generators(), generators()
    for step, timestep in enumerate(theirs.timesteps):
        answer = torch.sin(latents + step)
        latents = theirs.step(answer, timestep, latents, others).prev_sample
        mine = walk.step(answer, step, mine, ours)
        assert torch.equal(mine, latents)


def test_a_scheduler_is_built_once_and_no_run_sees_what_another_left(monkeypatch):
    built, kind = [], diffusers.KDPM2DiscreteScheduler
    build = kind.from_config
    monkeypatch.setattr(kind, "from_config", lambda *a, **k: built.append(1) or build(*a, **k))
    config = {**SCHEDULER, "beta_end": 0.0121}
    first, second = (schedule("dpm2", steps=4, config=config) for _ in range(2))
    assert built == [1]
    expected = second.timesteps.clone()
    latents = torch.ones(1, 4, 2, 2)
    for step in range(2):
        latents = first.step(latents, step, latents, torch.Generator())
    assert first.scheduler.step_index == 2
    assert second.scheduler.step_index is None
    assert torch.equal(second.scheduler.timesteps, expected)
    assert schedule("dpm2", steps=4, config=SCHEDULER).scheduler.config.beta_end == 0.012
