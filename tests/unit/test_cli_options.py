"""Options of an upscale as options of the command line, and progress as lines."""

import re

import click
import pytest
from cli_support import run

from tegula.cli import upscale as upscale_module
from tegula.cli.models import PARTS, models_like
from tegula.cli.options import given_options, option_name, options_like
from tegula.cli.progress import ProgressLines, ProgressRecords, stage_text, time_left
from tegula.cli.several import RemainingWork
from tegula.cli.upscale import UPSCALE
from tegula.errors import InputError, OptionError
from tegula.models import BundleSettings
from tegula.options import OPTIONS, UpscaleOptions
from tegula.progress import Progress, about

SAMPLES = {
    "number": ("0.5", 0.5),
    "integer": ("64", 64),
    "string": ("text", "text"),
    "boolean": (None, True),
}


def parsed(*words):
    return UPSCALE.make_context("upscale", ["a.png", *words]).params


def sample(name):
    """A word of the command line for an option and the value it stands for."""
    if "enum" in OPTIONS[name]:
        return OPTIONS[name]["enum"][-1], OPTIONS[name]["enum"][-1]
    special = {
        "clip_skip": ("2", 2),
        "size": ("30x40", (30, 40)),
        "crop": ("1,2,3,4", (1, 2, 3, 4)),
        "regions": ("0,0,0.5,1:a tree", ("0,0,0.5,1:a tree",)),
    }
    return special.get(name) or SAMPLES[OPTIONS[name]["type"]]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_an_option_of_its_type(name):
    text, value = sample(name)
    words = [option_name(name)] if text is None else [option_name(name), text]
    assert given_options(parsed(*words)) == {name: value}
    assert getattr(UpscaleOptions(**{name: value}), name) == value


def test_no_option_is_set_unless_given():
    assert given_options(parsed()) == {}


def test_flags_can_be_switched_off():
    assert given_options(parsed("--no-guess-mode")) == {"guess_mode": False}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_help_shows_the_effect_of_every_option(name):
    shown = "".join(run("upscale", "--help-all").stdout.split())
    effect = "".join(OPTIONS[name]["description"].removeprefix("Redraw mode: ").split())
    assert effect[1:] in shown
    assert option_name(name) in shown


@pytest.mark.parametrize("words", [("--size", "30"), ("--crop", "1,2,3"), ("--size", "-1x4")])
def test_words_of_another_form_are_refused(words):
    with pytest.raises(click.UsageError, match="not of the form"):
        parsed(*words)


@pytest.mark.parametrize(
    ("word", "lora"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:-0.5", ("a.safetensors", -0.5)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", 1.0)),
        ("123", ("123", 1.0)),
    ],
)
def test_a_lora_and_its_weight(word, lora):
    assert parsed("--lora", word)["loras"] == (lora,)


def test_a_lora_has_a_finite_weight():
    with pytest.raises(click.UsageError, match=r"weight of a\.safetensors is a number, not nan"):
        parsed("--lora", "a.safetensors:nan")


def test_bounds_are_those_of_the_library():
    result = run("upscale", "a.png", "--scale", "17")
    assert result.exit_code == 2
    assert result.stderr == "tegula: scale is between 0.05 and 16 times, not 17.0.\n"


SETTINGS = {
    "version": "0.1.0",
    "width": 100,
    "creativity": 0.3,
    "steps": 12,
    "preset": "faithful",
    "crop": [0, 0, 4, 4],
    "regions": [{"prompt": "a tree"}],
    "asked": {
        "steps": 12,
        "regions": ["0,0,0.5,1:a tree"],
        "size": [30, 40],
        "crop": [0, 0, 4, 4],
        "max_pixels": 10,
    },
    "redraw": {"tile_width": 640},
}


def test_settings_become_options_again():
    options = options_like(SETTINGS, {"hdr": 0.5})
    expected = {"creativity": 0.3, "steps": 12, "preset": "faithful", "size": (30, 40)}
    expected["regions"] = ("0,0,0.5,1:a tree",)
    assert options == UpscaleOptions(**expected, tile_width=640, hdr=0.5)


def test_a_given_preset_fills_its_options_anew():
    options = options_like(SETTINGS, {"preset": "fast"})
    assert (options.preset, options.creativity, options.steps) == ("fast", None, 12)


@pytest.mark.parametrize(
    "damage",
    [{"steps": "12"}, {"creativity": True}, {"prompt": 3}, {"asked": {"size": [1, "x"]}}],
)
def test_damaged_settings_are_refused(damage):
    with pytest.raises(InputError, match="damaged"):
        options_like({**SETTINGS, **damage}, {})


