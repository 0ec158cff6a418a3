"""Distilled LoRAs: recognised, fused, and run with the scheduler that they were made for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import picture, run
from diffusers import (
    DDIMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from growth import SUPERLINEAR, growth
from safetensors.torch import save_file
from sd15_support import files, load_sd15, offline  # noqa: F401
from support import options, photograph, refine_canvas

from bench.speed.loop import pipeline_of
from tegula.errors import MissingWeightsError, OptionError
from tegula.models import BundleSettings
from tegula.models.load import load_bundle
from tegula.models.sd15.facts import PRESETS
from tegula.models.sd15.few_step import RECIPES, FewStepRecipe, choose_few_step, recipe_of
from tegula.options import SCHEDULERS
from tegula.pipeline.refine import RefineJob
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle, tiny_networks

pytestmark = pytest.mark.usefixtures("offline")

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (16, 8),
    "up_blocks.1.resnets.0.conv1": (24, 8),
}


def products():
    """Return the two factors of each layer, those of convolutions as kernels."""
    generator = torch.Generator().manual_seed(4)
    for name, (width, out) in LAYERS.items():
        down, up = (
            0.3 * torch.randn(*shape, generator=generator) for shape in ((2, width), (out, 2))
        )
        if "conv" in name:
            kernels = 0.1 * torch.randn(2, width, 3, 3, generator=generator)
            yield name, kernels, up[:, :, None, None]
        else:
            yield name, down, up


def kohya():
    """Return a LoRA as lcm-lora-sdv1-5 keeps it."""
    state = {}
    for name, down, up in products():
        key = "lora_unet_" + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(2.0)
    return state


def peft():
    """Return a LoRA as diffusers saves it."""
    return {
        f"unet.{name}.{half}.weight": part
        for name, down, up in products()
        for half, part in (("lora_A", down), ("lora_B", up))
    }


def put(path, state=None, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(kohya() if state is None else state, path, metadata)
    return str(path)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("Hyper-SD15-1step-lora", "hyper-1"),
        ("Hyper-SD15-2steps-lora", "hyper-2"),
        ("Hyper-SD15-4steps-lora", "hyper-4"),
        ("hyper_sd15_8step_lora", "hyper-8"),
        ("Hyper-SD15-8steps-CFG-lora", "hyper-8-cfg"),
        ("Hyper-SD15-12steps-CFG-lora", "hyper-12-cfg"),
        ("lcm-lora-sdv1-5", "lcm"),
        ("LCM_LoRA_Weights_SD15", "lcm"),
        ("TCD-SD15-LoRA", "tcd"),
        ("sd15_lcm_lora", "lcm"),
        ("LCM_LoRA_Weights", "lcm"),
        ("lcm_sd15", "lcm"),
        ("AnimateLCM_sd15_t2v_lora", None),
        ("lcm-sd1.5-realistic-people", None),
        ("lcm-lora-ssd-1b", None),
        ("pcm_sd15_smallcfg_2step_converted", None),
        ("Hyper-SDXL-4steps-lora", None),
        ("lcm-lora-sdxl", None),
        ("more_details", None),
    ],
)
def test_a_few_step_lora_is_known_by_its_name(tmp_path, name, recipe):
    known = recipe_of(put(tmp_path / f"{name}.safetensors"))
    assert (known and known.name) == recipe


def test_the_time_for_a_title_does_not_grow_with_its_square(tmp_path):
    def titled(times):
        return put(tmp_path / f"{times}.safetensors", metadata={"ss_output_name": "lcm" * times})

    assert growth(recipe_of, titled, 1000) < SUPERLINEAR


def test_a_lora_is_known_by_the_title_its_maker_gave_and_by_its_repository(tmp_path):
    titled = put(tmp_path / "a.safetensors", metadata={"ss_output_name": "TCD-SD15-LoRA"})
    assert recipe_of(titled) == BY_NAME["tcd"]
    cached = "models--latent-consistency--lcm-lora-sdv1-5/snapshots/abc"
    assert recipe_of(put(tmp_path / cached / "pytorch_lora_weights.safetensors")) == BY_NAME["lcm"]
    assert recipe_of("h1t/TCD-SD15-LoRA") == BY_NAME["tcd"]
    assert recipe_of(put(tmp_path / "lcm-lora-sdv1-5" / "style.safetensors")) is None


def test_recipes_name_schedulers_that_there_are():
    assert {recipe.scheduler for recipe in RECIPES} <= set(SCHEDULERS)
    assert len(BY_NAME) == len(RECIPES)


def test_a_given_lora_that_is_recognised_sets_all_presets(files, tmp_path):  # noqa: F811
    lora = put(tmp_path / "Hyper-SD15-4steps-lora.safetensors")
    bundle = load_sd15(str(files.folder), loras=[(lora, 0.8)])
    for name, preset in bundle.facts.presets.items():
        assert (preset.scheduler, preset.steps, preset.guidance_scale) == ("ddim-trailing", 4, 1)
        assert preset.creativity == PRESETS[name].creativity
    assert "hyper-4" in bundle.warnings[0]
    plain = load_sd15(str(files.folder), loras=[(lora, 0.8)], few_step="none")
    assert plain.facts.presets == PRESETS
    assert plain.facts.fingerprint == bundle.facts.fingerprint


def test_auto_takes_the_best_that_is_on_this_machine_and_nothing_where_none_is(tmp_path):
    models = tmp_path / "models"
    assert choose_few_step((), "auto").loras == ()
    put(models / "latent-consistency" / "lcm-lora-sdv1-5" / "pytorch_lora_weights.safetensors")
    assert choose_few_step((), "auto").recipe == BY_NAME["lcm"]
    hyper = put(models / "lora" / "Hyper-SD15-4steps-lora.safetensors")
    assert choose_few_step((), "auto").loras == ((hyper, 1.0),)
    assert choose_few_step((), None).loras == ()
    given = put(tmp_path / "tcd-sd15.safetensors")
    assert choose_few_step([(given, 0.7)], "auto").loras == ((given, 0.7),)
    assert choose_few_step([("style.safetensors", 0.7)], "auto").loras[1] == (hyper, 1.0)


@pytest.mark.parametrize("place", ["models/Lora/speed/", "models/loras/"])
def test_the_best_is_found_where_a1111_and_comfyui_have_it(tmp_path, monkeypatch, place):
    folder = tmp_path / "program"
    monkeypatch.setenv("TEGULA_LIBRARY", str(folder))
    file = put(folder / place / "Hyper-SD15-8steps-lora.safetensors")
    for_sdxl = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}
    put(folder / place / "LCM_LoRA_Weights.safetensors", for_sdxl)
    assert choose_few_step((), "auto").loras == ((file, 1.0),)
    assert choose_few_step((), "hyper-8").loras == ((file, 1.0),)
    assert choose_few_step((), "hyper-sd15-8steps-lora").loras == ((file, 1.0),)
    with pytest.raises(MissingWeightsError, match="LoRA lcm is not on this machine"):
        choose_few_step((), "lcm")


def test_a_lora_is_named_by_its_recipe_or_its_file(tmp_path):
    lcm = put(tmp_path / "models" / "lcm_sd15.safetensors")
    assert choose_few_step((), "lcm").loras == choose_few_step((), lcm).loras == ((lcm, 1.0),)
    with pytest.raises(MissingWeightsError, match="TCD-SD15-LoRA"):
        choose_few_step((), "tcd")
    with pytest.raises(OptionError, match="hyper-4"):
        choose_few_step((), "unknown")
    with pytest.raises(OptionError, match="knows no few-step LoRA"):
        choose_few_step((), put(tmp_path / "style.safetensors"))


def test_mini_takes_no_few_step_lora_but_goes_on_with_what_is_automatic(tmp_path):
    assert load_bundle(BundleSettings(bundle="mini", few_step="auto")).facts.name == "mini"
    with pytest.raises(Exception, match="packaged model takes no"):
        load_bundle(BundleSettings(bundle="mini", few_step="lcm"))


def test_the_page_lists_every_recipe():
    page = (Path(__file__).parents[2] / "docs" / "stable-diffusion.md").read_text("utf-8")
    for known in RECIPES:
        row = f"| `{known.name}` | `{known.file}` | {known.repo} | {known.scheduler} "
        assert f"{row}| {known.steps} | {known.guidance_scale:g} |" in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), None),
        (("--preset", "fast"), "auto"),
        (("--preset", "fast", "--few-step", "none"), "none"),
        (("--few-step", "lcm"), "lcm"),
    ],
)
def test_the_fast_preset_looks_for_one_unless_told_otherwise(
    tmp_path, monkeypatch, words, expected
):
    loads = []
    tiny = Upscaler(tiny_bundle())
    load = staticmethod(lambda **named: loads.append(named) or tiny)
    monkeypatch.setattr(Upscaler, "load", load)
    source, result = tmp_path / "a.png", tmp_path / "b.png"
    picture().save(source)
    plain = ("--prescaler", "lanczos", "--creativity", "0")
    done = run("upscale", source, result, *plain, *words)
    assert done.exit_code == 0, done.output
    again = run("upscale", source, tmp_path / "c.png", "--like", result)
    assert again.exit_code == 0, again.output
    assert [each["few_step"] for each in loads] == [expected] * 2


CASES = {
    "lcm": (LCMScheduler, {}, 1.0),
    "tcd": (TCDScheduler, {}, 1.0),
    "hyper-4": (DDIMScheduler, {"timestep_spacing": "trailing"}, 0.5),
    "hyper-8-cfg": (DDIMScheduler, {"timestep_spacing": "trailing"}, 0.5),
}


def diffusers_result(picture, lora, recipe: FewStepRecipe, strength):
    kind, settings, _ = CASES[recipe.name]
    pipeline = pipeline_of(tiny_networks(3), kind, **settings)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    image = torch.tensor(picture.transpose(2, 0, 1)[None])
    return pipeline(
        prompt="a red cat",
        negative_prompt="blurry",
        image=image,
        control_image=image,
        strength=strength,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        controlnet_conditioning_scale=1.0,
        eta=0.3 if recipe.scheduler == "tcd" else 0.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("state", [kohya(), peft()], ids=["kohya", "peft"])
@pytest.mark.parametrize("name", CASES)
def test_the_picture_is_diffusers_own_with_the_same_lora_and_scheduler(
    files,  # noqa: F811
    tmp_path,
    name,
    state,
):
    recipe, strength, picture = BY_NAME[name], CASES[name][2], photograph(64, 64)
    lora = put(tmp_path / "models" / recipe.repo / recipe.file, state)
    bundle = load_sd15(str(files.folder), few_step=name)
    preset = bundle.facts.presets["fast"]
    chosen = options(
        prompt="a red cat",
        negative_prompt="blurry",
        creativity=strength,
        steps=preset.steps,
        scheduler=preset.scheduler,
        guidance_scale=preset.guidance_scale,
        seed=7,
    )
    ours = refine_canvas(RefineJob(bundle, picture, picture, chosen))
    expected = diffusers_result(picture, lora, recipe, strength)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    plain = refine_canvas(RefineJob(load_sd15(str(files.folder)), picture, picture, chosen))
    assert np.abs(ours - plain).max() > 1e-3
