"""What canvas mode promises whatever the model: no seams, no dependence on batches."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from support import options, photograph, refine_canvas

from tegula.errors import CancelledError, NumericalError, OptionError, OutOfMemoryError
from tegula.models.bundle import Bundle, ControlImage
from tegula.pipeline import autoencoder
from tegula.pipeline.autoencoder import AutoencoderTiling
from tegula.pipeline.refine import RefineJob
from tegula.progress import Cancel, StageProgress
from tests.tiny.networks import tiny_bundle

WIDE = (150, 110)
"""Three by two windows of 64 px, with sides that 8 does not divide."""


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


class PixelwiseDenoiser:
    """Treats every latent pixel alike, so windows cannot matter."""

    def embed_control(self, control):
        return control.prescaled.new_zeros((len(control.prescaled), 0))

    def __call__(self, batch):
        return torch.tanh(batch.latents) * 0.3 + 0.01

    def to_dtype(self, dtype):
        return self


class FailingDenoiser:
    """Passes a denoiser's answers on, after ``spoil`` had its way with them."""

    def __init__(self, inner, spoil):
        self.inner, self.spoil, self.calls = inner, spoil, []

    def embed_control(self, control):
        return self.inner.embed_control(control)

    def __call__(self, batch):
        self.calls.append(len(batch.latents))
        return self.spoil(self.inner(batch), len(batch.latents))

    def to_dtype(self, dtype):
        return self.inner


def refine(bundle: Bundle, picture=None, **changes):
    picture = photograph(*WIDE) if picture is None else picture
    height, width = picture.shape[:2]
    chosen = options(width=width, height=height, **changes)
    return refine_canvas(RefineJob(bundle, picture, picture, chosen))


def with_denoiser(bundle, denoiser, dtype=torch.float32):
    return dataclasses.replace(bundle, denoiser=denoiser, dtype=dtype)


@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral", "dpm++2m-sde-karras", "lcm"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_result_does_not_depend_on_the_window_batch(bundle, scheduler, guidance_scale):
    results = [
        refine(bundle, scheduler=scheduler, guidance_scale=guidance_scale, window_batch=size)
        for size in (1, 2, 5)
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5)


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(bundle):
    first, again, other = (
        refine(bundle, seed=seed, scheduler="euler-ancestral") for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("overlap", [0.0, 0.125, 0.5])
@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral", "dpm++2m", "heun"])
def test_a_denoiser_that_treats_pixels_alike_leaves_no_trace_of_windows(bundle, overlap, scheduler):
    same = with_denoiser(bundle, PixelwiseDenoiser())
    picture = photograph(160, 160)
    tiled = refine(same, picture, overlap=overlap, scheduler=scheduler, window=64)
    whole = refine(same, picture, scheduler=scheduler, window=160)
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    assert np.abs(whole - picture).max() > 0.05


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (64, 64), (65, 40), (129, 131)])
def test_any_size_comes_back_at_its_own_size(bundle, size):
    picture = photograph(*size)
    assert refine(bundle, picture).shape == picture.shape


def test_the_prompt_the_negative_prompt_and_control_all_matter(bundle):
    base = {"guidance_scale": 4.0, "prompt": "cat", "negative_prompt": "blurry", "resemblance": 1.0}
    first = refine(bundle, **base)
    for change in (
        {"prompt": "dog"},
        {"negative_prompt": "red"},
        {"resemblance": 0.3},
        {"guidance_scale": 7.0},
        {"guess_mode": True},
        {"control_end": 0.5},
        {"guidance_end": 0.5},
        {"creativity": 0.9},
    ):
        assert np.abs(refine(bundle, **(base | change)) - first).max() > 1e-4, change


