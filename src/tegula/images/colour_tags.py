"""What files say of their colour otherwise than by an ICC profile.

PNG files have code points (cICP) or numbers (cHRM, gAMA), AVIF and HEIC files code points
(nclx), and cameras' JPEG files a word in EXIF. Each is turned into an ICC profile, which every
format can carry on. High dynamic range is not: its values stay as they are, and with them
their mark.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from tegula.images.curves import ParametricCurve
from tegula.images.profiles import D50

# Chromaticities of red, green, blue and white: x and y of each.
_D65 = (0.3127, 0.3290)
_BT709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, *_D65)
_ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, *_D65)
_PRIMARIES = {
    1: ("sRGB", _BT709),
    2: ("sRGB", _BT709),  # unspecified
    5: ("BT.601, 625 lines", (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *_D65)),
    6: ("BT.601, 525 lines", (0.63, 0.34, 0.31, 0.595, 0.155, 0.07, *_D65)),
    9: ("BT.2020", (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65)),
    11: ("DCI P3", (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.314, 0.351)),
    12: ("Display P3", (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, *_D65)),
}

# Transfer functions of ITU-T H.273. Those of video are shown with sRGB's curve, as browsers do.
_SRGB_CURVE = ParametricCurve(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_CURVES = {
    **dict.fromkeys((1, 2, 6, 13, 14, 15), _SRGB_CURVE),
    4: ParametricCurve(2.2),
    5: ParametricCurve(2.8),
    8: ParametricCurve(1.0),
}
_HIGH_RANGE = {16: "PQ", 18: "HLG"}

_NOT_KNOWN = (
    "The source marks its colour by the code points {}, which are not known here; it is taken "
    "for sRGB."
)

_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)

_NEARLY = 0.004
"""Chromaticities that differ by no more are the same ones, rounded."""

_ADOBE_GAMMA = 563 / 256
_ADOBE_BY_COLOUR_SPACE, _UNCALIBRATED = 2, 65_535


@dataclass(frozen=True)
class ColourTag:
    """What a file says of its colour beside ICC profiles.

    profile: an ICC profile that says the same; None for sRGB and for high dynamic range.
    cicp: the code points of a picture of high dynamic range, as PNG has them.
    overrides: it goes before an ICC profile of the file.
    remark: a sentence on what is not understood.
    """

    profile: bytes | None = None
    cicp: bytes | None = None
    overrides: bool = False
    remark: str | None = None


@dataclass(frozen=True)
class AvifFacts:
    """The properties of the picture proper of an AVIF or HEIC file.

    bits: of a channel.
    codes: primaries, transfer and matrix as ITU-T H.273 numbers them; None when not given.
    """

    bits: int = 8
    codes: tuple[int, int] | None = None


def colour_tag(image: Image.Image, file: BinaryIO | None) -> ColourTag:
    """Return what a file says of its colour beside ICC profiles and gamma alone.

    Args:
        image: that Pillow opened.
        file: that it was read from, if any.
    """
    try:
        if image.format == "PNG" and file is not None:
            codes = _png_chunk(file, b"cICP")
            if codes is not None and len(codes) == 4:
                if codes[2:] == b"\0\1":
                    return _by_codes(codes[0], codes[1], overrides=True)
                return ColourTag(remark=_NOT_KNOWN.format(", ".join(map(str, codes))))
        elif image.format in ("AVIF", "HEIF") and file is not None:
            found = avif_facts(file).codes
            if found is not None:
                return _by_codes(*found, overrides=False)
        if "chromaticity" in image.info and "srgb" not in image.info:
            return _by_numbers(image)
        if image.format != "PNG" and _is_adobe_by_exif(image):
            curve = ParametricCurve(_ADOBE_GAMMA)
            return ColourTag(icc_profile("Adobe RGB (1998)", _ADOBE, curve))
    except (ValueError, struct.error, np.linalg.LinAlgError, ArithmeticError):
        pass  # damaged or senseless numbers say nothing
    return ColourTag()


def _by_codes(primaries: int, transfer: int, *, overrides: bool) -> ColourTag:
    if transfer in _HIGH_RANGE:
        return ColourTag(cicp=bytes([primaries, transfer, 0, 1]), overrides=overrides)
    if primaries not in _PRIMARIES or transfer not in _CURVES:
        return ColourTag(remark=_NOT_KNOWN.format(f"{primaries}, {transfer}"))
    name, chromaticities = _PRIMARIES[primaries]
    curve = _CURVES[transfer]
    if chromaticities == _BT709 and curve is _SRGB_CURVE:
        return ColourTag(overrides=overrides)
    return ColourTag(icc_profile(name, chromaticities, curve), overrides=overrides)


def _by_numbers(image: Image.Image) -> ColourTag:
    """Return what PNG's chromaticities say, unless they are sRGB's, where gamma is enough."""
    white_x, white_y, *colours = image.info["chromaticity"]
    chromaticities = (*colours, white_x, white_y)
    if np.abs(np.subtract(chromaticities, _BT709)).max() <= _NEARLY:
        return ColourTag()
    gamma = image.info.get("gamma")
    curve = ParametricCurve(1 / gamma) if gamma and 0.01 < gamma < 100 else _SRGB_CURVE
    return ColourTag(icc_profile("PNG", chromaticities, curve))


def _is_adobe_by_exif(image: Image.Image) -> bool:
    """Whether EXIF says Adobe RGB: by the number of some cameras, or as DCF 2.0 has it."""
    try:
        exif = image.getexif()
        colour_space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        if colour_space != _UNCALIBRATED:
            return bool(colour_space == _ADOBE_BY_COLOUR_SPACE)
        return str(exif.get_ifd(ExifTags.IFD.Interop).get(1, "")).rstrip("\0") == "R03"
    except Exception:  # hostile EXIF raises nearly anything
        return False


# Reading PNG chunks and AVIF boxes.


def _png_chunk(file: BinaryIO, wanted: bytes) -> bytes | None:
    """Return a chunk that lies before the pixels of a PNG file."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == wanted:
            return file.read(length)
        file.seek(length + 4, 1)
    return None


