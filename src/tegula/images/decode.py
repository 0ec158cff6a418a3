"""From a file to the two arrays that tegula works on, and what else the file said."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from tegula.errors import ImageError
from tegula.images import deep, profile
from tegula.images.jpeg import estimate_quality
from tegula.images.metadata import Metadata, orientation, read_metadata
from tegula.images.opening import (
    Source,
    check_size,
    describe,
    guarded,
    open_image,
    opened_file,
)
from tegula.images.pixels import Float, is_grey, split

_SRGB_GAMMA = 1 / 2.2
_KNOWN = "PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF"


@dataclass(frozen=True)
class Facts:
    """What a source is, beside its pixels.

    size: width and height of the whole source in pixels, upright.
    format: Pillow's name of the file format, such as "PNG"; None for an image in memory.
    greyscale: the source has no colour, by its mode or palette.
    jpeg_quality: 1..100, estimated from the quantisation tables; None unless JPEG.
    metadata: what a result takes over, with the ICC profile to restore.
    warnings: sentences on what could not be kept.
    """

    size: tuple[int, int]
    format: str | None
    greyscale: bool
    jpeg_quality: int | None
    metadata: Metadata
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A decoded source, upright and in sRGB.

    rgb: float32 [height, width, 3], 0..1.
    alpha: float32 [height, width], 0..1, or None when the source has no transparency.
    """

    rgb: Float
    alpha: Float | None
    facts: Facts


@dataclass(frozen=True)
class _Raw:
    """Pixels as the file has them: not yet upright, nor in sRGB."""

    rgb: Float
    alpha: Float | None
    greyscale: bool
    metadata: Metadata
    warnings: tuple[str, ...] = ()
    gamma: float | None = None


def decode(source: Source, *, max_pixels: int) -> Picture:
    """Read an image: first frame, upright by its EXIF orientation, converted to sRGB.

    Reads PNG, JPEG, WebP, AVIF, TIFF, BMP and GIF by content, whatever the file is called.
    Sixteen-bit and float samples keep their depth. A PNG gamma without a profile counts.

    Args:
        source: a path, the bytes of a file, a binary stream, or a Pillow image.
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        PathError: the path is missing, a folder, or unreadable.
        ImageError: not an image of these formats, or a damaged one.
        TooLargeError: more than ``max_pixels`` pixels.
    """
    name = describe(source)
    if isinstance(source, Image.Image):
        check_size(*source.size, max_pixels, name)
        with guarded(name):
            source.load()
            return _finished(_read(source, None), source)
    with opened_file(source, max_pixels) as file:
        image = open_image(file, name)
        if image is None:
            return _decode_with_opencv(file, name, max_pixels)
        check_size(*image.size, max_pixels, name)
        with guarded(name):
            image = _verified(image, file, name)
            image.load()
            return _finished(_read(image, file), image)


def upright_size(source: str | Path | bytes, *, max_pixels: int) -> tuple[int, int]:
    """Return the width and height of an image, upright, from its header alone.

    Raises:
        PathError, ImageError, TooLargeError: as ``decode``, as far as the header tells.
    """
    name = describe(source)
    with opened_file(source, max_pixels) as file:
        image = open_image(file, name)
        if image is None:
            with guarded(name):
                found = deep.deep_tiff_size(file)
            if found is None:
                raise _not_an_image(name)
        else:
            found = image.size[::-1] if _is_turned(image) else image.size
        check_size(*found, max_pixels, name)
        return found


