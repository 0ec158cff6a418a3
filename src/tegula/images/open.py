"""Opening pictures: from a path, bytes or a stream to what Pillow or tifffile will decode.

Eight formats are opened, by their content and whatever the file is called; HEIC needs a library
that is optional. The size is checked before a pixel is decoded, against the caller's limit in
place of Pillow's. Whatever a decoder raises becomes an ``ImageError`` of one sentence. What is
opened here is decoded in ``decode.py``.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image

from tegula.errors import ImageError, PathError, TooLargeError
from tegula.images.formats import START, not_readable, not_supported
from tegula.images.metadata import orientation
from tegula.images.pixels import Size
from tegula.images.repair import (
    PROFILE_CHUNK,
    bit_fields,
    damaged,
    is_heif,
    open_heif,
    repaired,
)
from tegula.images.samples import ArrayLike
from tegula.images.tiff import main_page, size_of

Source: TypeAlias = "str | Path | bytes | BinaryIO | Image.Image | ArrayLike"
READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")

_UNSUPPORTED = re.compile(r"^(unsupported|cannot handle|unknown \w+ (mode|category|method))", re.I)
"""How Pillow's messages begin for kinds of a format that it does not read."""

_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+:)/{1,2}", re.I)
"""How addresses begin; a ``Path`` has lost one of their two slashes."""

# A stream may hold what the largest picture takes without compression, four floats a pixel,
# and as much metadata again as anybody has.
_BYTES_PER_PIXEL = 16
_HEADROOM = 64 * 2**20


def name_of(source: Source) -> str:
    """Return what messages call the source."""
    if isinstance(source, str | Path):
        return str(source)
    return "The input"


@contextmanager
def opened_file(source: str | Path | bytes | BinaryIO, max_pixels: int) -> Iterator[BinaryIO]:
    """Yield a seekable file of the source; a stream is read to its end first.

    Raises:
        PathError: the path is missing, a folder, or unreadable.
        ImageError: the source is nothing that bytes can be read from.
        TooLargeError: a stream holds more bytes than any picture within the limit.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif isinstance(source, str | Path):
        with _open_path(Path(source)) as file:
            yield file if file.seekable() else _read_stream(file, max_pixels)
    elif isinstance(source, io.TextIOBase) or not hasattr(source, "read"):
        raise ImageError(
            f"The input is of the type {type(source).__name__}; give a path, bytes, a file opened "
            "in binary mode, a Pillow image, a numpy array or a torch tensor."
        )
    else:
        yield source if source.seekable() else _read_stream(source, max_pixels)


def _open_path(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise PathError(f"{path} is a folder, not an image file.")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if _ADDRESS.match(str(path)):
            address = _ADDRESS.sub(r"\1//", str(path))
            raise PathError(
                f"{address} is an address, and pictures are read from files; download it first, "
                "and give its path or its bytes."
            ) from error
        if isinstance(error, FileNotFoundError):
            raise PathError(f"{path} does not exist.") from error
        reason = getattr(error, "strerror", None) or error
        raise PathError(f"{path} cannot be read: {reason}.") from error


def _read_stream(stream: BinaryIO, max_pixels: int) -> BinaryIO:
    try:
        data = stream.read(_most_bytes(max_pixels) + 1)
    except (OSError, ValueError) as error:
        raise PathError(f"The input cannot be read: {error}.") from error
    check_bytes(len(data), max_pixels)
    return io.BytesIO(data)


def check_bytes(count: int, max_pixels: int) -> None:
    """Refuse to read so many bytes into memory.

    Raises:
        TooLargeError: there are more than any picture within the limit has.
    """
    if count > _most_bytes(max_pixels):
        raise TooLargeError(f"The input holds more bytes than an image of {max_pixels:,} pixels.")


def _most_bytes(max_pixels: int) -> int:
    return max_pixels * _BYTES_PER_PIXEL + _HEADROOM


def open_image(file: BinaryIO, name: str) -> Image.Image | None:
    """Open an image of an allowed format by its content; no pixel is decoded yet.

    The decoders are called one by one, and not through ``Image.open``, which would try
    every format that Pillow knows and check the size against Pillow's own limit.

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
    for format_name in READ_FORMATS:
        factory, accepts = Image.OPEN.get(format_name, (None, None))
        # An answer other than True is a sentence on why the decoder is missing.
        if factory is None or accepts is None or accepts(prefix) is not True:
            continue
        file.seek(0)
        if format_name == "AVIF" and is_heif(file):
            continue
        file.seek(0)
        with guarded(name):
            return _opened_as(format_name, factory, file)
    with guarded(name):
        return open_heif(file, name) if is_heif(file) else None


def _opened_as(
    format_name: str, factory: Callable[..., Image.Image], file: BinaryIO
) -> Image.Image | None:
    try:
        image = factory(file, "")
    except SyntaxError:
        if format_name == "TIFF":
            return None
        raise
    except OSError:
        plain = bit_fields(file) if format_name == "BMP" else None
        if plain is None:
            raise
        return plain
    chunks = dict(getattr(image, "private_chunks", ()))
    if PROFILE_CHUNK in chunks:
        image.info["icc_profile"] = chunks[PROFILE_CHUNK]
    return image


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
        unsupported = _UNSUPPORTED.search(str(error))
        if unsupported is not None:
            raise not_supported(name, f"an image of a kind ({error})") from error
        raise damaged(name) from error


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
            f"{name} has {width}x{height} = {width * height:,} pixels; at most "
            f"{max_pixels:,} are allowed (max_pixels)."
        )


def repaired_file(
    file: BinaryIO, name: str, *, header: bool = False
) -> tuple[BinaryIO, tuple[str, ...]]:
    """Return the file without what is odd around its pixels, and sentences on what that was."""
    with guarded(name):
        found = repaired(file, name, header=header)
    return found.file, found.remarks


def not_an_image(file: BinaryIO, name: str) -> ImageError:
    """Return the error for a file that no decoder knows; it names the kind that it seems to be."""
    file.seek(0)
    return not_readable(name, file.read(START))


def upright_size(source: str | Path | bytes, *, max_pixels: int) -> Size:
    """Return the width and height of an image, upright, from its header alone.

    Raises:
        PathError, ImageError, TooLargeError: as ``decode``, as far as the header tells.
    """
    name = name_of(source)
    with opened_file(source, max_pixels) as opened:
        file, _ = repaired_file(opened, name, header=True)
        image = open_image(file, name)
        page = main_page(file, name) if image is None or image.format == "TIFF" else None
        if page is not None:
            size = size_of(page)
        elif image is None:
            raise not_an_image(file, name)
        else:
            # Pillow has exchanged the sides of a turned TIFF file already.
            is_turned = image.format != "TIFF" and orientation(image) >= 5
            size = image.size[::-1] if is_turned else image.size
        check_size(*size, max_pixels, name)
        return size
