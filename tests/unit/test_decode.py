from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import colour_profiles
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from tegula.errors import ImageError, InputError, PathError, TooLargeError
from tegula.images.compression import estimate_quality
from tegula.images.decode import Picture, decode
from tegula.images.formats import may_be_read

SUITE = Path(__file__).parents[1] / "data" / "pngsuite"
LIMIT = 1_000_000
VALID = sorted(path.name for path in SUITE.glob("[!x]*.png"))
CORRUPT = sorted(path.name for path in SUITE.glob("x*.png"))


def noise(width=24, height=16, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def encoded(image, format_name, **parameters):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **parameters)
    return buffer.getvalue()


def read(source) -> Picture:
    return decode(source, max_pixels=LIMIT)


def eight_bit(values):
    return np.rint(values * 255).astype(int)


@pytest.mark.parametrize("name", VALID)
def test_every_valid_png_decodes_to_its_colours(name):
    picture = read(SUITE / name)
    with Image.open(SUITE / name) as image:
        image.load()
        if image.mode.startswith("I"):
            expected = np.repeat(np.asarray(image)[..., None] / 65535, 3, axis=2)
        else:
            expected = np.asarray(image.convert("RGBA"))[..., :3] / 255
        gamma = image.info.get("gamma", 1 / 2.2)
    if abs(gamma * 2.2 - 1) > 0.05:
        expected = expected ** (1 / 2.2 / gamma)
    assert picture.rgb.dtype == np.float32
    assert picture.facts.size == (expected.shape[1], expected.shape[0])
    # Eight bits of a dark value are far apart once a gamma of 1 is undone.
    tolerance = 1 / 255 if "16" not in name else 0.06
    assert np.abs(picture.rgb - expected).max() <= tolerance


@pytest.mark.parametrize("name", CORRUPT)
def test_every_corrupt_png_is_refused_by_name(name):
    with pytest.raises(ImageError, match=name):
        read(SUITE / name)


def test_the_suite_is_all_there():
    assert (len(VALID), len(CORRUPT)) == (162, 14)


@pytest.mark.parametrize("kind", ["n0g16", "n2c08", "n3p04"])
def test_files_that_differ_only_in_declared_gamma_look_alike(kind):
    means = [read(SUITE / f"g{g}{kind}.png").rgb.mean() for g in ("03", "04", "05", "07", "10")]
    assert max(means) - min(means) < 0.02


@pytest.mark.parametrize(
    ("name", "transparent"),
    [
        ("tbbn0g04", True),
        ("tbwn0g16", True),
        ("tbrn2c08", True),
        ("tbbn2c16", True),
        ("tbbn3p08", True),
        ("tp1n3p08", True),
        ("tm3n3p02", True),
        ("tp0n0g08", False),
    ],
)
def test_a_transparent_colour_becomes_alpha(name, transparent):
    alpha = read(SUITE / f"{name}.png").alpha
    assert (alpha is not None) == transparent
    if alpha is not None:
        assert alpha.min() == 0
        assert alpha.max() > 0.6


@pytest.mark.parametrize("name", ["basn0g01", "basn0g16", "basn4a08", "basn4a16"])
def test_grey_files_are_known_as_grey(name):
    assert read(SUITE / f"{name}.png").facts.greyscale
    assert not read(SUITE / "basn2c16.png").facts.greyscale
    assert not read(SUITE / "basn3p08.png").facts.greyscale


