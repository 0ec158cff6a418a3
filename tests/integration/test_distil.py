"""Distilling the small prescaler: its beginning, pairs, losses, resuming, the whole program."""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import SRVGGNetCompact
from train import distil
from train.batches import BatchSettings
from train.config import CPU, DistilSettings
from train.degradation import RECIPES
from train.distil import (
    DistilProgram,
    begin_pupil,
    distil_step,
    high_bands,
    new_distil_state,
)
from train.distil_pairs import (
    DistilPairSettings,
    DistilSource,
    make_distil_shards,
)
from train.pairs import SWIFT
from train.runner import Stage, run_stage

DEVICE = torch.device("cpu")
CROPS = BatchSettings(size=2, crop=96, parts=1)
PAIRS = DistilPairSettings(side=160, count=3, shard=2)
SETTINGS = DistilSettings(
    convolutions=5, pairs=PAIRS, steps=4, batch=CROPS, judges_from=1, judges_grow=2, warm_up=1
)
SMALL = dataclasses.replace(
    CPU, distil=SETTINGS, checkpoint_every=2, samples_every=1000, held_out_every=3
)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    network = SRVGGNetCompact(3, features=8).eval()
    with torch.no_grad():
        network.body[-1].weight.mul_(0.2)
        for layer in network.body:
            if isinstance(layer, torch.nn.PReLU):
                layer.weight.uniform_(-0.2, 0.6)
    return network


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    path = tmp_path_factory.mktemp("photographs") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return path


def enlarge(small):
    return functional.interpolate(small, scale_factor=4, mode="bicubic")


TEACHERS = dict.fromkeys(RECIPES, enlarge)