def test_settings_out_of_bounds_are_refused():
    with pytest.raises(InputError, match="damaged: creativity is between 0 and 1, not 7"):
        options_like({"creativity": 7}, {})
    with pytest.raises(OptionError, match="creativity is between 0 and 1, not 8"):
        options_like(SETTINGS, {"creativity": 8})


@pytest.mark.parametrize("damage", [{"asked": [1]}, {"redraw": 5}, {"asked": None}])
def test_settings_that_are_no_objects_are_refused(damage):
    with pytest.raises(InputError, match=r"damaged: (asked|redraw) is"):
        options_like({**SETTINGS, **damage}, {})


@pytest.mark.parametrize(
    "damage",
    [
        5,
        [1],
        {"loras": 5},
        {"loras": [["a", 1.0, 2]]},
        {"loras": ["ab"]},
        {"bundle": 5},
        {"vae": ["a"]},
        {"embeddings": "abc"},
        {"few_step": 1},
    ],
)
def test_damaged_models_are_refused(damage):
    with pytest.raises(InputError, match="damaged: models"):
        models_like({"models": damage}, BundleSettings())


def test_models_of_a_result_become_models_again():
    found = {"models": {"bundle": "mine", "loras": [["a", 1], ["b", 0.5]], "embeddings": ["e"]}}
    assert models_like(found, BundleSettings(vae="v")) == BundleSettings(
        bundle="mine", loras=(("a", 1.0), ("b", 0.5)), embeddings=("e",), vae="v"
    )


def test_lines_are_few_and_none_for_quick_work():
    now = iter(range(0, 1000, 2))
    written = []
    lines = ProgressLines("a.png", written.append, clock=lambda: next(now))
    for done in range(101):
        lines(Progress("refine", done, 100, done / 100, 65.0))
    assert [line.split(",")[0] for line in written] == ["a.png: 25%", "a.png: 50%", "a.png: 75%"]
    assert written[0] == "a.png: 25%, refine 25/100 windows, 0:01:05 left"
    quick = []
    lines = ProgressLines("a.png", quick.append, clock=lambda: 0.0)
    for done in range(101):
        lines(Progress("refine", done, 100, done / 100, 0.0))
    assert quick == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.2, ""),
        (59.4, "0:00:59 left"),
        (125, "0:02:05 left"),
        (7300, "2:01:40 left"),
    ],
)
def test_time_left_is_short(seconds, text):
    assert time_left(Progress("refine", 1, 2, 0.5, seconds)) == text


def test_a_stage_that_begins_is_shown_without_a_count():
    assert stage_text(Progress("refine", 0, 0, 0.5)) == "refine"


def test_stages_without_units_are_shown_by_name():
    assert stage_text(Progress("finish", 1, 1, 1.0)) == "finish"
    assert stage_text(Progress("prescale", 2, 9, 0.1)) == "prescale 2/9 tiles"


def test_models_record_only_what_was_given():
    assert BundleSettings().given() == {}
    assert BundleSettings(vae="x").given() == {"vae": "x"}
    assert set(PARTS) <= set(parsed())


def test_the_help_shows_everyday_options_and_says_where_the_others_are():
    everyday, every = run("upscale", "--help").stdout, run("upscale", "--help-all").stdout
    for name in ("--scale", "--prompt", "--creativity", "--model", "--quality"):
        assert name in everyday
    assert "--help-all" in everyday
    assert "--scheduler" not in everyday
    assert "--scheduler" in every
    assert len(everyday) < len(every) / 2
    (quality,) = re.findall(r"--quality.*?\n  --", "".join(everyday), re.DOTALL)
    assert "".join(quality.split()).count("100") == 1
    assert run("plan", "--help").stdout.count("--scheduler") == 0


def configured(tmp_path, monkeypatch, text):
    file = tmp_path / "config.toml"
    file.write_text(text, "utf-8")
    monkeypatch.setenv("TEGULA_CONFIG", str(file))


def requests(monkeypatch, *words):
    """Return what a command would do."""
    found = []
    monkeypatch.setattr(
        upscale_module, "work_of", lambda _, request: found.append(request) or 1 / 0
    )
    result = run("upscale", "a.png", *words)
    assert found, result.stderr
    return found[0]


DEFAULTS = """
[upscale]
quality = 80
scale = 4
creativity = 0.2
negative-prompt = "blurry"
model = "mine"
lora = ["a:0.5", "b"]
overwrite = true
"""


