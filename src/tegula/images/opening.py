"""Opening what claims to be an image, within limits and without surprises.

Only eight formats are opened, whatever the name of the file says. The size is checked
before a pixel is decoded. Pillow's own limit and its warning are passed by, because the
limit here is the caller's. Whatever a decoder raises becomes an ImageError.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image

from tegula.errors import ImageError, PathError, TooLargeError

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
