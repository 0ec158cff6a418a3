"""TIFF files beyond what Pillow reads correctly: deep, planar, float, inverted, L*a*b*, raw.

What the tags say of the samples is read before the samples are. Pillow decodes the common
kinds of eight bits; the others are decoded by tifffile, which takes planes, tiles, half
floats and any directory of the file, but without further packages only files that are not
compressed or compressed by Deflate. LZW and its kin go through OpenCV, in files that are made
for it. Whatever none of them understands is refused by name.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from tegula.errors import ImageError
from tegula.images.pixels import OVERSHOOT, Size, float_remarks
from tegula.images.repair import damaged

# What tifffile and OpenCV think of damaged files would be printed, or fill a server's log.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False

_REDUCED, _MASK = 1, 4
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_CIELAB, _ICCLAB = 8, 9
_RAW = (32803, 34892)  # a colour filter array, and linear raw
_BY_PILLOW = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB)
_COLOUR_CHANNELS = {0: 1, 1: 1, 2: 3, 5: 4, 8: 3, 9: 3}

_NOT_COMPRESSED, _DEFLATE = 1, (8, 32946)
_SURE_OF_LIBTIFF = (_NOT_COMPRESSED, 5, 8, 32773, 32946)  # also LZW and PackBits
_PREDICTORS = (1, 2)  # none, and differences of integers; not that of floats
_IPTC = 33723
_DNG_VERSION, _SUB_DIRECTORIES, _ORIENTATION, _XMP, _PROFILE = 50706, 330, 274, 700, 34675
_ASSOCIATED, _UNASSOCIATED = 1, 2
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3

_MOST_DIRECTORIES = 32
"""A file with more pictures than this is looked through no further for its main one."""

_MOST_SAMPLES = 16
"""Samples of a pixel; a file that claims more would take much memory for little picture."""


@dataclass(frozen=True)
class TiffValues:
    """The numbers of a TIFF picture, brought to a common meaning, as stored: not upright.

    values: float32 [height, width, channels]: grey, grey and alpha, RGB or RGBA in 0..1 not
        multiplied by alpha; CIE L*a*b* in its own units; CMYK as uint8.
    space: "grey", "rgb", "lab" or "cmyk".
    depth: bits of a sample in the file.
    turn: EXIF orientation that is still to be undone, 1..8.
    remarks: sentences on what was left out.
    """

    values: NDArray[Any]
    space: str
    depth: int
    turn: int
    remarks: tuple[str, ...] = ()


def main_page(file: BinaryIO, name: str) -> tifffile.TiffPage | None:
    """Return the directory of the picture proper; None when the file cannot be parsed.

    The first one, unless it says that it is a smaller copy of another.

    Raises:
        ImageError: the file holds what a camera's sensor saw, and only a small picture of it.
    """
    file.seek(0)
    try:
        first = tifffile.TiffFile(file).pages[0]
        if not isinstance(first, tifffile.TiffPage):
            return None
        is_whole = not first.subfiletype & (_REDUCED | _MASK)
        pages = [first] if is_whole and _DNG_VERSION not in first.tags else _directories(first)
        is_raw = any(_number(page.photometric) in _RAW for page in pages)
        whole = [page for page in pages if not page.subfiletype & (_REDUCED | _MASK)]
        largest = max(whole or [first], key=lambda page: size_of(page)[0] * size_of(page)[1])
    except Exception:  # a hostile directory raises nearly anything
        return None
    if is_raw:
        raise ImageError(
            f"{name} is a camera's raw file, which is not read, and the preview in it is not "
            "the picture; develop it and save it as TIFF, PNG or JPEG."
        )
    return largest


def _directories(first: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    """Return the directories of the file, and those within them, up to a number."""
    found: list[tifffile.TiffPage] = []
    for page in first.parent.pages:
        inner = page.pages or () if isinstance(page, tifffile.TiffPage) else ()
        for directory in (page, *inner):
            if isinstance(directory, tifffile.TiffPage):
                found.append(directory)
            if len(found) >= _MOST_DIRECTORIES:
                return found
    return found


def page_count(page: tifffile.TiffPage) -> int:
    """Return the number of pictures in the file of a directory, beside copies and masks of them.

    Of more than ``_MOST_DIRECTORIES`` the kinds are not looked at.
    """
    try:
        count = len(page.parent.pages)
        return count if count > _MOST_DIRECTORIES else len(whole_pages(page))
    except Exception:  # a hostile directory raises nearly anything
        return 1


def whole_pages(page: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    """Return the pictures in the file of a directory, beside copies and masks of them."""
    pages = (each for each in page.parent.pages if isinstance(each, tifffile.TiffPage))
    return [each for each in pages if not each.subfiletype & (_REDUCED | _MASK)]


def frame_for_pillow(page: tifffile.TiffPage) -> int | None:
    """Return the frame that Pillow reads correctly as this picture; None when there is none."""
    is_shallow = max(_bits(page)) <= 8 and _number(page.sampleformat or 1) == _UNSIGNED
    if not is_shallow or _number(page.photometric) not in _BY_PILLOW:
        return None
    # A directory within another has several numbers, and is not a frame.
    return page.index if isinstance(page.index, int) else None


def size_of(page: tifffile.TiffPage) -> Size:
    """Return the width and height that a directory claims, upright."""
    size = int(page.imagewidth), int(page.imagelength)
    return size[::-1] if _turn(page) >= 5 else size


def iptc_of(page: tifffile.TiffPage) -> bytes | None:
    """Return the IPTC records of a directory, which some programs write as numbers of 32 bits."""
    value = page.tags.valueof(_IPTC)
    if isinstance(value, int | tuple):
        return np.asarray(value, f"{page.parent.byteorder}u4").tobytes()
    return bytes(value) if isinstance(value, bytes | bytearray) else None


def metadata_carrier(page: tifffile.TiffPage, file: BinaryIO) -> Image.Image:
    """Return an image of one pixel with the metadata of a file that Pillow does not open."""
    image = Image.new("L", (1, 1))
    info = image.info
    file.seek(0)
    info["exif"] = b"Exif\0\0" + file.read()
    for key, tag in (("icc_profile", _PROFILE), ("xmp", _XMP)):
        value = page.tags.valueof(tag)
        if isinstance(value, bytes | bytearray):
            info[key] = bytes(value)
    unit = {2: 1.0, 3: 2.54}.get(_number(page.tags.valueof(296) or 2))
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if unit and isinstance(x, tuple) and isinstance(y, tuple) and x[1] and y[1]:
        info["dpi"] = (unit * x[0] / x[1], unit * y[0] / y[1])
    return image


def read_values(page: tifffile.TiffPage, file: BinaryIO, name: str) -> TiffValues:
    """Decode a picture and bring its numbers to a common meaning.

    Raises:
        ImageError: a kind that is not read, or a damaged file.
    """
    photometric, bits = _number(page.photometric), _bits(page)
    colours = _COLOUR_CHANNELS.get(photometric)
    sample_format = _number(page.sampleformat or 1)
    if colours is None or max(bits) != min(bits) or sample_format not in (1, 2, 3):
        what = getattr(page.photometric, "name", photometric)
        raise _not_read(name, f"samples of the kind {what}, {max(bits)} bits, {sample_format}")
    if not colours <= page.samplesperpixel <= _MOST_SAMPLES or page.imagedepth != 1:
        raise _not_read(name, f"{page.samplesperpixel} samples a pixel, {page.imagedepth} deep")
    values = _decoded(page, file, name)
    if values is None:
        values = _by_opencv(page, file, name)
    values, extra = values[..., :colours], values[..., colours:]
    floats = _scaled(values, bits[0], photometric, name)
    alpha, remarks = _alpha(page, extra, bits[0], name)
    if values.dtype.kind == "f" and photometric not in (_CIELAB, _ICCLAB):
        remarks = (*float_remarks(values), *remarks)
    if photometric == _CMYK:
        inks = np.rint(np.clip(floats, 0, 1) * 255).astype(np.uint8)
        return TiffValues(inks, "cmyk", bits[0], _turn(page), remarks)
    if photometric in (_CIELAB, _ICCLAB):
        return TiffValues(floats, "lab", bits[0], _turn(page), remarks)
    if alpha is not None:
        if _ASSOCIATED in _extras(page):
            floats /= np.maximum(alpha, np.float32(1e-6))
        floats = np.concatenate([floats, alpha], axis=2)
    return TiffValues(floats, "rgb" if colours == 3 else "grey", bits[0], _turn(page), remarks)


def _not_read(name: str, what: str) -> ImageError:
    return ImageError(
        f"{name} is a TIFF file with {what}, which is not read; "
        "save it as RGB or grey with 8 or 16 bits a channel."
    )


def _number(value: Any) -> int:
    """Return a tag as a plain number, the first of several."""
    return int(value[0] if isinstance(value, tuple) else value)


def _bits(page: tifffile.TiffPage) -> tuple[int, ...]:
    bits = page.bitspersample
    return tuple(bits) if isinstance(bits, tuple) else (int(bits),)


def _extras(page: tifffile.TiffPage) -> tuple[int, ...]:
    """Return the meanings of the samples beyond colour; a fourth one unexplained is alpha."""
    if page.extrasamples:
        return tuple(int(kind) for kind in page.extrasamples)
    extra = page.samplesperpixel - _COLOUR_CHANNELS.get(_number(page.photometric), 1)
    return (_UNASSOCIATED,) * min(extra, 1)


def _turn(page: tifffile.TiffPage) -> int:
    value = page.tags.valueof(_ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decoded(page: tifffile.TiffPage, file: BinaryIO, name: str) -> NDArray[Any] | None:
    """Decode as [height, width, channels]; None where tifffile lacks the decompressor."""
    compression = _number(page.compression)
    if compression != _NOT_COMPRESSED and compression not in _DEFLATE:
        return None
    if max(_bits(page)) not in (8, 16, 32, 64) or page.predictor not in _PREDICTORS:
        return None
    _check_segments(page, file, name, compression)
    values = np.asarray(page.asarray())
    if _number(page.planarconfig) == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values.reshape(page.samplesperpixel, *values.shape[-2:]), 0, -1)
    return values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)


def _check_segments(page: tifffile.TiffPage, file: BinaryIO, name: str, compression: int) -> None:
    """Refuse strips and tiles that lie beyond the file, or hold more than they say.

    tifffile would leave the former black and unpack the latter into memory, however long.
    """
    end = file.seek(0, 2)
    width, length = page.tilewidth or page.imagewidth, page.tilelength or page.rowsperstrip
    sample = -(-max(_bits(page)) // 8)
    samples = 1 if _number(page.planarconfig) == 2 else page.samplesperpixel
    longest = width * min(length, page.tilelength or page.imagelength) * sample * samples
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if offset <= 0 or count <= 0 or offset + count > end:
            raise damaged(name)
        if compression in _DEFLATE:
            file.seek(offset)
            unpacking = zlib.decompressobj()
            unpacked = unpacking.decompress(file.read(count), longest + 1)
            if len(unpacked) > longest:
                raise damaged(name)


def _by_opencv(page: tifffile.TiffPage, file: BinaryIO, name: str) -> NDArray[Any]:
    """Decode as [height, width, channels] by OpenCV's libtiff, which knows LZW and others.

    It reads grey and RGB side by side. So each plane, or all samples, are put into a file of
    their own that says no more of them; what they mean is said by the page.
    """
    samples, bits = page.samplesperpixel, max(_bits(page))
    planes = samples if _number(page.planarconfig) == 2 else 1
    what = getattr(page.compression, "name", str(page.compression))
    refusal = _not_read(name, f"{samples} samples of {bits} bits compressed by {what}")
    if samples // planes not in (1, 3, 4):
        raise refusal
    _check_segments(page, file, name, _number(page.compression))
    count = len(page.dataoffsets) // planes
    decoded = []
    for start in range(0, planes * count, count):
        part = slice(start, start + count)
        values = _libtiff_values(_bare_file(page, file, part, samples // planes))
        if values is None or values.dtype.itemsize * 8 < bits:
            raise damaged(name) if _number(page.compression) in _SURE_OF_LIBTIFF else refusal
        decoded.append(values)
    joined: NDArray[Any] = np.concatenate(decoded, axis=2)
    return joined >> (16 - bits) if bits in (10, 12, 14) else joined


def _libtiff_values(data: bytes) -> NDArray[Any] | None:
    """Decode a file of grey or RGB; packed samples come in the upper bits of sixteen."""
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None:
        return None
    return np.asarray(
        values[..., None] if values.ndim == 2 else values[..., [2, 1, 0, 3][: values.shape[2]]]
    )


def _bare_file(page: tifffile.TiffPage, file: BinaryIO, part: slice, samples: int) -> bytes:
    """Return a TIFF file of some strips or tiles that holds nothing but samples.

    Args:
        page: the directory that they are from.
        file: that the directory is in.
        part: which of its strips or tiles.
        samples: of a pixel in each: 1 for grey, 3 or 4 for RGB.
    """
    order = page.parent.byteorder
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II" if order == "<" else b"MM")
    directory[256], directory[257] = page.imagewidth, page.imagelength
    directory[258], directory[339] = (
        (max(_bits(page)),) * samples,
        (_number(page.sampleformat or 1),) * samples,
    )
    directory[259], directory[262] = _number(page.compression), 1 if samples == 1 else 2
    directory[266], directory[277], directory[284] = _number(page.fillorder), samples, 1
    directory[317] = int(page.predictor)
    if samples == 4:
        directory[338] = _UNASSOCIATED
    segments = []
    for offset, count in zip(page.dataoffsets[part], page.databytecounts[part], strict=True):
        file.seek(offset)
        segments.append(file.read(count))
    starts = np.cumsum([0, *map(len, segments[:-1])])
    places, counts = (324, 325) if page.is_tiled else (273, 279)
    directory.tagtype[places] = directory.tagtype[counts] = 4
    directory[places], directory[counts] = tuple(map(int, starts)), tuple(map(len, segments))
    if page.is_tiled:  # of strips, Pillow counts from the end of the directory by itself
        directory[322], directory[323] = page.tilewidth, page.tilelength
        directory[places] = tuple(int(start) + 8 + len(directory.tobytes(8)) for start in starts)
    else:
        directory[278] = page.rowsperstrip
    head = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return b"".join([head, directory.tobytes(8), *segments])


def _scaled(values: NDArray[Any], bits: int, photometric: int, name: str) -> NDArray[Any]:
    """Return colour samples of any type as floats: 0..1, or the units of L*a*b*."""
    kind = values.dtype.kind
    if photometric in (_CIELAB, _ICCLAB):
        return _lab(values, bits, photometric)
    white = {"u": 2.0**bits - 1, "i": 2.0 ** (bits - 1) - 1}.get(kind, 1.0)
    out = np.multiply(values, np.float32(1 / white), dtype=np.float32)
    if kind == "f":
        black = 1.0 if photometric in (_WHITE_IS_ZERO, _CMYK) else 0.0
        np.nan_to_num(out, copy=False, nan=black, posinf=1.0, neginf=0.0)
        low, high = float(out.min()), float(out.max())
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            raise ImageError(
                f"{name} holds floats from {low:g} to {high:g}, of which white is not known; "
                "save it with floats from 0 to 1, or with 16 bits a channel."
            )
    if photometric == _WHITE_IS_ZERO:
        np.subtract(1, out, out=out)
    return np.asarray(out)


def _lab(values: NDArray[Any], bits: int, photometric: int) -> NDArray[Any]:
    """Return L* in 0..100, a* and b*, as TIFF 6.0 and its second supplement store them."""
    out = values.astype(np.float32)
    if values.dtype.kind == "f":
        return out
    if photometric == _CIELAB:  # a* and b* are signed, in the type of L*
        signed = np.ascontiguousarray(values[..., 1:]).view(f"i{values.dtype.itemsize}")
        out[..., 0] *= 100 / (2.0**bits - 1)
        out[..., 1:] = signed * np.float32(2.0 ** (8 - bits))
    else:  # as in ICC profiles: shifted, and at 16 bits 0xFF00 is L* = 100
        out[..., 0] *= 100 / (255 * 2.0 ** (bits - 8))
        out[..., 1:] = out[..., 1:] * np.float32(2.0 ** (8 - bits)) - 128
    return out


def _alpha(
    page: tifffile.TiffPage, extra: NDArray[Any], bits: int, name: str
) -> tuple[NDArray[Any] | None, tuple[str, ...]]:
    """Return the channel that is transparency, if any, and a sentence on the others."""
    kinds = _extras(page)[: extra.shape[2]]
    chosen = next((i for i, kind in enumerate(kinds) if kind in (1, 2)), None)
    left_out = extra.shape[2] - (chosen is not None)
    remarks = ("A further channel of the source is not colour and is left out.",)
    if chosen is None:
        return None, remarks if left_out else ()
    alpha = _scaled(extra[..., chosen : chosen + 1], bits, _BLACK_IS_ZERO, name)
    return np.clip(alpha, 0, 1), remarks if left_out else ()
