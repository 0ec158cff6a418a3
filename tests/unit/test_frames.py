"""Animations and files of several pages, read and written."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tegula.errors import InputError
from tegula.images.encode import read_settings
from tegula.images.frames import check_frames, encode_frames, frame_facts, read_frames
from tegula.images.metadata import Metadata

LIMIT = 10_000


def moving(count=4, mode="RGB"):
    """Return frames on which a square moves over a ground that stands still."""
    frames = []
    for number in range(count):
        values = np.full((16, 24, 3), (40, 90, 200), np.uint8)
        values[4:8, 4 * number : 4 * number + 4] = (250, 200, 30)
        frames.append(Image.fromarray(values).convert(mode))
    return frames


def encoded(frames, name, **parameters):
    buffer = io.BytesIO()
    frames[0].save(buffer, name, save_all=True, append_images=frames[1:], **parameters)
    return buffer.getvalue()


def eight_bit(picture):
    return np.rint(picture.rgb * 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_every_frame_is_a_whole_picture(name):
    lossless = {"lossless": True} if name == "WEBP" else {}
    data = encoded(moving(), name, duration=[40, 80, 120, 160], loop=2, **lossless)
    facts = frame_facts(data, LIMIT)
    assert (facts.kind, facts.count) == ("frame", 4)
    assert facts.durations == (40, 80, 120, 160)
    assert facts.loop == (3 if name == "GIF" else 2)
    pictures = list(read_frames(data, facts, LIMIT))
    for picture, expected in zip(pictures, moving(), strict=True):
        assert np.array_equal(eight_bit(picture), np.asarray(expected))
        assert picture.facts.warnings == ()
    assert pictures[0].facts.format == name


def test_a_picture_beside_an_animation_is_no_frame_of_it():
    cover = Image.new("RGB", (24, 16), "red")
    buffer = io.BytesIO()
    cover.save(buffer, "PNG", save_all=True, append_images=moving(3), default_image=True)
    facts = frame_facts(buffer.getvalue(), LIMIT)
    pictures = list(read_frames(buffer.getvalue(), facts, LIMIT))
    assert facts.count == len(pictures) == 3
    assert np.array_equal(eight_bit(pictures[0]), np.asarray(moving()[0]))


def test_pages_are_pictures_of_their_own_size_and_depth():
    deep = np.arange(20 * 10, dtype=np.uint16).reshape(10, 20) * 300
    colours = np.asarray(moving()[2])
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(deep, photometric="minisblack")
        writer.write(colours[::4, ::4].copy(), photometric="rgb", subfiletype=1)
        writer.write(colours, photometric="rgb")
    data = buffer.getvalue()
    facts = frame_facts(data, LIMIT)
    assert (facts.kind, facts.count) == ("page", 2)
    first, second = read_frames(data, facts, LIMIT)
    assert np.array_equal(np.rint(first.rgb[..., 0] * 65535), deep)
    assert np.array_equal(eight_bit(second), colours)


@pytest.mark.parametrize("name", ["png", "webp", "avif"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_animation_is_written_with_its_times_and_settings(name, mode):
    facts = frame_facts(encoded(moving(), "GIF", duration=[40, 80, 120, 160], loop=0), LIMIT)
    results = [(frame, None) for frame in moving(mode=mode)]
    metadata = Metadata(text={"Title": "t"}, xmp=None)
    made = encode_frames(results, facts, name, quality=100, metadata=metadata, settings={"seed": 7})
    assert read_settings(made.data) == {"seed": 7}
    with Image.open(io.BytesIO(made.data)) as image:
        assert image.n_frames == 4
        for number, (frame, duration) in enumerate(
            zip(moving(mode=mode), (40, 80, 120, 160), strict=True)
        ):
            image.seek(number)
            image.load()
            assert image.info["duration"] == duration
            expected = np.asarray(frame.convert("RGB")).astype(int)
            assert np.abs(np.asarray(image.convert("RGB")) - expected).mean() < 5


def test_pages_are_written_with_all_their_bits():
    from tegula.images.deep import DeepPixels

    deep = (np.arange(20 * 10 * 3, dtype=np.uint16) * 100).reshape(10, 20, 3)
    facts = frame_facts(encoded(moving(3), "TIFF"), LIMIT)
    results = [(moving()[0], None), (moving()[1].resize((20, 10)), DeepPixels(deep, 16))]
    results.append((moving(mode="L")[2], None))
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif[0x8769] = {0x9003: "2024:01:01 00:00:00"}
    made = encode_frames(
        results,
        facts,
        "tiff",
        quality=90,
        metadata=Metadata(exif=exif.tobytes(), dpi=(300, 300)),
        settings={"seed": 7},
    )
    with tifffile.TiffFile(io.BytesIO(made.data)) as file:
        assert np.array_equal(file.pages[0].asarray(), np.asarray(moving()[0]))
        assert np.array_equal(file.pages[1].asarray(), deep)
        assert np.array_equal(file.pages[2].asarray(), np.asarray(moving(mode="L")[2]))
        assert file.pages[0].tags["Make"].value == "camera"
        assert file.pages[0].tags["ExifTag"].value["DateTimeOriginal"] == "2024:01:01 00:00:00"
    assert read_settings(made.data) == {"seed": 7}


def test_formats_of_one_picture_are_refused_before_the_work():
    frames, pages = (frame_facts(encoded(moving(), name), LIMIT) for name in ("GIF", "TIFF"))
    for facts, name in ((frames, "jpeg"), (pages, "png"), (pages, "jpeg")):
        with pytest.raises(InputError, match=r"holds one picture.*4 .*--frames all"):
            check_frames(facts, name)
    check_frames(frame_facts(encoded(moving(1), "GIF"), LIMIT), "jpeg")


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_animation_gives_frames_or_a_sentence(name, changes):
    data = bytearray(encoded(moving(3), name))
    for place, value in changes:
        data[place % len(data)] = value
    with contextlib.suppress(InputError):
        facts = frame_facts(bytes(data), LIMIT)
        for picture in read_frames(bytes(data), facts, LIMIT):
            assert np.isfinite(picture.rgb).all()
