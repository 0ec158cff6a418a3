"""Sixteen bits a channel: PNG and TIFF files that Pillow has no mode to write.

Pillow still writes what surrounds the samples, so that metadata is the same at any depth.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from tegula.images.metadata import IFDS

Bytes = NDArray[np.uint8]

DEEP_FORMATS = ("png", "tiff")

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
            _add_chunk(out, kind, struct.pack(">2IB", width, height, 16) + data[9:])
        elif kind == b"IDAT":
            for part in _compressed_rows(samples):
                _add_chunk(out, kind, part)
        else:
            _add_chunk(out, kind, data)
    return out.getvalue()


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def _add_chunk(out: io.BytesIO, kind: bytes, data: bytes) -> None:
    out.write(struct.pack(">I", len(data)) + kind + data)
    out.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))


def _compressed_rows(samples: NDArray[np.uint16]) -> Iterator[bytes]:
    height, width, channels = samples.shape
    pixel = 2 * channels
    above = np.zeros((1, width * pixel), np.uint8)
    packer = zlib.compressobj(_COMPRESSION, strategy=zlib.Z_FILTERED)
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
