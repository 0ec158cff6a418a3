from __future__ import annotations

import io

import colour_profiles
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import finish_arrays, of_arrays, photograph
from support import options as resolved

from tegula.errors import OptionError, TooLargeError
from tegula.images.compression import smooth_chroma, soften_blocks
from tegula.images.encode import encode
from tegula.images.pixels import (
    LUMA,
    fill_hidden,
    to_bytes,
    to_image,
)
from tegula.options import UpscaleOptions
from tegula.pipeline import adjust, pictures
from tegula.pipeline.prepare import (
    MENDED_BELOW,
    MENDED_BELOW_FOR_RESAMPLING,
    prepare,
)
from tegula.resolve import with_context

enlarge_alpha, enlarge_lanczos, outlines = map(
    of_arrays, (pictures.enlarge_alpha, pictures.enlarge_lanczos, pictures.outlines)
)


def encoded(image, format_name="PNG", **parameters):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **parameters)
    return buffer.getvalue()


def portrait(width=48, height=40):
    return to_image(photograph(width, height))


def enlarged(prepared, scale=2):
    return enlarge_lanczos(prepared.rgb, (prepared.size[0] * scale, prepared.size[1] * scale))


def round_trip(source, scale=2):
    prepared = prepare(source, UpscaleOptions())
    prescaled = enlarged(prepared, scale)
    return finish_arrays(prescaled, prescaled, prepared, resolved())


def peak_ratio(picture, truth):
    return 10 * np.log10(1 / np.mean(np.square(picture - truth)))


def test_a_plain_photograph_passes_through_unchanged():
    finished = round_trip(encoded(portrait()), scale=1)
    assert finished.image.mode == "RGB"
    assert np.array_equal(np.asarray(finished.image), np.asarray(portrait()))
    assert finished.warnings == ()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_grey_stays_grey_and_alpha_stays(mode):
    finished = round_trip(encoded(portrait().convert(mode)))
    assert finished.image.mode == {"1": "L"}.get(mode, mode)
    assert finished.image.size == (96, 80)


def test_colour_that_refine_puts_into_grey_is_taken_out():
    prepared = prepare(encoded(portrait().convert("L")), UpscaleOptions())
    tinted = enlarged(prepared) * np.float32([1, 0.9, 0.8])
    finished = finish_arrays(tinted, enlarged(prepared), prepared, resolved(colour_lock="none"))
    assert finished.image.mode == "L"


def test_colour_is_taken_out_of_a_grey_source_in_three_channels():
    grey = Image.fromarray(np.repeat(np.asarray(portrait().convert("L"))[..., None], 3, axis=2))
    prepared = prepare(grey, UpscaleOptions())
    tinted = np.clip(enlarged(prepared) + np.float32([0.08, 0, -0.08]), 0, 1)
    options = resolved(colour_lock="none", keep_grey=True)
    done = np.asarray(finish_arrays(tinted, enlarged(prepared), prepared, options).image)
    assert done.shape[2] == 3
    assert np.ptp(done, axis=2).max() == 0


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", colour_profiles.wide_rgb()),
        ("RGBA", colour_profiles.wide_rgb()),
        ("L", colour_profiles.grey(1.8)),
        ("LA", colour_profiles.grey(2.6)),
        ("L", colour_profiles.wide_rgb()),
    ],
)
def test_the_profile_of_the_source_comes_back(mode, profile):
    muted = to_image(0.3 + 0.4 * photograph(48, 40)).convert(mode)
    finished = round_trip(encoded(muted, icc_profile=profile), scale=1)
    assert finished.image.mode == mode
    assert finished.metadata.profile == profile
    difference = np.asarray(finished.image).astype(int) - np.asarray(muted)
    assert np.abs(difference).max() <= 3


def test_cmyk_ends_as_rgb_with_a_warning():
    finished = round_trip(encoded(Image.new("CMYK", (8, 8), (10, 20, 30, 0)), "TIFF"))
    assert finished.image.mode == "RGB"
    assert finished.metadata.profile is None
    assert "CMYK" in finished.warnings[0]


def test_a_crop_is_cut_with_what_lies_around_it_and_the_whole_size_remembered():
    options = UpscaleOptions(crop=(500, 300, 20, 10))
    prepared = prepare(encoded(portrait(1200, 700)), options)
    assert prepared.facts.size == (1200, 700)
    crop = with_context(options, (1200, 700)).crop
    assert crop is not None
    x, y, width, height = crop
    assert x <= 500 < 520 <= x + width < 1200
    assert y <= 300 < 310 <= y + height < 700
    cut = np.asarray(portrait(1200, 700).crop((x, y, x + width, y + height)))
    assert np.array_equal(np.asarray(to_image(prepared.rgb, prepared.alpha)), cut)