@pytest.fixture(scope="module")
def pairs(photograph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    make_distil_shards([photograph], folder, PAIRS, TEACHERS)
    return folder


@pytest.mark.parametrize("convolutions", [3, 5, 8])
def test_a_deepened_pupil_begins_as_its_base(base, convolutions, monkeypatch):
    monkeypatch.setattr(distil, "_IDENTITY_NOISE", 0.0)
    pupil = begin_pupil(base, convolutions, 1).eval()
    small = torch.rand(1, 3, 12, 16)
    with torch.inference_mode():
        four, two = pupil(small)
        torch.testing.assert_close(four, base(small))
        torch.testing.assert_close(two, functional.avg_pool2d(four, 2))
    assert len(pupil.four.body) == 3 + 2 * convolutions


def test_both_heads_learn_on_one_body(base):
    pupil = begin_pupil(base, 5, 1)
    names = [name for name, _ in pupil.named_parameters()]
    assert [n for n in names if n.startswith("two.")] == ["two.body.12.weight", "two.body.12.bias"]
    shared = set(map(id, pupil.four.parameters())) & set(map(id, pupil.two.parameters()))
    assert len(shared) == len(list(pupil.four.parameters())) - 2


def test_pairs_repeat_and_every_recipe_asks_its_own_teacher(photograph, pairs, tmp_path):
    counts = dict.fromkeys(RECIPES, 0)

    def teacher(name):
        def teach(small):
            counts[name] += len(small)
            return enlarge(small)

        return teach

    settings = dataclasses.replace(PAIRS, recipe_shares=(0.0, 0.0, 1.0))
    teachers = {name: teacher(name) for name in RECIPES}
    make_distil_shards([photograph], tmp_path / "heavy", settings, teachers)
    assert counts == {"clean": 0, "light": 0, "heavy": 3}
    make_distil_shards([photograph], tmp_path / "again", PAIRS, TEACHERS)
    draws = [
        DistilSource(f).draw(CROPS, np.random.default_rng(3)) for f in (pairs, tmp_path / "again")
    ]
    for name in ("small", "truth", "taught"):
        assert torch.equal(getattr(draws[0], name), getattr(draws[1], name))


def test_crops_of_a_pair_lie_over_each_other(pairs):
    batch = DistilSource(pairs).draw(BatchSettings(size=8, crop=96), np.random.default_rng(1))
    torch.testing.assert_close(batch.taught, enlarge(batch.small).clamp(0, 1), atol=0.2, rtol=0)
    inner = batch.taught[..., 16:-16, 16:-16] - enlarge(batch.small)[..., 16:-16, 16:-16]
    assert float(inner.abs().mean()) < 0.01
    half = batch.twice()
    assert half.truth.shape[-1] == 2 * half.small.shape[-1]
    torch.testing.assert_close(half.taught, functional.avg_pool2d(batch.taught, 2))


def test_the_discriminator_sees_no_brightness_and_no_slope():
    slope = torch.linspace(0, 1, 24).repeat(24, 1)[None, None]
    assert float(high_bands(slope)[..., 2:-2].abs().max()) < 1e-6
    dots = torch.zeros(1, 1, 24, 24)
    dots[..., ::2, ::2] = 1
    assert float(high_bands(dots).std()) > 0.3


def run(base, pairs, steps, folder, settings=SETTINGS):
    features = pytest.importorskip("bench.quality.features").EarlyFeatures("lite1", stages=3)
    state = new_distil_state(begin_pupil(base, 5, 1), settings, 1, DEVICE)
    logged = []

    def step(state, batch):
        logged.append(distil_step(state, settings, features, batch))
        return logged[-1]

    run_stage(
        Stage("distil", steps, 0.9, settings.batch, step), state, DistilSource(pairs), folder, SMALL
    )
    return state, logged


def test_distilling_resumes_bit_for_bit(base, pairs, tmp_path):
    whole, logged = run(base, pairs, 4, tmp_path / "whole")
    run(base, pairs, 2, tmp_path / "parts")
    resumed, _ = run(base, pairs, 4, tmp_path / "parts")
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in pairwise([whole.network.two.body[3], whole.network.four.body[3]]):
        assert a is b
    assert "adversarial" not in logged[0]
    assert {"adversarial", "judge", "taught", "statistics", "flat"} <= logged[1].keys()


def test_a_pupil_learns_what_the_teacher_does(base, photograph, tmp_path):
    """The teacher here enlarges by bicubic curves, which a tiny net soon comes near."""
    make_distil_shards([photograph], tmp_path, PAIRS, TEACHERS)
    alone = dict.fromkeys(
        ("perceptual", "statistics", "texture", "energy", "flat", "colour", "adversarial"), 0.0
    )
    settings = dataclasses.replace(
        SETTINGS, steps=24, learning_rate=4e-3, judges_from=999, taught=4.0,
        batch=BatchSettings(size=2, crop=64), **alone,
    )  # fmt: skip
    _, logged = run(base, tmp_path, 24, tmp_path / "run", settings)
    taught = [float(losses["taught"]) for losses in logged]
    assert taught[0] > 0.8
    assert sum(taught[-4:]) / 4 < 0.4


@pytest.mark.slow
def test_the_whole_program_makes_a_prescaler_that_loads(photograph, tmp_path):
    said = []
    settings = dataclasses.replace(
        SMALL, distil=dataclasses.replace(SETTINGS, convolutions=32, steps=2)
    )
    copies = [tmp_path / f"{name}.png" for name in "abc"]
    for copy in copies:
        copy.write_bytes(photograph.read_bytes())
    weights = tmp_path / "weights"
    pupil = DistilProgram(
        settings, copies, tmp_path / "work", weights, DEVICE, said.append
    ).everything()
    loaded = load_prescaler(SWIFT, DEVICE, torch.float32, weights)
    assert loaded.network is not None
    assert loaded.smaller is not None
    assert loaded.smaller.network is not None
    small = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        four, two = pupil(small)
        torch.testing.assert_close(loaded.network(small), four, atol=4e-3, rtol=0)
        torch.testing.assert_close(loaded.smaller.network(small), two, atol=4e-3, rtol=0)
    digest = hashlib.sha256((weights / f"{SWIFT}.safetensors").read_bytes()).hexdigest()
    assert digest in said[-1]
    assert digest in (weights / f"{SWIFT}.md").read_text()
