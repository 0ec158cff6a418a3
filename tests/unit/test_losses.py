"""What of a file's metadata comes along, and what is said of the rest."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, IptcImagePlugin, PngImagePlugin

from tegula.cli.targets import Naming, find_work
from tegula.images.decode import decode
from tegula.images.encode import encode
from tegula.images.formats import FORMATS
from tegula.images.metadata import Metadata
from tegula.images.open import upright_size
from tegula.images.repair import repaired

AUTHOR = "© 2024 José".encode()
CAPTION = "Zürich am See".encode()
IPTC = b"\x1c\x01\x5a\x00\x03\x1b%G" + b"\x1c\x02\x78" + struct.pack(">H", len(CAPTION)) + CAPTION


def picture():
    values = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    return Image.fromarray(values)


def encoded(image, format_name, **parameters):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **parameters)
    return buffer.getvalue()


def facts(data):
    return decode(data, max_pixels=10_000).facts


def exif_with_bytes(kind=2):
    """Return EXIF whose copyright and camera owner are UTF-8, in fields of ASCII or of UTF-8."""
    text = AUTHOR + b"\0"
    inner = 8 + 2 + 2 * 12 + 4
    after = inner + 2 + 12 + 4
    body = b"II*\0" + struct.pack("<I", 8)
    body += struct.pack("<H", 2)
    body += struct.pack("<HHII", 0x8298, kind, len(text), after)
    body += struct.pack("<HHII", 0x8769, 4, 1, inner) + bytes(4)
    body += struct.pack("<H", 1) + struct.pack("<HHII", 0xA430, kind, len(text), after) + bytes(4)
    return b"Exif\0\0" + body + text


@pytest.mark.parametrize("kind", [2, 129], ids=["ASCII", "UTF-8"])
@pytest.mark.parametrize("name", FORMATS)
def test_text_of_exif_keeps_its_bytes(name, kind):
    source = encoded(picture(), "JPEG", exif=exif_with_bytes(kind))
    data = encode(picture(), name, metadata=facts(source).metadata).data
    exif = Image.open(io.BytesIO(data)).getexif()
    for value in (exif[0x8298], exif.get_ifd(0x8769)[0xA430]):
        assert value.encode("latin-1") == AUTHOR
    assert facts(encode(picture(), name, metadata=facts(data).metadata).data).metadata.exif


def test_exif_that_is_damaged_is_told_and_what_describes_old_pixels_is_not():
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 1, {0xA002: 24, 0xA003: 16}
    assert facts(encoded(picture(), "JPEG", exif=exif.tobytes())).warnings == ()
    found = facts(encoded(picture(), "JPEG", exif=b"Exif\0\0XX*\0" + bytes(20)))
    assert found.warnings == ("EXIF of the source is damaged and is left out.",)


def jpeg_with_iptc():
    return encode(picture(), "jpeg", metadata=Metadata(iptc=IPTC, comment=CAPTION)).data


@pytest.mark.parametrize("name", ["jpeg", "tiff", "png"])
def test_iptc_goes_from_any_format_to_any(name):
    source = jpeg_with_iptc()
    found = IptcImagePlugin.getiptcinfo(Image.open(io.BytesIO(source)))
    assert found[(2, 120)] == CAPTION
    data = encode(picture(), name, metadata=facts(source).metadata).data
    assert facts(data).metadata.iptc == IPTC
    if name == "tiff":
        assert Image.open(io.BytesIO(data)).tag_v2[33723] == IPTC
    again = encode(picture(), "jpeg", metadata=facts(data).metadata).data
    assert IptcImagePlugin.getiptcinfo(Image.open(io.BytesIO(again)))[(2, 120)] == CAPTION


def test_iptc_of_a_tiff_file_written_as_numbers_is_read():
    padded = IPTC + bytes(-len(IPTC) % 4)
    tags = Image.Exif()
    tags[33723] = padded
    data = bytearray(encoded(picture(), "TIFF", tiffinfo=tags))
    at = data.index(struct.pack("<HH", 33723, 7))
    struct.pack_into("<HHI", data, at, 33723, 4, len(padded) // 4)
    assert facts(bytes(data)).metadata.iptc == padded


def test_a_comment_is_kept_by_jpeg_and_png():
    metadata = facts(jpeg_with_iptc()).metadata
    assert metadata.comment == CAPTION
    png = Image.open(io.BytesIO(encode(picture(), "png", metadata=metadata).data))
    assert png.text["Comment"] == CAPTION.decode()
    back = encode(
        picture(), "jpeg", metadata=facts(encoded(picture(), "GIF", comment=CAPTION)).metadata
    )
    assert Image.open(io.BytesIO(back.data)).info["comment"] == CAPTION
    text = Metadata(text={"Comment": CAPTION.decode()})
    image = Image.open(io.BytesIO(encode(picture(), "jpeg", metadata=text).data))
    assert image.info["comment"] == CAPTION


def test_what_a_format_has_no_place_for_is_said_once():
    metadata = Metadata(iptc=IPTC, comment=b"c", text={"Title": "t", "Comment": "c"})
    said = {name: encode(picture(), name, metadata=metadata).warnings for name in FORMATS}
    assert said["png"] == ()
    assert said["jpeg"] == (
        "JPEG has no place for texts (Title) of the source; PNG would hold that.",
    )
    (webp,) = said["webp"]
    assert "IPTC and a comment and texts (Title, Comment)" in webp
    long = Metadata(
        iptc=b"\x1c" + bytes(70_000), comment=bytes(70_000), text={"Comment": "c" * 70_000}
    )
    assert any("too long" in each for each in encode(picture(), "jpeg", metadata=long).warnings)


FRAMES = "The source has 3 frames, of which only the first is enlarged."


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_further_frames_and_pages_are_told(name):
    frames = [picture().transpose(turn) for turn in (0, 1, 4)]
    frames[2].thumbnail((16, 24))
    frames = [frame.resize((24, 16)) for frame in frames]
    data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
    expected = FRAMES.replace("frames", "pages") if name == "TIFF" else FRAMES
    assert facts(data).warnings == (expected,)
    assert facts(encoded(frames[0], name)).warnings == ()


def test_further_pictures_of_a_jpeg_file_are_told_once():
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture()])
    (sentence,) = facts(data).warnings
    assert "further pictures" in sentence
    assert facts(data).format == "JPEG"


def test_a_gain_map_of_an_avif_file_is_told():
    head = struct.pack(">I", 24) + b"ftypavif" + bytes(4) + b"mif1tmap"
    (sentence,) = repaired(io.BytesIO(head), "it").remarks
    assert "gain map" in sentence
    assert facts(encoded(picture(), "AVIF")).warnings == ()


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_orientation_in_xmp_alone_counts_nowhere(name):
    if name == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", XMP.decode())
        data = encoded(picture(), name, pnginfo=chunks)
    elif name == "TIFF":
        data = encoded(picture(), name, tiffinfo={700: XMP})
    else:
        data = encoded(picture(), name, xmp=XMP)
    assert facts(data).size == upright_size(data, max_pixels=10_000) == (24, 16)
    assert any("XMP alone" in each for each in facts(data).warnings)


def test_orientation_of_exif_behind_the_pixels_of_a_png_file_counts_in_the_header_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    (length,) = struct.unpack_from(">I", data, at)
    moved = data[:at] + data[at + 12 + length : -12] + data[at : at + 12 + length] + data[-12:]
    assert moved.index(b"eXIf") > moved.index(b"IDAT")
    assert facts(moved).size == upright_size(moved, max_pixels=10_000) == (16, 24)


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".dib", ".apng", ".heic", ".hif"])
def test_other_endings_of_pictures_are_pictures(tmp_path, ending):
    (tmp_path / f"a{ending}").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").touch()
    work = find_work([str(tmp_path)], f"{tmp_path}/out/", Naming())
    (job,) = work.jobs
    assert job.target.name == ("a" + ending if ending[1] == "j" else "a.png")
    assert job.format == ("jpeg" if ending[1] == "j" else "png")
    assert work.left_out == (tmp_path / "notes.txt",)
