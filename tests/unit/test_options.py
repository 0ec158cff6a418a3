import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tegula.errors import OptionError, TooLargeError
from tegula.models.sd15.facts import PRESETS as SD15
from tegula.options import KNOBS, PRESETS, ResolvedOptions, UpscaleOptions, resolve, target_size

NUMBERS = [n for n, knob in KNOBS.items() if knob.high is not None and n not in ("size", "crop")]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_bounds_is_refused_by_name_and_bound(name):
    knob = KNOBS[name]
    for bad in (knob.low - 1, knob.high + 1, float("nan")):
        with pytest.raises(OptionError, match=f"{name} is between"):
            UpscaleOptions(**{name: bad})


@pytest.mark.parametrize("name", NUMBERS)
def test_the_bounds_themselves_are_allowed(name):
    ends = {"guidance_start": "guidance_end", "control_start": "control_end"}
    for value in (KNOBS[name].low, KNOBS[name].high):
        extra = {ends[name]: 1.0} if name in ends else {}
        swapped = {start: 0.0 for start, end in ends.items() if end == name}
        UpscaleOptions(**{name: value, **extra, **swapped})


@pytest.mark.parametrize("name", [n for n, knob in KNOBS.items() if knob.choices])
def test_a_wrong_choice_is_refused_with_the_right_ones(name):
    with pytest.raises(OptionError, match=KNOBS[name].choices[0]):
        UpscaleOptions(**{name: "nonsense"})


def test_two_sizes_are_refused():
    with pytest.raises(OptionError, match="scale and size"):
        UpscaleOptions(scale=2, size=(10, 10))


@pytest.mark.parametrize("name", ["guidance", "control"])
def test_an_interval_must_not_end_before_it_starts(name):
    with pytest.raises(OptionError, match=f"{name}_start"):
        UpscaleOptions(**{f"{name}_start": 0.6, f"{name}_end": 0.4})


@given(width=st.integers(1, 4000), height=st.integers(1, 4000), scale=st.floats(0.05, 16))
def test_the_target_is_the_rounded_product(width, height, scale):
    options = UpscaleOptions(scale=scale, max_pixels=10**12)
    expected = max(1, round(width * scale)), max(1, round(height * scale))
    assert target_size(options, width, height) == expected


def test_the_pixel_limit_counts_the_crop_not_the_whole():
    whole = UpscaleOptions(scale=8, max_pixels=1_000_000)
    with pytest.raises(TooLargeError):
        target_size(whole, 1000, 1000)
    crop = dataclasses.replace(whole, crop=(0, 0, 100, 100))
    assert target_size(crop, 1000, 1000) == (800, 800)


def test_every_knob_of_a_preset_is_filled_and_none_is_left_open():
    for preset in PRESETS:
        resolved = resolve(UpscaleOptions(preset=preset), SD15, 512, (10, 10))
        left_open = {f.name for f in dataclasses.fields(ResolvedOptions)} - {"window_batch"}
        assert all(getattr(resolved, name) is not None for name in left_open)


def test_what_was_asked_for_wins_over_the_preset():
    resolved = resolve(UpscaleOptions(creativity=0.9), SD15, 512, (10, 10))
    assert resolved.creativity == 0.9


def test_an_open_seed_is_drawn_anew_each_time():
    seeds = {resolve(UpscaleOptions(), SD15, 512, (1, 1)).seed for _ in range(5)}
    assert len(seeds) > 1