def test_sixteen_bit_colour_keeps_its_depth():
    ramp = np.arange(2048, dtype=np.uint16).reshape(32, 64) * 31
    deep = np.stack([ramp, ramp // 2, ramp // 3], axis=-1)
    for extension in (".png", ".tiff"):
        _, data = cv2.imencode(extension, deep)
        rgb = read(data.tobytes()).rgb
        assert np.array_equal(np.rint(rgb * 65535).astype(int), deep[..., ::-1])


def test_float_tiff_is_read_as_zero_to_one_and_clipped():
    values = np.linspace(-0.5, 1.5, 60, dtype=np.float32).reshape(4, 5, 3)
    values[0, 0, 0] = np.nan
    _, data = cv2.imencode(".tiff", values)
    expected = np.nan_to_num(np.clip(values, 0, 1))[..., ::-1]
    assert np.allclose(read(data.tobytes()).rgb, expected)
    grey = np.full((3, 4), 0.25, np.float32)
    picture = read(encoded(Image.fromarray(grey), "TIFF"))
    assert picture.facts.greyscale
    assert np.allclose(picture.rgb, 0.25)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr", "La"])
def test_images_in_memory_of_any_mode_decode(mode):
    image = noise().convert("RGBA").convert("LA").convert("La") if mode == "La" else None
    image = noise().convert(mode) if image is None else image
    picture = read(image)
    assert picture.rgb.shape == (16, 24, 3)
    assert (picture.alpha is not None) == mode.lower().endswith("a")


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float16, np.float32, np.float64, ">u2"])
def test_an_array_is_the_same_picture_as_a_file_of_its_pixels(mode, kind):
    image = noise().convert("RGBA").convert(mode)
    expected = read(encoded(image, "PNG"))
    values = np.asarray(image)
    array = values / 255 if np.issubdtype(kind, np.floating) else values.astype(np.uint16) * 257
    given = (values if kind is np.uint8 else array).astype(kind)
    before = given.copy()
    picture = read(given)
    tolerance = {"float16": 5e-4, "uint8": 0}.get(given.dtype.name, 1e-6)
    assert picture.rgb.dtype == np.float32
    assert picture.rgb.flags.c_contiguous
    np.testing.assert_allclose(picture.rgb, expected.rgb, rtol=0, atol=tolerance)
    assert (picture.alpha is None) == (expected.alpha is None)
    if picture.alpha is not None:
        np.testing.assert_allclose(picture.alpha, expected.alpha, rtol=0, atol=tolerance)
    assert picture.facts.size == expected.facts.size
    assert picture.facts.greyscale == expected.facts.greyscale
    assert picture.facts.format is None
    assert np.array_equal(given, before)


def test_arrays_of_other_layouts_in_memory_decode():
    values = np.asarray(noise())
    expected = read(values).rgb
    for same in (values[::-1, ::-1][::-1, ::-1], np.asfortranarray(values), values[None]):
        assert np.array_equal(read(same).rgb, expected)
    grey = np.asarray(noise().convert("L"))
    assert np.array_equal(read(grey).rgb, read(grey[..., None]).rgb)
    assert np.array_equal(read(grey > 128).rgb, read((grey > 128).astype(np.float32)).rgb)


def test_floats_of_a_pillow_image_are_held_to_what_those_of_an_array_are():
    grey = noise().convert("F")
    with pytest.raises(ImageError, match="give floats from 0 to 1"):
        read(grey)
    half = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert np.array_equal(read(half).rgb, np.full((4, 4, 3), 0.5, np.float32))


def test_a_closed_pillow_image_is_called_that():
    data = encoded(noise(), "PNG")
    made, loaded, opened = noise(), Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    loaded.load()
    for image in (made, loaded, opened):
        image.close()
    with Image.open(io.BytesIO(data)) as left:
        pass
    with io.BytesIO(data) as file:
        over = Image.open(file)
    for image in (made, loaded, opened, left, over):
        with pytest.raises(ImageError, match="a Pillow image that is closed"):
            read(image)


