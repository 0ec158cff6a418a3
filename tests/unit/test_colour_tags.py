"""Colour that files tell without an ICC profile, and marks that results cannot keep."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from colour_profiles import wide_rgb
from PIL import ExifTags, Image, PngImagePlugin

from tegula.images.colour_tags import avif_facts, icc_profile
from tegula.images.curves import ParametricCurve
from tegula.images.decode import decode, in_srgb
from tegula.images.encode import encode
from tegula.images.metadata import Metadata
from tegula.images.pixels import to_image
from tegula.images.profiles import colour_space, srgb_decoded

COLOURS = np.uint8([[[200, 40, 40], [10, 20, 30], [64, 200, 30], [250, 90, 20]]])
P3_PRIMARIES = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
D65 = (0.3127, 0.329)

# Linear light of Display P3 to that of sRGB, as CSS Color 4 gives it.
P3_TO_SRGB = np.array(
    [
        [1.2249401762, -0.2249401762, 0],
        [-0.0420569547, 1.0420569547, 0],
        [-0.0196375546, -0.0786360456, 1.0982736002],
    ]
)


def png(pixels=COLOURS, chunks=(), **parameters):
    info = PngImagePlugin.PngInfo()
    for kind, data in chunks:
        info.add(kind, data)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, **parameters)
    return buffer.getvalue()


def read(data):
    return decode(data, max_pixels=10_000)


def wide(picture):
    return picture.rgb if picture.beyond is None else picture.rgb + picture.beyond


def numbers(primaries, white=D65):
    return struct.pack(">8I", *(round(v * 100_000) for v in (*white, *primaries)))


def assert_is_p3(picture):
    expected = srgb_decoded(COLOURS / 255) @ P3_TO_SRGB.T
    assert np.abs(srgb_decoded(wide(picture)) - expected).max() < 1e-3
    space = colour_space(picture.facts.metadata.profile, greyscale=False)
    assert np.abs(space.from_srgb(wide(picture)) - COLOURS / 255).max() < 1e-5


def test_code_points_of_display_p3_count_in_png():
    assert_is_p3(read(png(chunks=[(b"cICP", bytes([12, 13, 0, 1]))])))
    # They go before a profile, too.
    assert_is_p3(read(png(chunks=[(b"cICP", bytes([12, 13, 0, 1]))], icc_profile=wide_rgb())))


@pytest.mark.parametrize("codes", [(1, 13), (1, 1), (2, 2), (1, 6)])
def test_code_points_of_srgb_change_nothing(codes):
    picture = read(png(chunks=[(b"cICP", bytes([*codes, 0, 1]))]))
    assert np.array_equal(np.asarray(to_image(picture.rgb)), COLOURS)
    assert picture.facts.metadata.profile is None


def test_chromaticities_count_in_png():
    chunks = [(b"cHRM", numbers(P3_PRIMARIES)), (b"gAMA", struct.pack(">I", 45455))]
    picture = read(png(chunks=chunks))
    expected = np.power(COLOURS / 255, 2.2) @ P3_TO_SRGB.T
    assert np.abs(srgb_decoded(wide(picture)) - expected).max() < 1e-3
    assert picture.facts.metadata.profile is not None
    usual = (0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
    same = read(png(chunks=[(b"cHRM", numbers(usual)), (b"gAMA", struct.pack(">I", 45455))]))
    assert np.array_equal(np.asarray(to_image(same.rgb)), COLOURS)
    senseless = read(png(chunks=[(b"cHRM", bytes(32))]))
    assert np.array_equal(np.asarray(to_image(senseless.rgb)), COLOURS)


def test_unknown_code_points_are_said():
    for codes in ([77, 13, 0, 1], [12, 13, 0, 0]):
        picture = read(png(chunks=[(b"cICP", bytes(codes))]))
        assert str(codes[0]) in picture.facts.warnings[0]
        assert np.array_equal(np.asarray(to_image(picture.rgb)), COLOURS)


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_keeps_its_values_and_its_mark(transfer):
    mark = bytes([9, transfer, 0, 1])
    picture = read(png(chunks=[(b"cICP", mark)]))
    assert np.array_equal(np.asarray(to_image(picture.rgb)), COLOURS)
    result = encode(Image.fromarray(COLOURS), "png", metadata=picture.facts.metadata)
    assert b"cICP" + mark in result.data
    assert result.data.index(b"cICP") < result.data.index(b"IDAT")
    assert result.warnings == ()
    marked = encode(Image.fromarray(COLOURS), "avif", metadata=picture.facts.metadata)
    assert read(marked.data).facts.metadata.cicp == mark
    assert marked.warnings == ()
    for name in ("jpeg", "tiff", "webp"):
        (warning,) = encode(
            Image.fromarray(COLOURS), name, metadata=picture.facts.metadata
        ).warnings
        assert "high dynamic range" in warning


def avif(bits, primaries=2, transfer=2, channels=3):
    ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32, 1)
    values = np.rint(np.concatenate([ramp, ramp[::-1], 1 - ramp, ramp * 0 + 1], 2) * (2**bits - 1))
    values = values[..., :channels].astype(np.uint8 if bits == 8 else np.uint16)
    parameters = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
    _, data = cv2.imencode(".avif", values, parameters)
    data = bytearray(data.tobytes())
    at = data.index(b"nclx") + 4
    data[at : at + 4] = struct.pack(">2H", primaries, transfer)
    return bytes(data), values[..., [0] if channels == 1 else [2, 1, 0]] / (2**bits - 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avif_is_read_at_its_depth(bits, channels):
    data, expected = avif(bits, channels=channels)
    picture = read(data)
    assert picture.facts.depth == bits
    assert picture.facts.greyscale == (channels == 1)
    assert np.abs(picture.rgb - expected).max() < 1e-6


def test_code_points_count_in_avif():
    data, expected = avif(10, 12, 13)
    picture = read(data)
    linear = srgb_decoded(expected) @ P3_TO_SRGB.T
    assert np.abs(srgb_decoded(wide(picture)) - linear).max() < 1e-3
    assert read(avif(10, 9, 16)[0]).facts.metadata.cicp == bytes([9, 16, 0, 1])
    assert avif_facts(io.BytesIO(data[:60])).codes is None


def test_heic_is_read_at_its_depth_and_in_its_colours():
    pillow_heif = pytest.importorskip("pillow_heif")
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    values = np.repeat(np.rint(ramp * 1023).astype(np.uint16)[..., None] << 6, 3, axis=2)
    buffer = io.BytesIO()
    file = pillow_heif.from_bytes(mode="RGB;16", size=(64, 64), data=values.tobytes())
    file.save(buffer, quality=100)
    picture = read(buffer.getvalue())
    assert picture.facts.depth == 10
    assert picture.facts.warnings == ()
    assert np.abs(picture.rgb - ramp[..., None]).max() < 4 / 1023
    marked = bytearray(buffer.getvalue())
    at = marked.index(b"nclx") + 4
    marked[at : at + 4] = struct.pack(">2H", 9, 16)
    assert read(bytes(marked)).facts.metadata.cicp == bytes([9, 16, 0, 1])


@pytest.mark.parametrize("how", ["number", "dcf"])
def test_adobe_rgb_by_exif_alone_is_adobe_rgb(how):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 2 if how == "number" else 65535
    if how == "dcf":
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: "R03"}
    buffer = io.BytesIO()
    image = Image.new("RGB", (16, 16), (90, 200, 60))
    image.save(buffer, "JPEG", exif=exif.tobytes(), quality=100)
    picture = read(buffer.getvalue())
    # CIE XYZ relative to D50 of Adobe RGB's linear light, from its specification.
    light = np.power(np.array([90, 200, 60]) / 255, 563 / 256)
    to_xyz = np.array(
        [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
    )
    srgb_to_xyz = np.array(
        [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
    )
    got = srgb_decoded(wide(picture)[8, 8]) @ srgb_to_xyz.T
    assert np.abs(got - to_xyz @ light).max() < 0.01
    assert picture.facts.metadata.profile is not None


def test_a_result_is_shown_beside_its_source_in_srgb():
    picture = read(png(chunks=[(b"cICP", bytes([12, 13, 0, 1]))]))
    shown = in_srgb(Image.fromarray(COLOURS), picture.facts.metadata)
    assert np.array_equal(np.asarray(shown), np.asarray(to_image(picture.rgb)))
    image = Image.fromarray(COLOURS)
    assert in_srgb(image, Metadata()) is image


def test_a_written_profile_has_the_primaries_that_it_was_given():
    curve = ParametricCurve(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    space = colour_space(icc_profile("P3", (*P3_PRIMARIES, *D65), curve), greyscale=False)
    linear = srgb_decoded(space.to_srgb(COLOURS / 255))
    assert np.abs(linear - srgb_decoded(COLOURS / 255) @ P3_TO_SRGB.T).max() < 2e-4


def packet(inner, attributes=""):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf'
        '-syntax-ns#"><rdf:Description rdf:about="" xmlns:dc="dc" xmlns:hdrgm="h" xmlns:Item="i" '
        f'xmlns:Container="c" xmlns:GPano="g" dc:source="roof" {attributes}>{inner}'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


@pytest.mark.parametrize(
    ("inner", "attributes", "gone", "word"),
    [
        ("", 'hdrgm:Version="1.0"', b"hdrgm:Version", "gain map"),
        (
            '<Container:Directory><rdf:Seq><rdf:li><Container:Item Item:Semantic="GainMap"/>'
            "</rdf:li></rdf:Seq></Container:Directory>",
            "",
            b"GainMap",
            "further pictures",
        ),
        (
            "<GPano:FullPanoWidthPixels>8000</GPano:FullPanoWidthPixels>",
            'GPano:CroppedAreaImageWidthPixels="8000"',
            b"8000",
            "panorama",
        ),
    ],
)
def test_marks_that_no_longer_hold_leave_xmp_with_a_warning(inner, attributes, gone, word):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", xmp=packet(inner, attributes))
    facts = read(buffer.getvalue()).facts
    assert gone not in facts.metadata.xmp
    assert b"roof" in facts.metadata.xmp
    assert len(facts.warnings) == 1
    assert word in facts.warnings[0]


def test_a_chunk_behind_the_pixels_or_cut_off_tells_nothing():
    whole = png()
    tail = struct.pack(">I", 4) + b"cICP" + bytes([12, 13, 0, 1])
    tail += struct.pack(">I", zlib.crc32(tail[4:]))
    late = whole[:-12] + tail + whole[-12:]
    assert read(late).facts.metadata.profile is None
