"""`tegula tune`, with the tiny bundle behind it."""

import json
import shlex

import numpy as np
import pytest
from cli_support import picture, put, run
from colour_profiles import wide_rgb
from PIL import Image

from tegula.cli.sheet import liveliest
from tegula.images.decode import decode
from tegula.options import PRESETS
from tegula.pipeline import prescale
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle


@pytest.fixture(scope="module")
def tiny():
    return Upscaler(tiny_bundle())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Upscaler, "load", staticmethod(lambda **_: tiny))
    return tmp_path


@pytest.fixture
def passes(monkeypatch):
    """The sizes that nets enlarged to."""
    sizes = []
    whole = prescale.prescale

    def counted(rgb, size, *given, **named):
        sizes.append(size)
        return whole(rgb, size, *given, **named)

    monkeypatch.setattr(prescale, "prescale", counted)
    return sizes


def tuned(*words):
    result = run("tune", *words, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_cell_is_what_its_command_makes(folder, passes):
    put(folder / "my photo.png", width=96, height=64)
    words = ("my photo.png", "--prescaler", "lanczos", "--steps", "3", "--crop", "40,16,32,24")
    *cells, last = tuned(*words, "--vary", "creativity=0.3,0.8", "--vary", "resemblance=0.5,1")
    assert len(passes) == 1
    assert [cell["settings"] for cell in cells] == [
        {"creativity": c, "resemblance": r} for c in ("0.3", "0.8") for r in ("0.5", "1")
    ]
    assert last == {
        "input": "my photo.png",
        "output": "my photo_tune.png",
        "crop": [40, 16, 32, 24],
    }
    sheet = np.asarray(Image.open("my photo_tune.png").convert("RGB"))
    command = shlex.split(cells[1]["command"])
    assert command[:3] == ["tegula", "upscale", "my photo.png"]
    assert "--crop" not in command
    made = run(*command[1:], "--crop", "40,16,32,24", "--output", "cell.png")
    assert made.exit_code == 0, made.stderr
    expected = np.asarray(Image.open("cell.png").convert("RGB"))
    found = np.lib.stride_tricks.sliding_window_view(sheet, expected.shape)[:, :, 0]
    corner = (sheet.shape[1] - 12) // 2 + 12  # the second column begins there
    assert any((found[y, corner] == expected).all() for y in range(found.shape[0]))
    assert not any((found[y, 12] == expected).all() for y in range(found.shape[0]))


def test_without_vary_the_presets_are_tried_that_the_model_tells_apart(folder, tiny, monkeypatch):
    put(folder / "a.png", width=48, height=40)
    words = ("a.png", "--prescaler", "lanczos", "--steps", "2", "--scale", "4")
    *cells, last = tuned(*words)
    assert [cell["settings"]["preset"] for cell in cells] == [
        each for each in PRESETS if each != "best"
    ]
    assert all("--seed 1 --preset" in cell["command"] for cell in cells)
    assert last["crop"][2:] == [48, 40]
    monkeypatch.setattr("tegula.cli.tune.offered_presets", lambda _: ("balanced", "fast"))
    again = run("tune", *words)
    assert again.exit_code == 5
    assert "--overwrite" in again.stderr
    fewer = run("tune", *words, "--overwrite", "--vary", "preset=fast,exact")
    assert "2 cells" in fewer.stderr
    fewer = run("tune", *words, "--overwrite")
    assert "they look like balanced: faithful, creative, best, exact." in fewer.stderr
    assert "2: tegula upscale a.png" in fewer.stderr
    assert "2 cells" in fewer.stderr


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        (("creativity",), "OPTION=VALUE"),
        (("creativity=",), "OPTION=VALUE"),
        (("colour=red",), "one value, such as creativity or preset, not colour"),
        (("size=3x4",), "one value, such as creativity or preset, not size"),
        (("steps=2", "steps=3"), "--vary steps is there twice"),
        (("steps=2,x",), "steps is a whole number, not x"),
        (("creativity=0.2,7",), "creativity"),
        (("auto=on,maybe",), "on or off"),
        (("seed=" + ",".join(map(str, range(37))),), "37 cells"),
        (("seed=1", "steps=2", "detail=1"), "once or twice"),
    ],
)
def test_values_that_cannot_be_varied_are_refused_in_a_sentence(folder, vary, words):
    put(folder / "a.png")
    given = [part for text in vary for part in ("--vary", text)]
    result = run("tune", "a.png", *given)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (folder / "a_tune.png").exists()


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("a.png", "--output", "missing/sheet.png"), 5, "its folder does not exist"),
        (("a.png", "--output", "a.png", "--overwrite"), 5, "a.png is the picture itself"),
        (("a.png", "--output", "-"), 2, "give names, not `-`"),
        (("-",), 2, "give names, not `-`"),
        (("a.png", "--crop", "20,20,20,20"), 2, "leaves the picture"),
    ],
)
def test_what_cannot_become_a_sheet_is_refused_before_any_work(
    folder, monkeypatch, passes, words, status, sentence
):
    path = put(folder / "a.png", width=32, height=24)
    before = path.read_bytes()

    def load(**_):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(Upscaler, "load", staticmethod(load))
    result = run("tune", *words, "--prescaler", "lanczos", "--steps", "1")
    assert (result.exit_code, passes) == (status, [])
    assert sentence in result.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["upscale", "plan", "tune"])
