"""Files that are odd around their pixels: read where the pixels are whole, else named.

Decoders refuse a whole picture for a text that is long, a checksum of a text that is wrong, or
an end marker that is missing. Here such a file becomes one that they read, with a sentence on
what was wrong with it. Nothing is guessed: where a pixel is missing, the file stays as it is
and its decoder refuses it. Kinds that are not read at all are known by their first bytes, so
that nobody is told to save a sound file again.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin

from tegula.errors import ImageError
from tegula.images.formats import AVIF_BRANDS, HEIF_BRANDS, START, brands_of, not_supported
from tegula.images.metadata import further_frames
from tegula.images.xmp import GAIN_MAP

PROFILE_CHUNK = b"tgIC"
"""A chunk of a repaired PNG file: its ICC profile, not compressed."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_ANIMATION_CHUNKS = (b"acTL", b"fcTL", b"fdAT")

_PILLOW_UNPACKS = 2**19
"""Bytes: Pillow refuses compressed text and profiles of 2**20. Packed, such long ones mostly
have more than a thousandth of that; what is longer is unpacked here to see."""
_LONGEST_TEXTS = 2**25
"""Bytes of all texts and the profile of a file, unpacked; what would exceed it is left out."""

_MOST_CHUNKS = 2**16
"""Beside those of pixels; more than anybody writes, and each takes its time."""

_BLOCK = 2**20


NO_END = "The end marker of the source is missing; its pixels are whole."


@dataclass(frozen=True)
class Repaired:
    """A file that decoders take, and sentences on what was left out of it."""

    file: BinaryIO
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Chunk:
    """A chunk of a PNG file; ``sound`` where its checksum is right."""

    kind: bytes
    start: int
    length: int
    sound: bool


def repaired(
    file: BinaryIO, name: str, *, header: bool = False, animated: bool = False
) -> Repaired:
    """Return the file, or one with the same pixels that decoders take.

    Args:
        file: that is open at any place.
        name: what messages call it.
        header: only what stands beside the pixels is wanted; these are not read.
        animated: the frames of a PNG file are kept.

    Raises:
        ImageError: a PNG file whose pixels are damaged.
    """
    file.seek(0)
    if file.read(len(_PNG)) != _PNG:
        return Repaired(file, (GAIN_MAP,) if _GAIN_MAP_BRAND in _brands(file) else ())
    chunks = list(_png_chunks(file, header=header))
    if sum(each.kind != b"IDAT" for each in chunks) > _MOST_CHUNKS:
        raise not_supported(name, f"a PNG file of more than {_MOST_CHUNKS} chunks")
    if any(not each.sound and each.kind in _PIXEL_CHUNKS for each in chunks):
        raise damaged(name)
    if b"CgBI" in (each.kind for each in chunks[:1]):
        raise not_supported(name, "a PNG file in the way of Apple's own tools (CgBI)")
    remarks: dict[str, None] = {}
    frames = sum(each.kind == b"fcTL" for each in chunks)
    if frames > 1:
        remarks[further_frames(frames, "frame")] = None
    kinds = [each.kind for each in chunks]
    has_end = b"IEND" in kinds
    if not has_end:
        remarks[NO_END] = None
    # The header is what counts for the size; what stands behind the pixels may turn them.
    is_odd = not has_end or (header and kinds[-2:-1] != [b"IDAT"])
    if not animated:
        is_odd |= any(kind in _ANIMATION_CHUNKS for kind in kinds)
        chunks = [each for each in chunks if each.kind not in _ANIMATION_CHUNKS]
    is_odd |= any(not each.sound or _may_be_long(each) for each in chunks)
    if not is_odd:
        return Repaired(file)
    if header:
        chunks.sort(key=lambda each: each.kind == b"IDAT")
    return Repaired(_png_of(file, chunks, remarks), tuple(remarks))


