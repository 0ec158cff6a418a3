"""The small prescalers of our own: beginning, pairs, losses, resuming, the whole programs."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional

from bench.quality.measures import high_bands
from tegula.models.prescalers import WEIGHTS, find_packaged
from tegula.models.prescalers.load import load_prescaler, read_own, two_heads
from tegula.models.prescalers.networks import SRVGGNetCompact
from train import distil, line_pairs, photos
from train.batches import BatchSettings
from train.config import CPU, DistilSettings, LineSettings, LossWeights, TwiceSettings
from train.degradation import RECIPES, soften
from train.distil import (
    DistilProgram,
    begin_pupil,
    distil_step,
    new_distil_state,
)
from train.distil_pairs import (
    DistilPairSettings,
    DistilSource,
    make_distil_shards,
)
from train.drawings import draw
from train.line import LineProgram, edges, extremes, line_step, within_range
from train.line_pairs import LinePairSettings, LineSource, damage, make_line_shards, shrink
from train.pairs import COMPRESSED, FOUR, LINE, SWIFT, TWICE, levels, unit
from train.runner import Stage, run_stage
from train.sketch import NOT_TRAINED_ON, find_faces
from train.twice import (
    CompressedProgram,
    CropSource,
    FourProgram,
    SharpenedProgram,
    TwiceProgram,
    twice_step,
)

DEVICE = torch.device("cpu")
CROPS = BatchSettings(size=2, crop=96, parts=1)
PAIRS = DistilPairSettings(side=160, count=3, shard=2)
SETTINGS = DistilSettings(
    convolutions=5, pairs=PAIRS, steps=4, batch=CROPS, judges_from=1, judges_grow=2, warm_up=1
)
DRAWN = LinePairSettings(side=160, count=4, shard=3, photographs=0.25, held_out=2)
LINES = LineSettings(
    convolutions=5, pairs=DRAWN, steps=4, batch=CROPS, judges_from=1, judges_grow=2, warm_up=1
)
TWICES = TwiceSettings(side=96, steps=4, batch=CROPS, judges_from=1, judges_grow=2, warm_up=1)
FOURS = dataclasses.replace(TWICES, weights=CPU.four.weights)
SMALL = dataclasses.replace(
    CPU,
    distil=SETTINGS,
    twice=TWICES,
    line=LINES,
    checkpoint_every=2,
    samples_every=1000,
    held_out_every=3,
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


@pytest.fixture(scope="module")
def faces():
    try:
        return find_faces()
    except SystemExit:
        pytest.skip("no fonts")


@pytest.fixture(scope="module")
def drawn(photograph, faces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    make_line_shards([photograph], folder, DRAWN, faces)
    return folder


@pytest.fixture(scope="module")
def crops(photograph):
    return CropSource([levels(photos.read(photograph))], TWICES.recipe_shares)


@pytest.fixture(scope="module")
def quarters(photograph):
    return CropSource([levels(photos.read(photograph))], FOURS.recipe_shares, factor=4)


def _net_of(pupil, settings):
    if not isinstance(settings, TwiceSettings):
        return pupil
    return pupil.four if settings is FOURS else pupil.two


def run(base, source, step_of, steps, folder, settings):
    features = pytest.importorskip("bench.quality.features").EarlyFeatures("lite1", stages=3)
    pupil = begin_pupil(base, 5, 1)
    network = _net_of(pupil, settings)
    state = new_distil_state(network, settings, 1, DEVICE)
    logged = []

    def step(state, batch):
        logged.append(step_of(state, settings, features, batch))
        return logged[-1]

    stage = Stage("distil", steps, 0.9, settings.batch, step)
    run_stage(stage, state, source, folder, SMALL)
    return state, logged


@pytest.mark.parametrize("kind", ["distil", "twice", "four", "line"])
def test_training_resumes_bit_for_bit(base, pairs, crops, quarters, drawn, kind, tmp_path):
    source, step, settings = {
        "distil": (DistilSource(pairs), distil_step, SETTINGS),
        "twice": (crops, twice_step, TWICES),
        "four": (quarters, twice_step, FOURS),
        "line": (LineSource(drawn), line_step, LINES),
    }[kind]
    whole, logged = run(base, source, step, 4, tmp_path / "whole", settings)
    run(base, source, step, 2, tmp_path / "parts", settings)
    resumed, _ = run(base, source, step, 4, tmp_path / "parts", settings)
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    if kind in ("distil", "line"):
        assert whole.network.two.body[3] is whole.network.four.body[3]
    losses = {
        "distil": {"taught", "statistics", "flat"},
        "twice": {"pixel", "edges", "statistics", "flat"},
        "four": {"pixel", "edges", "statistics", "flat", "grid", "artefacts"},
        "line": {"edges", "extremes", "energy"},
    }
    assert "adversarial" not in logged[0]
    assert {"adversarial", "judge", "perceptual"} | losses[kind] <= logged[1].keys()


def learnt(base, source, step, settings, folder, loss):
    """Return a loss at the first of a few large steps, and its mean over the last four."""
    _, logged = run(base, source, step, settings.steps, folder, settings)
    values = [float(losses[loss]) for losses in logged]
    return values[0], sum(values[-4:]) / 4


QUICK = {
    "steps": 24, "learning_rate": 4e-3, "judges_from": 999, "batch": BatchSettings(size=2, crop=64)
}  # fmt: skip


def test_a_pupil_learns_what_the_teacher_does(base, photograph, tmp_path):
    """The teacher here enlarges by bicubic curves, which a tiny net soon comes near."""
    make_distil_shards([photograph], tmp_path, PAIRS, TEACHERS)
    weights = LossWeights(taught=4.0, taught_features=3.0)
    settings = dataclasses.replace(SETTINGS, weights=weights, **QUICK)
    source = DistilSource(tmp_path)
    first, last = learnt(base, source, distil_step, settings, tmp_path / "run", "taught")
    assert first > 0.8
    assert last < 0.4


def test_crops_for_2x_lie_over_each_other_and_repeat(photograph):
    source = CropSource([levels(photos.read(photograph))], (1.0, 0.0, 0.0))
    settings = BatchSettings(size=4, crop=64)
    batch, again = (source.draw(settings, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(batch.small, again.small)
    assert (batch.small.shape[-2:], batch.truth.shape[-2:]) == ((32, 32), (64, 64))
    # Of the four, one or two were shrunk by cubic curves, which keep more than the mean does.
    assert float((functional.avg_pool2d(batch.truth, 2) - batch.small).abs().mean()) < 0.02


def test_soft_crops_are_sharpened_by_what_is_measured_on_them(photograph):
    pictures = [levels(photos.read(photograph))]
    sources = [CropSource(pictures, (1.0, 0.0, 0.0), sharpened) for sharpened in (1.0, 0.0)]
    settings = BatchSettings(size=12, crop=64)
    batch, plain = (source.draw(settings, np.random.default_rng(5)) for source in sources)
    assert torch.equal(batch.small, sources[0].draw(settings, np.random.default_rng(5)).small)
    assert (batch.small.shape[-2:], batch.truth.shape[-2:]) == ((32, 32), (64, 64))
    # Means over areas keep none of the softness that sharpening left, and noise is on half of them.
    off, usual = (
        float((functional.avg_pool2d(each.truth, 2) - each.small).abs().mean())
        for each in (batch, plain)
    )
    assert usual < off < 0.03


def test_soft_pictures_are_jpeg_of_the_quality_that_is_asked_for(photograph):
    truth = unit(levels(photos.read(photograph)))[:192, :192]
    losses = []
    for quality in (40, 70, 97):
        rngs = np.random.default_rng(5), np.random.default_rng(5)
        found = [soften(truth, 2, rng, (quality, quality + 1)) for rng in rngs]
        assert np.array_equal(found[0][0], found[1][0])
        plain, blur = soften(truth, 2, np.random.default_rng(5), (100, 101))
        assert blur == found[0][1]
        losses.append(float(np.abs(found[0][0] - plain).mean()) * 255)
    assert losses[0] > 1.2 * losses[1] > 1.2 * 1.5 * losses[2] > 0


def test_softening_gives_whole_levels_and_says_the_blur():
    y, x = np.mgrid[:128, :128]
    disk = np.repeat((np.hypot(x - 64, y - 50) < 30).astype(np.float32)[..., None], 3, 2)
    softest = []
    for seed in range(24):
        small, blur = soften(disk, 2, np.random.default_rng(seed))
        again, _ = soften(disk, 2, np.random.default_rng(seed))
        assert np.array_equal(small, again)
        assert np.allclose(small * 255, np.rint(small * 255), atol=1e-4)
        assert 0 <= blur <= 0.7
        softest.append((blur, float(np.abs(np.diff(small.mean(2), axis=0)).max())))
    # The more it was blurred, the less steep its edge is.
    blurs, steps = zip(*softest, strict=True)
    assert np.corrcoef(blurs, steps)[0, 1] < -0.6


class OneBatch:
    """Always the same pictures."""

    def __init__(self, batch):
        self.batch = batch

    def draw(self, _settings, _rng):
        return self.batch


def test_a_net_for_2x_learns_its_originals(base, crops, tmp_path):
    settings = dataclasses.replace(TWICES, weights=LossWeights(pixel=4.0), **QUICK)
    batch = OneBatch(crops.draw(settings.batch, np.random.default_rng(4)))
    first, last = learnt(base, batch, twice_step, settings, tmp_path, "pixel")
    assert first > 0.38
    assert last < 0.3


def test_a_pupil_learns_to_draw_letters(base, faces, tmp_path):
    truth = torch.from_numpy(unit(draw(16, np.random.default_rng(3), faces))).permute(2, 0, 1)[None]
    letters = OneBatch(line_pairs.LineBatch(functional.avg_pool2d(truth, 4), truth))
    quick = {**QUICK, "steps": 60, "learning_rate": 1e-2}
    settings = dataclasses.replace(LINES, weights=LossWeights(pixel=1.0, extremes=0.3), **quick)
    first, last = learnt(base, letters, line_step, settings, tmp_path, "pixel")
    # How much ink there is depends on the fonts of the machine.
    assert first > 1.5
    assert last < 0.8 * first


def test_drawings_repeat_and_use_no_font_of_the_bench(faces):
    assert not [face.path for face in faces if face.path.endswith(NOT_TRAINED_ON)]
    fonts = pytest.importorskip("bench.quality.drawings")._FONTS
    assert set(fonts.values()) <= set(NOT_TRAINED_ON)
    one, two, other = (draw(24, np.random.default_rng(seed), faces) for seed in (3, 3, 4))
    assert one.shape == (96, 96, 3)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_small_pictures_lie_under_their_truths_whatever_shrank_them():
    y, x = np.mgrid[:128, :128]
    truth = np.repeat(np.uint8(np.hypot(x - 64, y - 50) < 30)[..., None] * 255, 3, 2)
    goal = functional.avg_pool2d(torch.from_numpy(unit(truth)).permute(2, 0, 1), 4).permute(1, 2, 0)
    for seed in range(24):
        rng = np.random.default_rng(seed)
        small = damage(shrink(truth, 4, rng), rng)
        assert small.dtype == np.uint8
        assert np.abs(unit(small) - goal.numpy()).mean() < 0.035


def test_crops_of_drawings_lie_over_each_other_and_repeat(drawn):
    source = LineSource(drawn)
    batch, again = (source.draw(CROPS, np.random.default_rng(4)) for _ in range(2))
    assert torch.equal(batch.small, again.small)
    assert batch.truth.shape[-1] == 4 * batch.small.shape[-1] == 96
    assert float((functional.avg_pool2d(batch.truth, 4) - batch.small).abs().mean()) < 0.06
    torch.testing.assert_close(batch.twice().truth, functional.avg_pool2d(batch.truth, 2))


def test_white_and_black_have_to_be_pure_and_may_be_more_than_that():
    truth = torch.zeros(1, 3, 16, 16)
    truth[..., 8:] = 1
    beyond = torch.where(truth > 0.5, 1.2, -0.3)
    assert float(within_range(beyond, truth).abs().max()) == 0
    assert float(extremes(beyond, truth)) == 0
    hazy = torch.where(truth > 0.5, 1 - 4 / 255, 4 / 255)
    # Half a departure counts half, wherever no edge is near.
    assert float(extremes(hazy, truth)) == pytest.approx(0.5 * 14 / 16, abs=0.01)
    assert float(extremes(truth * 0.5 + 0.25, truth)) == pytest.approx(14 / 16, abs=0.01)
    assert float(edges(truth, truth)) == 0
    soft = functional.avg_pool2d(functional.pad(truth, (2, 2, 0, 0), "replicate"), (1, 5), 1)
    assert float(edges(soft, truth)) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "name"),
    [
        (DistilProgram, SWIFT),
        (FourProgram, FOUR),
        (TwiceProgram, TWICE),
        (SharpenedProgram, TWICE),
        (CompressedProgram, COMPRESSED),
        (LineProgram, LINE),
    ],
)
def test_the_whole_program_makes_a_prescaler_that_loads(photograph, faces, program, name, tmp_path):
    said = []
    # Smaller pictures, since whole nets teach and judge here.
    quick = {"steps": 2, "batch": dataclasses.replace(CROPS, crop=32)}
    pairs, drawn = (dataclasses.replace(each, side=96) for each in (PAIRS, DRAWN))
    settings = dataclasses.replace(
        SMALL,
        distil=dataclasses.replace(SETTINGS, convolutions=32, pairs=pairs, **quick),
        four=dataclasses.replace(TWICES, side=64, **quick),
        twice=dataclasses.replace(TWICES, side=64, **quick),
        sharpened=dataclasses.replace(TWICES, side=64, sharpened=0.5, **quick),
        compressed=dataclasses.replace(TWICES, side=64, sharpened=1.0, qualities=(70, 99), **quick),
        line=dataclasses.replace(LINES, convolutions=16, pairs=drawn, **quick),
    )
    copies = [tmp_path / f"{letter}.png" for letter in "abc"]
    for copy in copies:
        copy.write_bytes(photograph.read_bytes())
    weights = tmp_path / "weights"
    made = program(settings, copies, tmp_path / "work", weights, DEVICE, said.append).everything()
    digest = hashlib.sha256((weights / f"{name}.safetensors").read_bytes()).hexdigest()
    assert digest in said[-1]
    assert digest in (weights / f"{name}.md").read_text()
    # What a program does not make is the package's.
    for packaged in WEIGHTS.glob("tegula-swift*"):
        if not (weights / packaged.name).exists():
            shutil.copy(packaged, weights)
    loaded = load_prescaler(
        SWIFT if name in (FOUR, TWICE) else name, DEVICE, torch.float32, weights
    )
    small = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(tensor.half())  # as the file keeps it
        if name in (TWICE, COMPRESSED):
            nets = [(loaded.smaller, made(small))]
        elif name == FOUR:
            nets = [(loaded, made(small))]
        elif name == SWIFT:
            # What is run of it was trained on since.
            heads = two_heads(find_packaged(SWIFT), read_own(SWIFT, weights)[0])
            for head, expected in zip(heads, made(small), strict=True):
                torch.testing.assert_close(head(small), expected, atol=1e-4, rtol=0)
            nets = []
        else:
            nets = [(loaded, made(small)[0]), (loaded.smaller, made(small)[1])]
        for prescaler, expected in nets:
            assert prescaler is not None
            assert prescaler.network is not None
            found = prescaler.network(small)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
