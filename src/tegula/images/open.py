"""Reading pictures: formats, limits, depths, masks."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from tegula.errors import ImageError, PathError, TooLargeError
from tegula.images import metadata as profile
from tegula.images.metadata import Metadata, estimate_quality, orientation, read_metadata
from tegula.images.pixels import Float, as_rgb, is_grey, split, to_floats, to_image

# Opening what claims to be an image, within limits and without surprises.
#
# Only eight formats are opened, whatever the name of the file says. The size is checked
# before a pixel is decoded. Pillow's own limit and its warning are passed by, because the
# limit here is the caller's. Whatever a decoder raises becomes an ImageError.

Source: TypeAlias = "str | Path | bytes | BinaryIO | Image.Image"
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
_BYTES_PER_PIXEL = 16
_HEADROOM = 64 * 2**20


def describe(source: Source) -> str:
    """Return how messages call the source."""
    if isinstance(source, str | Path):
        return str(source)
    return "The input"


@contextmanager
def opened_file(source: str | Path | bytes | BinaryIO, max_pixels: int) -> Iterator[BinaryIO]:
    """Yield a seekable file of the source; a stream is read to its end first.

    Raises:
        PathError: the path is missing, a folder, or unreadable.
        TooLargeError: a stream holds more bytes than any picture within the limit.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, str | Path):
        with _open_path(Path(source)) as file:
            yield file if file.seekable() else _read_stream(file, max_pixels)
    else:
        yield source if source.seekable() else _read_stream(source, max_pixels)


def open_image(file: BinaryIO, name: str) -> Image.Image | None:
    """Open an image of an allowed format by its content; no pixel is decoded yet.

    Returns:
        The image, or None when no decoder knows the content; that may still be a TIFF
        file with samples that Pillow has no mode for.

    Raises:
        ImageError: the content is empty, or begins like an image and is damaged.
    """
    file.seek(0)
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{name} is empty.")
    Image.init()
    for format_name in FORMATS:
        factory, accepts = Image.OPEN.get(format_name, (None, None))
        if factory is None or accepts is None or accepts(prefix) is not True:
            continue
        file.seek(0)
        with guarded(name):
            try:
                return factory(file, "")
            except SyntaxError:
                if format_name == "TIFF":
                    return None
                raise
    return None


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one sentence, and keep its warnings quiet.

    Raises:
        ImageError: the decoder failed.
        TooLargeError: the decoder found the image to be larger than it can be.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, ImageError, TooLargeError, PathError):
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name} claims more pixels than can be decoded.") from error
    except Exception as error:
        raise ImageError(f"{name} is a damaged or truncated image; save it again.") from error


