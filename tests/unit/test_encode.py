from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import colour_profiles
import numpy as np
import pytest
from growth import SUPERLINEAR, growth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tegula.errors import ImageError, InputError, OptionError, PathError
from tegula.folders import write_atomically
from tegula.images.decode import decode
from tegula.images.deep import DeepPixels
from tegula.images.encode import encode, read_settings, save
from tegula.images.formats import FORMATS, format_for
from tegula.images.metadata import Metadata, read_metadata
from tegula.images.xmp import add_settings

AWKWARD = 'a <b> & "c" \u00fc \u732b ]]> \\'
SETTINGS = {"prompt": AWKWARD, "creativity": 0.35, "seed": 2**53, "hdr": None}


def smooth(mode="RGB", width=40, height=24):
    y, x = np.mgrid[:height, :width].astype(np.float32)
    bands = [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 9)]
    image = Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))
    if mode.endswith("A"):
        image.putalpha(Image.fromarray((255 * x / width).astype(np.uint8)))
    return image.convert(mode)


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def exif():
    tags = Image.Exif()
    tags[0x010F] = "camera"
    tags[0x8825] = {1: "N"}
    return tags.tobytes()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_every_format_holds_every_mode(name, mode):
    encoded = encode(smooth(mode), name)
    image = opened(encoded.data)
    assert image.format == name.upper()
    assert image.size == (40, 24)
    if name in ("png", "tiff"):
        assert image.mode == mode
        assert np.array_equal(np.asarray(image), np.asarray(smooth(mode)))
    elif name != "jpeg":
        assert image.has_transparency_data == mode.endswith("A")