def test_progress_counts_every_window_of_every_level_once(bundle):
    seen = []
    picture = photograph(*WIDE)
    chosen = options(width=WIDE[0], height=WIDE[1], window_batch=4)
    refine_canvas(
        RefineJob(bundle, picture, picture, chosen),
        StageProgress(lambda *units: seen.append(units)),
    )
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_cancel_stops_before_the_next_batch(bundle):
    counting = FailingDenoiser(bundle.denoiser, lambda p, n: p)
    stops = iter([False, False, True])
    picture = photograph(*WIDE)
    with pytest.raises(CancelledError):
        refine_canvas(
            RefineJob(
                with_denoiser(bundle, counting),
                picture,
                picture,
                options(width=WIDE[0], height=WIDE[1], window_batch=1),
            ),
            StageProgress(cancel=Cancel(lambda: next(stops))),
        )
    assert counting.calls == [1, 1]


def test_nan_in_half_precision_is_run_again_in_fp32(bundle):
    spoiled = FailingDenoiser(bundle.denoiser, lambda p, n: p * float("nan"))
    rescued = refine(with_denoiser(bundle, spoiled, torch.bfloat16))
    np.testing.assert_array_equal(rescued, refine(bundle))
    assert spoiled.calls


def test_nan_in_fp32_is_an_error_and_never_a_black_tile(bundle):
    spoiled = FailingDenoiser(bundle.denoiser, lambda p, n: p * float("nan"))
    with pytest.raises(NumericalError, match="fp32"):
        refine(with_denoiser(bundle, spoiled))


def fail_above(limit):
    def spoil(prediction, rows):
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prediction

    return spoil


def test_out_of_memory_halves_the_batch_and_keeps_the_result(bundle):
    tight = FailingDenoiser(bundle.denoiser, fail_above(2))
    result = refine(with_denoiser(bundle, tight), window_batch=6)
    np.testing.assert_allclose(result, refine(bundle), atol=1e-5)
    assert tight.calls[:3] == [6, 3, 1]
    assert max(tight.calls[3:]) <= 2


class Tight(torch.Tensor):
    """Predictions of which one product does not fit into memory, as on a nearly full GPU."""

    products = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("mul", "__mul__"):
            Tight.products += 1
            if Tight.products == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_window_is_added_once_though_memory_runs_out_while_adding(bundle):
    Tight.products = 0
    tight = FailingDenoiser(bundle.denoiser, lambda p, n: p.as_subclass(Tight))
    result = refine(with_denoiser(bundle, tight), window_batch=6)
    assert tight.calls[:2] == [6, 3]
    np.testing.assert_allclose(result, refine(bundle), atol=1e-5)


def test_memory_is_given_back_when_nothing_of_the_failed_batch_is_left(bundle, monkeypatch):
    failed, left = [], []

    def spoil(prediction, rows):
        if rows > 2:
            failed.append(weakref.ref(prediction))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prediction

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: left.append([ref() is not None for ref in failed])
    )
    refine(with_denoiser(bundle, FailingDenoiser(bundle.denoiser, spoil)), window_batch=6)
    assert left == [[False], [False, False]]


def tensors_alive():
    gc.collect()
    return {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}


@pytest.mark.parametrize("error", [ValueError("broken"), torch.OutOfMemoryError("out of memory")])
def test_an_upscale_that_fails_half_way_leaves_no_tensor_behind(bundle, error):
    def spoil(prediction, rows):
        if len(failing.calls) > 2:
            raise error
        return prediction

    failing = FailingDenoiser(bundle.denoiser, spoil)
    with pytest.raises((ValueError, OutOfMemoryError)) as first:
        refine(with_denoiser(bundle, failing), window_batch=2)
    del first  # its traceback has the frames
    error.__traceback__ = None
    before = tensors_alive()
    failing.calls.clear()
    with pytest.raises((ValueError, OutOfMemoryError)) as again:
        refine(with_denoiser(bundle, failing), window_batch=2)
    del again
    error.__traceback__ = None
    assert tensors_alive() <= before


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"]
)
def test_a_gpu_that_another_program_fills_halves_the_batch(bundle, words):
    def spoil(prediction, rows):
        if rows > 3:
            raise RuntimeError(words)
        return prediction

    filled = FailingDenoiser(bundle.denoiser, spoil)
    result = refine(with_denoiser(bundle, filled), window_batch=6)
    assert filled.calls[:2] == [6, 3]
    np.testing.assert_allclose(result, refine(bundle), atol=1e-5)


