"""mini: latents, words, network, and its files."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from support import photograph

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models import offered_presets
from tegula.models.bundle import ControlImage, ControlScale, WindowBatch
from tegula.models.mini import bundle as words
from tegula.models.mini.bundle import SCHEDULER, WEIGHTS, load_mini
from tegula.models.mini.network import (
    BlockAutoencoder,
    MiniDenoiser,
    MiniNetwork,
    NetworkShape,
    control_channels,
    creativity_gain,
    dct_filters,
    luma,
    prepare,
    room_for_detail,
    take_shares,
)
from tegula.options import PRESETS, UpscaleOptions
from tegula.upscaler import Upscaler

CPU = torch.device("cpu")
SHAPE = NetworkShape(widths=(32, 48), down=(1,), middle=1, up=(1,), words=words.VOCABULARY_SIZE)


def _control(side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ControlImage(
        torch.rand(1, 3, side, side, generator=generator),
        torch.rand(1, 3, side, side, generator=generator),
    )


def _random_network():
    torch.manual_seed(0)
    network = MiniNetwork(SHAPE)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return prepare(network, CPU, torch.float32)


def _batch(control, prompt="", scale=1.0, controlled=slice(0, 1), timestep=600.0):
    denoiser = MiniDenoiser(_random_network(), torch.float32)
    generator = torch.Generator().manual_seed(1)
    return denoiser, WindowBatch(
        latents=torch.randn(1, 16, 8, 8, generator=generator),
        timestep=torch.tensor(timestep),
        text=words.WordEncoder(CPU, torch.float32).encode([prompt]),
        control=denoiser.embed_control(control),
        control_scale=None if scale is None else ControlScale(scale),
        controlled=controlled,
    )


def test_the_block_transform_is_orthonormal():
    filters = dct_filters().flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(16), atol=1e-6, rtol=0)


def test_an_unchanged_picture_is_a_latent_of_zeros_and_comes_back_exactly():
    control = _control()
    autoencoder = BlockAutoencoder()
    latents = autoencoder.encode(control.prescaled, control)
    assert latents.shape == (1, 16, 8, 8)
    assert latents.abs().max() == 0
    assert torch.equal(autoencoder.decode(latents, control), control.prescaled)


def test_decoding_returns_the_encoded_luma_and_the_chroma_of_the_control():
    control, image = _control(), _control(seed=1).prescaled
    autoencoder = BlockAutoencoder()
    decoded = autoencoder.decode(autoencoder.encode(image, control), control)
    torch.testing.assert_close(luma(decoded), luma(image), atol=1e-5, rtol=0)
    chroma = decoded - luma(decoded)
    expected = control.prescaled - luma(control.prescaled)
    torch.testing.assert_close(chroma, expected, atol=1e-5, rtol=0)


def test_the_network_predicts_nothing_before_training():
    network = MiniNetwork(SHAPE)
    out = network(
        torch.randn(2, 16, 8, 8), torch.rand(2), torch.randn(2, 35, 8, 8), torch.zeros(2, 28)
    )
    assert out.abs().max() == 0


def test_a_prediction_depends_on_its_surroundings_alone():
    network = _random_network()
    latents, control = torch.randn(1, 16, 48, 48), torch.randn(1, 35, 48, 48)
    level, text = torch.tensor([0.5]), torch.zeros(1, words.VOCABULARY_SIZE)
    whole = network(latents, level, control, text)
    part = network(latents[..., :24, :24], level, control[..., :24, :24], text)
    torch.testing.assert_close(part[..., :8, :8], whole[..., :8, :8], atol=1e-5, rtol=1e-4)


def test_words_and_noise_level_and_control_change_the_prediction():
    control = _control()
    denoiser, plain = _batch(control)
    before = denoiser(plain)
    for other in (
        _batch(control, prompt="blurry"),
        _batch(control, timestep=100.0),
        _batch(_control(seed=5)),
        _batch(control, scale=None),
        _batch(control, controlled=slice(1, 1)),
    ):
        assert not torch.allclose(before, denoiser(other[1]), atol=1e-4)


def test_resemblance_shrinks_the_difference_steadily():
    control = _control()
    sizes = []
    for scale in (0.0, 0.5, 1.0, 2.0, 3.0):
        denoiser, batch = _batch(control, scale=scale)
        sizes.append(float(denoiser(batch).abs().mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.2 * sizes[2] > 1.2 * 1.2 * sizes[4]


def test_a_creativity_above_that_of_the_presets_takes_visibly_more():
    levels = torch.tensor([0.001, 0.699, 0.8, 0.9, 1.0])
    assert creativity_gain(levels).tolist() == pytest.approx([1, 1, 2, 3, 4])
    sizes = []
    for timestep in (699.0, 799.0):
        denoiser, batch = _batch(_control(), timestep=timestep)
        sizes.append(float(denoiser(batch).abs().mean()))
    assert sizes[1] > 1.4 * sizes[0]


def test_more_weight_of_control_takes_less_of_the_prediction_there():
    weight = torch.ones(1, 1, 32, 32)
    weight[..., 16:] = 3
    (denoiser, even), (_, uneven) = (
        _batch(dataclasses.replace(_control(), weight=w)) for w in (None, weight)
    )
    taken, less = denoiser(even).abs(), denoiser(uneven).abs()
    torch.testing.assert_close(taken[..., :3], less[..., :3])
    assert less[..., 4:].mean() < 0.9 * taken[..., 4:].mean()


def _ripples(contrast: float, seed: int = 0) -> torch.Tensor:
    """Return a grey picture [1, 3, 64, 64] of noise around one half."""
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(seed))
    return (0.5 + contrast * noise).expand(-1, 3, -1, -1)


def _taken(before: torch.Tensor, after: torch.Tensor, gain: float) -> torch.Tensor:
    """Return the picture that a prediction of ``after`` leads to from ``before``."""
    control, autoencoder = ControlImage(before, before), BlockAutoencoder()
    predicted = autoencoder.encode(after, control)
    shares = take_shares(predicted, control_channels(control), room_for_detail(control), gain)
    return autoencoder.decode(shares, control)


def _inner_deviation(picture: torch.Tensor) -> float:
    return float(luma(picture)[..., 8:-8, 8:-8].std())


def test_there_is_no_room_where_the_prescaled_picture_is_flat():
    flat = torch.full((1, 3, 64, 64), 0.4)
    assert room_for_detail(ControlImage(flat, flat)).abs().max() < 1e-4
    torch.testing.assert_close(_taken(flat, _ripples(0.1), 1.0), flat, atol=1e-4, rtol=0)


def test_more_texture_in_the_prescaled_picture_makes_more_room():
    pictures = [_ripples(contrast) for contrast in (0.0, 0.003, 0.01, 0.1)]
    sizes = [float(room_for_detail(ControlImage(p, p)).mean()) for p in pictures]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] <= 1


def test_mixing_two_textures_hardly_loses_energy():
    before, after = _ripples(0.1), _ripples(0.1, seed=1)
    halfway = _inner_deviation((before + after) / 2)
    kept = _inner_deviation(_taken(before, after, 1.0))
    assert halfway < 0.75 * _inner_deviation(before)
    assert 0.85 * _inner_deviation(before) < kept < 1.02 * _inner_deviation(before)


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0, 2.0])
def test_predicting_the_prescaled_picture_changes_nothing(gain):
    picture = _ripples(0.1)
    torch.testing.assert_close(_taken(picture, picture, gain), picture, atol=1e-5, rtol=0)


def test_another_precision_gives_nearly_the_same_prediction():
    denoiser, batch = _batch(_control())
    other = denoiser.to_dtype(torch.bfloat16)(batch)
    assert other.dtype == batch.latents.dtype
    full = denoiser(batch)
    assert (other - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("sharp", {"sharp": 1.0}),
        ("(sharp:1.5), warm", {"sharp": 1.5, "warm": 1.0}),
        ("((detailed))", {"detailed": 1.21}),
        ("[noise]", {"noisy": 1 / 1.1}),
        ("a VIVID picture", {"colourful": 1.0}),
        ("(sharp:9)", {"sharp": 2.0}),
        ("(sharp:1.0)", {"sharp": 1.0}),
        ("[sharp:1.5]", {"sharp": 1 / 1.1}),
        ("(sharp:1.3, warm", {"sharp": 1.1, "warm": 1.1}),
        ("[sharp:1.5), warm]", {"sharp": 1 / 1.1, "warm": 1 / 1.1}),
        ("sharp (", {"sharp": 1.0}),
        (r"\(sharp\)", {"sharp": 1.0}),
        ("", {}),
    ],
)
def test_prompts_become_weights(prompt, expected):
    weights = words.encode_words(prompt)
    found = {w: float(v) for w, v in zip(words.VOCABULARY, weights, strict=True) if v}
    assert found == pytest.approx(expected)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_prompt_breaks_the_encoder(prompt):
    encoded = words.WordEncoder(CPU, torch.float32).encode([prompt, ""])
    assert encoded.shape == (2, 1, words.VOCABULARY_SIZE)
    assert torch.isfinite(encoded).all()
    assert encoded[1].abs().max() == 0


def test_unknown_words_are_named_once_and_stop_words_never():
    encoder = words.WordEncoder(CPU, torch.float32)
    ignored = encoder.ignored_words("a sharp photo of a castle, the castle on (fire:1.2)")
    assert ignored == ("castle", "fire")
    assert encoder.ignored_words("[sharp:1.5] BREAK 16:9") == ()


def test_unknown_words_of_a_region_are_warned_of_as_those_of_the_prompt():
    mini = Upscaler(load_mini(torch.device("cpu"), torch.float32))
    options = UpscaleOptions(
        prescaler="lanczos", steps=2, prompt="a zyzzyva", regions=("0,0,8,8:a wombat of brick",)
    )
    picture = Image.fromarray((photograph(16, 16) * 255).astype(np.uint8))
    assert "mini does not know and ignores: zyzzyva, wombat, brick." in (
        mini.upscale(picture, options).warnings
    )


def test_every_synonym_leads_to_a_known_word():
    assert set(words.SYNONYMS.values()) <= set(words.VOCABULARY)
    assert not set(words.SYNONYMS) & set(words.VOCABULARY)


def test_the_packaged_bundle_loads_and_has_every_preset():
    bundle = load_mini(CPU, torch.float32)
    assert bundle.facts.family == "mini"
    assert set(bundle.facts.presets) == set(PRESETS) - {"best", "exact"}  # which follow from others
    assert bundle.facts.minimum_window % bundle.facts.window_multiple == 0
    assert bundle.scheduler == SCHEDULER
    assert (WEIGHTS / "README.md").read_text().count(bundle.facts.fingerprint) == 1


def test_the_packaged_weights_are_small():
    assert (WEIGHTS / "mini.safetensors").stat().st_size < 20 * 2**20


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("name", ["mini.safetensors", "config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(MissingWeightsError, match=name):
        load_mini(CPU, torch.float32, folder)


def test_a_changed_byte_is_noticed(folder):
    path = folder / "mini.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenWeightsError, match="damaged"):
        load_mini(CPU, torch.float32, folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"network": {"widths": 3}}'])
def test_a_broken_configuration_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(BrokenWeightsError):
        load_mini(CPU, torch.float32, folder)


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["network"]["middle"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenWeightsError, match="does not fit"):
        load_mini(CPU, torch.float32, folder)


def test_weights_with_other_words_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["words"].append("castle")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenWeightsError, match="other words"):
        load_mini(CPU, torch.float32, folder)


def test_a_guidance_scale_that_would_tear_the_picture_is_held_and_told():
    upscaler = Upscaler.load("mini", device="cpu", precision="fp32")
    picture = Image.fromarray((photograph(64, 64) * 255).astype(np.uint8))
    chosen = UpscaleOptions(prescaler="lanczos", seed=1, guidance_scale=8.0)
    held, reported = (
        upscaler.upscale(picture, chosen.replaced(guidance_scale=scale)) for scale in (8.0, 2.0)
    )
    assert np.array_equal(held.image, reported.image)
    assert held.warnings == ("mini takes a guidance scale of up to 2; 8 was held to it.",)
    assert reported.warnings == ()


def test_presets_that_are_not_offered_look_like_the_usual_one():
    upscaler = Upscaler(load_mini(CPU, torch.float32))
    source = Image.fromarray(data.chelsea()[100:148, 120:168])
    options = UpscaleOptions(prescaler="realesrgan-animevideov3", seed=1)

    def made(preset):
        result = upscaler.upscale(source, options.replaced(preset=preset))
        return np.asarray(result.image, np.float32)

    usual, presets = made("balanced"), upscaler.bundle.facts.presets
    alike = {name for name in PRESETS if np.abs(made(name) - usual).mean() < 2}
    nets = {name: values.prescaler for name, values in presets.items()}
    other_nets = {name for name, net in nets.items() if net != nets["balanced"]} | {"best"}
    assert set(offered_presets("mini")) == {"balanced", *other_nets} | (set(PRESETS) - alike)
    assert set(offered_presets("some/checkpoint")) == set(PRESETS) - {"best"}
