"""`tegula upscale`, with the tiny bundle behind it."""

import errno
import io
import json

import pytest
from cli_support import PLAIN, names_in, picture, picture_bytes, put, run, size_of, upscale
from PIL import ExifTags, Image

from tegula import folders as folders_module
from tegula import upscaler as upscaler_module
from tegula.errors import CancelledError, MissingWeightsError
from tegula.expectation import Expectation
from tegula.images.decode import decode
from tegula.images.encode import read_settings
from tegula.images.open import upright_size
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle


@pytest.fixture(scope="module")
def tiny():
    return Upscaler(tiny_bundle())


@pytest.fixture
def loads(monkeypatch, tiny):
    """The arguments of every load of a model."""
    arguments = []
    load = staticmethod(lambda **named: arguments.append(named) or tiny)
    monkeypatch.setattr(upscaler_module.Upscaler, "load", load)
    return arguments


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, loads):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_picture_becomes_twice_as_large_beside_itself(folder):
    put(folder / "a.jpg")
    result = upscale("a.jpg")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "a_x2.jpg: 24x16, seed 7" in result.stderr
    assert size_of("a_x2.jpg") == (24, 16)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (("--scale", "3"), (36, 24)),
        (("--resolution", "20"), (30, 20)),
        (("--size", "31x17"), (31, 17)),
        (("--scale", "8", "--crop", "2,3,5,4"), (40, 32)),
    ],
)
def test_the_size_of_the_result(folder, options, size):
    put(folder / "a.png")
    assert upscale("a.png", "out.png", *options).exit_code == 0
    assert size_of("out.png") == size


def test_every_format_is_written_as_its_ending_says(folder):
    put(folder / "a.png")
    for ending, magic in (("jpg", b"\xff\xd8"), ("webp", b"RIFF"), ("tiff", b"II")):
        assert upscale("a.png", f"out.{ending}").exit_code == 0
        assert (folder / f"out.{ending}").read_bytes().startswith(magic)


def test_a_result_that_is_there_is_not_replaced_without_overwrite(folder, loads):
    put(folder / "a.png")
    upscale("a.png", "out.png")
    before = (folder / "out.png").read_bytes()
    result = upscale("a.png", "out.png", "--scale", "3")
    assert result.exit_code == 5
    assert "--overwrite" in result.stderr
    assert (folder / "out.png").read_bytes() == before
    assert upscale("a.png", "out.png", "--scale", "3", "--overwrite").exit_code == 0
    assert size_of("out.png") == (36, 24)


def test_with_progress_programs_see_the_work_and_a_folder_says_how_far_it_is(folder):
    for name in ("a.png", "b.png"):
        put(folder / "in" / name)
    done = upscale("in", "out/")
    assert "1 of 2" in done.stderr
    assert "2 of 2" in done.stderr
    done = upscale("in", "again/", "--json", "--progress")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    moved = [
        each["progress"]["fraction"]
        for each in records
        if each.get("input") == "in/a.png" and "progress" in each
    ]
    assert moved == sorted(set(moved))
    assert moved[-1] == 1
    plain = upscale("in", "third/", "--json")
    assert len(plain.stdout.splitlines()) == 2


def test_long_work_says_beforehand_how_long_it_takes_and_what_is_quicker(folder, monkeypatch):
    for name in ("a.png", "b.png"):
        put(folder / "in" / name)
    expected = {"prepare": 1.0, "prescale": 170.0, "refine": 9.0, "finish": 0.0}
    monkeypatch.setattr(Expectation, "known", lambda *_: expected)
    monkeypatch.setattr(Expectation, "with_preset", lambda *_: 15.0)
    sentence = "expected to take about 3 min; with --preset fast about 15 s"
    assert f"in/a.png: {sentence}" in upscale("in/a.png", "one.png").stderr
    assert "--preset fast" not in upscale("in/a.png", "two.png", "--preset", "fast").stderr
    folders = upscale("in", "out/").stderr
    assert folders.count("expected to take") == 1
    assert "2 pictures: expected to take about 6 min; with --preset fast about 30 s" in folders
    expected.update(prescale=5.0, refine=2.0)
    assert "expected" not in upscale("in/a.png", "three.png").stderr


def test_overwrite_does_not_replace_what_could_be_a_second_source(folder):
    put(folder / "a.png")
    put(folder / "b.png")
    result = upscale("a.png", "b.png", "--overwrite")
    assert result.exit_code == 2
    assert "--output" in result.stderr
    assert size_of("b.png") == (12, 8)
    assert upscale("a.png", "--output", "b.png", "--overwrite").exit_code == 0
    assert size_of("b.png") == (24, 16)