@pytest.mark.parametrize("crop", [(40, 0, 9, 5), (0, 39, 5, 2), (48, 0, 1, 1)])
def test_a_crop_that_leaves_the_picture_is_refused(crop):
    with pytest.raises(OptionError, match="48x40"):
        prepare(encoded(portrait()), UpscaleOptions(crop=crop))


def test_the_pixel_limit_of_the_options_counts():
    with pytest.raises(TooLargeError):
        prepare(encoded(portrait()), UpscaleOptions(max_pixels=48 * 40 - 1))


@pytest.mark.parametrize("quality", [5, MENDED_BELOW - 1, MENDED_BELOW_FOR_RESAMPLING - 1])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_mending_brings_a_damaged_photograph_nearer_to_the_truth(quality, name):
    truth = photograph(160, 128, name)
    damaged = np.asarray(Image.open(io.BytesIO(encoded(to_image(truth), "JPEG", quality=quality))))
    damaged = damaged.astype(np.float32) / 255
    gain = peak_ratio(soften_blocks(damaged, quality), truth) - peak_ratio(damaged, truth)
    assert gain > 0.1


@pytest.mark.parametrize(
    ("quality", "prescaler", "mended"),
    [
        (MENDED_BELOW - 1, None, True),
        (MENDED_BELOW, None, False),
        (MENDED_BELOW_FOR_RESAMPLING - 1, "lanczos", True),
        (MENDED_BELOW_FOR_RESAMPLING, "lanczos", False),
        (None, "lanczos", False),
    ],
)
def test_damage_is_mended_where_that_helps(quality, prescaler, mended):
    source = encoded(portrait())
    if quality is not None:
        source = encoded(portrait(), "JPEG", quality=quality)
    assert prepare(source, UpscaleOptions(prescaler=prescaler)).mended == mended


@pytest.mark.parametrize("quality", [10, 20, 30])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_blocks_of_colour_become_like_the_truth_and_brightness_stays(quality, name):
    truth = photograph(160, 128, name)
    file = encoded(to_image(truth), "JPEG", quality=quality, subsampling=2)
    damaged = np.asarray(Image.open(io.BytesIO(file)), np.float32) / 255
    mended = smooth_chroma(damaged, quality)

    def chroma(rgb):
        return rgb - (rgb @ LUMA)[..., None]

    before, after = (np.square(chroma(each) - chroma(truth)).mean() for each in (damaged, mended))
    assert after < 0.93 * before
    inside = (mended.min(2) > 0) & (mended.max(2) < 1)
    assert np.abs(mended @ LUMA - damaged @ LUMA)[inside].max() < 1e-3


@pytest.mark.parametrize(
    ("quality", "given", "mended"),
    [
        (MENDED_BELOW_FOR_RESAMPLING - 2, {"prescaler": "lanczos"}, True),
        (MENDED_BELOW_FOR_RESAMPLING + 2, {"prescaler": "lanczos"}, False),
        (MENDED_BELOW_FOR_RESAMPLING - 2, {"prescaler": "lanczos", "auto": False}, False),
        (MENDED_BELOW_FOR_RESAMPLING - 2, {"prescaler": "lanczos", "mend_chroma": False}, False),
        (20, {}, False),
        (90, {"mend_chroma": True}, True),
    ],
)
def test_blocks_of_colour_are_smoothed_where_that_helps(quality, given, mended):
    source = encoded(to_image(photograph(96, 96, "chelsea")), "JPEG", quality=quality)
    assert prepare(source, UpscaleOptions(**given)).chroma_mended == mended


def test_a_single_opaque_pixel_survives_enlargement():
    alpha = np.zeros((9, 9), np.float32)
    alpha[4, 4] = 1
    assert enlarge_alpha(alpha, 36, 36).max() > 0.5


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_any_size_can_be_mended(height, width):
    rgb = np.random.default_rng(width).random((height, width, 3), np.float32)
    mended = soften_blocks(rgb, 30)
    assert mended.shape == rgb.shape
    assert 0 <= mended.min() <= mended.max() <= 1


def cut_out(height=33, width=41):
    """A red disc; black lies hidden around it."""
    y, x = np.mgrid[:height, :width]
    alpha = ((y - 16) ** 2 + (x - 20) ** 2 < 120).astype(np.float32)
    return alpha[..., None] * np.float32([1, 0, 0]), alpha


def test_what_goes_on_under_transparency_is_kept_as_in_textures():
    texture = to_image(photograph(64, 48)).convert("RGBA")
    mask = Image.new("L", texture.size, 255)
    mask.paste(0, (10, 8, 45, 40))
    texture.putalpha(mask)
    for name in ("PNG", "WEBP"):
        source = encoded(texture, name, lossless=True, exact=True)
        finished = round_trip(source, scale=1)
        assert np.array_equal(np.asarray(finished.image), np.asarray(texture))
    kept = encode(finished.image, "webp", quality=100).data
    with Image.open(io.BytesIO(kept)) as image:
        difference = np.asarray(image).astype(int) - np.asarray(texture)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("hidden", ["black", "noise", "stripes"])
