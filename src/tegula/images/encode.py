"""Writing pictures: from a result to a file, its settings back out of it, and comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from tegula.errors import ImageError, OptionError
from tegula.folders import write_atomically
from tegula.images.deep import (
    AVIF_SPEED,
    DEEPEST,
    DeepPixels,
    deep_avif,
    deep_png,
    deep_tiff,
    mark_avif,
)
from tegula.images.formats import check_sides, format_for
from tegula.images.metadata import (
    IFDS,
    Metadata,
    keep_text,
    photoshop_block,
)
from tegula.images.open import Source, guarded, name_of, open_image, opened_file
from tegula.images.pixels import Size
from tegula.images.repair import repaired
from tegula.images.samples import ArrayLike
from tegula.images.tiff import main_page, metadata_carrier
from tegula.images.xmp import MAX_XMP, SETTINGS_KEY, add_settings, settings_of, to_json

PNG_LEVEL = 4
"""Level of zlib, 0 to 9: higher ones take much longer and save little on photographs."""

# JPEG quality from which colour keeps its full resolution; below, halving it is the smaller
# part of the damage.
_FULL_CHROMA_FROM = 90

# Pixels: for optimised tables libjpeg needs a buffer that holds the whole file.
_OPTIMISED_BELOW = 2**24

# One segment of a JPEG file holds 65,533 bytes, the name of its content included.
_JPEG_SEGMENT = 65_000

_XMP_TAG, _IPTC_TAG = 700, 33723

# Characters from which a text of a PNG file is compressed, as the specification advises.
_LONG_TEXT = 1024
_COMMENT = "Comment"
"""The keyword of PNG's own for what JPEG keeps as a comment."""

_LARGEST_WITH_SETTINGS = 100_000_000
"""Pixels; a stream is read no further than to what so large a picture can take."""


_NO_HIGH_RANGE = (
    "The source is a picture of high dynamic range, which PNG and AVIF can mark as such; the {} "
    "file does not, and looks flat."
)


@dataclass(frozen=True)
class Encoded:
    """The bytes of a file, its format, and sentences on what it could not hold."""

    data: bytes
    format: str
    warnings: tuple[str, ...]


def encode(
    image: Image.Image,
    file_format: str = "png",
    *,
    quality: int = 95,
    png_level: int = PNG_LEVEL,
    metadata: Metadata | None = None,
    settings: Mapping[str, Any] | None = None,
    deep: DeepPixels | None = None,
) -> Encoded:
    """Write an image of mode L, LA, RGB or RGBA to the bytes of a file.

    Args:
        image: the result.
        file_format: one of ``formats.FORMATS``.
        quality: 1..100, for JPEG, WebP and AVIF; the others lose nothing.
        png_level: 0..9, how hard PNG is compressed.
        metadata: what the result takes over from its source.
        settings: the options that made the result, to be read by ``read_settings``.
        deep: the same image with more than eight bits a channel, for formats that hold them.

    Raises:
        OptionError: unknown format, or quality or level out of bounds.
        InputError: a side is longer than the format allows.
    """
    name = format_for(None, file_format)
    if not 1 <= quality <= 100:
        raise OptionError(f"quality is between 1 and 100, not {quality}.")
    if not 0 <= png_level <= 9:
        raise OptionError(f"png_level is between 0 and 9, not {png_level}.")
    check_sides(*image.size, name)
    given = metadata if metadata is not None else Metadata()
    warnings: tuple[str, ...] = ()
    if name == "jpeg":
        image, warnings = _flattened(image)
    kept, dropped = _fitting(given, settings, name)
    if name != "png":
        warnings += dropped + _left_out(kept, name)
        if kept.cicp is not None and name != "avif":
            warnings += (_NO_HIGH_RANGE.format(name.upper()),)
    parameters = _parameters(name, image, quality, kept, settings)
    if name == "png":
        parameters["compress_level"] = png_level
    data = None if deep is None else _deep(deep, name, parameters)
    if deep is not None:
        warnings += _lost_depth(deep.depth, name, 8 if data is None else DEEPEST[name])
    if data is None:
        buffer = io.BytesIO()
        image.save(buffer, name, **parameters)
        data = buffer.getvalue()
    # OpenCV leaves open what Pillow says of pictures without a profile: that they are sRGB.
    if name == "avif" and (kept.cicp is not None or kept.profile is None):
        primaries, transfer = (1, 13) if kept.cicp is None else kept.cicp[:2]
        data = mark_avif(data, primaries, transfer)
    return Encoded(data, name, warnings)


