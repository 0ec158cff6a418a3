"""What fits into a device's memory."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import options

from tegula.errors import OutOfMemoryError
from tegula.models import optimise
from tegula.models.bundle import ControlImage
from tegula.models.device import MOST_WINDOWS, SHARE, side_that_fits, windows_that_fit
from tegula.pipeline import autoencoder as tiled_autoencoder
from tegula.pipeline.autoencoder import AutoencoderTiling
from tegula.pipeline.evaluate import BatchSize
from tests.tiny.networks import tiny_bundle

BYTES = st.integers(0, 10**12)


@given(BYTES, st.integers(1, 10**10))
def test_a_batch_fits_into_its_share_and_one_window_more_does_not(free, each):
    windows = windows_that_fit(free, each)
    assert windows == 1 or windows * each <= free * SHARE
    assert windows == MOST_WINDOWS or (windows + 1) * each > int(free * SHARE)


@given(BYTES, st.integers(1, 10**5))
def test_a_side_fits_unless_it_is_the_smallest(free, each):
    side = side_that_fits(free, each, (512, 4096), 64)
    assert side % 64 == 0
    assert 512 <= side <= 4096
    assert side == 512 or side**2 * each <= free * SHARE


def on_a_gpu(monkeypatch, free, window_bytes):
    monkeypatch.setattr(optimise, "free_memory", lambda device: free)
    return dataclasses.replace(
        tiny_bundle(), device=torch.device("cuda"), window_bytes=window_bytes
    )


def test_free_memory_decides_how_many_windows_run_together(monkeypatch):
    bundle = on_a_gpu(monkeypatch, free=1000, window_bytes=100)
    assert BatchSize.of(bundle, options(window=64)).windows == 8
    assert BatchSize.of(bundle, options(window=128)).windows == 2
    assert BatchSize.of(bundle, options(window=64, window_batch=3)).windows == 3


def test_without_a_measurement_the_batch_is_the_usual_one(monkeypatch):
    bundle = on_a_gpu(monkeypatch, free=1000, window_bytes=None)
    assert BatchSize.of(bundle, options()).windows == optimise.GPU_WINDOW_BATCH
    assert BatchSize.of(tiny_bundle(), options()).windows == optimise.CPU_WINDOW_BATCH


class Greedy:
    """An autoencoder that runs out of memory above a number of pixels."""

    def __init__(self, autoencoder, most, sides=None):
        self.inner, self.most, self.sides = autoencoder, most, [] if sides is None else sides
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder
        self.encode_moments, self.draw = autoencoder.encode_moments, autoencoder.draw
        self.encode, self.to_dtype = autoencoder.encode, autoencoder.to_dtype

    def decode(self, latents, control):
        self.sides.append(latents.shape[-1] * 8)
        if latents.shape[-1] * latents.shape[-2] * 64 > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner.decode(latents, control)

    def with_norms(self, norms):
        return Greedy(self.inner.with_norms(norms), self.most, self.sides)


def decode(bundle, autoencoder):
    latents = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    picture = torch.zeros(1, 3, 320, 320)
    return tiled_autoencoder.decode(
        dataclasses.replace(bundle, autoencoder=autoencoder),
        latents,
        ControlImage(picture, picture),
    )


@pytest.fixture
def tiles_of_512(monkeypatch):
    tiling = AutoencoderTiling(whole_side=512, tile_side=512)
    monkeypatch.setattr(tiled_autoencoder, "tiling_of", lambda _: tiling)


@pytest.mark.usefixtures("tiles_of_512")
def test_a_canvas_that_does_not_fit_whole_is_decoded_in_ever_smaller_tiles():
    bundle = tiny_bundle()
    whole = decode(bundle, bundle.autoencoder)
    greedy = Greedy(bundle.autoencoder, 256**2)
    tiled = decode(bundle, greedy)
    assert greedy.sides[:3] == [320, 320, 256]
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.01


@pytest.mark.usefixtures("tiles_of_512")
def test_a_tile_that_never_fits_is_one_clear_error():
    bundle = tiny_bundle()
    with pytest.raises(OutOfMemoryError, match="single tile"):
        decode(bundle, Greedy(bundle.autoencoder, 0))
