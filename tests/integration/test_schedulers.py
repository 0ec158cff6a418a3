"""Solvers and spacings: every pair runs, and the spacings are those of their names."""

import itertools

import pytest
import torch

from tegula.models.sd15.facts import SCHEDULER, scheduler_settings
from tegula.options import SCHEDULERS, SIGMAS
from tegula.pipeline.schedulers import SIGMA_SETTINGS, SOLVERS, ScheduleChoice, make_schedule


def schedule(name, sigmas="own", steps=10, strength=1.0, **others):
    return make_schedule(ScheduleChoice(name, steps, sigmas, **others), SCHEDULER, strength)


def test_the_options_name_every_recipe_and_spacing():
    assert set(SCHEDULERS) == set(SOLVERS)
    assert set(SIGMAS) == set(SIGMA_SETTINGS)


@pytest.mark.parametrize(("name", "sigmas"), list(itertools.product(SCHEDULERS, SIGMAS)))
def test_every_scheduler_walks_every_spacing_to_the_picture(name, sigmas):
    walk = schedule(name, sigmas, strength=0.6)
    clean = torch.full((1, 4, 8, 8), 0.7)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator)
    latents = walk.add_noise(clean, noise)
    for timestep in walk.timesteps:
        walk.scale_input(latents, timestep)
        share = walk.scheduler.alphas_cumprod[timestep.round().long()]
        known = _noise_in(walk, latents, timestep, clean, share)
        latents = walk.step(known, timestep, latents, generator)
    assert torch.isfinite(latents).all()
    assert (latents - clean).abs().mean() < 0.1


def _noise_in(walk, latents, timestep, clean, share):
    scaled = walk.scale_input(latents, timestep)
    if hasattr(walk.scheduler, "sigmas") and not torch.equal(scaled, latents):
        sigma = (latents / scaled).square().mean().sub(1).clamp_min(1e-8).sqrt()
        return (latents - clean) / sigma
    return (latents - share.sqrt() * clean) / (1 - share).sqrt().clamp_min(1e-4)


def test_the_smallest_strength_is_the_longest_schedule():
    walk = schedule("dpm++2m", steps=4, strength=5e-324, exact_steps=True)
    assert len(walk) == 4
    assert walk.timesteps.max() < 5


@pytest.mark.parametrize("name", ["euler", "euler-ancestral", "dpm++2m"])
def test_karras_levels_are_even_in_the_seventh_root(name):
    levels = schedule(name, "karras").scheduler.sigmas[:-1].double()
    gaps = levels.pow(1 / 7).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "euler-ancestral", "dpm++2m"])
def test_exponential_levels_are_even_in_the_logarithm(name):
    gaps = schedule(name, "exponential").scheduler.sigmas[:-1].double().log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-3, atol=1e-6)


def test_timesteps_of_the_even_spacings_are_those_of_their_definitions():
    assert schedule("ddim", "normal", 4).timesteps.tolist() == [999, 666, 333, 0]
    assert schedule("ddim", "simple", 4).timesteps.tolist() == [999, 749, 499, 249]
    assert schedule("ddim", "ddim-uniform", 4).timesteps.tolist() == [751, 501, 251, 1]


def test_exact_steps_are_all_run_on_a_longer_schedule():
    assert len(schedule("ddim", steps=20, strength=0.2)) == 4
    exact = schedule("ddim", steps=20, strength=0.2, exact_steps=True)
    assert len(exact) == 20
    assert exact.timesteps[0] < 210
    assert len(schedule("ddim", steps=20, strength=0.001, exact_steps=True)) == 20


def test_ddim_with_karras_levels_is_eulers_method():
    assert type(schedule("ddim", "karras").scheduler).__name__ == "EulerDiscreteScheduler"


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


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "euler", "unipc"])
def test_prediction_type_and_zero_snr_of_a_folder_are_kept(name):
    trained = {**NOISE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    found = make_schedule(ScheduleChoice(name, 8), scheduler_settings(trained), 0.6)
    assert found.prediction_type == "v_prediction"
    assert found.scheduler.config.prediction_type == "v_prediction"
    assert found.scheduler.alphas_cumprod[-1] < 1e-6