def _is_turned(image: Image.Image) -> bool:
    """Tell from the header whether width and height are to be exchanged.

    Pillow has exchanged those of a TIFF file already, and would decode a whole PNG file in
    search of an orientation.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return False
    return orientation(image) >= 5


def _not_an_image(name: str) -> ImageError:
    return ImageError(f"{name} is not a {_KNOWN} image.")


def _verified(image: Image.Image, file: BinaryIO, name: str) -> Image.Image:
    """Check the checksums of a PNG file, which loading alone does not do for pixels."""
    if image.format != "PNG":
        return image
    image.verify()
    again = open_image(file, name)
    if again is None:
        raise ImageError(f"{name} changed while it was read; try again.")
    return again


def _decode_with_opencv(file: BinaryIO, name: str, max_pixels: int) -> Picture:
    """Read the TIFF files that Pillow has no mode for, such as three floats a pixel."""
    with guarded(name):
        size = deep.deep_tiff_size(file)
        if size is not None:
            check_size(*size, max_pixels, name)
        pixels = deep.read_deep(file) if size is not None else None
    if pixels is None:
        raise _not_an_image(name)
    rgb, alpha, greyscale = pixels
    facts = Facts((rgb.shape[1], rgb.shape[0]), "TIFF", greyscale, None, Metadata(), ())
    return Picture(rgb, alpha, facts)


def _read(image: Image.Image, file: BinaryIO | None) -> _Raw:
    """Take the pixels out of a loaded image."""
    metadata = read_metadata(image)
    if image.mode in ("CMYK", "LAB"):
        return _read_print(image, metadata)
    gamma = image.info.get("gamma") if "srgb" not in image.info else None
    if file is not None and deep.needs_deep_reading(image, file):
        pixels = deep.read_deep(file)
        if pixels is not None:
            rgb, alpha, grey = pixels
            grey = grey or (image.format == "PNG" and deep.png_header(file)[1])
            return _Raw(rgb, alpha, grey, metadata, gamma=gamma)
    bits = deep.png_header(file)[0] if file is not None and image.format == "PNG" else None
    return _Raw(*split(image, bits), is_grey(image), metadata, gamma=gamma)


def _read_print(image: Image.Image, metadata: Metadata) -> _Raw:
    """Bring CMYK and L*a*b* to sRGB, where they stay: their profile is not restored."""
    converted = None
    if image.mode == "LAB":
        converted = profile.lab_to_srgb(image)
    elif metadata.profile is not None:
        converted = profile.cmyk_to_srgb(image, metadata.profile)
    rgb, _ = split(image.convert("RGB") if converted is None else converted)
    warning = f"The source is {image.mode}; the result is sRGB."
    kept = dataclasses.replace(metadata, profile=None)
    return _Raw(rgb, None, greyscale=False, metadata=kept, warnings=(warning,))


def _finished(raw: _Raw, image: Image.Image) -> Picture:
    """Convert to sRGB and turn upright."""
    rgb, metadata, warnings = raw.rgb, raw.metadata, raw.warnings
    if metadata.profile is not None:
        converted = profile.to_srgb(rgb, metadata.profile)
        if converted is None:
            warnings = (*warnings, "The colour profile of the source is unusable and is dropped.")
            metadata = dataclasses.replace(metadata, profile=None)
        else:
            rgb = converted
    elif raw.gamma:
        rgb = _from_gamma(rgb, float(raw.gamma))
    turn = orientation(image)
    rgb = upright(rgb, turn)
    alpha = None if raw.alpha is None else upright(raw.alpha, turn)
    quality = estimate_quality(getattr(image, "quantization", None))
    size = (rgb.shape[1], rgb.shape[0])
    file_format = "JPEG" if image.format == "MPO" else image.format
    return Picture(rgb, alpha, Facts(size, file_format, raw.greyscale, quality, metadata, warnings))


def _from_gamma(rgb: Float, gamma: float) -> Float:
    """Undo the gamma that a PNG file declares; sRGB is close enough to 1/2.2 to stay."""
    exponent = _SRGB_GAMMA / gamma
    if not 0.01 < gamma < 100 or abs(exponent - 1) < 0.05:
        return rgb
    np.power(rgb, np.float32(exponent), out=rgb)
    return rgb


def upright(pixels: Float, turn: int) -> Float:
    """Undo an EXIF orientation, 1..8, of [height, width] or [height, width, 3]."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
