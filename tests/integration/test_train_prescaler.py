"""Tuning a prescaler's last layers: cutting, training, resuming, the whole program."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import RRDBNet
from train.batches import BatchSettings
from train.config import CPU, TailSettings
from train.pairs import PHOTO
from train.prescaler import PrescalerProgram, base_network
from train.runner import Stage, run_stage
from train.tail import (
    cut_tail,
    interpolate,
    new_tail_state,
    run_tail,
    tail_step,
    tuned_tensors,
    with_tail,
)
from train.tail_pairs import (
    TailBatch,
    TailPairSettings,
    TailSource,
    features_before,
    make_tail_shards,
)

DEVICE = torch.device("cpu")
CROPS = BatchSettings(size=4, crop=64, parts=2)
PAIRS = TailPairSettings(side=96, count=4, shard=2)
SETTINGS = TailSettings(
    pairs=PAIRS, steps=4, batch=CROPS, regularise_every=2, judges_grow=2, warm_up=1
)
SMALL = dataclasses.replace(
    CPU, tail=SETTINGS, checkpoint_every=2, samples_every=1000, held_out_every=3
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return RRDBNet(blocks=4).eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def pairs(network, photograph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    make_tail_shards([photograph], folder, PAIRS, lambda x: features_before(network, x, 2))
    return folder


def test_a_cut_tail_goes_on_where_the_network_was_cut(network):
    small = torch.rand(1, 3, 24, 20)
    batch = TailBatch(small, small, features_before(network, small, 2))
    with torch.inference_mode():
        torch.testing.assert_close(run_tail(cut_tail(network, 2), batch), network(small))


def test_a_tuned_tail_takes_its_place_in_the_network(network):
    tail = cut_tail(network, 2)
    with torch.no_grad():
        tail.conv_last.bias.add_(0.25)
    small = torch.rand(1, 3, 16, 16)
    whole = with_tail(network, tail.state_dict(), 2)
    with torch.inference_mode():
        torch.testing.assert_close(whole(small), network(small) + 0.25)
    names = set(tuned_tensors(tail.state_dict(), 2))
    assert {"body.2.rdb1.conv1.weight", "body.3.rdb3.conv5.bias", "conv_last.bias"} <= names
    assert not any(name.startswith(("conv_first", "body.0", "body.1")) for name in names)


def test_a_share_of_the_tuning_lies_between_both(network):
    untuned = cut_tail(network, 2).state_dict()
    tuned = {name: tensor + 1 for name, tensor in untuned.items()}
    quarter = interpolate(untuned, tuned, 0.25)
    for name, tensor in untuned.items():
        torch.testing.assert_close(quarter[name], tensor + 0.25)
    torch.testing.assert_close(interpolate(untuned, tuned, 1.0), tuned)


def test_pairs_repeat_and_crops_lie_over_each_other(network, photograph, pairs, tmp_path):
    make_tail_shards([photograph], tmp_path, PAIRS, lambda x: features_before(network, x, 2))
    draws = [TailSource(f).draw(CROPS, np.random.default_rng(3)) for f in (pairs, tmp_path)]
    assert torch.equal(draws[0].truth, draws[1].truth)
    assert torch.equal(draws[0].seen, draws[1].seen)
    shrunk = torch.nn.functional.avg_pool2d(draws[0].truth, 4)
    assert float((shrunk - draws[0].small).abs().mean()) < 0.06


def run(network, pairs, steps, folder):
    features = pytest.importorskip("bench.quality.features").EarlyFeatures("lite1", stages=3)
    state = new_tail_state(cut_tail(network, 2), SETTINGS, 1, DEVICE)
    stage = Stage("tail", steps, 0.9, CROPS, lambda s, b: tail_step(s, SETTINGS, features, b))
    run_stage(stage, state, TailSource(pairs), folder, SMALL)
    return state


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.network.parameters()])


def test_tuning_resumes_bit_for_bit_and_leaves_the_first_layer_alone(network, pairs, tmp_path):
    whole = run(network, pairs, 4, tmp_path / "whole")
    run(network, pairs, 2, tmp_path / "parts")
    resumed = run(network, pairs, 4, tmp_path / "parts")
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.network.conv_first.weight, network.conv_first.weight)
    assert not torch.equal(whole.network.conv_last.weight, network.conv_last.weight)


@pytest.mark.slow
def test_the_whole_program_makes_a_prescaler_that_loads(photograph, tmp_path):
    said = []
    tail = dataclasses.replace(SETTINGS, steps=2, share=0.5)
    settings = dataclasses.replace(SMALL, tail=tail)
    copies = [tmp_path / f"{name}.png" for name in "abc"]
    for copy in copies:
        copy.write_bytes(photograph.read_bytes())
    program = PrescalerProgram(
        settings, copies, tmp_path / "work", tmp_path / "weights", DEVICE, said.append
    )
    tuned = program.everything()
    base = base_network(DEVICE)
    loaded = load_prescaler(PHOTO, DEVICE, torch.float32, tmp_path / "weights").network
    assert loaded is not None
    small = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(small), tuned(small), atol=2e-3, rtol=0)
        assert float((loaded(small) - base(small)).abs().max()) > 0
    trained = torch.load(tmp_path / "work" / "cpu" / "tail-000002.average.pt", weights_only=True)
    middle = (trained["conv_last.bias"] + base.conv_last.bias) / 2
    torch.testing.assert_close(loaded.conv_last.bias, middle, atol=1e-4, rtol=0)
    digest = hashlib.sha256(
        (tmp_path / "weights" / f"{PHOTO}.safetensors").read_bytes()
    ).hexdigest()
    assert digest in said[-1]
    assert digest in (tmp_path / "weights" / "README.md").read_text()
    assert list((tmp_path / "work" / "cpu").glob("tail-*.png"))