def test_a_face_model_that_is_not_there_is_named_before_a_model_is_loaded(
    folder, monkeypatch, command
):
    put(folder / "a.png", width=32, height=24)

    def load(**_):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(Upscaler, "load", staticmethod(load))
    result = run(command, "a.png", "--faces", "foo")
    assert "There is no face model 'foo'; choose GFPGANv1.4" in result.stderr


def test_the_sheet_shows_transparency_and_colours_of_a_profile_as_viewers_do(folder):
    marked = Image.new("RGBA", (32, 32), (200, 40, 40, 0))
    marked.paste((200, 40, 40, 255), (0, 16, 32, 32))
    marked.save("a.png", icc_profile=wide_rgb())
    tuned("a.png", "--prescaler", "lanczos", "--creativity", "0", "--vary", "exact=on")
    sheet = np.asarray(Image.open("a_tune.png").convert("RGB")).astype(int)
    cell = sheet[29:93, 12:76]
    assert len(np.unique(cell[4:20].reshape(-1, 3), axis=0)) == 2
    assert (np.ptp(cell[4:20], axis=2) == 0).all()
    given = decode(folder / "a.png", max_pixels=10_000).rgb[24, 16] * 255
    assert abs(cell[48, 32] - given).max() <= 2
    assert abs(cell[48, 32] - (200, 40, 40)).max() > 10


def test_the_part_of_a_strip_is_as_long_as_that_of_other_pictures(folder):
    strip = np.full((900, 1, 3), 0.5, np.float32)
    strip[700::2] = 1
    x, y, width, height = liveliest(strip, 128)
    assert (x, width, height) == (0, 1, 128)
    assert 572 < y <= 772
    assert liveliest(strip.transpose(1, 0, 2), 2000)[2:] == (900, 1)
    put(folder / "a.png", width=24, height=24)
    alone = run("tune", "a.png", "--prescaler", "lanczos", "--vary", "steps=1")
    assert "a_tune.png: 1 cell of 0,0,24,24" in alone.stderr


def test_the_part_is_where_most_is_going_on_beside_something_flat():
    flat = np.full((200, 300, 3), 0.5, np.float32)
    busy = flat.copy()
    noise = np.asarray(Image.effect_noise((300, 200), 90), np.float32)[..., None] / 255
    checks = (np.indices((200, 300)).sum(0) // 3 % 2)[..., None].astype(np.float32)
    busy[:, 180:260] = (checks * noise)[:, 180:260]
    x, y, width, height = liveliest(busy, 60)
    assert (width, height) == (60, 60)
    assert 0 <= y <= 140
    assert 180 - 60 < x < 260
    assert liveliest(flat, 60)[2:] == (60, 60)
    assert liveliest(np.asarray(picture(20, 16), np.float32) / 255, 16)[2:] == (16, 16)


def test_defaults_of_upscale_count_for_a_sheet_but_for_its_place(folder, monkeypatch):
    put(folder / "a.png", width=24, height=24)
    file = folder / "config.toml"
    file.write_text('[upscale]\noutput = "large/"\nscale = 3\nprescaler = "lanczos"\n')
    monkeypatch.setenv("TEGULA_CONFIG", str(file))
    *_, last = tuned("a.png", "--vary", "steps=2")
    assert last["output"] == "a_tune.png"