def test_defaults_come_from_a_file_of_the_user(tmp_path, monkeypatch):
    configured(tmp_path, monkeypatch, DEFAULTS)
    found = requests(monkeypatch)
    assert (found.quality, found.overwrite) == (80, True)
    assert found.options == UpscaleOptions(scale=4, creativity=0.2, negative_prompt="blurry")
    assert found.models == BundleSettings(bundle="mine", loras=(("a", 0.5), ("b", 1.0)))


def test_what_is_given_goes_before_the_file_of_the_user(tmp_path, monkeypatch):
    configured(tmp_path, monkeypatch, DEFAULTS)
    options = requests(monkeypatch, "--resolution", "500", "--creativity", "0.6").options
    assert options == UpscaleOptions(resolution=500, creativity=0.6, negative_prompt="blurry")
    options = requests(monkeypatch, "--preset", "creative").options
    assert options.changed() == {"scale": 4.0, "preset": "creative"}
    monkeypatch.setattr(upscale_module, "read_like", lambda _: {"scale": 3, "asked": {"scale": 3}})
    like = requests(monkeypatch, "--like", "b.png")
    assert like.options == UpscaleOptions(scale=3)
    assert (like.models, like.quality) == (BundleSettings(), 80)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[upscale]\nqualty = 1", "sets qualty of upscale, which has no such option"),
        ("[upscal]\nquality = 1", "sets upscal, which is no section"),
        ("quality = 1", "sets quality, which is no section"),
        ("[upscale", "is not TOML"),
        ("[upscale]\nquality = 101", "101"),
    ],
)
def test_mistakes_in_the_file_of_the_user_are_named(tmp_path, monkeypatch, text, says):
    configured(tmp_path, monkeypatch, text)
    result = run("upscale", "a.png")
    assert result.exit_code == 2
    assert says in result.stderr
    monkeypatch.setenv("TEGULA_CONFIG", str(tmp_path / "other.toml"))
    assert run("upscale", "a.png").exit_code == 5
    assert "other.toml, which TEGULA_CONFIG names, does not exist" in run("models").stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (99, "99 s"),
        (100, "2 min"),
        (720, "12 min"),
        (5969, "99 min"),
        (9000, "2.5 h"),
    ],
)
def test_times_are_said_as_people_say_them(seconds, text):
    assert about(seconds) == text


def test_a_folder_takes_what_its_pictures_take_by_their_size():
    now = [0.0]
    remaining = RemainingWork([100, 0, 300, 600], clock=lambda: now[0])
    remaining.begin(0)
    assert remaining.text(Progress("refine", 1, 2, 0.5, 60.0)) == "1 of 3, 10 min left in all"
    now[0] = 30.0
    assert remaining.left(Progress("refine", 1, 2, 0.5, 30.0)) == 30 + 60 * 9
    now[0] = 60.0
    assert remaining.text_after(1) == "1 of 3, 9 min left in all"
    remaining.begin(2)
    assert remaining.text_after(1) == "1 of 3, 9 min left in all"
    now[0] = 240.0
    assert remaining.left(Progress("finish", 1, 1, 1.0, 0.0)) == 240 * 600 / 400
    remaining.begin(3)
    assert remaining.text(Progress("prepare", 0, 0, 0.0)) == "3 of 3"
    assert remaining.text_after(2) == "2 of 3, 6 min left in all"


def test_nothing_is_left_after_the_last_picture_nor_of_one_that_failed():
    now = [0.0]
    remaining = RemainingWork([100, 100, 100], clock=lambda: now[0])
    remaining.begin(0)
    now[0] = 60.0
    remaining.skip(1)  # its file is damaged
    assert remaining.text_after(2) == "2 of 3, 60 s left in all"
    remaining.begin(2)
    assert remaining.text_after(2) == "2 of 3, 60 s left in all"
    now[0] = 120.0
    assert remaining.text_after(3) == "3 of 3"


def test_a_folder_stands_in_the_lines_of_its_pictures():
    written, now = [], iter(range(0, 1000, 10))
    lines = ProgressLines("a.png", written.append, lambda _: "2 of 9", clock=lambda: next(now))
    lines(Progress("refine", 30, 100, 0.3, 65.0))
    assert written == ["a.png: 30%, refine 30/100 windows, 0:01:05 left; 2 of 9"]


def test_programs_read_a_line_for_every_hundredth():
    written = []
    records = ProgressRecords("a.png", written.append)
    for thousandth in range(1001):
        records(Progress("refine", 1, 2, thousandth / 1000, 5.0))
    assert len(written) == 101
    assert written[50]["input"] == "a.png"
    assert written[50]["progress"] == {
        "stage": "refine",
        "done": 1,
        "total": 2,
        "fraction": 0.5,
        "seconds_left": 5.0,
    }