def check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    """Refuse an image without pixels or with too many.

    Raises:
        ImageError: a side is 0.
        TooLargeError: more than ``max_pixels`` pixels.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} and so has no pixels.")
    if width * height > max_pixels:
        raise TooLargeError(
            f"{name} has {width}x{height} = {width * height:,} pixels, above the limit of "
            f"{max_pixels:,}; give a smaller image or raise max_pixels."
        )


def _open_path(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise PathError(f"{path} is a folder, not an image file.")
        return path.open("rb")
    except FileNotFoundError as error:
        raise PathError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PathError(f"{path} cannot be read: {reason}.") from error


def _read_stream(stream: BinaryIO, max_pixels: int) -> BinaryIO:
    limit = max_pixels * _BYTES_PER_PIXEL + _HEADROOM
    try:
        data = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        raise PathError(f"The input cannot be read: {error}.") from error
    if len(data) > limit:
        raise TooLargeError(f"The input holds more bytes than an image of {max_pixels:,} pixels.")
    return io.BytesIO(data)


# Sixteen-bit and float colour, which Pillow narrows to eight bits or does not read.
#
# OpenCV reads them. It is only given files whose size has been checked, and PNG files
# only after their checksums have been.

_PNG_DEPTH_AND_COLOUR = slice(24, 26)
_GREY_PNG_COLOURS = (0, 4)
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS = 256, 257, 258
_DEEP = 16


def png_header(file: BinaryIO) -> tuple[int, bool]:
    """Return the bits of a sample of a PNG file, and whether it is grey."""
    file.seek(0)
    depth, colour = file.read(_PNG_DEPTH_AND_COLOUR.stop)[_PNG_DEPTH_AND_COLOUR]
    return depth, colour in _GREY_PNG_COLOURS


def needs_deep_reading(image: Image.Image, file: BinaryIO) -> bool:
    """Whether Pillow would narrow the samples of this opened image."""
    if image.format == "PNG":
        return png_header(file)[0] == _DEEP and not image.mode.startswith("I")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_TIFF_BITS, (8,))
        return image.mode in ("RGB", "RGBA") and max(bits) == _DEEP
    return False


def deep_tiff_size(file: BinaryIO) -> tuple[int, int] | None:
    """Return width and height that a TIFF file claims; None unless it has deep samples."""
    file.seek(0)
    try:
        header = file.read(8)
        directory = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(directory.next)
        directory.load(file)
        if max(directory[_TIFF_BITS]) < _DEEP:
            return None
        return int(directory[_TIFF_WIDTH]), int(directory[_TIFF_HEIGHT])
    except Exception:  # a hostile directory raises nearly anything: it is no TIFF then
        return None


def read_deep(file: BinaryIO) -> tuple[Float, Float | None, bool] | None:
    """Decode with OpenCV at full depth.

    Returns:
        float32 [height, width, 3] in 0..1, the alpha or None, and whether the file is
        grey; None when OpenCV cannot read it. Float samples are taken as 0..1.
    """
    file.seek(0)
    try:
        values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None:
        return None
    return _ordered(to_floats(values, _white(values)))


def _white(values: NDArray[np.generic]) -> float:
    return {"u": 256.0**values.dtype.itemsize - 1}.get(values.dtype.kind, 1.0)


def _ordered(values: Float) -> tuple[Float, Float | None, bool]:
    if values.ndim == 2:
        return as_rgb(values), None, True
    alpha = np.ascontiguousarray(values[..., 3]) if values.shape[2] == 4 else None
    return np.ascontiguousarray(values[..., 2::-1]), alpha, False


# From a file to the two arrays that tegula works on, and what else the file said.

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
                found = deep_tiff_size(file)
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
        size = deep_tiff_size(file)
        if size is not None:
            check_size(*size, max_pixels, name)
        pixels = read_deep(file) if size is not None else None
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
    if file is not None and needs_deep_reading(image, file):
        pixels = read_deep(file)
        if pixels is not None:
            rgb, alpha, grey = pixels
            grey = grey or (image.format == "PNG" and png_header(file)[1])
            return _Raw(rgb, alpha, grey, metadata, gamma=gamma)
    bits = png_header(file)[0] if file is not None and image.format == "PNG" else None
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


# Grey pictures that say where something holds: masks and strength maps.

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_WHOLE = (0.0, 0.0, 1.0, 1.0)


def read_mask(
    source: Source,
    size: tuple[int, int],
    max_pixels: int,
    part: tuple[float, float, float, float] = _WHOLE,
) -> Float:
    """Read a mask of any size and bring it to the size of the result.

    Transparent places count as black.

    Args:
        source: a grey picture; of a coloured one the brightness counts.
        size: width and height of the result in pixels.
        max_pixels: of the mask at most.
        part: x, y, width and height of what is wanted, as shares of the mask.

    Returns:
        float32 [height, width] in 0..1.

    Raises:
        ImageError, TooLargeError, PathError: as their names say.
    """
    picture = decode(source, max_pixels=max_pixels)
    grey = picture.rgb @ _LUMA
    if picture.alpha is not None:
        grey = grey * picture.alpha
    height, width = grey.shape
    x, y, across, down = part
    box = (x * width, y * height, (x + across) * width, (y + down) * height)
    # Lanczos would ring into places that the mask leaves out.
    plane = Image.fromarray(np.ascontiguousarray(grey))
    return np.asarray(plane.resize(size, Image.Resampling.BILINEAR, box=box), np.float32)


def inverted(source: Source, max_pixels: int) -> Image.Image:
    """Return a mask with black and white exchanged.

    Raises:
        ImageError, TooLargeError, PathError: as their names say.
    """
    picture = decode(source, max_pixels=max_pixels)
    return to_image(1 - picture.rgb, picture.alpha)
