"""LoRAs that a prompt names, which count for that run alone."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sd15_support import load_sd15

from tegula import UpscaleOptions, Upscaler
from tegula.errors import BrokenWeightsError, CancelledError

LORA_LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": 8,
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": 16,
}


@pytest.fixture
def style(offline, tmp_path):
    """A LoRA in the models folder."""
    path = tmp_path / "models" / "lora" / "Style.safetensors"
    path.parent.mkdir(parents=True)
    generator, state = torch.Generator().manual_seed(4), {}
    for layer, side in LORA_LAYERS.items():
        state[f"{layer}.lora_down.weight"] = torch.randn(2, side, generator=generator)
        state[f"{layer}.lora_up.weight"] = torch.randn(side, 2, generator=generator)
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def upscaler(files):
    """An upscaler that tests share: a LoRA of a prompt leaves no trace in it, as they check."""
    return Upscaler(load_sd15(str(files.folder)))


USUAL = {"seed": 1, "steps": 3, "creativity": 1, "scale": 1, "prescaler": "lanczos"}


def upscaled(upscaler, prompt="a cat", **options):
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    return upscaler.upscale(picture, UpscaleOptions(**{**USUAL, "prompt": prompt, **options}))


def weights_of(bundle):
    modules = bundle.denoiser.unet, bundle.text.model
    return [weight.clone() for module in modules for weight in module.parameters()]


def test_a_lora_in_the_prompt_counts_for_that_run_alone(files, upscaler, style):
    before, own = upscaled(upscaler), weights_of(upscaler.bundle)
    with_lora = upscaled(upscaler, "a cat<lora:style:0.7>")
    after = upscaled(upscaler)
    loaded = Upscaler(load_sd15(str(files.folder), loras=[(str(style), 0.7)]))
    assert with_lora.image.tobytes() == upscaled(loaded).image.tobytes()
    assert with_lora.image.tobytes() != before.image.tobytes() == after.image.tobytes()
    assert all(map(torch.equal, own, weights_of(upscaler.bundle)))
    assert with_lora.warnings == before.warnings
    assert with_lora.settings["prompt"] == "a cat<lora:style:0.7>"


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("<lora:style:0> a cat", {}),
        ("<lora:style:0> a cat", {"prompt_weighting": "comfyui"}),
        ("a <lyco:STYLE:0.5><lora:style:-0.5>cat", {}),
    ],
)
def test_a_tag_is_no_part_of_the_prompt(upscaler, style, prompt, options):
    tagged = upscaled(upscaler, prompt, **options)
    assert np.abs(pixels(tagged) - pixels(upscaled(upscaler, **options))).max() <= 1
    assert tagged.warnings == ()


def pixels(result):
    return np.asarray(result.image).astype(int)


def test_the_prompt_of_a_region_may_name_a_lora(upscaler, style):
    plain = upscaled(upscaler, "", regions=("0,0,1,1:a cat",))
    tagged = upscaled(upscaler, "<lora:style:0>", regions=("0,0,1,1:<lora:style> a cat",))
    assert tagged.image.tobytes() != plain.image.tobytes()
    assert tagged.warnings == ()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": "a cat <lora:gone:1>"}, "The LoRA gone is left out: there is no"),
        ({"prompt": "a cat <lora:style:high>"}, "is left out: its weight is a number, not "),
        ({"prompt": "a cat <lora:style:1:0.5>"}, "is left out: its weight is a number, not "),
        ({"prompt": "a cat <lora:style:nan>"}, "is left out: its weight is a number, not "),
        (
            {"prompt": "a cat <hypernet:style:1>"},
            "The hypernet style is left out: a prompt",
        ),
        ({"negative_prompt": "<lora:style:1>"}, "not in the negative prompt"),
        ({"prompt": "a cat <lora:../models/lora/Style:1>"}, "there is no LoRA of that name"),
    ],
)
def test_a_tag_that_cannot_be_followed_is_left_out_and_said(upscaler, style, options, sentence):
    plain = upscaled(upscaler, negative_prompt="")
    tagged = upscaled(upscaler, **{"negative_prompt": "", **options})
    assert tagged.image.tobytes() == plain.image.tobytes()
    (warning,) = tagged.warnings
    assert sentence in warning


def test_a_path_names_no_lora(upscaler, style):
    (warning,) = upscaled(upscaler, f"a cat <lora:{style}:1>").warnings
    assert "there is no LoRA of that name" in warning


def test_the_words_in_the_file_of_a_lora_are_said_to_be_unknown(upscaler, style):
    state = {**load_file(style), "bundle_emb.mood.string_to_param.*": torch.ones(2, 16)}
    save_file(state, style)
    warnings = upscaled(upscaler, "mood <lora:style:0.7>").warnings
    assert any("The word mood of Style.safetensors" in warning for warning in warnings)


def test_weights_come_back_when_a_run_fails(files, style):
    upscaler = Upscaler(load_sd15(str(files.folder), dtype=torch.bfloat16))
    own, seen = weights_of(upscaler.bundle), []

    def cancelled():
        changed = not all(map(torch.equal, own, weights_of(upscaler.bundle)))
        seen.append(changed)
        return changed

    options = UpscaleOptions(prompt="<lora:style>", steps=3, creativity=1, prescaler="lanczos")
    with pytest.raises(CancelledError):
        upscaler.upscale(torch.rand(3, 16, 16), options, cancelled=cancelled)
    assert seen[-1]
    assert all(map(torch.equal, own, weights_of(upscaler.bundle)))


def test_a_lora_that_does_not_fit_changes_nothing(upscaler, style):
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    save_file({key: torch.ones(2, 2048)}, style.parent / "xl.safetensors")
    own = weights_of(upscaler.bundle)
    with pytest.raises(BrokenWeightsError, match="SDXL"):
        upscaled(upscaler, "<lora:style> <lora:xl>")
    assert all(map(torch.equal, own, weights_of(upscaler.bundle)))


def test_pictures_made_at_once_have_the_lora_of_their_prompt(upscaler, style):
    expected = upscaled(upscaler, "a cat <lora:style:0.7>")
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    own = weights_of(upscaler.bundle)
    options = UpscaleOptions(**USUAL, prompt="a cat <lora:style:0.7>")
    for made in upscaler.upscale_many([picture] * 2, options):
        assert np.abs(pixels(made) - pixels(expected)).max() <= 1
        assert made.warnings == expected.warnings
    assert all(map(torch.equal, own, weights_of(upscaler.bundle)))


def test_mini_takes_no_lora_and_says_so(style):
    result = upscaled(Upscaler.load("mini"), "sharp <lora:style:1>")
    assert any("cannot be changed for a single run" in warning for warning in result.warnings)
    assert not any("style" in warning and "ignores" in warning for warning in result.warnings)
