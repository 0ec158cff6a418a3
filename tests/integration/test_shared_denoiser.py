"""Several upscales that share one denoiser."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sd15_support import batch_of
from support import photograph

from tegula.errors import CancelledError, InputError
from tegula.images.pixels import to_image
from tegula.models.mini.bundle import load_mini
from tegula.options import UpscaleOptions
from tegula.pipeline.sharing import SharedDenoiser
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

LONG = 400.0
"""Seconds that only a failing test waits."""


class Counting:
    """A denoiser that notes how many rows it was given, and fails above ``most``."""

    def __init__(self, denoiser, most=99, poison=None):
        self.denoiser, self.most, self.poison, self.rows = denoiser, most, poison, []

    def __call__(self, batch):
        self.rows.append(len(batch.latents))
        if len(batch.latents) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        if self.poison is not None and (batch.timestep == self.poison).any():
            raise ValueError("poisoned")
        return self.denoiser(batch)

    def embed_control(self, control):
        return self.denoiser.embed_control(control)

    def to_dtype(self, dtype):
        return self.denoiser.to_dtype(dtype)


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def together(shared, batches):
    """Run batches in threads of which each waits for all others."""
    barrier = threading.Barrier(len(batches))

    def one(batch):
        with shared.member():
            barrier.wait(LONG)
            try:
                return shared(batch)
            except ValueError as error:
                return error

    with ThreadPoolExecutor(len(batches)) as pool:
        return list(pool.map(one, batches))


@pytest.mark.parametrize("guess_mode", [False, True])
def test_batches_of_several_are_joined_and_give_the_same(bundle, guess_mode):
    counting = Counting(bundle.denoiser)
    batches = [batch_of(bundle, rows, guess_mode=guess_mode, seed=rows) for rows in (2, 4, 6)]
    got = together(SharedDenoiser(counting, 99, LONG), batches)
    assert counting.rows == [12]
    for batch, prediction in zip(batches, got, strict=True):
        torch.testing.assert_close(prediction, bundle.denoiser(batch), atol=1e-5, rtol=0)


def test_no_more_rows_are_joined_than_wanted(bundle):
    counting = Counting(bundle.denoiser)
    together(SharedDenoiser(counting, 5, LONG), [batch_of(bundle, 2, seed=n) for n in range(3)])
    assert sorted(counting.rows) == [2, 4]


def test_batches_of_other_control_run_alone(bundle):
    counting = Counting(bundle.denoiser)
    batches = [batch_of(bundle, 2), batch_of(bundle, 2, guess_mode=True)]
    together(SharedDenoiser(counting, 99, LONG), batches)
    assert counting.rows == [2, 2]


def test_what_does_not_fit_together_runs_alone(bundle):
    counting = Counting(bundle.denoiser, most=2)
    batches = [batch_of(bundle, 2, seed=n) for n in (0, 1)]
    got = together(SharedDenoiser(counting, 99, LONG), batches)
    assert counting.rows == [4, 2, 2]
    assert all(torch.is_tensor(prediction) for prediction in got)


def test_the_fault_of_one_is_not_that_of_the_others(bundle):
    counting = Counting(bundle.denoiser, poison=310.0)
    got = together(SharedDenoiser(counting, 99, LONG), [batch_of(bundle, 1), batch_of(bundle, 2)])
    assert torch.is_tensor(got[0])
    assert isinstance(got[1], ValueError)


def test_a_member_that_leaves_is_not_waited_for(bundle):
    shared = SharedDenoiser(bundle.denoiser, 99, LONG)
    entered, answered = threading.Event(), threading.Event()

    def leave():
        with shared.member():
            entered.set()

    def ask():
        with shared.member():
            shared(batch_of(bundle, 1))
            answered.set()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(leave)
        pool.submit(ask)
        assert entered.wait(LONG / 4)
        assert answered.wait(LONG / 4)


OPTIONS = UpscaleOptions(scale=2, seed=1, prescaler="lanczos", creativity=0.5, window=64)


def pictures():
    return [to_image(photograph(*size), None) for size in ((40, 30), (50, 70), (33, 33))]


def test_pictures_upscaled_together_are_those_upscaled_alone(bundle):
    counting = Counting(bundle.denoiser)
    shared = Upscaler(_with(bundle, counting))
    got = [result.image for result in shared.upscale_many(pictures(), OPTIONS, at_once=3)]
    alone = Counting(bundle.denoiser)
    expected = [Upscaler(_with(bundle, alone)).upscale(each, OPTIONS).image for each in pictures()]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=1)
    assert sum(counting.rows) == sum(alone.rows)


class CountingHalves(Counting):
    """One whose denoiser has halves."""

    encoded = 0

    def encode(self, batch):
        self.encoded += len(batch.latents)
        return self.denoiser.encode(batch)

    def decode(self, features, timestep, text):
        return self.denoiser.decode(features, timestep, text)


def test_encoder_propagation_saves_as_much_together_as_alone(bundle):
    reused = OPTIONS.replaced(steps=12, creativity=1.0, feature_reuse=3)
    counts, results = [], []
    for run in (
        lambda upscaler: [upscaler.upscale(each, reused) for each in pictures()],
        lambda upscaler: list(upscaler.upscale_many(pictures(), reused)),
    ):
        counting = CountingHalves(bundle.denoiser)
        results.append(run(Upscaler(_with(bundle, counting))))
        counts.append((counting.encoded, sum(counting.rows)))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
    for alone, together_ in zip(*results, strict=True):
        assert alone.warnings == together_.warnings == ()
        difference = np.asarray(alone.image, float) - np.asarray(together_.image, float)
        assert np.abs(difference).max() <= 1


def test_a_batch_that_does_not_fit_leaves_nothing_behind(bundle):
    failed = []

    class Full(Counting):
        def __call__(self, batch):
            failed.append(weakref.ref(batch.latents.clone()))
            kept = torch.zeros(8)
            failed.append(weakref.ref(kept))
            raise torch.OutOfMemoryError("out of memory")

    shared = SharedDenoiser(Full(bundle.denoiser), 99)
    batch = batch_of(bundle, 1)
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            _call(shared, batch)
        assert not any(ref() is not None for ref in failed)
    finally:
        gc.enable()


def _call(shared, batch):
    try:
        shared(batch)
    except torch.OutOfMemoryError as error:
        fresh = type(error)(str(error))
    raise fresh


def test_mini_takes_rows_of_several_noise_levels():
    mini = load_mini(torch.device("cpu"), torch.float32)
    upscaler = Upscaler(mini)
    got = list(upscaler.upscale_many(pictures()[:2], OPTIONS))
    expected = [upscaler.upscale(each, OPTIONS) for each in pictures()[:2]]
    for one, other in zip(got, expected, strict=True):
        difference = np.asarray(one.image, float) - np.asarray(other.image, float)
        assert np.abs(difference).max() <= 1


def test_the_first_failure_is_raised_and_the_rest_given_up(bundle):
    results = Upscaler(bundle).upscale_many([pictures()[0], b"nothing", pictures()[1]], OPTIONS)
    assert next(results).image.size == (80, 60)
    with pytest.raises(InputError):
        list(results)


def test_a_cancel_stops_all(bundle):
    with pytest.raises(CancelledError):
        list(Upscaler(bundle).upscale_many(pictures(), OPTIONS, cancelled=lambda: True))


def _with(bundle, denoiser):
    import dataclasses

    return dataclasses.replace(bundle, denoiser=denoiser)
