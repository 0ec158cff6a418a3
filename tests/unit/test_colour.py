from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import of_arrays, photograph

from tegula.pipeline import adjust

adain_lock, calm_flat_places, fuse_exposures, wavelet_lock = (
    of_arrays(each)
    for each in (
        adjust.adain_lock,
        adjust.calm_flat_places,
        adjust.fuse_exposures,
        adjust.wavelet_lock,
    )
)


def atrous_remainder(rgb, levels):
    """The definition: [1 2 1]/4 both ways, dilated by 1, 2, 4, .., edges continued."""
    reach = 2**levels
    rgb = np.pad(rgb.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), "edge")
    for level in range(levels):
        for axis in (0, 1):
            step = 2**level
            rgb = (np.roll(rgb, step, axis) + 2 * rgb + np.roll(rgb, -step, axis)) / 4
    return rgb[reach:-reach, reach:-reach]


def detail(height, width, seed=0):
    """Noise without anything coarse in it."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (height, width, 3))
    return (noise - atrous_remainder(noise, 5)).astype(np.float32)


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_the_wavelet_lock_is_the_decomposition_it_claims(levels):
    rng = np.random.default_rng(0)
    refined, prescaled = rng.random((2, 70, 90, 3), np.float32)
    coarse = atrous_remainder(prescaled.astype(np.float64) - refined, levels)
    assert np.abs(wavelet_lock(refined, prescaled, levels=levels) - refined - coarse).max() < 1e-6


def test_bands_of_rows_leave_no_trace(monkeypatch):
    rng = np.random.default_rng(1)
    refined, prescaled = rng.random((2, 300, 40, 3), np.float32)
    whole = wavelet_lock(refined, prescaled)
    monkeypatch.setattr("tegula.pipeline.adjust._BAND", 7)
    assert np.abs(wavelet_lock(refined, prescaled) - whole).max() < 1e-6


@pytest.mark.parametrize("lock", [wavelet_lock, adain_lock])
def test_a_constant_shift_of_colour_is_removed(lock):
    prescaled = photograph(96, 80)
    shifted = prescaled + np.float32([0.1, -0.05, 0.02])
    assert np.abs(lock(shifted, prescaled) - prescaled).max() < 1e-5


def test_a_shift_that_differs_from_window_to_window_is_removed():
    prescaled = photograph(256, 192)
    drift = np.zeros_like(prescaled)
    drift[:, 128:] = 0.08
    for locked in (
        wavelet_lock(prescaled + drift, prescaled),
        adain_lock(prescaled + drift, prescaled, window=32),
    ):
        error = np.abs(locked - prescaled)
        assert error[:, :64].max() < 0.01
        assert error[:, 192:].max() < 0.01
        assert error.mean() < 0.02


def test_fine_detail_is_kept():
    prescaled = photograph(160, 128)
    added = detail(128, 160)
    locked = wavelet_lock(prescaled + added, prescaled)
    assert np.abs(locked - prescaled - added)[32:-32, 32:-32].max() < 0.005
    for window in (None, 64):
        kept = adain_lock(prescaled + added, prescaled, window=window) - prescaled
        assert np.corrcoef(kept.ravel(), added.ravel())[0, 1] > 0.9


def test_adain_restores_contrast():
    prescaled = photograph(96, 80)
    flat = 0.5 + 0.6 * (prescaled - 0.5)
    assert np.abs(adain_lock(flat, prescaled) - prescaled).max() < 0.01
    assert np.abs(adain_lock(flat, prescaled, window=32) - prescaled).mean() < 0.01


def test_local_adain_shows_no_window_edge():
    y, x = np.mgrid[:256, :256].astype(np.float32) / 255
    prescaled = np.stack([x, y, (x + y) / 2], axis=-1)
    change = adain_lock(prescaled + 0.1 * x[..., None], prescaled, window=64) - prescaled
    assert np.abs(np.diff(change, axis=1)).max() < 0.01


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([None, 8, 64, 1024]))
def test_any_size_can_be_locked_and_agreement_changes_nothing(height, width, window):
    rgb = np.random.default_rng(height).random((height, width, 3), np.float32)
    for locked in (wavelet_lock(rgb, rgb), adain_lock(rgb, rgb, window=window)):
        assert locked.dtype == np.float32
        assert np.abs(locked - rgb).max() < 1e-5


def test_hdr_zero_is_the_picture_itself():
    rgb = photograph(40, 30)
    assert fuse_exposures(rgb, 0) is rgb


def test_hdr_opens_shadows_and_calms_highlights():
    dark, bright = 0.3 * photograph(96, 80), 0.7 + 0.3 * photograph(96, 80)
    levels = [fuse_exposures(dark, amount).mean() for amount in (0, 0.4, 1)]
    assert levels == sorted(levels)
    assert levels[2] > 1.1 * levels[0]
    assert fuse_exposures(bright, 0.5).mean() < bright.mean() - 0.01


def test_hdr_of_a_large_picture_is_close_to_fusing_it_whole(monkeypatch):
    rgb = photograph(320, 240)
    whole = fuse_exposures(rgb, 0.5)
    monkeypatch.setattr("tegula.pipeline.adjust._LARGEST_FUSED", 20_000)
    assert np.abs(fuse_exposures(rgb, 0.5) - whole).mean() < 0.02


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2)])
def test_hdr_takes_the_smallest_pictures(size):
    rgb = np.random.default_rng(0).random((*size, 3), np.float32)
    fused = fuse_exposures(rgb, 1.0)
    assert fused.shape == rgb.shape
    assert np.isfinite(fused).all()


@pytest.mark.parametrize("lock", [wavelet_lock, adain_lock])
@pytest.mark.parametrize("height", [9, 512, 1100])
def test_a_lock_may_write_over_the_picture(lock, height):
    rng = np.random.default_rng(height)
    refined, prescaled = rng.random((2, height, 24, 3), np.float32)
    wanted = lock(refined, prescaled)
    assert lock(refined, prescaled, out=refined) is refined
    np.testing.assert_array_equal(refined, wanted)


def test_noise_goes_from_flat_places_and_detail_stays():
    rng = np.random.default_rng(1)
    grain = rng.normal(0, 0.8 / 255, (96, 120, 3)).astype(np.float32)
    flat = np.full_like(grain, 0.4) + grain
    calm = calm_flat_places(flat.copy(), 0.8)
    assert calm.std() < 0.5 * flat.std()
    assert calm.mean() == pytest.approx(flat.mean(), abs=1e-4)
    rough = rng.random((96, 120, 3)).astype(np.float32)
    assert np.abs(calm_flat_places(rough.copy(), 0.8) - rough).max() < 0.5 / 255
    assert np.array_equal(calm_flat_places(flat.copy(), 0), flat)


def test_flat_places_are_calmed_alike_by_bands_of_any_height(monkeypatch):
    rng = np.random.default_rng(2)
    picture = (0.5 + rng.normal(0, 0.01, (150, 40, 3))).astype(np.float32)
    picture[40:80] = rng.random((40, 40, 3))
    whole = calm_flat_places(picture.copy(), 2.0)
    for band in (37, 64):
        monkeypatch.setattr(adjust, "_BAND", band)
        assert np.abs(calm_flat_places(picture.copy(), 2.0) - whole).max() < 1e-6


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 40)])
def test_the_smallest_pictures_can_be_calmed(size):
    picture = np.random.default_rng(3).random((*size, 3), np.float32)
    assert np.isfinite(calm_flat_places(picture, 3.0)).all()
