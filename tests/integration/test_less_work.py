"""Less work at equal quality: every technique counted, and held against the full computation."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from support import of_arrays, options, photograph, refine_canvas, refine_redraw

from tegula.errors import NumericalError
from tegula.models import BundleSettings
from tegula.models.bundle import ControlScale, SplitDenoiser
from tegula.models.load import load_bundle
from tegula.pipeline import adjust
from tegula.pipeline.refine import RefineJob
from tegula.pipeline.steps import Guidance, Interval, Rows, key_steps, rows_of
from tests.tiny.networks import tiny_bundle

flatness = of_arrays(adjust.flatness)


SIZE = (150, 110)
"""Three by two windows of 64 px."""

REDRAW = {"tile_width": 64, "tile_height": 64, "tile_padding": 16, "tile_blur": 3}
REFINERS = [refine_canvas, refine_redraw]


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def counted(bundle):
    """Return a bundle whose networks count the rows that they see, and the counts."""
    rows, calls = Counter(), Counter()

    def hook(name):
        def count(_module, args, kwargs, _output):
            first = args[0] if args else kwargs["hidden_states"]
            rows[name] += len(first)
            calls[name] += 1

        return count

    own = tiny_bundle()
    networks = {
        "encoder": own.denoiser.unet.conv_in,
        "decoder": own.denoiser.unet.conv_out,
        "controlnet": own.denoiser.controlnet,
        "hint": own.denoiser.hint_encoder,
    }
    for name, network in networks.items():
        network.register_forward_hook(hook(name), with_kwargs=True)
    return own, rows, calls


def refine(bundle, how=refine_canvas, strength=None, size=SIZE, **changes):
    picture = photograph(*size)
    chosen = options(
        width=size[0], height=size[1], **REDRAW, prompt="a red cat",
        negative_prompt="blurry", **changes,
    )  # fmt: skip
    return how(RefineJob(bundle, picture, picture, chosen, strength=strength))


def psnr(picture, full):
    return -10 * np.log10(np.mean((picture - full) ** 2))


def guidance(scale=5.0, start=0.0, end=1.0, control=(0.0, 1.0)):
    return Guidance(scale, Interval(start, end), ControlScale(1.0), Interval(*control))


# Guidance on an interval.


@pytest.mark.parametrize(("start", "end", "guided"), [(0, 1, 12), (0, 0.5, 6), (0.25, 0.75, 6)])
def test_guidance_is_evaluated_in_its_interval_alone(bundle, start, end, guided):
    own, rows, _ = counted(bundle)
    refine(own, creativity=1.0, steps=12, guidance_scale=4.0, guidance_start=start,
           guidance_end=end, window_batch=4)  # fmt: skip
    assert rows["encoder"] == rows["decoder"] == rows["controlnet"] == 6 * (12 + guided)


def test_guidance_on_most_steps_stays_near_guidance_on_all(bundle):
    full, part, none = (
        refine(bundle, creativity=0.6, steps=20, guidance_scale=scale, guidance_end=end)
        for scale, end in ((2.0, 1.0), (2.0, 0.75), (1.0, 1.0))
    )
    assert psnr(part, full) > psnr(none, full) + 6


# The embedding of the control image.


def test_the_control_image_is_embedded_once_whatever_the_steps(bundle):
    own, rows, calls = counted(bundle)
    refine(own, creativity=1.0, steps=6, guidance_scale=4.0, window_batch=3)
    assert (rows["hint"], calls["hint"]) == (6, 2)
    assert rows["controlnet"] == 6 * 6 * 2


def test_an_embedding_made_once_is_bit_for_bit_one_made_at_every_step(bundle):
    denoiser = bundle.denoiser
    steps = []

    class Again:
        def embed_control(self, control):
            self.control = control
            return denoiser.embed_control(control)

        def __call__(self, batch):
            steps.append(1)
            embedded = denoiser.embed_control(self.control)
            return denoiser(dataclasses.replace(batch, control=embedded))

        def to_dtype(self, dtype):
            return self

    changes = {"size": (64, 64), "steps": 4, "creativity": 1.0}
    again = refine(dataclasses.replace(bundle, denoiser=Again()), **changes)
    assert np.array_equal(refine(bundle, **changes), again)
    assert len(steps) == 4


# Features of the encoder and the ControlNet, reused.


def test_key_steps_are_the_first_two_the_last_and_every_nth_between():
    kept = [key_steps(guidance(), 12, every) for every in (1, 2, 3)]
    assert [[level for level in range(12) if keys[level]] for keys in kept] == [
        list(range(12)),
        [0, 1, 3, 5, 7, 9, 11],
        [0, 1, 4, 7, 10, 11],
    ]
    assert key_steps(guidance(), 1, 4) == (True,)


def test_a_level_where_guidance_sets_in_or_control_is_switched_is_a_key_level():
    late = key_steps(guidance(start=0.5), 12, 10)
    assert [level for level in range(12) if late[level]] == [0, 1, 6, 11]
    ends = key_steps(guidance(end=0.5), 12, 10)
    assert [level for level in range(12) if ends[level]] == [0, 1, 11]
    released = key_steps(guidance(control=(0.0, 0.5)), 12, 10)
    assert [level for level in range(12) if released[level]] == [0, 1, 6, 11]


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("how", REFINERS)
def test_encoder_and_controlnet_run_at_key_steps_alone(bundle, every, how):
    own, rows, _ = counted(bundle)
    changes = {"creativity": 1.0, "steps": 12, "guidance_scale": 4.0, "guidance_end": 0.5}
    refine(own, how, creativity=1.0, steps=1, guidance_scale=1.0)
    windows = rows["decoder"]
    rows.clear()
    refine(own, how, feature_reuse=every, **changes)
    expected = rows_of(guidance(4.0, end=0.5), 12, every)
    assert rows["encoder"] == rows["controlnet"] == windows * expected.encoder
    assert rows["decoder"] == windows * expected.decoder == windows * 18


def test_rows_are_counted_for_each_half():
    assert rows_of(guidance(), 12, 1) == Rows(24, 24)
    assert rows_of(guidance(), 12, 2) == Rows(14, 24)
    assert rows_of(guidance(1.0), 12, 3) == Rows(6, 12)


@pytest.mark.parametrize("guess", [False, True])
def test_the_two_halves_are_the_denoiser_bit_for_bit(bundle, guess):
    denoiser, batches = bundle.denoiser, []

    class Halves:
        def __getattr__(self, name):
            return getattr(denoiser, name)

        def __call__(self, batch):
            batches.append(batch)
            return denoiser.decode(denoiser.encode(batch), batch.timestep, batch.text)

    changes = {"guidance_scale": 4.0, "guess_mode": guess, "control_end": 0.5, "steps": 8}
    halved = refine(dataclasses.replace(bundle, denoiser=Halves()), **changes)
    assert np.array_equal(halved, refine(bundle, **changes))
    assert batches


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m-karras", "euler-ancestral"])
@pytest.mark.parametrize("changes", [
    {"guidance_scale": 1.0},
    {"guidance_scale": 4.0},
    {"guidance_scale": 4.0, "guess_mode": True},
])  # fmt: skip
def test_reused_features_stay_near_the_full_computation(bundle, scheduler, changes):
    changes = {"creativity": 0.6, "steps": 20, "scheduler": scheduler, **changes}
    full, reused = (refine(bundle, feature_reuse=each, **changes) for each in (1, 2))
    fewer = refine(bundle, **{**changes, "steps": 12})
    assert psnr(reused, full) > max(45, psnr(fewer, full) + 10)
    assert not np.array_equal(reused, full)


@pytest.mark.parametrize("how", REFINERS)
@pytest.mark.parametrize("changes", [
    {"guidance_scale": 4.0, "guidance_end": 0.6},
    {"guidance_scale": 4.0, "guess_mode": True, "control_end": 0.5},
])  # fmt: skip
def test_reuse_does_not_depend_on_the_window_batch(bundle, how, changes):
    results = [
        refine(bundle, how, creativity=1.0, steps=8, feature_reuse=3, window_batch=size, **changes)
        for size in (1, 4)
    ]
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)


def test_a_window_that_wakes_between_key_steps_runs_whole(bundle):
    own, rows, _ = counted(bundle)
    strength = np.full((128, 192), np.float32(1))
    strength[:, 64:] = 0.7
    refine(own, strength=strength, size=(192, 128), creativity=1.0, steps=10, feature_reuse=4,
           overlap=0.0)  # fmt: skip
    from_the_start, from_level_3 = 2, 4
    assert rows["decoder"] == 10 * from_the_start + 7 * from_level_3
    assert rows["encoder"] == len([0, 1, 5, 9]) * from_the_start + len([3, 5, 9]) * from_level_3


def test_reuse_with_a_strength_map_does_not_depend_on_the_batch(bundle):
    strength = np.linspace(0, 1, SIZE[0], dtype=np.float32)[None].repeat(SIZE[1], 0)
    results = [
        refine(bundle, strength=strength, creativity=1.0, steps=8, feature_reuse=3,
               guidance_scale=3.0, window_batch=size)
        for size in (1, 5)
    ]  # fmt: skip
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)


def test_half_precision_that_fails_is_run_again_whole_in_fp32(bundle):
    class Spoiled(type(bundle.denoiser)):  # type: ignore[misc]
        def decode(self, features, timestep, text):
            return super().decode(features, timestep, text) * float("nan")

    inner = bundle.denoiser
    parts = (inner.unet, inner.controlnet, inner.hint_encoder)
    spoiled = Spoiled(*parts)
    changes = {"creativity": 1.0, "steps": 6, "feature_reuse": 2}
    object.__setattr__(spoiled, "to_dtype", lambda dtype: inner)
    rescued = refine(dataclasses.replace(bundle, denoiser=spoiled, dtype=torch.bfloat16), **changes)
    np.testing.assert_array_equal(rescued, refine(bundle, **changes))
    with pytest.raises(NumericalError):
        refine(dataclasses.replace(bundle, denoiser=spoiled), **changes)


def test_mini_which_has_no_halves_ignores_reuse():
    bundle = load_bundle(BundleSettings())
    assert not isinstance(bundle.denoiser, SplitDenoiser)
    changes = {"size": (64, 64), "creativity": 0.5, "steps": 8, "window": 64}
    one, other = (refine(bundle, feature_reuse=each, **changes) for each in (1, 4))
    assert np.array_equal(one, other)


# Guidance of mini, where its interval means something.


def test_mini_keeps_its_picture_when_guidance_ends_early():
    bundle = load_bundle(BundleSettings())
    # At so little resemblance nearly the whole prediction is taken, and guidance shows.
    changes = {"size": (256, 192), "window": 128, "creativity": 0.5, "steps": 8,
               "scheduler": "dpm++2m", "sigmas": "sgm-uniform", "resemblance": 0.1}  # fmt: skip
    full, part, none = (
        refine(bundle, guidance_scale=scale, guidance_end=end, **changes)
        for scale, end in ((2.0, 1.0), (2.0, 0.5), (1.0, 1.0))
    )
    assert psnr(part, full) > max(34, psnr(none, full) + 1)


# Fewer steps for flat windows.


def grainy_sky():
    rng = np.random.default_rng(0)
    picture = np.full((128, 256, 3), 0.6, np.float32)
    picture += rng.normal(0, 0.02, (128, 256, 1)).astype(np.float32)
    picture[:, 192:] = photograph(64, 128)
    return picture


def test_flat_windows_take_fewer_evaluations_and_keep_their_grain(bundle):
    own, rows, _ = counted(bundle)
    sky = grainy_sky()
    chosen = options(width=256, height=128, creativity=0.5, steps=16, overlap=0.0)
    strength = 1 - 0.75 * flatness(sky)
    results = []
    for each in (None, strength, 1 - flatness(sky)):
        before = rows["decoder"]
        results.append(
            (
                refine_canvas(RefineJob(own, sky, sky, chosen, strength=each)),
                rows["decoder"] - before,
            )
        )
    (_, all_rows), (_, fewer_rows), (still, least_rows) = results
    assert all_rows > fewer_rows > least_rows
    flat = (slice(8, 120), slice(8, 120))
    np.testing.assert_allclose(still[flat], sky[flat], atol=0.02)
    assert still[flat].std() == pytest.approx(sky[flat].std(), rel=0.05)
