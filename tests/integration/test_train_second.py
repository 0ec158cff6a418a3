"""The second stage of the large prescaler: its losses, phases, resuming, the whole program."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from torch.nn import functional

from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import RRDBNet
from train import degradation, losses, photos
from train.batches import BatchSettings
from train.config import CPU, GPU, LossWeights, SecondSettings
from train.discriminator import UNetJudge
from train.pairs import PHOTO, levels
from train.program import Program
from train.runner import Stage, run_stage
from train.second import (
    SecondProgram,
    enlarge,
    exported_tensors,
    new_second_state,
    open_last,
    second_step,
    set_second_rates,
)
from train.twice import CropSource

DEVICE = torch.device("cpu")
SETTINGS = SecondSettings(
    blocks=3, side=64, steps=4, last=1, warm_up=1, judges_from=1, judges_grow=2, judge_width=4,
    batch=BatchSettings(size=2, crop=64, parts=1),
)  # fmt: skip
SMALL = dataclasses.replace(CPU, checkpoint_every=2, samples_every=1000, held_out_every=3)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return RRDBNet(blocks=3, features=8, growth=4).eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def features():
    return pytest.importorskip("bench.quality.features").EarlyFeatures("lite1", stages=3)


@pytest.fixture(scope="module")
def crops(photograph):
    pictures = [levels(photos.read(photograph))]
    return CropSource(pictures, SETTINGS.recipe_shares, factor=4, qualities=SETTINGS.qualities)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Losses.


def test_likeness_of_maps_is_lost_by_degrees_and_the_same_for_every_size_of_batch():
    truth = random(2, 8, 16, 16)
    assert losses.dists([truth], [truth]).tolist() == pytest.approx([0, 0], abs=1e-6)
    found = [
        float(losses.dists([truth + noise * random(2, 8, 16, 16, seed=1)], [truth]).mean())
        for noise in (0.1, 0.3, 1.0)
    ]
    assert found == sorted(found)
    assert found[0] > 0
    one = losses.dists([0.5 * truth[:1]], [truth[:1]])
    assert float(losses.dists([0.5 * truth], [truth])[0]) == pytest.approx(float(one))


def test_where_texture_lies_counts_less_than_in_a_loss_of_pixels(features):
    """Grain drawn anew beside a smooth picture: pixels take the smooth one, DISTS the grain."""
    grain, anew = (0.5 + 0.1 * torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(n))
                   for n in (1, 2))  # fmt: skip
    smooth = torch.full_like(grain, 0.5)
    pixels = {name: float((each - grain).abs().mean()) for name, each in
              {"anew": anew, "smooth": smooth}.items()}  # fmt: skip
    with torch.no_grad():
        goal = features(grain)
        likes = {
            name: float(losses.dists(features(each), goal))
            for name, each in {"anew": anew, "smooth": smooth}.items()
        }
    assert pixels["anew"] > 1.2 * pixels["smooth"]
    assert likes["anew"] < 0.8 * likes["smooth"]


def test_artefacts_are_where_the_result_is_worse_than_the_average_and_uneven():
    truth = random(1, 3, 32, 32)
    predicted, average = truth.clone(), truth + 0.02
    predicted[..., 4:12, 4:12] += 0.3 * random(1, 1, 8, 8, seed=2)  # an artefact
    found = losses.artefact_map(predicted, average, truth)
    assert found.shape == (1, 1, 32, 32)
    worse = (predicted - truth).abs().sum(1) >= (average - truth).abs().sum(1)
    assert float(found[:, 0][~worse].abs().max()) == 0
    assert float(found[:, 0][worse].min()) > 0
    # An average that has the artefact, too, and stronger, leaves nothing of it.
    assert float(losses.artefact_map(predicted, truth + 0.4, truth).abs().max()) == 0
    # Nor is what is amiss by the same everywhere an artefact.
    even = losses.artefact_map(truth + 0.1, truth, truth)
    assert float(even.max()) < 1e-6 < 1e-4 < float(found.max())


def test_the_loss_of_artefacts_is_nothing_for_the_truth_and_grows_with_them():
    truth, noise = random(1, 3, 32, 32), random(1, 3, 32, 32, seed=3) - 0.5
    assert float(losses.artefacts(truth, truth, truth)) == 0
    found = [float(losses.artefacts(truth + s * noise, truth, truth)) for s in (0.1, 0.2, 0.4)]
    assert 0 < 4 * found[0] < 2 * found[1] < found[2]
    predicted = (truth + 0.2 * noise).requires_grad_()
    losses.artefacts(predicted, truth, truth).sum().backward()
    # Down the gradient lies the truth: the map counts as a weight.
    assert bool(((predicted.grad * (predicted - truth).detach()) >= 0).all())


def test_the_source_holds_a_result_as_closely_as_its_truth():
    truth = random(1, 3, 16, 16)
    noisy = truth + 0.1 * random(1, 3, 16, 16, seed=4)
    for small in (truth, noisy):
        assert float(losses.source_kept(truth, small, truth)) == 0
    assert float(losses.source_kept(noisy, noisy, truth)) == 0
    found = [float(losses.source_kept(truth + off, truth, truth)) for off in (0.1, 0.2)]
    assert found == pytest.approx([0.1, 0.2], abs=1e-6)


def test_the_u_net_judges_every_pixel_and_sees_all_sizes():
    torch.manual_seed(0)
    judge = UNetJudge(4).eval()
    picture, context = random(1, 1, 40, 44), random(1, 2, 40, 44)
    picture.requires_grad_()
    verdict = judge(picture, context)
    assert verdict.shape == (1, 1, 40, 44)
    verdict[..., 20, 20].sum().backward()
    seen = picture.grad[0, 0].abs() > 0
    assert bool(seen[20, 20])
    assert int(seen.any(0).sum()) > 30


# Crops.


def test_crops_are_those_of_four_times_the_source_and_compressed_as_asked(crops, monkeypatch):
    qualities = []
    real = degradation.jpeg

    def noted(picture, quality):
        qualities.append(quality)
        return real(picture, quality)

    monkeypatch.setattr(degradation, "jpeg", noted)
    chosen = dataclasses.replace(SETTINGS.batch, size=40)
    batch, again = (crops.draw(chosen, np.random.default_rng(2)) for _ in range(2))
    assert torch.equal(batch.small, again.small)
    assert (batch.small.shape[-2:], batch.truth.shape[-2:]) == ((16, 16), (64, 64))
    assert float((functional.avg_pool2d(batch.truth, 4) - batch.small).abs().mean()) < 0.06
    assert 30 <= min(qualities) < 35
    assert max(qualities) < 95


# Blocks.


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_last_blocks_are_open_and_give_the_gradients_of_the_whole(network, blocks):
    opened = open_last(network, blocks)
    small = random(1, 3, 12, 10)
    trained = {n: p for n, p in opened.named_parameters() if p.requires_grad}
    assert not [n for n in trained if n.startswith("conv_first")]
    assert {n.split(".")[1] for n in trained if n.startswith("body.")} == {
        str(n) for n in range(3 - blocks, 3)
    }
    found = []
    for run in (opened, lambda x: enlarge(opened, x)):
        opened.zero_grad()
        made = run(small)
        made.square().mean().backward()
        found.append((made.detach(), {n: p.grad.clone() for n, p in trained.items()}))
    torch.testing.assert_close(*found)
    assert not any(p.requires_grad for p in network.parameters())


def test_a_number_of_blocks_that_there_is_not_is_refused(network):
    for blocks in (0, 4):
        with pytest.raises(ValueError, match="1 to 3"):
            open_last(network, blocks)


def test_what_was_tuned_before_is_exported_along_with_what_is_trained(network):
    opened = open_last(network, 1)
    names = set(
        exported_tensors(opened.state_dict(), opened, {"body.1.rdb1.conv1.bias": torch.ones(1)})
    )
    assert {"body.1.rdb1.conv1.bias", "body.2.rdb1.conv1.bias", "conv_last.weight"} <= names
    assert not [n for n in names if n.startswith(("conv_first", "body.0", "body.1.rdb2"))]


# Phases.


def run(network, features, source, steps, folder, settings=SETTINGS):
    state = new_second_state(network, settings, 1, DEVICE)
    logged = []

    def step(state, batch):
        found = second_step(state, settings, features, batch)
        rates = {name: each.param_groups[0]["lr"] for name, each in state.optimisers.items()}
        logged.append((found, rates))
        return found

    run_stage(Stage("second", steps, 0.9, settings.batch, step), state, source, folder, SMALL)
    return state, logged


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


ALWAYS = {"perceptual", "dists", "statistics", "texture", "energy", "flat", "source"}
AGAINST = {"adversarial", "judge", "artefacts"}


def test_training_goes_through_its_phases_and_resumes_bit_for_bit(
    network, features, crops, tmp_path
):
    whole, logged = run(network, features, crops, 4, tmp_path / "whole")
    run(network, features, crops, 2, tmp_path / "parts")
    resumed, _ = run(network, features, crops, 4, tmp_path / "parts")
    for a, b in ((whole.network, resumed.network), (whole.average, resumed.average)):
        assert torch.equal(weights(a), weights(b))
    assert torch.equal(*(weights(s.extras["judges"]) for s in (whole, resumed)))
    assert torch.equal(whole.network.conv_first.weight, network.conv_first.weight)
    assert not torch.equal(whole.network.body[0].rdb1.conv1.weight,
                           network.body[0].rdb1.conv1.weight)  # fmt: skip
    found = [set(losses_) for losses_, _ in logged]
    assert all(found_ >= ALWAYS for found_ in found)
    assert not found[0] & AGAINST
    assert all(found_ >= AGAINST for found_ in found[1:])
    assert all(bool(v.isfinite()) for losses_, _ in logged for v in losses_.values())
    assert [rates["network"] / SETTINGS.learning_rate for _, rates in logged] == pytest.approx(
        [1, 1, 1, 0.1]
    )


def test_the_planned_run_has_its_phases_at_its_steps(network):
    planned = dataclasses.replace(SecondSettings(), blocks=3, judge_width=4)
    assert (planned.steps, planned.judges_from, planned.last, planned.ema) == (
        2000,
        300,
        400,
        0.999,
    )
    assert (planned.batch.size, planned.batch.crop) == (48, 160)
    assert GPU.second == SecondSettings()
    state = new_second_state(network, planned, 1, DEVICE)
    found = {}
    for step in (0, 49, 300, 1599, 1600, 1999):
        state.step = step
        set_second_rates(state, planned)
        found[step] = [
            state.optimisers[name].param_groups[0]["lr"] / rate
            for name, rate in (
                ("network", planned.learning_rate), ("judges", planned.discriminator_rate),
            )
        ]  # fmt: skip
    expected = {0: 0.02, 49: 1, 300: 1, 1599: 1, 1600: 0.1, 1999: 0.1}
    assert found == {step: pytest.approx([share] * 2) for step, share in expected.items()}


def test_one_batch_is_overfitted(network, features, crops):
    settings = dataclasses.replace(
        SETTINGS, steps=60, last=0, learning_rate=5e-3, judges_from=999,
        weights=LossWeights(source=1.0, perceptual=4.0, dists=2.0),
    )  # fmt: skip
    state = new_second_state(network, settings, 1, DEVICE)
    batch = crops.draw(settings.batch, np.random.default_rng(1))
    found = []
    for _ in range(settings.steps):
        found.append(second_step(state, settings, features, batch))
        state.step += 1
    first, last = ({name: float(each[name]) for name in ALWAYS} for each in (found[0], found[-1]))
    assert first["source"] > 4
    assert last["source"] < 0.5
    assert last["dists"] < 0.45 < 0.7 < first["dists"]


# The whole program.


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_whole_run_has_this_stage_only_where_there_is_a_card(device, monkeypatch, tmp_path):
    ran = []
    program = Program(
        SMALL, (tmp_path,), tmp_path, tmp_path, tmp_path, torch.device(device), ran.append
    )
    monkeypatch.setattr(Program, "_train", lambda _self, kind: ran.append(kind.__name__))

    def stop(_self):
        raise InterruptedError

    monkeypatch.setattr(Program, "make_pairs", stop)
    with pytest.raises(InterruptedError):
        program.everything()
    assert ("SecondProgram" in ran) == (device == "cuda")
    assert ran[0] == "PrescalerProgram"
    if device == "cuda":
        assert ran.index("SecondProgram") < ran.index("RangesProgram")


@pytest.mark.slow
def test_the_whole_program_makes_a_prescaler_that_loads(photograph, tmp_path):
    said = []
    chosen = dataclasses.replace(
        SETTINGS, blocks=9, steps=2, batch=dataclasses.replace(SETTINGS.batch, crop=32)
    )
    copies = [tmp_path / f"{name}.png" for name in "abc"]
    for copy in copies:
        copy.write_bytes(photograph.read_bytes())
    folder = tmp_path / "weights"
    made = SecondProgram(
        dataclasses.replace(SMALL, second=chosen), copies, tmp_path / "work", folder, DEVICE,
        said.append,
    ).everything()  # fmt: skip
    before = load_prescaler(PHOTO, DEVICE, torch.float32)
    loaded = load_prescaler(PHOTO, DEVICE, torch.float32, folder)
    assert before.network is not None
    assert loaded.network is not None
    small = random(1, 3, 16, 16)
    with torch.inference_mode():
        off = (loaded.network(small) - made(small)).abs()
        moved = (before.network(small) - made(small)).abs()
    # Noise is made of fine contrasts, where the rounding to fp16 shows the most.
    assert float(off.max()) < 0.02
    assert float(off.mean()) < 1e-3 < 1e-2 < float(moved.mean())
    assert loaded.line.share == before.line.share
    names = loaded.line.tuned.keys()
    assert names > before.line.tuned.keys()
    assert "body.14.rdb1.conv1.weight" in names - before.line.tuned.keys()
    assert not any(name.startswith(("conv_first", "body.13.")) for name in names)
    digest = hashlib.sha256((folder / f"{PHOTO}.safetensors").read_bytes()).hexdigest()
    assert digest in said[-1]
    card = (folder / "README.md").read_text()
    assert digest in card
    assert "No file that tegula ships was made by this stage" in card
    assert list((tmp_path / "work" / "cpu").glob("second-*.png"))