def test_what_is_transparent_lies_on_white_in_jpeg_and_says_so():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    encoded = encode(clear, "jpeg")
    assert opened(encoded.data).getpixel((4, 4)) == (255, 255, 255)
    assert "white" in encoded.warnings[0]
    opaque = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 255)), "jpeg")
    assert opaque.warnings == ()


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_quality_trades_size_for_likeness(name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(noise)
    sizes = [len(encode(image, name, quality=quality).data) for quality in (5, 60, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_the_level_of_png_trades_size_for_time():
    noise = np.random.default_rng(0).integers(0, 32, (64, 64, 3), np.uint8)
    image = Image.fromarray(noise)
    deep = DeepPixels(noise.astype(np.uint16) * 257, 16)
    for pixels in (None, deep):
        files = [encode(image, png_level=level, deep=pixels).data for level in (0, 1, 9)]
        sizes = [len(file) for file in files]
        assert sizes[0] > max(sizes[1:])
        assert sizes[1] != sizes[2]
        assert all(np.array_equal(np.asarray(Image.open(io.BytesIO(f))), noise) for f in files)
    with pytest.raises(OptionError, match="png_level"):
        encode(image, png_level=10)


@pytest.mark.parametrize("quality", [0, 101])
def test_quality_out_of_bounds_is_refused(quality):
    with pytest.raises(OptionError, match="between 1 and 100"):
        encode(smooth(), "jpeg", quality=quality)


@pytest.mark.parametrize(
    ("path", "wanted", "expected"),
    [
        ("a.PNG", None, "png"),
        ("a.jpg", None, "jpeg"),
        ("a.tif", None, "tiff"),
        ("a.png", "webp", "webp"),
        (None, None, "png"),
        (None, "JPG", "jpeg"),
        ("a", "avif", "avif"),
    ],
)
def test_the_format_comes_from_the_wish_then_the_extension(path, wanted, expected):
    assert format_for(None if path is None else Path(path), wanted) == expected


@pytest.mark.parametrize(("path", "wanted"), [("a.gif", None), ("a", None), ("a.png", "bmp")])
def test_an_unknown_format_is_refused_with_the_known_ones(path, wanted):
    with pytest.raises(OptionError, match="png, jpeg, webp, avif, tiff"):
        format_for(Path(path), wanted)


@pytest.mark.parametrize(("name", "side"), [("webp", 16_384), ("jpeg", 65_501), ("avif", 65_536)])
def test_sides_a_format_cannot_hold_are_refused_in_words(name, side):
    with pytest.raises(InputError, match="PNG or TIFF instead"):
        encode(Image.new("L", (1, side)), name)


@pytest.mark.parametrize(("name", "side"), [("webp", 16_383), ("jpeg", 65_500)])
def test_sides_at_the_limit_are_written(name, side):
    assert opened(encode(Image.new("L", (1, side)), name).data).size == (1, side)


@pytest.mark.parametrize("name", FORMATS)
def test_settings_come_back_from_every_format(name, tmp_path):
    path = tmp_path / f"result.{name}"
    save(smooth(), path, settings=SETTINGS)
    assert read_settings(path) == SETTINGS
    save(smooth(), path)
    assert read_settings(path) is None


@pytest.mark.parametrize("name", FORMATS)
def test_metadata_and_profile_come_back_from_every_format(name):
    foreign = add_settings(None, {"older": 1})
    foreign = foreign.replace(b"</rdf:RDF>", "<a>Ana ü</a></rdf:RDF>".encode())
    profile = colour_profiles.wide_rgb()
    metadata = Metadata(exif=exif(), xmp=foreign, profile=profile, dpi=(300, 300))
    data = encode(smooth(), name, metadata=metadata, settings=SETTINGS).data
    back = decode(data, max_pixels=10_000).facts.metadata
    tags = Image.Exif()
    tags.load(back.exif)
    assert tags[0x010F] == "camera"
    assert tags.get_ifd(0x8825)[1] == "N"
    assert "Ana ü".encode() in back.xmp
    assert back.profile == profile
    assert read_settings(data) == SETTINGS
    if name in ("png", "jpeg", "tiff"):
        assert back.dpi == pytest.approx((300, 300), abs=0.1)


def test_png_text_comes_back():
    data = encode(smooth(), "png", metadata=Metadata(text={"Author": "Ana", "": "no key"})).data
    assert decode(data, max_pixels=10_000).facts.metadata.text == {"Author": "Ana"}


def test_metadata_too_long_for_jpeg_is_left_out_with_a_warning():
    tags = Image.Exif()
    tags[0x010F], tags[0x8769] = "camera", {0x927C: bytes(70_000)}
    xmp = add_settings(None, {"much": "x" * 70_000})
    encoded = encode(smooth(), "jpeg", metadata=Metadata(exif=tags.tobytes(), xmp=xmp))
    assert "too long" in encoded.warnings[0]
    kept = decode(encoded.data, max_pixels=10_000).facts.metadata
    assert (kept.exif, kept.xmp) == (None, None)


@pytest.mark.parametrize(("name", "length"), [("jpeg", 70_000), ("webp", 1_100_000)])
def test_settings_too_long_for_their_format_are_left_out_with_a_warning(name, length):
    encoded = encode(smooth(), name, settings={"prompt": "x" * length})
    assert f"too long for {name.upper()}" in encoded.warnings[0]
    assert read_settings(encoded.data) is None


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=4))
def test_any_settings_survive_the_packet_and_replace_older_ones(values):
    values = {"a": "\u00e4", **values}
    packet = add_settings(add_settings(None, {"older": 1}), values)
    image = Image.new("L", (1, 1))
    image.info["xmp"] = packet
    assert read_settings(image) == values
    assert packet.count(b"<tegula:settings>") == 1


def with_packet(packet):
    image = Image.new("L", (1, 1))
    image.info["xmp"] = packet
    return image


RDF = b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">%b</rdf:RDF>'
TIFF = b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
TEGULA = b'xmlns:tegula="https://tegula.invalid/ns/1.0/"'


@pytest.mark.parametrize(
    ("hostile", "length"),
    [
        (lambda n: b"<rdf:Description https://tegula.invalid/ns/1.0/" * n, 60),
        (lambda n: RDF % (b"<rdf:Description https://tegula.invalid/ns/1.0/>" * n), 60),
        (lambda n: RDF % (b"<rdf:Description>https://tegula.invalid/ns/1.0/" * n), 60),
        (lambda n: RDF % (b" " * n), 6000),
        (lambda n: RDF % (b"<a b='" + b" " * n + b"'/>"), 6000),
        (lambda n: RDF % (b"<tegula:settings>" * n), 400),
        (lambda n: RDF % (b"<a>" * n + b"</a>" * n), 1000),
        (lambda n: RDF % (b"<a/>" * n), 1000),
    ],
)
def test_the_time_for_a_packet_grows_with_its_length_and_not_with_its_square(hostile, length):
    for work in (read_metadata, read_settings):
        assert growth(work, lambda n: with_packet(hostile(n)), length) < SUPERLINEAR


def test_a_packet_of_any_length_is_not_read(monkeypatch):
    monkeypatch.setattr("defusedxml.sax.parseString", pytest.fail)
    image = with_packet(RDF % (b"<a/>" * 300_000))
    assert read_metadata(image)[0].xmp is None
    assert read_settings(image) is None


def test_entities_are_not_expanded():
    bomb = b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 1000 + b'">]>' + RDF % (b"<a>&b;</a>")
    file = b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + RDF % b"<a>&b;</a>"
    for packet in (bomb, file, b"<!DOCTYPE a>" + RDF % b"<a/>"):
        assert read_metadata(with_packet(packet))[0].xmp is None


@pytest.mark.parametrize("packet", [b"", b"text", b"<a>", RDF % b"<a>", b"\xff" + RDF % b"<a/>", 7])
def test_a_damaged_packet_is_left_out(packet):
    assert read_metadata(with_packet(packet))[0].xmp is None
    assert read_settings(with_packet(packet)) is None
    if isinstance(packet, bytes):
        assert read_settings(with_packet(add_settings(packet, SETTINGS))) == SETTINGS


def test_the_orientation_and_the_settings_leave_the_packet_and_the_rest_stays():
    merged = b'<rdf:Description %b %b tiff:Orientation="6" tegula:settings="{}" tiff:Make="c">'
    merged = merged % (TIFF, TEGULA) + "<dc:title>Ü &lt;&amp;</dc:title></rdf:Description>".encode()
    apart = b"<rdf:Description %b><tiff:Orientation>6</tiff:Orientation></rdf:Description>" % TIFF
    kept = read_metadata(with_packet(RDF % (merged + apart)))[0].xmp
    assert b"Orientation" not in kept
    assert b"settings" not in kept
    assert b'tiff:Make="c"' in kept
    assert "<dc:title>Ü &lt;&amp;</dc:title>".encode() in kept
    assert read_settings(with_packet(RDF % merged)) == {}


def test_a_packet_of_settings_alone_is_not_kept():
    assert read_metadata(with_packet(add_settings(None, SETTINGS)))[0].xmp is None


def test_settings_survive_what_xml_cannot_hold():
    values = {"prompt": "\ufffe\uffff\ud800\x00\r"}
    assert read_settings(with_packet(add_settings(None, values))) == values
    assert read_settings(encode(smooth(), "webp", settings=values).data) == values


@pytest.mark.parametrize("text", ["", "[1]", "{", "1" * 5000, "[" * 100_000])
def test_settings_that_make_no_sense_are_none(text):
    image = Image.new("L", (1, 1))
    image.info["tegula"] = text
    assert read_settings(image) is None


def test_settings_are_read_from_images_only(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ImageError):
        read_settings(tmp_path / "a.png")
    with pytest.raises(PathError):
        read_settings(tmp_path / "b.png")


def test_saving_replaces_what_was_there_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    save(smooth(), path)
    assert opened(path.read_bytes()).size == (40, 24)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    write_atomically(tmp_path / "link.png", b"new")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes() == b"new"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_permissions_the_user_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a.png", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError(errno.ENOSPC, "full"), PathError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
@pytest.mark.parametrize("owner_and_step", [(os, "fsync"), (Path, "replace")])
def test_an_interrupted_save_leaves_the_old_file_alone(
    tmp_path, monkeypatch, raised, expected, owner_and_step
):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise raised

    monkeypatch.setattr(*owner_and_step, fail)
    with pytest.raises(expected) as caught:
        save(smooth(), path)
    if expected is PathError:
        assert str(caught.value) == f"{path} cannot be written: the disk is full."
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written_are_path_errors(tmp_path):
    with pytest.raises(PathError, match="its folder does not exist"):
        save(smooth(), tmp_path / "missing" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(PathError, match="is a folder"):
        save(smooth(), tmp_path / "folder.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PathError):
        save(smooth(), tmp_path / "file" / "a.png")


def test_a_device_is_written_to_and_not_replaced():
    write_atomically(Path(os.devnull), b"x")
    assert not Path(os.devnull).is_file()


def test_a_disk_that_is_really_full_is_said_in_words():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(PathError, match="the disk is full"):
        write_atomically(full, b"x")


def test_long_texts_of_a_png_are_compressed():
    text = {"workflow": "a node, " * 10_000}
    data = encode(Image.new("RGB", (8, 8)), metadata=Metadata(text=text)).data
    assert len(data) < 5_000
    with Image.open(io.BytesIO(data)) as read:
        assert read.text["workflow"] == text["workflow"]
