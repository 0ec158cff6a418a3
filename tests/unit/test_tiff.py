"""TIFF files of the kinds that Pillow and OpenCV read as something else, or not at all."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from colour_profiles import wide_rgb
from PIL import Image, TiffImagePlugin

from tegula.errors import ImageError
from tegula.images.decode import decode
from tegula.images.open import upright_size

HEIGHT, WIDTH = 12, 20
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
COLOURS = np.stack([RAMP, RAMP.T.reshape(HEIGHT, WIDTH), 1 - RAMP], axis=-1)


def tiff(values, **parameters):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, metadata=None, **parameters)
    return buffer.getvalue()


def read(data):
    return decode(data, max_pixels=100_000)


def as_type(values, kind):
    white = 1 if kind.startswith("float") else np.iinfo(kind).max
    return (values * white).astype(kind)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "float16", "float32", "float64"])
def test_every_type_is_read_in_either_layout(kind, planar, compression):
    values = as_type(COLOURS, kind)
    stored = np.moveaxis(values, -1, 0) if planar == "separate" else values
    data = tiff(
        stored,
        photometric="rgb",
        planarconfig=planar,
        compression=compression,
        predictor=compression is not None and kind.startswith("uint"),
        rowsperstrip=5,
    )
    picture = read(data)
    tolerance = {"uint8": 1 / 255, "float16": 1e-3}.get(kind, 2e-5)
    assert np.abs(picture.rgb - COLOURS).max() <= tolerance
    assert not picture.facts.greyscale
    assert upright_size(data, max_pixels=1000) == (WIDTH, HEIGHT)


def lzw(data):
    """Pack bytes by LZW as TIFF 6.0 has it, with no code but those of single bytes."""
    bits = []
    for start in range(0, len(data), 250):  # before the codes would grow to ten bits
        bits.append(format(256, "09b"))
        bits += [format(byte, "09b") for byte in data[start : start + 250]]
    bits.append(format(257, "09b"))
    stream = "".join(bits)
    stream += "0" * (-len(stream) % 8)
    return int(stream, 2).to_bytes(len(stream) // 8, "big")


def packed_tiff(values, photometric, *, order="<", tile=None, planar=False, extras=()):
    """A TIFF file of samples compressed by LZW, which tifffile alone does not write."""
    height, width, channels = values.shape
    kind = values.dtype.newbyteorder(order)
    planes = [values[..., i : i + 1] for i in range(channels)] if planar else [values]
    segments = []
    for plane in planes:
        if tile is None:
            segments.append(lzw(plane.astype(kind).tobytes()))
            continue
        padded = np.zeros(
            (-(-height // tile) * tile, -(-width // tile) * tile, plane.shape[2]), kind
        )
        padded[:height, :width] = plane
        segments += [
            lzw(np.ascontiguousarray(padded[y : y + tile, x : x + tile]).tobytes())
            for y in range(0, height, tile)
            for x in range(0, width, tile)
        ]
    tags = {
        256: width, 257: height, 258: (8 * values.dtype.itemsize,) * channels, 259: 5,
        262: photometric, 277: channels, 284: 2 if planar else 1,
        339: ({"u": 1, "f": 3}[values.dtype.kind],) * channels,
    }  # fmt: skip
    if extras:
        tags[338] = extras
    places, counts = (273, 279) if tile is None else (324, 325)
    tags |= {278: height} if tile is None else {322: tile, 323: tile}
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II" if order == "<" else b"MM")
    starts = [sum(map(len, segments[:i])) for i in range(len(segments))]
    directory.tagtype[places] = directory.tagtype[counts] = 4
    for tag, value in tags.items():
        directory[tag] = value
    directory[places], directory[counts] = tuple(starts), tuple(map(len, segments))
    if tile is not None:
        length = 8 + len(directory.tobytes(8))
        directory[places] = tuple(start + length for start in starts)
    head = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return head + directory.tobytes(8) + b"".join(segments)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_deep_samples_packed_by_lzw_are_read_in_any_layout(kind, planar, tile, order):
    alpha = np.clip(RAMP * 2, 0.25, 1)[..., None]
    given = {"order": order, "tile": tile, "planar": planar}
    multiplied = np.concatenate([COLOURS * alpha, alpha], axis=-1)
    picture = read(packed_tiff(as_type(multiplied, kind), 2, extras=1, **given))
    assert np.abs(picture.rgb - COLOURS).max() <= 2e-4
    assert np.abs(picture.alpha - alpha[..., 0]).max() <= 2e-5
    picture = read(packed_tiff(as_type(1 - RAMP, kind)[..., None], 0, **given))
    assert np.abs(picture.rgb[..., 0] - RAMP).max() <= 2e-5
    assert picture.facts.greyscale


@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_white_is_zero_where_the_file_says_so(kind, tile):
    picture = read(tiff(as_type(1 - RAMP, kind), photometric="miniswhite", tile=tile))
    assert picture.facts.greyscale
    assert np.abs(picture.rgb[..., 0] - RAMP).max() <= 1 / 255


def test_signed_samples_are_white_at_their_largest():
    picture = read(tiff((RAMP * 32767).astype(np.int16), photometric="minisblack"))
    assert np.abs(picture.rgb[..., 0] - RAMP).max() <= 1e-4


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_fourth_sample_is_what_the_file_says(planar):
    alpha = np.clip(RAMP * 2, 0.25, 1)[..., None]
    stored = {
        "assocalpha": np.concatenate([COLOURS * alpha, alpha], axis=-1),
        "unassalpha": np.concatenate([COLOURS, alpha], axis=-1),
        "unspecified": np.concatenate([COLOURS, alpha], axis=-1),
    }
    for kind, values in stored.items():
        deep = as_type(values, "uint16")
        deep = np.moveaxis(deep, -1, 0) if planar == "separate" else deep
        picture = read(tiff(deep, photometric="rgb", planarconfig=planar, extrasamples=[kind]))
        assert np.abs(picture.rgb - COLOURS).max() <= 2e-4, kind
        if kind == "unspecified":
            assert picture.alpha is None
            assert "further channel" in picture.facts.warnings[0]
        else:
            assert np.abs(picture.alpha - alpha[..., 0]).max() <= 2e-5, kind
            assert picture.facts.warnings == ()


def test_lab_of_sixteen_bits_is_the_colour_that_it_says():
    # CIE L*a*b* of sRGB's grey 128, red and blue under D50, by littleCMS's transicc.
    lab = np.array([[[53.585, 0, 0], [54.29, 80.81, 69.89], [29.57, 68.30, -112.03]]])
    expected = np.array([[128, 128, 128], [255, 0, 0], [0, 0, 255]]) / 255
    light = np.rint(lab[..., :1] * 655.35)
    signed = np.rint(lab[..., 1:] * 256)
    cielab = np.concatenate([light, signed % 65536], axis=-1).astype(np.uint16)
    shifted = np.concatenate([lab[..., :1] * 652.8, signed + 32768], axis=-1).astype(np.uint16)
    for values, kind in ((cielab, "cielab"), (shifted, "icclab"), (lab.astype("f4"), "cielab")):
        picture = read(tiff(values, photometric=kind))
        assert np.abs(picture.rgb[0] - expected).max() < 0.004
        assert picture.facts.warnings == ("The source is LAB; the result is sRGB.",)


def test_cmyk_of_sixteen_bits_in_planes_is_read():
    inks = np.zeros((4, HEIGHT, WIDTH), np.uint16)
    inks[1] = 65535
    picture = read(tiff(inks, photometric="separated", planarconfig="separate"))
    assert np.allclose(picture.rgb, [1, 0, 1], atol=0.01)
    assert picture.facts.depth == 8
    assert "8 of its 16 bits" in picture.facts.warnings[1]


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_samples_reach_white(bits):
    values = np.rint(RAMP * (2**bits - 1)).astype(int)
    stream = "".join(format(value, f"0{bits}b") for value in values.flat)
    data = int(stream, 2).to_bytes(len(stream) // 8, "big")
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: HEIGHT}
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    for tag, value in {**tags, 279: len(data)}.items():
        directory[tag] = value
    picture = read(b"II*\0\x08\0\0\0" + directory.tobytes(8) + data)
    assert np.abs(picture.rgb[..., 0] - RAMP).max() <= 2**-bits


def test_profile_and_metadata_survive_where_pillow_does_not_read_the_file():
    profile = wide_rgb()
    packet = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-'
        b'rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:dc="d" dc:source="roof"/></rdf:RDF>'
        b"</x:xmpmeta>"
    )
    picture = read(
        tiff(
            COLOURS.astype(np.float32),
            photometric="rgb",
            iccprofile=profile,
            resolution=(300, 300),
            resolutionunit="inch",
            extratags=[(700, 1, len(packet), packet, True), (315, 2, 0, "Ada", True)],
        )
    )
    metadata = picture.facts.metadata
    assert metadata.profile == profile
    assert b"roof" in metadata.xmp
    assert metadata.dpi == (300, 300)
    exif = Image.Exif()
    exif.load(metadata.exif)
    assert exif[315] == "Ada"
    assert np.abs(picture.rgb - COLOURS).max() > 0.05  # the profile was applied


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_undone_where_pillow_does_not_read_the_file(turn):
    data = tiff(COLOURS.astype(np.float32), photometric="rgb", extratags=[(274, 3, 1, turn, True)])
    upright = COLOURS.swapaxes(0, 1) if turn >= 5 else COLOURS
    upright = upright[:, ::-1] if turn in (2, 3, 6, 7) else upright
    upright = upright[::-1] if turn in (3, 4, 7, 8) else upright
    picture = read(data)
    assert np.abs(picture.rgb - upright).max() < 1e-6
    assert upright_size(data, max_pixels=1000) == picture.facts.size


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_nan_is_black_with_a_warning_and_what_is_beyond_one_is_cut_off_with_another(photometric):
    values = RAMP.astype(np.float32)
    values[3, 4], values[5, 6] = np.nan, 1.25
    picture = read(tiff(values, photometric=photometric))
    assert picture.rgb[3, 4].max() == 0
    assert picture.rgb[5, 6].max() == (photometric == "minisblack")
    assert picture.facts.warnings == (
        "1 pixel of the source holds NaN, not a number, which is read as black.",
        "The source holds floats from 0 to 1.25; what is beyond 0 to 1 is cut off.",
    )


def test_a_smaller_copy_before_the_picture_is_not_taken_for_it():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(np.zeros((4, 5, 3), np.uint8), photometric="rgb", subfiletype=1)
        writer.write(as_type(COLOURS, "uint8"), photometric="rgb")
    assert read(buffer.getvalue()).facts.size == (WIDTH, HEIGHT)
    assert upright_size(buffer.getvalue(), max_pixels=1000) == (WIDTH, HEIGHT)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(np.zeros((4, 5, 3), np.uint8), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(as_type(COLOURS, "uint16"), photometric="rgb")
    assert np.abs(read(buffer.getvalue()).rgb - COLOURS).max() < 2e-5


def test_the_preview_of_a_raw_file_is_not_taken_for_the_picture():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        version = (50706, 1, 4, b"\1\4\0\0", True)
        preview = np.full((4, 5, 3), 90, np.uint8)
        writer.write(preview, photometric="rgb", subfiletype=1, subifds=1, extratags=[version])
        writer.write(as_type(RAMP, "uint16"), photometric="cfa")
    for look in (read, lambda data: upright_size(data, max_pixels=1000)):
        with pytest.raises(ImageError, match=r"raw file, .* develop it"):
            look(buffer.getvalue())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (tiff(as_type(RAMP, "float32") * 255, photometric="minisblack"), "floats from 0 to 255"),
        (tiff(RAMP.astype(np.complex64), photometric="minisblack"), "which is not read"),
        (tiff(as_type(COLOURS, "uint16"), photometric="ycbcr"), "YCBCR"),
        (
            tiff(
                as_type(np.moveaxis(COLOURS, -1, 0), "uint16"),
                photometric="rgb",
                planarconfig="separate",
                compression="lzma",
            ),
            "samples of 16 bits compressed by LZMA",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(data, sentence):
    with pytest.raises(ImageError, match=sentence):
        read(data)


def test_strips_beyond_the_file_or_beyond_their_size_are_refused():
    data = tiff(as_type(COLOURS, "float32"), photometric="rgb")
    with pytest.raises(ImageError, match="damaged"):
        read(data[:-8])
    honest = tiff(as_type(COLOURS, "float32"), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(io.BytesIO(honest)) as file:
        page = file.pages[0]
        count, offset = page.tags[279], page.tags[273]
        bomb = zlib.compress(bytes(100_000))
        changed = bytearray(honest + bomb)
        struct.pack_into("<I", changed, count.valueoffset, len(bomb))
        struct.pack_into("<I", changed, offset.valueoffset, len(honest))
    with pytest.raises(ImageError, match="damaged"):
        read(bytes(changed))
    packed = packed_tiff(as_type(COLOURS, "uint16"), 2)
    with pytest.raises(ImageError, match="damaged"):
        read(packed[:-700] + bytes(700))
