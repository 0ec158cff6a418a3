"""More than eight bits a channel: PNG, TIFF and AVIF files that Pillow has no mode to write.

Around the samples of PNG files Pillow still writes what there is of metadata. OpenCV, which
compresses AVIF, writes none, so that it is put into the container here.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from tegula.images.colour_tags import avif_boxes
from tegula.images.metadata import IFDS
from tegula.images.repair import write_png_chunk

Bytes = NDArray[np.uint8]

DEEPEST: Mapping[str, int] = {"png": 16, "tiff": 16, "avif": 12}
"""Bits of a channel in the formats that hold more than eight."""

_ROWS = 64
"""Rows that are compressed at once: what a strip of a TIFF file holds."""

_COMPRESSION = 4
_PAETH = 4
_TIFF_LONG = 4


@dataclass(frozen=True, eq=False)
class DeepPixels:
    """A result with more than eight bits a channel, in the colours of its file.

    samples: uint16 [height, width, 1 to 4]: grey, grey and alpha, RGB or RGBA.
    depth: bits a channel of the source; 32 and more for floats.
    """

    samples: NDArray[np.uint16]
    depth: int

    def crop(self, box: tuple[int, int, int, int]) -> DeepPixels:
        """Return the part between the left, top, right and bottom of a box."""
        left, top, right, bottom = box
        return DeepPixels(self.samples[top:bottom, left:right].copy(), self.depth)


def deep_png(samples: NDArray[np.uint16], parameters: Mapping[str, Any]) -> bytes:
    """Write a PNG file of sixteen bits.

    Args:
        samples: as in ``DeepPixels``.
        parameters: what Pillow's writer would be given.
    """
    height, width, channels = samples.shape
    small = io.BytesIO()
    Image.new(("L", "LA", "RGB", "RGBA")[channels - 1], (1, 1)).save(small, "PNG", **parameters)
    out = io.BytesIO(small.getvalue()[:8])
    out.seek(8)
    for kind, data in _chunks(small.getvalue()):
        if kind == b"IHDR":
            write_png_chunk(out, kind, struct.pack(">2IB", width, height, 16) + data[9:])
        elif kind == b"IDAT":
            for part in _compressed_rows(samples, parameters["compress_level"]):
                write_png_chunk(out, kind, part)
        else:
            write_png_chunk(out, kind, data)
    return out.getvalue()


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def _compressed_rows(samples: NDArray[np.uint16], level: int) -> Iterator[bytes]:
    height, width, channels = samples.shape
    pixel = 2 * channels
    above = np.zeros((1, width * pixel), np.uint8)
    packer = zlib.compressobj(level, strategy=zlib.Z_FILTERED)
    for top in range(0, height, _ROWS):
        rows = samples[top : top + _ROWS].astype(">u2").view(np.uint8).reshape(-1, width * pixel)
        lines = np.full((len(rows), 1 + width * pixel), _PAETH, np.uint8)
        lines[:, 1:] = rows - _paeth(rows, np.concatenate([above, rows[:-1]]), pixel)
        yield packer.compress(lines.tobytes())
        above = rows[-1:]
    yield packer.flush()


def _paeth(rows: Bytes, above: NDArray[Any], pixel: int) -> Bytes:
    """Predict each byte from its neighbours: left, above or both, whichever is nearest.

    This is filter 4 of the PNG specification, for all bytes at once.
    """
    above = above.astype(np.int16)
    left, before = np.zeros((2, *rows.shape), np.int16)
    left[:, pixel:], before[:, pixel:] = rows[:, :-pixel], above[:, :-pixel]
    to_left, to_above = np.abs(above - before), np.abs(left - before)
    to_before = np.abs(left + above - 2 * before)
    best = np.where(to_above <= to_before, above, before)
    best = np.where((to_left <= to_above) & (to_left <= to_before), left, best)
    return best.astype(np.uint8)


def deep_tiff(samples: NDArray[np.uint16], parameters: Mapping[str, Any]) -> bytes:
    """Write a TIFF file of sixteen bits, compressed by Deflate.

    Args:
        samples: as in ``DeepPixels``.
        parameters: what Pillow's writer would be given.
    """
    height, width, channels = samples.shape
    strips = []
    for top in range(0, height, _ROWS):
        rows = samples[top : top + _ROWS].astype("<u2")
        rows[:, 1:] -= samples[top : top + _ROWS, :-1]  # differences, which compress better
        strips.append(zlib.compress(rows.tobytes(), _COMPRESSION))
    lengths = [len(strip) for strip in strips]
    tags: Image.Exif = parameters["tiffinfo"]
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    for tag, value in tags.items():
        # Of a directory within, Pillow gives the place in the old file under its tag.
        directory[tag] = tags.get_ifd(tag) if tag in IFDS else value
    if "icc_profile" in parameters:
        directory.tagtype[34675] = 7
        directory[34675] = parameters["icc_profile"]
    if "dpi" in parameters:
        directory[296] = 2
        directory[282], directory[283] = parameters["dpi"]
    directory[256], directory[257], directory[258] = width, height, (16,) * channels
    directory[259], directory[262], directory[317] = 8, 2 if channels >= 3 else 1, 2
    directory[277], directory[278], directory[284] = channels, _ROWS, 1
    if channels in (2, 4):
        directory[338] = 2
    directory.tagtype[273] = directory.tagtype[279] = _TIFF_LONG
    # Counted from the end of the directory; Pillow adds where that is.
    directory[273] = tuple(int(start) for start in np.cumsum([0, *lengths[:-1]]))
    directory[279] = tuple(lengths)
    return b"".join([b"II*\0\x08\0\0\0", directory.tobytes(8), *strips])


AVIF_SPEED = 8
"""Speed of the encoder, 0 to 10, the slowest being 0."""
_COLR, _ASSOCIATIONS = b"colr", b"ipma"


def deep_avif(
    samples: NDArray[np.uint16], bits: int, parameters: Mapping[str, Any]
) -> bytes | None:
    """Write an AVIF file of 10 or 12 bits; None where OpenCV lacks the encoder.

    Args:
        samples: as in ``DeepPixels``.
        bits: 10 or 12.
        parameters: what Pillow's writer would be given.
    """
    channels = samples.shape[2]
    values = (samples * np.uint32(2**bits - 1) + 32_767) // 65_535
    order = {1: [0], 2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    settings = {
        cv2.IMWRITE_AVIF_DEPTH: bits,
        cv2.IMWRITE_AVIF_QUALITY: parameters["quality"],
        cv2.IMWRITE_AVIF_SPEED: AVIF_SPEED,
    }
    try:
        flat = [number for pair in settings.items() for number in pair]
        _, data = cv2.imencode(".avif", values[..., order].astype(np.uint16), flat)
        return _with_metadata(data.tobytes(), parameters)
    except (cv2.error, ValueError, KeyError):
        return None


def mark_avif(data: bytes, primaries: int, transfer: int) -> bytes:
    """Return an AVIF file whose code points are these, as ITU-T H.273 numbers them."""
    at = data.find(b"colrnclx")
    if at < 0:
        return data
    return data[: at + 8] + struct.pack(">2H", primaries, transfer) + data[at + 12 :]


def _with_metadata(data: bytes, parameters: Mapping[str, Any]) -> bytes:
    """Put profile, EXIF and XMP into an AVIF file that has none of them.

    By ISO/IEC 23008-12 and 14496-12 EXIF and XMP are items of their own, which refer to the
    first, and the profile is a property of that.
    """
    outer = dict(avif_boxes(data))
    meta = dict(avif_boxes(outer[b"meta"][4:]))
    (main,) = struct.unpack(">H", meta[b"pitm"][4:6])
    items = dict(_located(data, meta[b"iloc"]))
    infos = meta[b"iinf"][6:]
    references = meta.get(b"iref", bytes(4))[4:]
    properties, associations = (dict(avif_boxes(meta[b"iprp"]))[k] for k in (b"ipco", b"ipma"))
    exif = parameters.get("exif")
    extras = (
        (b"Exif", b"", None if exif is None else bytes(4) + exif.removeprefix(b"Exif\0\0")),
        (b"mime", b"application/rdf+xml\0", parameters.get("xmp")),
    )
    for kind, name, content in extras:
        if content is not None:
            number = max(items) + 1
            items[number] = content
            infos += _full_box(b"infe", 2, struct.pack(">HH", number, 0) + kind + b"\0" + name)
            references += _box(b"cdsc", struct.pack(">3H", number, 1, main))
    profile = parameters.get("icc_profile")
    if profile is not None:
        properties += _box(_COLR, b"prof" + profile)
        associations = _associate(associations, main, len(list(avif_boxes(properties))))
    parts = [
        _box(b"hdlr", meta[b"hdlr"]),
        _box(b"pitm", meta[b"pitm"]),
        _full_box(b"iinf", 0, struct.pack(">H", len(items)) + infos),
        _full_box(b"iref", 0, references) if references else b"",
        _box(b"iprp", _box(b"ipco", properties) + _box(_ASSOCIATIONS, associations)),
    ]
    head = _box(b"ftyp", outer[b"ftyp"])
    # The places are counted from the start of the file, and take as many bytes whatever they are.
    length = len(head) + len(_full_box(b"meta", 0, b"".join([*parts, _places(items, 0)]))) + 8
    meta_box = _full_box(b"meta", 0, b"".join([*parts, _places(items, length)]))
    return head + meta_box + _box(b"mdat", b"".join(items.values()))


def _box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data) + 8) + kind + data


def _full_box(kind: bytes, version: int, data: bytes) -> bytes:
    return _box(kind, bytes([version, 0, 0, 0]) + data)


def _located(data: bytes, places: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the items; in the one layout that libavif writes."""
    (count,) = struct.unpack_from(">H", places, 6)
    if places[:6] != b"\0\0\0\0\x44\0":
        raise ValueError(places[:6])
    for i in range(count):
        number, _, extents, start, length = struct.unpack_from(">3H2I", places, 8 + 14 * i)
        if extents != 1:
            raise ValueError(extents)
        yield number, data[start : start + length]


def _places(items: Mapping[int, bytes], start: int) -> bytes:
    out = b"\x44\0" + struct.pack(">H", len(items))
    for number, content in items.items():
        out += struct.pack(">3H2I", number, 0, 1, start, len(content))
        start += len(content)
    return _full_box(b"iloc", 0, out)


def _associate(associations: bytes, item: int, index: int) -> bytes:
    """Give an item one more property; in the one layout that libavif writes."""
    out, at = associations[:8], 8
    if associations[:4] != bytes(4):
        raise ValueError(associations[:4])
    for _ in range(int.from_bytes(associations[4:8], "big")):
        number, count = struct.unpack_from(">HB", associations, at)
        indices = associations[at + 3 : at + 3 + count]
        at += 3 + count
        if number == item:
            indices += bytes([index])
        out += struct.pack(">HB", number, len(indices)) + indices
    return out