def _png_chunks(file: BinaryIO, *, header: bool) -> Iterator[_Chunk]:
    """Yield the chunks up to the end of the picture, with a look at their checksums."""
    end, at, others = file.seek(0, 2), len(_PNG), 0
    while at + 8 <= end and others <= _MOST_CHUNKS:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if not kind.isalpha():
            return
        others += kind != b"IDAT"
        whole = at + 12 + length <= end
        sound = whole
        if kind == b"IDAT" and header:
            yield _Chunk(kind, at + 8, 0, sound=True)
            at += 12 + length
            continue
        if whole:
            checksum, left = zlib.crc32(kind), length
            while left:
                block = file.read(min(left, _BLOCK))
                checksum, left = zlib.crc32(block, checksum), left - len(block)
            sound = checksum == int.from_bytes(file.read(4), "big")
        elif kind == b"IDAT":
            sound = True  # Pillow will tell whether pixels are missing
        yield _Chunk(kind, at + 8, min(length, end - at - 8), sound)
        if kind == b"IEND":
            return
        at += 12 + length


def _may_be_long(chunk: _Chunk) -> bool:
    packed = chunk.kind in (b"zTXt", b"iTXt", b"iCCP")
    is_long = chunk.length > _PILLOW_UNPACKS // 1000 if packed else chunk.length > _LONGEST_TEXTS
    return is_long and (packed or chunk.kind == b"tEXt")


def _png_of(file: BinaryIO, chunks: list[_Chunk], remarks: dict[str, None]) -> BinaryIO:
    """Write a PNG file without what is damaged or moves, its long texts not compressed."""
    out, room = io.BytesIO(), _LONGEST_TEXTS
    out.write(_PNG)
    for chunk in chunks:
        kind = chunk.kind
        if kind == b"IEND":
            continue
        if not chunk.sound:
            what = "text" if kind in _TEXT_CHUNKS else f"chunk {kind.decode()}"
            remarks[f"A damaged {what} of the source is left out."] = None
            continue
        file.seek(chunk.start)
        data = file.read(chunk.length)
        if kind in (*_TEXT_CHUNKS, b"iCCP"):
            unpacked = _unpacked(kind, data, room)
            if unpacked is None:
                what = "colour profile" if kind == b"iCCP" else "text"
                remarks[f"A {what} of the source is damaged or too long, and is left out."] = None
                continue
            kind, data = unpacked
            room -= len(data)
        write_png_chunk(out, kind, data)
    write_png_chunk(out, b"IEND", b"")
    out.seek(0)
    return out


def write_png_chunk(out: BinaryIO, kind: bytes, data: bytes) -> None:
    """Write a chunk of a PNG file with its length and checksum."""
    out.write(struct.pack(">I", len(data)) + kind + data)
    out.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))


def _unpacked(kind: bytes, data: bytes, room: int) -> tuple[bytes, bytes] | None:
    """Return a chunk of text or profile that is not compressed; None when it is damaged.

    A damaged profile that is short is left to Pillow, which says nothing of it, and to the
    look at the profile itself.
    """
    key, _, rest = data.partition(b"\0")
    if kind == b"tEXt":
        return (kind, data) if len(data) <= room else None
    if kind == b"iTXt":
        if len(rest) < 2:
            return None
        if rest[0] == 0:
            return (kind, data) if len(data) <= room else None
        language, _, rest_of = rest[2:].partition(b"\0")
        translated, _, packed = rest_of.partition(b"\0")
        text = _inflated(packed, room)
        head = key + b"\0\0\0" + language + b"\0" + translated + b"\0"
        return None if text is None else (kind, head + text)
    text = _inflated(rest[1:], room)
    if text is None:
        return None
    return (PROFILE_CHUNK, text) if kind == b"iCCP" else (b"tEXt", key + b"\0" + text)


def _inflated(packed: bytes, room: int) -> bytes | None:
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(packed, max(room, 1))
    except zlib.error:
        return None
    return text if unpacking.eof else None


# JPEG files without an end marker.

_END_OF_IMAGE = b"\xff\xd9"