def test_what_ends_at_the_outline_of_a_cut_out_is_not_kept_unless_asked(hidden):
    pixels = np.asarray(to_image(photograph(64, 48)).convert("RGBA")).copy()
    hole = np.s_[8:40, 10:45]
    pixels[..., 3] = 255
    pixels[hole] = 0
    if hidden == "noise":
        values = np.random.default_rng(3).integers(0, 256, (32, 35, 3), np.uint8)
        pixels[hole][..., :3] = values
    elif hidden == "stripes":
        pixels[hole][::2, ..., :3] = 255
    source = encoded(Image.fromarray(pixels))
    filled = prepare(source, UpscaleOptions())
    assert np.abs(filled.rgb[hole] * 255 - pixels[hole][..., :3]).mean() > 10
    kept = prepare(source, UpscaleOptions(keep_hidden_colour=True))
    assert np.allclose(kept.rgb * 255, pixels[..., :3], atol=0.01)


def test_hidden_colour_does_not_bleed():
    rgb, alpha = cut_out()
    image = Image.fromarray(np.dstack([to_bytes(rgb), to_bytes(alpha)]))
    finished = round_trip(encoded(image), scale=3)
    shown = np.asarray(finished.image)
    visible = shown[shown[..., 3] > 0]
    assert visible[:, 0].min() >= 250
    assert visible[:, 1:3].max() <= 5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_filling_keeps_what_is_visible_and_invents_no_colour(height, width, seed):
    rng = np.random.default_rng(seed)
    alpha = (rng.random((height, width)) < 0.3).astype(np.float32)
    rgb = 0.25 + 0.5 * rng.random((height, width, 3), np.float32)
    filled = fill_hidden(np.where(alpha[..., None] > 0, rgb, 0).astype(np.float32), alpha)
    assert np.abs(filled - rgb)[alpha > 0].max(initial=0) < 1e-5
    if alpha.any():
        assert filled.min() > 0.249
        assert filled.max() < 0.751


def test_a_cut_out_keeps_sharp_edges_and_a_soft_alpha_stays_soft():
    _, alpha = cut_out()
    large = enlarge_alpha(alpha, 41 * 4, 33 * 4)
    between = np.mean((large > 0.02) & (large < 0.98))
    assert between < 0.06
    assert set(np.unique(np.rint(large))) == {0, 1}
    assert np.array_equal(enlarge_alpha(alpha, 41, 33), alpha)
    soft = np.repeat(np.linspace(0, 1, 32, dtype=np.float32)[None], 8, axis=0)
    ramp = enlarge_alpha(soft, 128, 32)
    assert np.abs(np.diff(ramp[16])).max() < 0.02


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 30)] * 4)
def test_alpha_takes_any_size(height, width, new_height, new_width):
    alpha = np.random.default_rng(0).random((height, width), np.float32)
    scaled = enlarge_alpha(alpha, new_width, new_height)
    assert scaled.shape == (new_height, new_width)
    assert 0 <= scaled.min() <= scaled.max() <= 1


@pytest.mark.parametrize("lock", ["wavelet", "adain"])
@pytest.mark.parametrize("window", [64, 4096])
def test_finish_locks_colour_as_the_options_say(lock, window):
    prepared = prepare(encoded(portrait()), UpscaleOptions())
    prescaled = enlarged(prepared)
    shifted = prescaled + np.float32(0.07)
    locked = finish_arrays(shifted, prescaled, prepared, resolved(colour_lock=lock, window=window))
    free = finish_arrays(shifted, prescaled, prepared, resolved(colour_lock="none", window=window))
    wanted = to_bytes(prescaled).astype(int)
    assert np.abs(np.asarray(locked.image) - wanted).max() <= 1
    assert np.abs(np.asarray(free.image) - wanted).mean() > 10


def test_the_three_locks_are_all_there_is():
    rgb = torch.zeros(32, 32, 3)
    assert adjust.lock_colour(rgb, rgb, resolved(colour_lock="none")) is rgb


def test_an_icon_has_outlines_and_a_shadow_or_a_bare_cut_out_none():
    column = np.array([0, 0, 0, 0.1, 0.7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], np.float32)
    found = outlines(np.tile(column, (20, 1)))
    assert found is not None
    assert (found[:, 2:6].min(), found[:, 12:].max()) == (1, 0)
    assert outlines(np.tile(np.linspace(0, 1, 20, dtype=np.float32), (20, 1))) is None
    assert outlines(np.tile(np.rint(column), (20, 1))) is None