class OverflowingAutoencoder:
    """One that overflows in half precision, after it has drawn."""

    def __init__(self, inner):
        self.inner = inner

    def encode(self, image, control, generator):
        return self.inner.encode(image, control, generator) * float("inf")

    def decode(self, latents, control):
        return self.inner.decode(latents, control)

    def to_dtype(self, dtype):
        return self.inner


def test_latents_that_are_drawn_again_in_fp32_are_those_of_fp32(bundle):
    overflowing = OverflowingAutoencoder(bundle.autoencoder)
    half = dataclasses.replace(bundle, autoencoder=overflowing, dtype=torch.bfloat16)
    np.testing.assert_allclose(refine(half), refine(bundle), atol=1e-6)


def test_a_window_that_does_not_fit_at_all_is_an_error(bundle):
    with pytest.raises(OutOfMemoryError, match="smaller window"):
        refine(with_denoiser(bundle, FailingDenoiser(bundle.denoiser, fail_above(0))))


@pytest.mark.parametrize("window", [16, 40])
def test_a_window_that_does_not_suit_the_model_is_refused_in_words(bundle, window):
    with pytest.raises(OptionError, match=f"window of {window} px does not fit"):
        refine(bundle, window=window)


TILES = AutoencoderTiling(whole_side=64, tile_side=256, overlap=0.25)


@pytest.fixture
def local_autoencoder_bundle():
    """A tiny bundle whose autoencoder has no attention, so only its GroupNorms see far."""
    bundle = tiny_bundle()
    network = bundle.autoencoder.network
    for half in (network.encoder, network.decoder):
        torch.nn.init.zeros_(half.mid_block.attentions[0].to_out[0].weight)
        torch.nn.init.zeros_(half.mid_block.attentions[0].to_out[0].bias)
    return bundle


def tiled_and_whole(bundle, stage, monkeypatch):
    image = torch.tensor(photograph(512, 384).transpose(2, 0, 1)[None])
    control = ControlImage(image, image)

    def run(tiling, stage):
        generator = torch.Generator().manual_seed(0)
        latents = None if stage == "encode" else run(AutoencoderTiling(), "encode")
        monkeypatch.setattr(autoencoder, "tiling_of", lambda _: tiling)
        if latents is None:
            return autoencoder.encode(bundle, image, control, generator)
        return autoencoder.decode(bundle, latents, control)

    return run(TILES, stage), run(AutoencoderTiling(), stage)


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_shared_statistics_bring_tiles_far_closer_to_the_whole_than_their_own(
    local_autoencoder_bundle, stage, monkeypatch
):
    shared, whole = tiled_and_whole(local_autoencoder_bundle, stage, monkeypatch)
    monkeypatch.setattr(autoencoder._FixedNorm, "of", lambda norm, _: norm)
    alone, _ = tiled_and_whole(local_autoencoder_bundle, stage, monkeypatch)
    error, error_alone = ((tiled - whole).abs().mean() for tiled in (shared, alone))
    assert error < 0.5 * error_alone
    assert error < 0.03 * whole.std()


def test_shared_statistics_leave_the_autoencoder_as_it_was(bundle, monkeypatch):
    latents = torch.randn(1, 4, 16, 16)
    control = ControlImage(torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128))
    before = autoencoder.decode(bundle, latents, control)
    with monkeypatch.context() as tiled:
        tiled.setattr(autoencoder, "tiling_of", lambda _: AutoencoderTiling(32, 64))
        autoencoder.decode(bundle, latents, control)
    assert torch.equal(autoencoder.decode(bundle, latents, control), before)
