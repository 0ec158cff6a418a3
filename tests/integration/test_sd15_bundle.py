import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from tegula.models.bundle import ControlImage, ControlScale, TileableAutoencoder, WindowBatch
from tegula.models.sd15.networks import Networks, align, make_denoiser
from tests.tiny.networks import tiny_bundle, tiny_networks

LONG = "a red cat a sharp photo of the dog " * 24


@pytest.fixture(scope="module")
def networks() -> Networks:
    return tiny_networks(3)


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle(3)


@pytest.fixture(scope="module")
def pipeline(networks, bundle):
    return StableDiffusionPipeline(
        vae=networks.autoencoder,
        text_encoder=networks.text_model,
        tokenizer=networks.tokenizer,
        unet=networks.unet,
        scheduler=DDIMScheduler.from_config(bundle.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def picture(rows=2, side=64, seed=0):
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def control(rows=2):
    return ControlImage(picture(rows, seed=1), picture(rows, seed=2))


def window_batch(bundle, scale, rows=2, controlled=None):
    generator = torch.Generator().manual_seed(5)
    return WindowBatch(
        latents=torch.randn(rows, 4, 8, 8, generator=generator),
        timestep=torch.tensor(321),
        text=torch.randn(rows, 77, 16, generator=generator),
        control=bundle.denoiser.embed_control(control(rows)),
        control_scale=scale,
        controlled=slice(0, rows) if controlled is None else controlled,
    )


def diffusers_prediction(networks, batch, scale, guess_mode=False):
    down, mid = networks.controlnet(
        batch.latents[batch.controlled],
        batch.timestep,
        encoder_hidden_states=batch.text[batch.controlled],
        controlnet_cond=control(len(batch.latents)).prescaled[batch.controlled],
        conditioning_scale=scale,
        guess_mode=guess_mode,
        return_dict=False,
    )
    if guess_mode:
        down = [torch.cat([torch.zeros_like(part), part]) for part in down]
        mid = torch.cat([torch.zeros_like(mid), mid])
    return networks.unet(
        batch.latents,
        batch.timestep,
        encoder_hidden_states=batch.text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]


def weighted_batch(bundle, weight, scale=1.0):
    pictures = control()
    weights = torch.as_tensor(weight).expand(2, 1, 64, 64).contiguous()
    embedded = bundle.denoiser.embed_control(dataclasses.replace(pictures, weight=weights))
    return dataclasses.replace(window_batch(bundle, ControlScale(scale)), control=embedded)


def test_an_even_weight_of_control_is_the_control_scale(bundle):
    weighted = bundle.denoiser(weighted_batch(bundle, 1.5))
    scaled = bundle.denoiser(window_batch(bundle, ControlScale(1.5)))
    torch.testing.assert_close(weighted, scaled, atol=1e-5, rtol=0)
    assert (weighted - bundle.denoiser(window_batch(bundle, ControlScale(1.0)))).abs().max() > 1e-3


def test_control_can_weigh_more_in_one_place_than_in_another(bundle):
    weight = torch.ones(1, 1, 64, 64)
    weight[..., 32:] = 2
    even, more = (bundle.denoiser.encode(weighted_batch(bundle, w))[-1] for w in (1.0, weight))
    change = (more - even).abs().mean((0, 1, 2))
    assert change[len(change) // 2 :].min() > change[0]


def test_the_same_seed_gives_the_same_weights(bundle):
    assert tiny_bundle(3).facts.fingerprint == bundle.facts.fingerprint
    assert tiny_bundle(4).facts.fingerprint != bundle.facts.fingerprint


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    tiny_networks(0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("prompt", ["", "a photo of a cat", "Rotes Häuschen, 8k!"])
def test_a_short_prompt_is_encoded_as_diffusers_does(bundle, pipeline, prompt):
    expected, negative = pipeline.encode_prompt(prompt, "cpu", 1, True, "blurry")
    assert torch.equal(bundle.text.encode([prompt, "blurry"]), torch.cat([expected, negative]))


def test_a_long_prompt_loses_no_words(bundle):
    encoded = bundle.text.encode([LONG, LONG + "dog"])
    assert encoded.shape == (2, 77 * 3, 16)
    assert not torch.equal(encoded[0], encoded[1])


def test_a_long_prompt_is_cut_into_framed_chunks(bundle, pipeline):
    words = ["dog"] * 75 + ["cat"] * 3
    expected = [
        pipeline.encode_prompt(" ".join(part), "cpu", 1, False)[0]
        for part in (words[:75], words[75:])
    ]
    assert torch.equal(bundle.text.encode([" ".join(words)]), torch.cat(expected, dim=1))


def test_a_short_prompt_beside_a_long_one_acts_as_it_does_alone(bundle, networks):
    def predicted(text):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        return networks.unet(latents, torch.tensor(321), text, return_dict=False)[0]

    two = LONG[: len(LONG) // 2]
    prompts = [LONG, "cat", two]
    together = bundle.text.encode(prompts)
    assert together.shape == (3, 77 * 6, 16)
    for prompt, row in zip(prompts, together, strict=True):
        alone = predicted(bundle.text.encode([prompt]))
        assert torch.allclose(predicted(row[None]), alone, atol=1e-5)


def test_prompts_of_many_lengths_are_filled_up_with_empty_chunks(bundle):
    words = ["a red cat " * 25 * chunks for chunks in (3, 4, 5)]
    together = bundle.text.encode(words)
    empty = bundle.text.encode([""])[0]
    assert together.shape == (3, 77 * 5, 16)
    alone = bundle.text.encode(words[:1])[0]
    assert torch.equal(together[0], torch.cat([alone, empty, empty]))


def test_a_weight_multiplies_the_word_and_keeps_the_mean(bundle):
    plain, weighted = bundle.text.encode(["a red cat"])[0], bundle.text.encode(["a (red:2) cat"])[0]
    ratio = (weighted / plain).mean(1)
    assert torch.allclose(ratio[2] / ratio[1], torch.tensor(2.0), atol=1e-4)
    assert torch.allclose(weighted.mean(), plain.mean(), atol=1e-5)


def test_a_weight_of_one_changes_nothing(bundle):
    assert torch.equal(bundle.text.encode(["a (red:1.0) cat"]), bundle.text.encode(["a red cat"]))


def test_no_word_is_ignored(bundle):
    assert bundle.text.ignored_words("xylophone") == ()


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_denoiser_equals_diffusers(bundle, networks, scale):
    batch = window_batch(bundle, ControlScale(scale))
    expected = diffusers_prediction(networks, batch, scale)
    assert torch.equal(bundle.denoiser(batch), expected)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_guess_mode_equals_diffusers(bundle, networks, scale):
    batch = window_batch(bundle, ControlScale(scale, guess_mode=True), controlled=slice(1, 2))
    expected = diffusers_prediction(networks, batch, scale, guess_mode=True)
    assert torch.allclose(bundle.denoiser(batch), expected, atol=1e-6)


def test_without_a_control_scale_the_unet_runs_alone(bundle, networks):
    batch = window_batch(bundle, None)
    expected = networks.unet(batch.latents, batch.timestep, batch.text, return_dict=False)[0]
    assert torch.equal(bundle.denoiser(batch), expected)


def test_control_reaches_only_the_controlled_rows(bundle):
    alone = bundle.denoiser(window_batch(bundle, None))
    steered = bundle.denoiser(window_batch(bundle, ControlScale(1.0), controlled=slice(1, 2)))
    assert torch.allclose(steered[0], alone[0], atol=1e-6)
    assert not torch.allclose(steered[1], alone[1], atol=1e-3)


def test_a_bundle_without_controlnet_runs_and_warns():
    bundle = tiny_bundle(control=False)
    prediction = bundle.denoiser(window_batch(bundle, ControlScale(1.0)))
    assert prediction.shape == (2, 4, 8, 8)
    assert "no ControlNet" in bundle.warnings[0]


def test_a_controlnet_that_takes_bgr_gets_bgr():
    networks = tiny_networks()
    encoder = networks.controlnet.controlnet_cond_embedding
    networks.controlnet.register_to_config(controlnet_conditioning_channel_order="bgr")
    embedded = make_denoiser(networks.unet, networks.controlnet).embed_control(control())
    assert torch.equal(embedded[:, :-1], encoder(control().prescaled.flip(1)))


def test_another_precision_computes_the_same_and_leaves_the_first_alone(bundle):
    batch = window_batch(bundle, ControlScale(1.0))
    half = bundle.denoiser.to_dtype(torch.bfloat16)
    prediction = half(batch)
    assert prediction.dtype == torch.bfloat16
    assert torch.allclose(prediction.float(), bundle.denoiser(batch), atol=0.1)
    assert bundle.denoiser.unet.dtype == torch.float32
    assert half.to_dtype(torch.bfloat16) is half


def test_the_autoencoder_encodes_as_diffusers_does(bundle, networks):
    posterior = networks.autoencoder.encode(picture() * 2 - 1).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(7)) * 0.18215
    latents = bundle.autoencoder.encode(picture(), control(), torch.Generator().manual_seed(7))
    assert torch.equal(latents, expected)


def test_the_autoencoder_decodes_as_diffusers_does(bundle, networks):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = networks.autoencoder.decode(latents / 0.18215).sample / 2 + 0.5
    assert torch.equal(bundle.autoencoder.decode(latents, control(1)), expected)


def test_moments_and_draw_make_up_encode(bundle):
    autoencoder = bundle.autoencoder
    assert isinstance(autoencoder, TileableAutoencoder)
    drawn = autoencoder.draw(
        autoencoder.encode_moments(picture()), torch.Generator().manual_seed(2)
    )
    encoded = autoencoder.encode(picture(), control(), torch.Generator().manual_seed(2))
    assert torch.equal(drawn, encoded)


def test_the_autoencoder_in_another_precision_is_a_copy(bundle):
    half = bundle.autoencoder.to_dtype(torch.bfloat16)
    assert half.network.dtype == torch.bfloat16
    assert bundle.autoencoder.network.dtype == torch.float32


def test_weights_that_lie_askew_in_memory_are_laid_straight():
    askew = torch.frombuffer(bytearray(4 * 65), dtype=torch.float32)[1:].view(8, 8)
    layer = torch.nn.Linear(8, 8, bias=False).requires_grad_(requires_grad=False)
    layer.weight.data = askew
    before = layer.weight.clone()
    align(layer)
    assert layer.weight.data_ptr() % 64 == 0
    assert torch.equal(layer.weight, before)