def test_a_folder_loads_the_model_once_and_a_second_run_skips(folder, loads):
    for name in ("a.jpg", "b.png"):
        put(folder / "in" / name)
    assert upscale("in", "out/").exit_code == 0
    assert names_in(folder / "out") == ["a.jpg", "b.png"]
    assert len(loads) == 1
    again = upscale("in", "out/")
    assert again.exit_code == 0
    assert "2 skipped" in again.stderr
    assert len(loads) == 1


def test_a_bad_picture_does_not_stop_the_others(folder):
    put(folder / "in" / "z.png")
    (folder / "in" / "broken.png").write_bytes(picture_bytes()[:60])
    (folder / "in" / "empty.jpg").write_bytes(b"")
    result = upscale("in", "out/")
    assert result.exit_code == 3
    assert names_in(folder / "out") == ["z.png"]
    assert "1 done, 2 failed" in result.stderr
    failures = [line for line in result.stderr.splitlines() if line.startswith("tegula: ")]
    assert len(failures) == 2
    assert "broken.png" in failures[0]
    assert "empty.jpg" in failures[1]


def test_the_status_is_that_of_the_first_failure(folder):
    put(folder / "a.png")
    put(folder / "b.png")
    (folder / "empty.jpg").write_bytes(b"")
    assert upscale("a.png", "missing.png", "empty.jpg", "out/").exit_code == 5
    assert upscale("empty.jpg", "missing.png", "b.png", "out/").exit_code == 3


def test_a_model_that_cannot_be_loaded_stops_the_whole_folder(folder, monkeypatch):
    for name in ("a.jpg", "b.png"):
        put(folder / "in" / name)

    def load(**named):
        raise MissingWeightsError("The weights are not here.")

    monkeypatch.setattr(upscaler_module.Upscaler, "load", load)
    result = upscale("in", "out/")
    assert result.exit_code == 6
    assert result.stderr.splitlines() == ["2 not begun", "tegula: The weights are not here."]
    assert not (folder / "out").exists()


def test_standard_input_to_standard_output(folder):
    result = upscale("-", "-", stdin=picture_bytes("JPEG"))
    assert result.exit_code == 0, result.stderr
    (folder / "out.png").write_bytes(result.stdout_bytes)
    assert size_of("out.png") == (24, 16)
    assert names_in(folder) == ["out.png"]


def test_standard_output_in_another_format(folder):
    put(folder / "a.png")
    result = upscale("a.png", "-", "--format", "webp")
    assert result.stdout_bytes[8:12] == b"WEBP"


@pytest.mark.parametrize("option", ["--json", "--compare"])
def test_standard_output_takes_nothing_beside_the_picture(folder, option):
    result = upscale("-", "-", option, stdin=picture_bytes())
    assert result.exit_code == 2
    assert result.stdout == "" or "error" in json.loads(result.stdout)


def test_compare_writes_before_and_after_beside_the_result(folder):
    put(folder / "a.png")
    result = upscale("a.png", "out.jpg", "--compare")
    assert names_in(folder) == ["a.png", "out.compare.png", "out.jpg"]
    assert size_of("out.compare.png")[0] > 2 * 24
    assert "out.compare.png" in result.stderr


def test_json_tells_all_of_each_result_and_nothing_else(folder):
    put(folder / "in" / "a.png")
    (folder / "in" / "b.png").write_bytes(b"nothing")
    result = upscale("in", "out/", "--json", "--compare")
    assert result.stderr == ""
    good, bad = records(result)
    assert (good["input"], good["output"]) == ("in/a.png", "out/a.png")
    assert good["compare"] == "out/a.compare.png"
    assert (good["width"], good["height"], good["seed"]) == (24, 16, 7)
    assert good["options"]["prescaler"] == "lanczos"
    assert set(good["timings"]) == {"prepare", "prescale", "refine", "finish"}
    assert good["warnings"] == []
    stored = read_settings(folder / "out" / "a.png")
    assert good["settings"] == stored
    assert bad["input"] == "in/b.png"
    assert bad["error"]["code"] == "invalid_image"
    assert records(upscale("in/a.png", "out/", "--json")) == [
        {"input": "in/a.png", "output": "out/a.png", "skipped": True}
    ]


def test_json_tells_errors_too(folder):
    result = upscale("missing.png", "--json")
    assert result.exit_code == 5
    assert records(result)[0]["error"]["code"] == "path"
    assert result.stderr == ""


def test_quiet_says_nothing_unless_something_is_wrong(folder):
    put(folder / "a.png")
    good = upscale("a.png", "--quiet")
    assert good.output == ""
    assert len(upscale("a.png", "--quiet").stderr.splitlines()) == 1