@pytest.mark.parametrize(("kind", "what"), [("GIF", "frame"), ("TIFF", "page"), ("PNG", "frame")])
def test_an_opened_pillow_image_of_several_frames_warns_as_its_file_does(kind, what):
    frames = [Image.new("RGB", (8, 8), (60 * number, 0, 0)) for number in range(4)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    sentence = f"The source has 4 {what}s, of which only the first is enlarged."
    image = Image.open(io.BytesIO(data))
    assert read(data).facts.warnings == read(image).facts.warnings == (sentence,)
    image.seek(2)
    picture = read(image)
    assert eight_bit(picture.rgb)[0, 0, 0] == 120
    assert picture.facts.warnings == (sentence.replace("the first", "number 3"),)
    assert image.tell() == 2
    assert read(image.copy()).facts.warnings == ()


def test_integers_of_a_pillow_image_to_255_are_eight_bits_unless_a_file_says_otherwise():
    grey = noise().convert("L")
    picture = read(grey.convert("I"))
    assert np.array_equal(picture.rgb, read(grey).rgb)
    assert picture.facts.depth == 8
    assert len(picture.facts.warnings) == 1
    assert "0 to 255" in picture.facts.warnings[0]
    deep = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    assert np.allclose(read(deep).rgb, picture.rgb)
    assert read(deep).facts.warnings == ()
    dark = np.asarray(grey).astype(np.int32)
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(dark), "TIFF")))
    assert opened.mode == "I"
    assert read(opened).rgb.max() < 0.01
    assert read(opened).facts.warnings == ()


def test_floats_of_an_array_are_clipped_and_nan_is_black():
    picture = read(np.array([[[-0.1, 0.5, 1.1], [np.nan] * 3]]))
    assert np.array_equal(picture.rgb, np.float32([[[0, 0.5, 1], [0, 0, 0]]]))
    assert picture.facts.warnings == (
        "1 pixel of the source holds NaN, not a number, which is read as black.",
        "The source holds floats from -0.1 to 1.1; what is beyond 0 to 1 is cut off.",
    )
    hole = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    for source in (np.full((2, 2), np.nan), hole):
        assert read(source).rgb.max() == 0
        assert read(source).facts.warnings == (
            "4 pixels of the source hold NaN, not a number, which is read as black.",
        )


def test_floats_beyond_one_by_rounding_are_clipped_without_a_word():
    assert read(np.array([[-0.003, 1.003]])).facts.warnings == ()


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((3, 20, 30), np.uint8), "has the shape [3, 20, 30]; give an array [height"),
        (np.zeros((2, 20, 30, 3)), "has the shape [2, 20, 30, 3]; give an array [height"),
        (np.zeros(5), "has the shape [5]; give an array [height"),
        (np.float32(1), "has the shape []; give an array [height"),
        (np.zeros((4, 4, 3), int), "holds int64; give uint8, uint16, or floats"),
        (np.zeros((4, 4, 3), complex), "holds complex128; give uint8"),
        (np.full((4, 4), "a"), "; give uint8"),
        (np.full((4, 4, 3), 200.0), "holds floats from 200 to 200; give floats from 0 to 1"),
        (np.linspace(-1, 1, 48).reshape(4, 4, 3), "holds floats from -1 to 1; give floats"),
        (np.zeros((0, 4, 3)), "has no pixels"),
    ],
)
def test_what_is_no_picture_among_arrays_is_refused_in_one_sentence(array, sentence):
    with pytest.raises(ImageError) as caught:
        read(array)
    assert sentence in str(caught.value)


def test_the_limit_counts_the_pixels_of_arrays_too():
    with pytest.raises(TooLargeError, match="20x10"):
        decode(np.zeros((10, 20, 3), np.uint8), max_pixels=199)


@pytest.mark.parametrize("thing", [None, 7, ["a.png"], io.StringIO("a")])
def test_what_is_no_source_is_refused_with_what_would_be(thing):
    with pytest.raises(
        ImageError, match=r"is of the type \w+; give a path, bytes, a file opened in binary"
    ):
        read(thing)