def avif_facts(file: BinaryIO) -> AvifFacts:
    """Return depth and code points of the main picture of a file (ISO/IEC 23008-12)."""
    try:
        return _avif_facts(file)
    except (ValueError, IndexError, KeyError, StopIteration, struct.error):
        return AvifFacts()  # the decoder has the last word on damaged files


def _avif_facts(file: BinaryIO) -> AvifFacts:
    file.seek(0)
    while (head := file.read(8))[4:] != b"meta":
        length = int.from_bytes(head[:4], "big")
        if length < 8:
            return AvifFacts()
        file.seek(length - 8, 1)
    meta = dict(avif_boxes(file.read(int.from_bytes(head[:4], "big") - 8)[4:]))
    version, main = meta[b"pitm"][0], meta[b"pitm"][4:]
    main_item = int.from_bytes(main[: 4 if version else 2], "big")
    parts = dict(avif_boxes(meta[b"iprp"]))
    properties = list(avif_boxes(parts[b"ipco"]))
    codes, bits = None, 8
    for index in _associated(parts[b"ipma"], main_item):
        kind, data = properties[index - 1]
        if kind == b"colr" and data[:4] == b"nclx":
            codes = struct.unpack(">2H", data[4:8])
        elif kind == b"hvcC":
            bits = 8 + (data[17] & 7)
        elif kind == b"pixi":  # of a picture of tiles, which have the others
            bits = max(bits, data[5])
        elif kind == b"av1C":  # two flags: more than 8 bits, and of these 12
            bits = (8, 10, 8, 12)[data[2] >> 6 & 1 | data[2] >> 4 & 2]
    return AvifFacts(bits, codes)


def avif_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of the boxes that follow each other."""
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if length < 8:
            return
        yield data[at + 4 : at + 8], data[at + 8 : at + length]
        at += length


def _associated(data: bytes, item: int) -> Sequence[int]:
    """Return the numbers, from 1, of the properties that an item has."""
    version, flags = data[0], data[3]
    at, width = 8, 2 if flags & 1 else 1
    for _ in range(int.from_bytes(data[4:8], "big")):
        size = 4 if version else 2
        found, count = int.from_bytes(data[at : at + size], "big"), data[at + size]
        at += size + 1
        if found == item:
            # The upper bit says that a reader has to know the property.
            mask = (1 << 8 * width - 1) - 1
            places = range(at, at + count * width, width)
            return [int.from_bytes(data[i : i + width], "big") & mask for i in places]
        at += count * width
    return ()


# Writing a profile.


def icc_profile(name: str, chromaticities: Sequence[float], curve: ParametricCurve) -> bytes:
    """Return an ICC profile, version 4, of primaries and one curve.

    Args:
        name: what programs show.
        chromaticities: x and y of red, green, blue and white.
        curve: from values to linear light.

    Raises:
        ValueError, LinAlgError: the chromaticities make no space of colours.
    """
    x, y = np.array(chromaticities, float).reshape(4, 2).T
    if not (y > 0).all():
        raise ValueError(chromaticities)
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    white = xyz[:, 3]
    colours = xyz[:, :3] * np.linalg.solve(xyz[:, :3], white)
    adaption = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ D50 / (_BRADFORD @ white)) @ _BRADFORD
    colours = adaption @ colours
    numbers = (curve.g, curve.a, curve.b, curve.c, curve.d)
    tone = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(*numbers)
    tags = {
        b"desc": _text(name),
        b"cprt": _text("No copyright"),
        b"wtpt": b"XYZ " + bytes(4) + _fixed(*D50),
        b"chad": b"sf32" + bytes(4) + _fixed(*adaption.flat),
        **{
            key: b"XYZ " + bytes(4) + _fixed(*colours[:, i])
            for i, key in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))
        },
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone),
    }
    start = 128 + 4 + 12 * len(tags)
    directory, body = struct.pack(">I", len(tags)), b""
    for key, data in tags.items():
        directory += key + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4x", start + len(body)) + b"\4\x30\0\0mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + _fixed(*D50)
    return head.ljust(128, b"\0") + directory + body


def _fixed(*values: Any) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _text(text: str) -> bytes:
    """Return a text as ICC profiles of version 4 have it: in one language."""
    data = text.encode("utf-16-be")
    return b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(data), 28) + data