def test_like_repeats_a_result_bit_for_bit(folder):
    put(folder / "a.png")
    options = ("--scale", "3", "--hdr", "0.5", "--prompt", "süß")
    assert upscale("a.png", "first.png", *options).exit_code == 0
    assert run("upscale", "a.png", "second.png", "--like", "first.png").exit_code == 0
    with Image.open("first.png") as one, Image.open("second.png") as other:
        assert one.tobytes() == other.tobytes()
    first, second = read_settings(folder / "first.png"), read_settings(folder / "second.png")
    first.pop("asked")
    second.pop("asked")
    assert first == second


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        (("--scale", "3"), (), (60, 30)),
        (("--resolution", "40"), (), (80, 40)),
        (("--size", "33x44"), (), (33, 44)),
        (("--scale", "4", "--crop", "1,1,4,4"), (), (80, 40)),
        (("--resolution", "40"), ("--scale", "1.5"), (30, 15)),
        ((), (), (40, 20)),
    ],
)
def test_like_sizes_anew_for_the_other_picture(folder, before, given, expected):
    put(folder / "a.png")
    put(folder / "b.png", width=20, height=10)
    assert upscale("a.png", "result.png", *before).exit_code == 0
    result = run("upscale", "b.png", "other.png", "--like", "result.png", *given)
    assert result.exit_code == 0, result.stderr
    assert size_of("other.png") == expected


def test_what_is_given_beside_like_wins(folder):
    put(folder / "a.png")
    upscale("a.png", "result.webp", "--colour-lock", "adain")
    run("upscale", "a.png", "other.png", "--like", "result.webp", "--seed", "99")
    settings = read_settings(folder / "other.png")
    assert settings["seed"] == 99
    assert settings["colour_lock"] == "adain"


def test_like_takes_the_models_too(folder, loads):
    put(folder / "a.png")
    models = ("--model", "mine", "--lora", "fine.safetensors:0.5", "--lora", "more.safetensors")
    upscale("a.png", "result.png", *models)
    run("upscale", "a.png", "other.png", "--like", "result.png")
    assert loads[1]["bundle"] == "mine"
    assert loads[1]["loras"] == (("fine.safetensors", 0.5), ("more.safetensors", 1.0))
    assert loads[0] == loads[1]
    run("upscale", "a.png", "third.png", "--like", "result.png", "--model", "yours")
    assert loads[2]["bundle"] == "yours"
    assert loads[2]["loras"] == ()


def test_like_needs_a_result(folder):
    put(folder / "a.png")
    result = upscale("a.png", "--like", "a.png")
    assert result.exit_code == 2
    assert "holds no settings" in result.stderr


def test_nothing_is_loaded_for_what_cannot_be_done(folder, loads):
    put(folder / "a.png")
    (folder / "no.png").write_text("text")
    for words in (
        ("missing.png",),
        ("no.png",),
        ("a.png", "nowhere/out.png"),
        ("a.png", "--scale", "99"),
        ("a.png", "out.webp", "--size", "17000x2"),
        ("a.png", "--scale", "16", "--max-pixels", "100"),
        ("a.png", "--quality", "0"),
        ("a.png", "out.png", "--format", "gif"),
        ("a.png", "out.png", "--preview", "nowhere/preview.png"),
        ("a.png", "out.png", "--preview", "preview.gif"),
        ("a.png", "out.png", "--preview", "a.png"),
        ("a.png", "out.png", "--mask", "missing.png"),
        ("a.png", "out.png", "--strength-map", "no.png"),
    ):
        result = upscale(*words)
        assert result.exit_code in (2, 3, 4, 5), words
        assert result.stderr.count("\n") == 1 or result.stderr.startswith("Usage"), words
    assert loads == []
    assert names_in(folder) == ["a.png", "no.png"]