def test_bytes_of_any_kind_decode():
    data = encoded(noise(), "PNG")
    for same in (bytearray(data), memoryview(data)):
        assert np.array_equal(read(same).rgb, read(data).rgb)


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG"])
def test_every_format_decodes_whatever_its_name(format_name, tmp_path):
    path = tmp_path / "picture.txt"
    image = Image.new("RGB", (24, 16), (200, 100, 50))
    path.write_bytes(encoded(image, format_name))
    picture = read(path)
    assert picture.facts.format == format_name
    assert np.abs(eight_bit(picture.rgb) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied_and_reset(turn, format_name):
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = turn, "camera"
    image = noise().resize((48, 32), Image.Resampling.BICUBIC)
    quality = {"quality": 100} if format_name == "JPEG" else {}
    data = encoded(image, format_name, exif=tags, **quality)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    picture = read(data)
    assert np.array_equal(eight_bit(picture.rgb), expected)
    kept = Image.Exif()
    kept.load(picture.facts.metadata.exif)
    assert kept.get(0x0112, 1) == 1
    assert kept[0x010F] == "camera"


def sixteen_bit_tiff(image, turn):
    """The simplest TIFF file with 16-bit colour and an orientation."""
    pixels = (np.asarray(image).astype("<u2") * 257).tobytes()
    tags = [(256, 3, 1, image.width), (257, 3, 1, image.height), (258, 3, 3, 8), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 14), (274, 3, 1, turn), (277, 3, 1, 3)]
    tags += [(278, 3, 1, image.height), (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    header = struct.pack("<2sHI3H", b"II", 42, 14 + len(pixels), 16, 16, 16)
    return header + pixels + directory + bytes(4)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_of_sixteen_bit_tiff_is_applied_once(turn):
    tags = Image.Exif()
    tags[0x0112] = turn
    with Image.open(io.BytesIO(encoded(noise(), "PNG", exif=tags))) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    picture = read(sixteen_bit_tiff(noise(), turn))
    assert np.array_equal(eight_bit(picture.rgb), expected)


def test_metadata_worth_keeping_is_kept():
    tags = Image.Exif()
    tags[0x010F], tags[0x8298] = "camera", "nobody"
    tags.get_ifd(0x8825)[1] = "N"
    tags.get_ifd(0x8769)[0xA002] = 24
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Author", "Ana")
    data = encoded(noise(), "PNG", exif=tags, pnginfo=chunks, dpi=(300, 300))
    metadata = read(data).facts.metadata
    kept = Image.Exif()
    kept.load(metadata.exif)
    assert (kept[0x010F], kept[0x8298], kept.get_ifd(0x8825)[1]) == ("camera", "nobody", "N")
    assert 0xA002 not in kept.get_ifd(0x8769)
    assert metadata.text == {"Author": "Ana"}
    assert metadata.dpi == pytest.approx((300, 300), abs=0.1)


def test_a_wide_profile_is_converted_to_srgb_and_kept():
    profile = colour_profiles.wide_rgb()
    image = Image.new("RGB", (4, 4), (60, 160, 60))
    picture = read(encoded(image, "PNG", icc_profile=profile))
    red, green, _ = eight_bit(picture.rgb)[0, 0]
    assert red < 35  # the same green lies further out in the smaller space
    assert abs(green - 160) <= 3
    assert picture.facts.metadata.profile == profile


def test_a_grey_profile_changes_tones_alone():
    image = Image.new("L", (4, 4), 128)
    darker = read(encoded(image, "PNG", icc_profile=colour_profiles.grey(2.8)))
    same = read(encoded(image, "PNG", icc_profile=colour_profiles.grey(2.2)))
    assert darker.facts.greyscale
    assert darker.rgb.mean() < 0.45
    assert abs(same.rgb.mean() - 128 / 255) < 0.01


def test_cmyk_comes_out_as_srgb_with_a_warning():
    plain = read(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert np.array_equal(eight_bit(plain.rgb)[0, 0], (255, 0, 0))
    profiled = encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "TIFF")
    with Image.open(io.BytesIO(profiled)) as image:
        profiled = encoded(image, "TIFF", icc_profile=colour_profiles.cmyk())
    picture = read(profiled)
    assert eight_bit(picture.rgb).max() <= 2
    assert picture.facts.metadata.profile is None
    assert "CMYK" in picture.facts.warnings[0]


def test_a_broken_profile_is_dropped_with_a_warning():
    picture = read(encoded(noise(), "PNG", icc_profile=b"not a profile"))
    assert picture.facts.metadata.profile is None
    assert "profile" in picture.facts.warnings[0]
    assert np.array_equal(eight_bit(picture.rgb), np.asarray(noise()))


@pytest.mark.parametrize("quality", [1, 10, 25, 49, 50, 51, 75, 95, 100])
def test_jpeg_quality_is_told_from_the_tables(quality):
    assert read(encoded(noise(), "JPEG", quality=quality)).facts.jpeg_quality == quality
    assert read(encoded(noise(), "PNG")).facts.jpeg_quality is None
    assert estimate_quality({0: [1, 2, 3]}) is None


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    for format_name in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format_name, save_all=True, append_images=frames[1:])
        assert np.abs(eight_bit(read(data).rgb)[4, 4] - (255, 0, 0)).max() <= 3


def png_claiming(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + name + body
        chunks += struct.pack(">I", zlib.crc32(name + body))
    return chunks


def test_a_bomb_is_refused_before_its_pixels():
    with pytest.raises(TooLargeError, match="100000x100000"):
        decode(png_claiming(100_000, 100_000), max_pixels=134_217_728)


def test_the_limit_counts_pixels_exactly():
    data = encoded(noise(20, 10), "PNG")
    assert decode(data, max_pixels=200).facts.size == (20, 10)
    with pytest.raises(TooLargeError, match="200 pixels"):
        decode(data, max_pixels=199)
    with pytest.raises(TooLargeError):
        decode(noise(20, 10), max_pixels=199)


def test_a_limit_above_pillows_own_is_the_callers_to_raise():
    with pytest.raises(ImageError, match="truncated"):
        decode(png_claiming(20_000, 20_000), max_pixels=10**9)


def test_an_image_without_pixels_is_refused():
    for side in ((0, 5), (5, 0)):
        with pytest.raises(ImageError):
            read(png_claiming(*side))
        with pytest.raises(ImageError, match="no pixels"):
            read(Image.new("RGB", side))


@pytest.mark.parametrize(
    "start",
    [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe1",
        b"GIF87a",
        b"BM\0\0",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"MM\0+",
        b"\0\0\0\x18ftypheix\0\0\0\0mif1heic",
        b"\0\0\0\x1cftypisom\0\0\0\0avismsf1miaf",
    ],
)
def test_a_file_that_may_be_read_is_known_by_its_first_bytes(start):
    assert may_be_read(start)


@pytest.mark.parametrize(
    "start", [b"", b"\n\x89PNG\r\n", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x10ftypmp42\0\0\0\0", b"<svg>"]
)
def test_other_files_are_known_by_their_first_bytes(start):
    assert not may_be_read(start)


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a", b"\x89PNG\r\n\x1a\n", bytes(5000)])
def test_what_is_no_image_is_refused_in_one_sentence(data, tmp_path):
    path = tmp_path / "thing.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"thing\.png [^\n]*\.$"):
        read(path)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(format_name, share):
    data = encoded(noise(96, 64), format_name)
    with pytest.raises(ImageError):
        read(data[: int(len(data) * share)])


def test_formats_that_are_not_needed_are_not_opened():
    with pytest.raises(ImageError, match="not supported"):
        read(encoded(noise(), "PPM"))


def test_paths_that_cannot_be_read_are_path_errors(tmp_path):
    for address in ("https://example.com/a.png", Path("https://example.com/a.png")):
        with pytest.raises(PathError, match=r"^https://example.com/a.png is an address"):
            read(address)
    with pytest.raises(PathError, match="does not exist"):
        read(tmp_path / "missing.png")
    with pytest.raises(PathError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(PathError):
        read("a\0b.png")


class Pipe(io.RawIOBase):
    """A stream that cannot seek, like standard input."""

    def __init__(self, data):
        self.rest = io.BytesIO(data)

    def readable(self):
        return True

    def read(self, size=-1):
        return self.rest.read(size)


def test_a_pipe_is_read_to_its_end():
    assert read(Pipe(encoded(noise(), "PNG"))).facts.size == (24, 16)


SEEDS = [encoded(noise(), f) for f in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 1999), st.integers(0, 255))))
def test_damage_anywhere_gives_a_picture_or_a_clear_refusal(data, changes):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    with contextlib.suppress(InputError):
        assert np.isfinite(decode(bytes(damaged), max_pixels=LIMIT).rgb).all()
