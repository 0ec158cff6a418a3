from __future__ import annotations

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tegula.errors import ImageError
from tegula.images.decode import decode
from tegula.images.encode import encode, read_settings
from tegula.images.metadata import Metadata
from tegula.images.open import upright_size

NO_END = "The end marker of the source is missing; its pixels are whole."


def picture(width=24, height=16, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, format_name, **parameters):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **parameters)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(data, before=b"", behind=b""):
    """Put chunks around the pixels of a PNG file of one IDAT chunk."""
    at = data.index(b"IDAT") - 4
    return data[:at] + before + data[at:-12] + behind + data[-12:]


def pixels(data):
    return np.rint(decode(data, max_pixels=10_000).rgb * 255).astype(np.uint8)


def remarks(data):
    return decode(data, max_pixels=10_000).facts.warnings


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt"])
def test_a_text_longer_than_decoders_take_is_read_and_kept(kind, place):
    text = "a long story " * 200_000
    packed = zlib.compress(text.encode())
    body = {
        b"zTXt": b"Comment\0\0" + packed,
        b"iTXt": b"Comment\0\1\0\0\0" + packed,
        b"tEXt": b"Comment\0" + text.encode(),
    }[kind]
    data = with_chunks(encoded(picture(), "PNG"), **{place: chunk(kind, body)})
    found = decode(data, max_pixels=10_000)
    assert np.array_equal(np.rint(found.rgb * 255), np.asarray(picture()))
    assert found.facts.metadata.text == {"Comment": text}
    assert found.facts.warnings == ()
    assert upright_size(data, max_pixels=10_000) == (24, 16)


def test_settings_and_text_of_a_result_are_read_however_long_they_are():
    settings = {"prompt": "a cat " * 300_000}
    text = Metadata(text={"parameters": "steps " * 300_000})
    data = encode(picture(), "png", metadata=text, settings=settings).data
    assert np.array_equal(pixels(data), np.asarray(picture()))
    assert read_settings(data) == settings
    assert decode(data, max_pixels=10_000).facts.metadata.text == text.text


def test_a_profile_longer_than_decoders_take_is_kept():
    profile = bytes(2**21)
    body = b"icc\0\0" + zlib.compress(profile)
    data = with_chunks(encoded(picture(), "PNG"), before=chunk(b"iCCP", body))
    assert np.array_equal(pixels(data), np.asarray(picture()))
    assert remarks(data) == ("The colour profile of the source is unusable and is dropped.",)


def test_a_text_that_unpacks_to_more_than_anybody_writes_is_left_out():
    body = b"Comment\0\0" + zlib.compress(bytes(2**25 + 1))
    data = with_chunks(encoded(picture(), "PNG"), before=chunk(b"zTXt", body))
    found = decode(data, max_pixels=10_000)
    assert found.facts.metadata.text == {}
    assert "too long" in found.facts.warnings[0]


@pytest.mark.parametrize("mode", ["RGB", "LA", "I;16"])
def test_a_wrong_checksum_of_a_text_costs_the_text_alone(mode):
    image = picture().convert("L").convert("I").convert("I;16") if mode == "I;16" else None
    image = picture(mode=mode) if image is None else image
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Title", "kept")
    sound = encoded(image, "PNG", pnginfo=chunks)
    bad = bytearray(with_chunks(sound, before=chunk(b"tEXt", b"Comment\0lost")))
    bad[bad.index(b"lost") + 4] ^= 1
    found = decode(bytes(bad), max_pixels=10_000)
    assert np.array_equal(found.rgb, decode(sound, max_pixels=10_000).rgb)
    assert found.facts.metadata.text == {"Title": "kept"}
    assert found.facts.warnings == ("A damaged text of the source is left out.",)


@pytest.mark.parametrize("kind", [b"IDAT", b"tRNS", b"PLTE", b"IHDR"])
def test_a_wrong_checksum_of_what_makes_the_pixels_is_damage(kind):
    image = picture().quantize(16)
    data = bytearray(encoded(image, "PNG", transparency=3))
    at = data.index(kind) - 4
    (length,) = struct.unpack_from(">I", data, at)
    data[at + 8 + length] ^= 1
    with pytest.raises(ImageError, match="damaged or truncated"):
        pixels(bytes(data))


