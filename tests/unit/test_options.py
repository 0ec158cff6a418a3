"""The options of an upscale: what is refused and how, and what a preset fills."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tegula.errors import OptionError, TooLargeError
from tegula.models.sd15.facts import PRESETS as SD15
from tegula.options import OPTIONS, PRESETS, PresetValues, ResolvedOptions, UpscaleOptions
from tegula.resolve import preset_values, resolve, target_size, with_context

NUMBERS = [name for name, schema in OPTIONS.items() if "maximum" in schema]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_bounds_is_refused_by_name_and_bound(name):
    schema = OPTIONS[name]
    for bad in (schema["minimum"] - 1, schema["maximum"] + 1):
        with pytest.raises(OptionError, match=f"^{name} is between"):
            UpscaleOptions(**{name: bad})
    with pytest.raises(OptionError, match=f"^{name} is .*between"):
        UpscaleOptions(**{name: float("nan")})


@pytest.mark.parametrize("name", NUMBERS)
def test_the_bounds_themselves_are_allowed(name):
    ends = {"guidance_start": "guidance_end", "control_start": "control_end"}
    for value in (OPTIONS[name]["minimum"], OPTIONS[name]["maximum"]):
        extra = {ends[name]: 1.0} if name in ends else {}
        swapped = {start: 0.0 for start, end in ends.items() if end == name}
        options = UpscaleOptions(**{name: value, **extra, **swapped})
        assert getattr(options, name) == value


@pytest.mark.parametrize("name", [n for n, schema in OPTIONS.items() if "enum" in schema])
def test_a_wrong_choice_is_refused_with_the_right_ones(name):
    with pytest.raises(OptionError, match=re.escape(", ".join(OPTIONS[name]["enum"]))):
        UpscaleOptions(**{name: "nonsense"})


def test_two_sizes_are_refused():
    with pytest.raises(OptionError, match="scale and size"):
        UpscaleOptions(scale=2, size=(10, 10))


@pytest.mark.parametrize("name", ["guidance", "control"])
def test_an_interval_must_not_end_before_it_starts(name):
    with pytest.raises(OptionError, match=f"{name}_start"):
        UpscaleOptions(**{f"{name}_start": 0.6, f"{name}_end": 0.4})


WRONG_TYPES = [
    ({"steps": 12.5}, "steps is a whole number between 1 and 1000, not 12.5."),
    ({"steps": True}, "steps is a whole number between 1 and 1000, not True."),
    ({"scale": "2"}, "scale is a number between 0.05 and 16 times, not '2'."),
    ({"size": (10,)}, "size is 2 whole numbers between 1 and 65536 px, not (10,)."),
    ({"size": 10}, "size is 2 whole numbers between 1 and 65536 px, not 10."),
    ({"size": (10, 2.5)}, "size is 2 whole numbers between 1 and 65536 px, not 2.5."),
    ({"crop": (0, 0, 5)}, "crop is 4 whole numbers between 0 and 65536 px, not (0, 0, 5)."),
    ({"guess_mode": 1}, "guess_mode is true or false, not 1."),
    ({"prompt": None}, "prompt is text, not None."),
    ({"max_pixels": 1e6}, "max_pixels is a whole number from 1 px, not 1000000.0."),
    ({"regions": "0,0,1,1:a"}, "regions is a list of texts, not '0,0,1,1:a'."),
    ({"creativty": 0.3}, "there is no option creativty (did you mean creativity?)."),
]


@pytest.mark.parametrize(("given_", "sentence"), WRONG_TYPES)
def test_a_value_of_another_type_is_refused_with_what_is_right(given_, sentence):
    with pytest.raises(OptionError) as refused:
        UpscaleOptions(**given_)
    assert str(refused.value) == sentence


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(OptionError) as refused:
        UpscaleOptions(
            scale=2, size=(3, 4), steps=0.5, preset="finest", regions=("0,0,0,1:a", "here"),
            guidance_start=1, guidance_end=0,
        )  # fmt: skip
    sentence = str(refused.value)
    for part in ("scale and size", "steps", "preset", "width or no height", "'here'", "guidance_s"):
        assert part in sentence
    assert "\n" not in sentence


def test_whole_numbers_lists_and_the_numbers_of_numpy_are_taken():
    options = UpscaleOptions(
        creativity=1, steps=np.int64(5), resemblance=np.float32(0.5), size=[30, 40]
    )
    assert options == UpscaleOptions(creativity=1.0, steps=5, resemblance=0.5, size=(30, 40))
    assert type(options.steps) is int


def test_options_are_keywords_and_cannot_be_changed_but_replaced_ones_are_checked():
    options = UpscaleOptions(scale=3)
    with pytest.raises(TypeError):
        UpscaleOptions(3)
    with pytest.raises(ValueError, match="frozen"):
        options.scale = 4
    assert options.replaced(scale=4) == UpscaleOptions(scale=4)
    assert hash(options) == hash(UpscaleOptions(scale=3))
    with pytest.raises(OptionError, match="scale"):
        options.replaced(scale=40)
    with pytest.raises(OptionError, match="scale"):
        options.__replace__(scale=40)


@pytest.mark.parametrize("seed", [0, 2**53, 2**63 - 1])
def test_seeds_of_63_bits_are_kept_exactly(seed):
    resolved = resolve(UpscaleOptions(seed=seed), SD15, 512, (10, 10))
    assert json.loads(json.dumps(resolved.settings()))["seed"] == seed
    with pytest.raises(OptionError, match="seed is between"):
        UpscaleOptions(seed=-1)
    with pytest.raises(OptionError, match="seed is between"):
        UpscaleOptions(seed=2**63)


@given(width=st.integers(1, 4000), height=st.integers(1, 4000), scale=st.floats(0.05, 16))
def test_the_target_is_the_rounded_product(width, height, scale):
    options = UpscaleOptions(scale=scale, max_pixels=10**12)
    expected = max(1, round(width * scale)), max(1, round(height * scale))
    assert target_size(options, width, height) == expected


def test_the_pixel_limit_counts_the_crop_not_the_whole():
    whole = UpscaleOptions(scale=8, max_pixels=1_000_000)
    with pytest.raises(TooLargeError):
        target_size(whole, 1000, 1000)
    crop = whole.replaced(crop=(0, 0, 100, 100))
    assert target_size(crop, 1000, 1000) == (800, 800)


def test_every_option_of_a_preset_is_filled_and_none_is_left_open():
    stay_open = {"scale", "resolution", "size", "crop", "window_batch", "whole", "tuning"}
    for preset in PRESETS:
        resolved = resolve(UpscaleOptions(preset=preset), SD15, 512, (10, 10))
        assert {name for name, value in resolved if value is None} == stay_open
        for name in PresetValues.model_fields:
            assert getattr(resolved, name) == getattr(preset_values(SD15, preset), name)


def test_what_was_asked_for_wins_over_the_preset():
    resolved = resolve(UpscaleOptions(creativity=0.9), SD15, 512, (10, 10))
    assert resolved.creativity == 0.9


def test_an_open_seed_is_drawn_anew_each_time():
    seeds = {resolve(UpscaleOptions(), SD15, 512, (1, 1)).seed for _ in range(5)}
    assert len(seeds) > 1


def test_resolved_options_give_the_same_again():
    chosen = UpscaleOptions(size=(64, 48), crop=(0, 0, 5, 5), regions=("0,0,0.5,1:a tree",))
    resolved = resolve(chosen, SD15, 512, (10, 10))
    assert resolve(resolved, SD15, 512, (10, 10)) == resolved


def test_the_settings_of_a_result_keep_their_form():
    settings = resolve(
        UpscaleOptions(scale=2, regions=("0,0,0.5,1:a tree",)), SD15, 512, (10, 10)
    ).settings()
    assert not {
        "scale",
        "resolution",
        "size",
        "crop",
        "max_pixels",
        "placed_regions",
        "place",
    } & set(settings)
    assert (settings["width"], settings["height"]) == (20, 20)
    assert settings["regions"] == (
        {"left": 0, "top": 0, "right": 10, "bottom": 20, "feather": 1.25, "prompt": "a tree"},
    )
    assert set(settings["redraw"]) == {
        "tile_width", "tile_height", "tile_padding", "tile_order", "tile_blur", "tile_uniform",
        "seam_fix", "seam_fix_denoise", "seam_fix_width", "seam_fix_blur", "seam_fix_padding",
    }  # fmt: skip


def test_resolved_options_narrow_what_is_open_and_declare_nothing_anew():
    own = set(ResolvedOptions.__annotations__)
    assert own - set(OPTIONS) == {"width", "height", "placed_regions", "whole", "offset"}
    assert own & set(OPTIONS) == {
        *PresetValues.model_fields,
        *("seed", "window", "drawing_prescaler", "drawing_share", "hold_drawings"),
        *("keep_grey", "mend_jpeg", "mend_chroma", "mend_blur", "mend_flat"),
        "likeness",
    }
    source = Path(__file__).parents[2] / "src" / "tegula" / "options.py"
    assert source.read_text().count("Denoise strength: 0 leaves") == 1


@pytest.mark.parametrize("scale", [2, 3, 4, 1.7, 8])
@pytest.mark.parametrize("crop", [(0, 0, 10, 10), (101, 61, 121, 119), (300, 200, 151, 100)])
def test_a_crop_gets_context_and_begins_where_the_nets_grid_has_a_line(scale, crop):
    size = (451, 300)
    options = UpscaleOptions(scale=scale, crop=crop)
    around = with_context(options, size).crop
    assert around is not None
    x, y, width, height = around
    for start, side, first, length, whole in zip(
        crop[:2], crop[2:], (x, y), (width, height), size, strict=True
    ):
        assert first == 0 or start - first >= 32
        assert first + length == min(whole, start + side + 32)
        off = abs(math.remainder(first * scale, 64))
        assert off <= scale / 2


def test_a_crop_as_large_as_the_limit_allows_goes_without_context():
    options = UpscaleOptions(scale=2, crop=(50, 50, 20, 20), max_pixels=40 * 40)
    assert with_context(options, (200, 200)) == options


def test_steps_are_counted_in_one_way():
    assert UpscaleOptions(webui_steps=True, exact_steps=False).webui_steps
    with pytest.raises(OptionError, match="both say how steps are counted"):
        UpscaleOptions(webui_steps=True, exact_steps=True)