@pytest.mark.parametrize("turn", [1, 3, 6])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_header_tells_the_size_that_decoding_finds(file_format, turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    buffer = io.BytesIO()
    picture().save(buffer, file_format, exif=exif)
    decoded = decode(buffer.getvalue(), max_pixels=1000)
    assert upright_size(buffer.getvalue(), max_pixels=1000) == decoded.facts.size


def test_an_unwritable_folder_is_found_before_the_work(folder, loads, monkeypatch):
    put(folder / "a.png")

    def refused(**named):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    result = upscale("a.png", "locked/")
    assert result.exit_code == 5
    assert result.stderr == "tegula: locked/a.png cannot be written: Permission denied.\n"
    assert loads == []
    assert names_in(folder) == ["a.png"]


def test_a_result_for_a_device_is_written_to_it(folder):
    put(folder / "a.png")
    assert upscale("a.png", "/dev/null", "--format", "png").exit_code == 0


def test_a_cancelled_folder_tells_what_is_left(folder, monkeypatch, tiny):
    for name in ("a.png", "b.png", "c.png"):
        put(folder / "in" / name)
    answers = iter([tiny.upscale])

    def stopping(*words, **named):
        for work in answers:
            return work(*words, **named)
        raise CancelledError("Cancelled.")

    monkeypatch.setattr(tiny, "upscale", stopping, raising=False)
    result = upscale("in", "out/")
    assert result.exit_code == 130
    assert "1 done, 2 not begun" in result.stderr
    assert names_in(folder / "out") == ["a.png"]


def test_the_options_reach_the_upscaler(folder):
    put(folder / "a.png")
    options = ("--steps", "2", "--scheduler", "euler", "--guess-mode", "--preset", "fast")
    result = run(
        "upscale", "a.png", "--json", *PLAIN[:2], "--creativity", "0.5", *options, "--window", "64"
    )
    used = records(result)[0]["options"]
    assert (used["steps"], used["scheduler"], used["preset"]) == (2, "euler", "fast")
    assert used["guess_mode"]


def test_a_full_disk_stops_a_batch_and_is_said_once(folder, monkeypatch):
    for name in "abcd":
        put(folder / "in" / f"{name}.png")
    whole = folders_module._replace

    def full_after_one(target, data):
        if target.name != "a.png":
            raise OSError(errno.ENOSPC, "no room")
        whole(target, data)

    with monkeypatch.context() as patched:
        patched.setattr(folders_module, "_replace", full_after_one)
        result = upscale("in", "out/")
    assert result.exit_code == 5
    assert result.stderr.count("cannot be written: the disk is full") == 1
    assert "goes on from here" in result.stderr
    assert "not begun" in result.stderr
    assert names_in(folder / "out") == ["a.png"]
    assert upscale("in", "out/").exit_code == 0
    assert names_in(folder / "out") == ["a.png", "b.png", "c.png", "d.png"]


def test_files_of_a_folder_that_are_no_pictures_are_told_once(folder):
    put(folder / "in" / "a.png")
    (folder / "in" / "notes.txt").write_text("no picture")
    result = upscale("in", "out/")
    assert result.stderr.count("notes.txt") == 1
    assert "1 file is not a picture by its name and is left out: notes.txt." in result.stderr
    again = records(upscale("in", "out/", "--json", "--overwrite"))
    assert again[0] == {"left_out": ["in/notes.txt"]}
    assert len(again) == 2


def animation(folder, name="a.gif", **parameters):
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180), picture()]
    frames[0].save(folder / name, save_all=True, append_images=frames[1:], **parameters)


def test_the_first_frame_is_enlarged_with_a_warning_or_all_of_them(folder):
    animation(folder, duration=[50, 70, 90])
    result = upscale("a.gif", "first.png")
    assert result.stderr.count("has 3 frames, of which only the first is enlarged") == 1
    result = run(
        "upscale",
        "a.gif",
        "all.png",
        "--frames",
        "all",
        "--json",
        "--steps",
        "4",
        "--prescaler",
        "lanczos",
        "--creativity",
        "0.5",
    )
    (record,) = records(result)
    assert (record["frames"], record["warnings"]) == (3, [])
    with Image.open("all.png") as image:
        assert (image.n_frames, image.size) == (3, (24, 16))
        shown = []
        for number in range(3):
            image.seek(number)
            shown.append((image.convert("RGB"), image.info["duration"]))
    assert [duration for _, duration in shown] == [50, 70, 90]
    # The noise belongs to the place, so that equal frames stay equal, with a random seed, too.
    assert shown[0][0].tobytes() == shown[2][0].tobytes() != shown[1][0].tobytes()
    assert read_settings("all.png")["seed"] == record["seed"]


def test_all_pages_go_into_a_folder_of_results_and_jpeg_is_refused(folder):
    (folder / "in").mkdir()
    animation(folder / "in", "a.tif")
    put(folder / "in" / "b.png")
    assert upscale("in", "out", "--frames", "all").exit_code == 0
    with Image.open("out/a.tif") as image:
        assert (image.n_frames, image.size) == (3, (24, 16))
    assert size_of("out/b.png") == (24, 16)
    refused = upscale("in/a.tif", "a.jpg", "--frames", "all")
    assert refused.exit_code == 2
    assert "JPEG holds one picture, and the source has 3 pages" in refused.stderr