@pytest.mark.parametrize("cut", [12, 11, 4, 1])
def test_a_png_file_without_its_end_is_read(cut):
    data = encoded(picture(), "PNG")[:-cut]
    assert np.array_equal(pixels(data), np.asarray(picture()))
    assert remarks(data) == (() if cut < 5 else (NO_END,))


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_a_png_file_that_lacks_pixels_is_damaged(mode):
    image = picture() if mode == "RGB" else picture(mode="L").convert("I").convert("I;16")
    data = encoded(image, "PNG")
    with pytest.raises(ImageError, match="damaged or truncated"):
        pixels(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_file_without_its_end_is_read_where_no_pixel_is_missing(progressive, subsampling):
    image = picture(50, 34).resize((200, 136), Image.Resampling.BICUBIC)
    data = encoded(image, "JPEG", quality=90, progressive=progressive, subsampling=subsampling)
    for whole in (data[:-2], data[:-1]):
        found = decode(whole, max_pixels=100_000)
        assert np.array_equal(found.rgb, decode(data, max_pixels=100_000).rgb)
        assert found.facts.warnings == (NO_END,)
    for cut in (12, 100, len(data) // 2):
        with pytest.raises(ImageError, match="damaged or truncated"):
            decode(data[:-cut], max_pixels=100_000)


def bmp(masks, bits, values, header=40):
    height, width = values.shape
    rows = np.zeros((height, -(-width * bits // 32) * 4), np.uint8)
    packed = values.astype(f"<u{bits // 8}").view(np.uint8).reshape(height, -1)
    rows[:, : packed.shape[1]] = packed
    fields = struct.pack(f"<{len(masks)}I", *masks)
    info = struct.pack("<I2i2H6I", header, width, height, 1, bits, 3, rows.size, 0, 0, 0, 0)
    info = (info + fields).ljust(max(header, 40 + len(fields)), b"\0")
    start = 14 + len(info)
    head = b"BM" + struct.pack("<I4xI", start + rows.size, start)
    return head + info + rows[::-1].tobytes()


@pytest.mark.parametrize(
    ("masks", "bits", "header"),
    [
        ((0xF00, 0xF0, 0xF), 16, 40),
        ((0xF800, 0x7E0, 0x1F), 16, 40),
        ((0x3FF00000, 0xFFC00, 0x3FF), 32, 40),
        ((0xFF, 0xFF00, 0xFF0000), 32, 40),
        ((0x7C00, 0x3E0, 0x1F, 0x8000), 16, 56),
        ((0xF000, 0xF00, 0xF0, 0xF), 16, 124),
    ],
)
def test_bmp_files_of_any_bit_fields_are_read(masks, bits, header):
    values = np.random.default_rng(1).integers(0, 2**bits, (5, 7), np.uint32)
    found = decode(bmp(masks, bits, values, header), max_pixels=10_000)
    for channel, mask in enumerate(masks[:3]):
        shift = (mask & -mask).bit_length() - 1
        expected = ((values & mask) >> shift) / (mask >> shift)
        assert np.abs(found.rgb[..., channel] - expected).max() < 5e-3
    if header == 124:
        assert np.abs(found.alpha - (values & 0xF) / 15).max() < 5e-3


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\xff\x0a\0\0", "a JPEG XL picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"%PDF-1.7", "a PDF document"),
        (b'<?xml version="1.0"?>\n<svg xmlns="', "an SVG drawing"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "a camera's raw file"),
    ],
)
def test_kinds_that_are_not_read_are_named(start, what):
    for look in (decode, upright_size):
        with pytest.raises(ImageError, match=f"is {what}, which is not supported; ") as caught:
            look(start.ljust(64, b" "), max_pixels=100)
        assert "save it again" not in str(caught.value)


def test_kinds_of_jpeg_that_are_not_read_are_not_called_damaged():
    data = bytearray(encoded(picture(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12  # bits a sample
    with pytest.raises(ImageError, match="not supported"):
        pixels(bytes(data))


def heif(*brands):
    body = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + bytes(64)


@pytest.mark.parametrize(
    "brands", [(b"heic",), (b"heix",), (b"mif1", b"heic"), (b"msf1", b"hevc"), (b"mif1",)]
)
def test_heic_without_its_library_says_what_to_install(brands, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC picture.*pip install 'tegula\[heic\]'"):
        pixels(heif(*brands))


def test_avif_of_a_common_brand_is_avif():
    data = encoded(picture(), "AVIF", quality=100)
    assert data[8:12] == b"avif"
    as_mif1 = data.replace(b"ftypavif", b"ftypmif1", 1)
    assert np.array_equal(pixels(as_mif1), pixels(data))


def test_heic_is_read_like_any_other_picture():
    pillow_heif = pytest.importorskip("pillow_heif")
    smooth = picture(8, 8).resize((64, 48), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6
    pillow_heif.from_pillow(smooth).save(buffer, quality=95, exif=exif.tobytes())
    for brand in (b"heic", b"mif1"):
        data = buffer.getvalue().replace(b"ftypheic", b"ftyp" + brand, 1)
        found = decode(data, max_pixels=10_000)
        assert found.facts.format == "HEIF"
        assert found.facts.size == upright_size(data, max_pixels=10_000)
        assert b"a description" in found.facts.metadata.exif
        if found.facts.size == smooth.size:
            assert np.abs(found.rgb - np.asarray(smooth) / 255).mean() < 0.02


def test_more_chunks_than_anybody_writes_are_refused():
    many = with_chunks(encoded(picture(), "PNG"), before=chunk(b"tEXt", b"a\0b") * 70_000)
    for look in (decode, upright_size):
        with pytest.raises(ImageError, match="more than 65536 chunks, which is not supported"):
            look(many, max_pixels=10_000)