def _deep(deep: DeepPixels, name: str, parameters: Mapping[str, Any]) -> bytes | None:
    """Return the bytes of a file with more than eight bits; None where there can be none."""
    if name == "png":
        return deep_png(deep.samples, parameters)
    if name == "tiff":
        return deep_tiff(deep.samples, parameters)
    return (
        deep_avif(deep.samples, 12 if deep.depth > 10 else 10, parameters)
        if name == "avif"
        else None
    )


def save(
    image: Image.Image,
    path: Path,
    *,
    file_format: str | None = None,
    quality: int = 95,
    metadata: Metadata | None = None,
    settings: Mapping[str, Any] | None = None,
    deep: DeepPixels | None = None,
) -> tuple[str, ...]:
    """Encode and write to a path at once or not at all; return the warnings.

    Raises:
        OptionError: unknown format, or quality out of bounds.
        InputError: a side is longer than the format allows.
        PathError: the file cannot be written; nothing is left of it then.
    """
    name = format_for(path, file_format)
    encoded = encode(image, name, quality=quality, metadata=metadata, settings=settings, deep=deep)
    write_atomically(path, encoded.data)
    return encoded.warnings


def read_settings(source: Source) -> dict[str, Any] | None:
    """Return the settings that a result of tegula carries; None when it carries none.

    Raises:
        PathError: the path cannot be read.
        ImageError: it is not an image.
    """
    if isinstance(source, Image.Image):
        return settings_of(source)
    if isinstance(source, ArrayLike):
        return None
    name = name_of(source)
    with opened_file(source, _LARGEST_WITH_SETTINGS) as opened:
        with guarded(name):
            file = repaired(opened, name, header=True).file
        image = open_image(file, name)
        page = main_page(file, name) if image is None else None
        if page is not None:
            image = metadata_carrier(page, file)
        if image is None:
            raise ImageError(f"{name} is not an image, and so holds no settings.")
        with guarded(name):
            return settings_of(image)


def _lost_depth(depth: int, name: str, held: int) -> tuple[str, ...]:
    """Return a sentence when a file holds fewer bits than the source had."""
    if depth <= held:
        return ()
    elsewhere = " PNG and TIFF hold 16." if held < 16 else ""
    return (
        f"The source has {depth} bits a channel, and the {name.upper()} file {held}.{elsewhere}",
    )