def with_end(file: BinaryIO) -> BinaryIO | None:
    """Return a JPEG file with the end marker that it lacks; None where pixels are missing, too.

    The decoder takes any data for the pixels that are still to come, and skips it where there
    are none. So the pixels are whole when what follows them makes no difference.
    """
    file.seek(0)
    data = file.read().rstrip(b"\xff")
    filler = bytes(np.random.default_rng(0).integers(1, 255, 512, np.uint8))
    pictures = []
    for following in (b"", filler, filler[::-1]):
        ended = io.BytesIO(data + following + _END_OF_IMAGE)
        try:
            image = JpegImagePlugin.JpegImageFile(ended)
            image.load()
            pictures.append(image.tobytes())
        except Exception:  # a damaged file raises nearly anything
            return None
    if any(picture != pictures[0] for picture in pictures):
        return None
    return io.BytesIO(data + _END_OF_IMAGE)


# BMP files whose channels have bits of their own.

_BITFIELDS = (3, 6)


def bit_fields(file: BinaryIO) -> Image.Image | None:
    """Return the picture of a BMP file of any bit fields, of eight bits; None for other kinds.

    The masks follow the header of 40 bytes, or are part of a longer one.
    """
    file.seek(0)
    data = file.read()
    if len(data) < 66:
        return None
    start, header = struct.unpack_from("<2I", data, 10)
    if header < 40:
        return None
    width, height, _, bits, compression = struct.unpack_from("<2i2HI", data, 18)
    if compression not in _BITFIELDS or bits not in (16, 32) or width < 1 or not height:
        return None
    has_alpha = (header >= 56 or compression == 6) and len(data) >= 70
    masks = struct.unpack_from(f"<{4 if has_alpha else 3}I", data, 54)
    row = (width * bits + 31) // 32 * 4
    if start + row * abs(height) > len(data):
        return None
    rows = np.frombuffer(data, np.uint8, row * abs(height), start).reshape(abs(height), row)
    values = rows[:, : width * bits // 8].copy().view(f"<u{bits // 8}").astype(np.uint32)
    channels = [_field(values, mask) for mask in masks]
    if has_alpha and (masks[3] == 0 or not channels[3].any()):
        channels.pop()  # nothing would be seen: then the channel is not alpha
    pixels = np.stack(channels, axis=2)[:: -1 if height > 0 else 1]
    image = Image.fromarray(pixels)
    image.format = "BMP"
    return image


def _field(values: NDArray[np.uint32], mask: int) -> NDArray[np.uint8]:
    """Return one channel, 0..255, of packed pixels."""
    if mask == 0:
        return np.zeros(values.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    largest = mask >> shift
    field = ((values & np.uint32(mask)) >> np.uint32(shift)).astype(np.float64)
    return np.asarray(np.rint(np.minimum(field * (255 / largest), 255)), np.uint8)


# What is wrong with a file as a whole.


def damaged(name: str) -> ImageError:
    """Return the error for a file whose pixels are not whole."""
    return ImageError(f"{name} is a damaged or truncated image; save it again.")


# HEIC, by a library that is optional.

_GAIN_MAP_BRAND = b"tmap"
INSTALL_HEIF = "pip install 'tegula[heic]'"


def is_heif(file: BinaryIO) -> bool:
    """Tell whether a file is HEIC by any of its brands, and not AVIF."""
    brands = _brands(file)
    return not brands & AVIF_BRANDS and bool(brands & HEIF_BRANDS)


def _brands(file: BinaryIO) -> set[bytes]:
    file.seek(0)
    return brands_of(file.read(START))


def open_heif(file: BinaryIO, name: str) -> Image.Image:
    """Open a HEIC file.

    Raises:
        ImageError: the library for it is missing.
        SyntaxError: the file is damaged.
    """
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError(
            f"{name} is a HEIC picture, for which pillow-heif is not installed: "
            f"{INSTALL_HEIF}, or save it as JPEG or PNG."
        ) from None
    file.seek(0)
    image: ImageFile.ImageFile = HeifImageFile(file)
    return image
