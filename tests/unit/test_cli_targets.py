"""Which pictures are read, and where each result goes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli_support import put, run
from hypothesis import given, settings
from hypothesis import strategies as st

from tegula.cli.targets import Job, Naming, SideFiles, check_job, find_work, format_of_target
from tegula.errors import InputError, OptionError, PathError, TegulaError
from tegula.folders import write_atomically
from tegula.options import UpscaleOptions


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def work(*words, output=None, **naming):
    return find_work(words, output, Naming(**naming))


def targets(*words, **settings):
    return [str(job.target) for job in work(*words, **settings).jobs]


def holiday():
    for name in ("a.jpg", "b.PNG", "sub/c.webp", ".hidden.jpg"):
        put(Path("holiday") / name)
    Path("holiday/notes.txt").write_text("no picture")


@pytest.mark.parametrize(
    ("source", "naming", "expected"),
    [
        ("x/a.jpg", {}, "x/a_x2.jpg"),
        ("a.PNG", {"size": "_2560px"}, "a_2560px.PNG"),
        ("a.bmp", {}, "a_x2.png"),
        ("a", {}, "a_x2.png"),
        ("a.jpg", {"format": "tiff"}, "a_x2.tif"),
        ("a.jpeg", {"format": "jpeg"}, "a_x2.jpeg"),
        ("a.jpg", {"crop": "_crop"}, "a_x2_crop.jpg"),
    ],
)
def test_one_picture_goes_beside_itself_in_its_own_format(source, naming, expected):
    assert targets(source, **naming) == [expected]


def test_the_last_word_is_the_file_of_the_result():
    found = work("a.jpg", "b.webp")
    assert found.jobs == (Job(Path("a.jpg"), Path("b.webp"), "webp"),)
    assert found.guessed
    assert not found.resumes


def test_an_output_given_apart_is_not_guessed():
    assert not work("a.jpg", output="b.png").guessed


@pytest.mark.parametrize("words", [("holiday", "large/"), ("holiday/", "large/")])
def test_a_folder_gives_its_pictures_and_no_others(words):
    holiday()
    assert targets(*words) == ["large/a.jpg", "large/b.PNG"]
    assert work(*words).resumes


def test_a_folder_that_is_there_needs_no_slash():
    Path("large").mkdir()
    assert targets("a.jpg", "large") == ["large/a.jpg"]


def test_several_pictures_make_the_folder_that_is_not_there():
    holiday()
    assert targets("holiday", "large") == ["large/a.jpg", "large/b.PNG"]
    assert targets("a.jpg", "b.jpg", "v1.2") == ["v1.2/a.jpg", "v1.2/b.jpg"]


def test_a_link_beside_its_target_is_a_picture_of_its_own_name():
    put(Path("holiday/a.jpg"))
    Path("holiday/latest.jpg").symlink_to("a.jpg")
    assert targets("holiday", "large/") == ["large/a.jpg", "large/latest.jpg"]
    assert targets("holiday/a.jpg", "x/../holiday/a.jpg", "large/") == ["large/a.jpg"]


def test_devices_of_streams_are_streams():
    assert work("/dev/stdin", "/dev/stdout").jobs == (Job(None, None, "png"),)
    assert work("a.jpg", "/dev/fd/1", format="webp").jobs == (Job(Path("a.jpg"), None, "webp"),)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_needs_no_ending_and_is_written_to():
    os.mkfifo("pipe")
    (job,) = work("a.jpg", "pipe").jobs
    assert job.format == "png"
    with ThreadPoolExecutor() as pool:
        read = pool.submit(Path("pipe").read_bytes)
        write_atomically(Path("pipe"), b"a picture")
        assert read.result() == b"a picture"
    reading, writing = os.pipe()
    write_atomically(Path(f"/dev/fd/{writing}"), b"more")
    assert os.read(reading, 10) == b"more"
    assert work("a.jpg", f"/dev/fd/{writing}").jobs[0].format == "png"


def test_a_name_too_long_for_its_comparison_is_found_before_the_work():
    put(Path("a.png"))
    job = Job(Path("a.png"), Path("o" * 248 + ".png"), "png")
    options = UpscaleOptions()
    check_job(job, job.source, options, makes_folder=False)
    with pytest.raises(PathError, match="its name has 260 bytes"):
        check_job(job, job.source, options, makes_folder=False, compares=True)
    longer = Job(Path("a.png"), Path("ö" * 130 + ".png"), "png")
    with pytest.raises(PathError, match="its name has 264 bytes"):
        check_job(longer, longer.source, options, makes_folder=True)


def test_a_pattern_keeps_the_subfolders_below_its_fixed_part():
    holiday()
    expected = ["large/a.jpg", "large/sub/c.webp"]
    assert sorted(targets("holiday/**/*.[jw]*", "large/")) == expected
    assert targets("*/sub/*.webp", output="large/") == ["large/holiday/sub/c.webp"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file():
    put(Path("a[1].png"))
    assert targets("a[1].png") == ["a[1]_x2.png"]


def test_a_picture_given_twice_is_one():
    assert targets("a.jpg", "./a.jpg", "large/") == ["large/a.jpg"]


def test_a_picture_into_its_own_folder_is_called_as_beside():
    assert targets("a.jpg", "./") == ["a_x2.jpg"]


def test_streams():
    assert work("-").jobs == (Job(None, None, "png"),)
    assert work("-", "-", format="webp").jobs == (Job(None, None, "webp"),)
    assert work("-", "b.jpg").jobs == (Job(None, Path("b.jpg"), "jpeg"),)
    assert work("a.jpg", output="-").jobs == (Job(Path("a.jpg"), None, "png"),)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("a.jpg", "b.jpg", "c.jpg"), OptionError, "c.jpg does not exist.*slash"),
        (("holiday",), OptionError, "FOLDER/"),
        (("holiday", "-"), OptionError, "FOLDER/"),
        (("https://example.org/a.jpg",), InputError, "https://example.org/a.jpg is an address"),
        (("a.jpg", "HTTP://example.org/a.png"), InputError, "is an address"),
        (("data:image/png;base64,AAAA", "b.png"), InputError, "is an address"),
        (("a.jpg", "https://example.org/a.png"), InputError, "address, and results go into files"),
        (("-", "https://example.org/a.png"), InputError, "address, and results go into files"),
        (("a.jpg", "large"), OptionError, "large has no ending.* large.png, say, or large/ for a"),
        (("holiday", "holiday/a.jpg"), OptionError, "is a file"),
        (("a.jpg", "b.jpg", "holiday/a.jpg/"), PathError, "is a file"),
        (("holiday", "holiday/"), InputError, "among their sources"),
        (("holiday/*.jpg", "holiday/"), InputError, "among their sources"),
        (("none/*.jpg", "large/"), InputError, "pattern.*no picture"),
        (("empty", "large/"), InputError, "folder.*no picture"),
        (("-", "a.jpg", "large/"), OptionError, "one picture"),
        (("-", "large/"), OptionError, "no name"),
        (("a.jpg", "a.jpg"), InputError, "replace a.jpg"),
        (("a.jpg", "b.gif"), OptionError, "png.*b.gif"),
        (("x/a.jpg", "y/a.jpg", "large/"), InputError, "both be large/a.jpg"),
        (("holiday/a.jpg", "x/a.jpg", "x/"), InputError, "replace x/a.jpg"),
    ],
)
def test_what_could_be_meant_otherwise_is_refused(words, error, says):
    holiday()
    Path("empty").mkdir()
    with pytest.raises(error, match=says):
        work(*words)


@pytest.mark.parametrize(
    ("words", "side_files", "says"),
    [
        (("a.png",), {"preview": Path("x/../a.png")}, "preview would replace a.png, a source"),
        (("a.png", "b.png"), {"preview": Path("b.png")}, "result of a.png and the preview"),
        (("a_x2.compare.png", "a.png", "./"), {"compare": True}, "replace a_x2.compare.png, a s"),
        (("x/a.png", "x/a.compare.png", "y/"), {"compare": True}, "comparison of x/a.png and the"),
        (("a.png", "m.png"), {"mask": Path("m.png")}, "replace m.png, which is read too"),
    ],
)
def test_files_beside_the_results_replace_nothing(words, side_files, says):
    Path("x").mkdir()
    with pytest.raises(InputError, match=says):
        find_work(words, None, Naming(), SideFiles(**side_files))


def test_a_format_against_the_ending_is_refused():
    with pytest.raises(OptionError, match="says png and --format says jpeg"):
        format_of_target(Path("b.png"), "jpeg")
    assert format_of_target(Path("b.xyz"), "jpeg") == "jpeg"


WORDS = st.sampled_from(
    ["-", "a.jpg", "b.png", "x/a.jpg", "holiday", "holiday/", "new/", "./", "*.jpg", "holiday/*"]
)


@settings(max_examples=300)
@given(st.lists(WORDS, min_size=1, max_size=4), st.none() | WORDS)
def test_no_result_replaces_a_source_or_another_result(tmp_path_factory, words, output):
    folder = tmp_path_factory.getbasetemp() / "words"
    if not folder.exists():
        for name in ("a.jpg", "b.png", "x/a.jpg", "holiday/a.jpg", "holiday/d.png"):
            put(folder / name)
    os.chdir(folder)
    try:
        jobs = find_work(words, output, Naming()).jobs
    except TegulaError:
        return
    places = [os.path.realpath(job.target) for job in jobs if job.target is not None]
    sources = {os.path.realpath(job.source) for job in jobs if job.source is not None}
    assert len(set(places)) == len(places)
    assert sources.isdisjoint(places)
    assert len(jobs) == 1 or all(job.target is not None for job in jobs)


def test_an_address_is_an_address_for_named_models_too():
    for words in ("image=https://example.org/a.png", "image=@https://example.org/a.png"):
        result = run("run", "tegula/upscale", words)
        assert result.exit_code == 2
        assert "https://example.org/a.png is an address" in result.stderr