def _flattened(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Lay an image with alpha on white; a warning only if something shone through."""
    if image.mode not in ("LA", "RGBA"):
        return image, ()
    alpha = image.getchannel("A")
    opaque = image.convert(image.mode[:-1])
    if alpha.getextrema() == (255, 255):
        return opaque, ()
    white = Image.new(opaque.mode, image.size, "white")
    white.paste(opaque, mask=alpha)
    return white, ("JPEG has no transparency; the result lies on white.",)


def _fitting(
    metadata: Metadata, settings: Mapping[str, Any] | None, name: str
) -> tuple[Metadata, tuple[str, ...]]:
    """Put the settings into the XMP packet, and leave out what is too long for the format.

    PNG has a place of its own for settings, and holds any length. JPEG holds EXIF and XMP in one
    segment each; the other formats hold any length, and
    tegula reads XMP of ``MAX_XMP`` bytes. The settings go last.
    """
    if name == "png":
        return metadata, ()
    longest = _JPEG_SEGMENT if name == "jpeg" else MAX_XMP
    packets = [metadata.xmp]
    if settings is not None:
        packets = [add_settings(metadata.xmp, settings), add_settings(None, settings)]
    xmp = next((packet for packet in packets if len(packet or b"") <= longest), None)
    too_long = [
        each
        for each in ("exif", "iptc", "comment")
        if name == "jpeg" and len(getattr(metadata, each) or b"") > longest
    ]
    left_out: dict[str, Any] = dict.fromkeys(too_long)
    kept = dataclasses.replace(metadata, xmp=xmp, **left_out)
    if name == "jpeg" and len(kept.text.get(_COMMENT, "").encode()) > longest:
        too_long.append(_COMMENT)
        kept = dataclasses.replace(kept, text={k: v for k, v in kept.text.items() if k != _COMMENT})
    if xmp == packets[0] and not too_long:
        return kept, ()
    warning = f"Some metadata is too long for {name.upper()} and is left out; PNG would hold it."
    return kept, (warning,)


def writer_parameters(
    name: str,
    image: Image.Image,
    quality: int,
    metadata: Metadata,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what Pillow's writer of a format is given for metadata and settings.

    Args:
        name: one of ``formats.FORMATS``.
        image: what is written.
        quality: as ``encode`` takes it.
        metadata: as ``encode`` takes it.
        settings: as ``encode`` takes them.
    """
    return _parameters(name, image, quality, _fitting(metadata, settings, name)[0], settings)


def _left_out(metadata: Metadata, name: str) -> tuple[str, ...]:
    """Return a sentence on what a format other than PNG has no place for."""
    lost = {"IPTC": metadata.iptc is not None and name not in ("jpeg", "tiff")}
    lost["a comment"] = metadata.comment is not None and name != "jpeg"
    keys = [key for key in metadata.text if (name, key) != ("jpeg", _COMMENT)]
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    lost[f"texts ({shown})"] = bool(keys)
    what = " and ".join(each for each, is_lost in lost.items() if is_lost)
    if not what:
        return ()
    return (f"{name.upper()} has no place for {what} of the source; PNG would hold that.",)


def _parameters(
    name: str,
    image: Image.Image,
    quality: int,
    metadata: Metadata,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what Pillow's writer of the format is given."""
    given: dict[str, Any] = {"icc_profile": metadata.profile}
    if name in ("png", "jpeg", "tiff"):
        given["dpi"] = metadata.dpi
    if name == "tiff":
        given |= _tiff_parameters(metadata)
    else:
        given["exif"] = metadata.exif
    if name == "png":
        given |= {"pnginfo": _chunks(metadata, settings), "compress_level": PNG_LEVEL}
    elif name != "tiff":
        given |= {"xmp": metadata.xmp, "quality": quality}
    if name == "webp":
        given["exact"] = True  # or colours under transparency are thrown away
    if name == "avif":
        given["speed"] = AVIF_SPEED
    if name == "jpeg":
        given |= _jpeg_parameters(image, quality, metadata)
    return {key: value for key, value in given.items() if value is not None}


def _tiff_parameters(metadata: Metadata) -> dict[str, Any]:
    """Return the directory; EXIF is part of it, and not a block within.

    Libtiff compresses, but cannot write the directories within EXIF; Pillow can.
    """
    tags = Image.Exif()
    if metadata.exif is not None:
        tags.load(metadata.exif)
        keep_text(tags)
    if metadata.iptc is not None:
        tags[_IPTC_TAG] = metadata.iptc
    if metadata.xmp is not None:
        tags[_XMP_TAG] = metadata.xmp
    is_nested = any(isinstance(tags.get(ifd), int | dict) for ifd in IFDS)
    return {"tiffinfo": tags, "compression": "raw" if is_nested else "tiff_adobe_deflate"}


def _jpeg_parameters(image: Image.Image, quality: int, metadata: Metadata) -> dict[str, Any]:
    given: dict[str, Any] = {
        "subsampling": 0 if quality >= _FULL_CHROMA_FROM else 2,
        "optimize": image.width * image.height < _OPTIMISED_BELOW,
        "comment": metadata.comment,
    }
    if metadata.comment is None and _COMMENT in metadata.text:
        given["comment"] = metadata.text[_COMMENT].encode()
    if metadata.iptc is not None:
        block = b"Photoshop 3.0\0" + photoshop_block(metadata.iptc)
        given["extra"] = b"\xff\xed" + (len(block) + 2).to_bytes(2, "big") + block
    return given


def _chunks(metadata: Metadata, settings: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    texts = dict(metadata.text)
    if metadata.comment is not None:
        texts.setdefault(_COMMENT, _as_text(metadata.comment))
    for key, value in texts.items():
        with contextlib.suppress(ValueError, UnicodeError):  # a key that PNG does not allow
            chunks.add_text(key, value, zip=len(value) > _LONG_TEXT)
    if metadata.iptc is not None:
        # As ImageMagick writes it, and most programs read it.
        block = photoshop_block(metadata.iptc)
        chunks.add_text(
            "Raw profile type iptc", f"\niptc\n{len(block):8}\n{block.hex()}\n", zip=True
        )
    if metadata.xmp is not None:
        chunks.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
    if metadata.cicp is not None:
        chunks.add(b"cICP", metadata.cicp)
    if settings is not None:
        chunks.add_itxt(SETTINGS_KEY, to_json(settings))
    return chunks


def _as_text(comment: bytes) -> str:
    try:
        return comment.decode()
    except UnicodeDecodeError:
        return comment.decode("latin-1")


# A before/after picture, small enough to look at and large enough to judge by.

# Sizes in pixels.
_DIVIDER, _SMALLEST_PANEL, _TEXT = 4, 96, 15
_WHITE, _INK = (255, 255, 255), (20, 20, 20)

_CHECKS, _CHECK_TONES = 8, (255, 225)
"""The ground under transparency, as viewers show it."""

_CELL = 16
"""The part with most structure is looked for on a grid of such cells."""


def side_by_side(before: Image.Image, after: Image.Image, *, width: int = 1600) -> Image.Image:
    """Put the source, enlarged by bicubic interpolation, beside the result.

    Bicubic is what a viewer does to a small picture: it neither flatters the source nor
    shows it as blocks. The upper row holds both whole. When they had to be shrunk for
    that, a lower row holds a detail of both, pixel for pixel as in the result: where the
    result has most structure.

    Args:
        before: the source, upright, of any size.
        after: the result.
        width: of the whole comparison, at most, in pixels.

    Returns:
        An RGB image, at most ``width`` wide but for the smallest panels.
    """
    left, right = opaque(before), opaque(after)
    panel = max(_SMALLEST_PANEL, (width - _DIVIDER) // 2)
    shrink = min(1.0, panel / right.width, panel / right.height)
    rows = [_row(_fitted(left, right.size, shrink), _fitted(right, right.size, shrink))]
    if shrink < 1:
        box = _busiest(right, min(panel, right.width), min(panel // 2, right.height))
        rows.append(_row(_detail(left, right.size, box), right.crop(box)))
    sheet_width = max(row.width for row in rows)
    height = sum(row.height for row in rows) + _DIVIDER * (len(rows) - 1)
    sheet = Image.new("RGB", (sheet_width, height), _WHITE)
    y = 0
    for row in rows:
        sheet.paste(row, ((sheet_width - row.width) // 2, y))
        y += row.height + _DIVIDER
    return sheet


def opaque(image: Image.Image) -> Image.Image:
    """Lay transparency on a chequered ground, as viewers do."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    y, x = np.indices((image.height, image.width), dtype=np.int32, sparse=True)
    checks = np.take(np.array(_CHECK_TONES, np.uint8), (x // _CHECKS + y // _CHECKS) % 2)
    ground = Image.fromarray(checks).convert("RGB")
    ground.paste(coloured, mask=coloured.getchannel("A"))
    return ground


def _fitted(image: Image.Image, size: Size, shrink: float) -> Image.Image:
    """Scale to a share of the result's size; magnify a tiny picture in whole pixels."""
    width, height = (max(1, round(side * shrink)) for side in size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    times = _SMALLEST_PANEL // max(width, height)
    if times < 2:
        return image
    return image.resize((width * times, height * times), Image.Resampling.NEAREST)


def _detail(before: Image.Image, size: Size, box: tuple[int, int, int, int]) -> Image.Image:
    """Enlarge the part of the source that lies under a box of the result."""
    x, y = before.width / size[0], before.height / size[1]
    part = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    target = (box[2] - box[0], box[3] - box[1])
    return before.resize(target, Image.Resampling.BICUBIC, box=part)


def _row(left: Image.Image, right: Image.Image) -> Image.Image:
    """Put two pictures of one size beside each other, each with its name in the corner."""
    panel = max(_SMALLEST_PANEL, left.width)
    height = max(left.height, 2 * _TEXT)
    row = Image.new("RGB", (2 * panel + _DIVIDER, height), _WHITE)
    font = ImageFont.load_default(_TEXT)
    for image, text, x in ((left, "before", 0), (right, "after", panel + _DIVIDER)):
        row.paste(image, (x + (panel - image.width) // 2, (height - image.height) // 2))
        draw = ImageDraw.Draw(row)
        _, _, right_end, bottom = draw.textbbox((0, 0), text, font=font)
        draw.rectangle((x, 0, x + right_end + 12, bottom + 8), fill=_INK)
        draw.text((x + 6, 3), text, font=font, fill=_WHITE)
    return row


def _busiest(image: Image.Image, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the box of this size with the most structure, found on a grid of cells."""
    structure = np.abs(cv2.Laplacian(np.asarray(image.convert("L")), cv2.CV_16S))
    grid = (-(-image.width // _CELL), -(-image.height // _CELL))
    cells = cv2.resize(structure, grid, interpolation=cv2.INTER_AREA).reshape(grid[::-1])
    across, down = min(grid[0], -(-width // _CELL)), min(grid[1], -(-height // _CELL))
    # Sums over every box of cells at once, from sums over all that is above and left.
    sums = np.pad(cells.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    totals = sums[down:, across:] - sums[:-down, across:]
    totals = totals - sums[down:, :-across] + sums[:-down, :-across]
    row, column = np.unravel_index(int(totals.argmax()), totals.shape)
    # The last box may reach beyond the picture, whose last cells are not whole.
    left = min(int(column) * _CELL, image.width - width)
    top = min(int(row) * _CELL, image.height - height)
    return left, top, left + width, top + height
