"""Reading pictures: whatever is given becomes float32 arrays, upright and in sRGB.

A picture goes through here once and forward: it is opened, its size is checked, its samples
are decoded, brought to sRGB and turned upright. Eight formats are opened, by their content
and whatever the file is called; HEIC needs a library that is optional. The size is checked
before a pixel is decoded, against the caller's limit in place of Pillow's. Whatever a decoder
raises becomes an ``ImageError`` of one sentence.
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image
from tifffile import TiffPage

from tegula.errors import ImageError, PathError, TooLargeError
from tegula.images.colour_tags import ColourTag, colour_tag
from tegula.images.deep import DeepPixels
from tegula.images.metadata import (
    IPTC_RESOURCE,
    Metadata,
    estimate_quality,
    exif_of,
    further_frames,
    further_pictures,
    orientation,
    read_metadata,
)
from tegula.images.pixels import Float, Size, to_image
from tegula.images.profiles import colour_space, into_srgb, is_nearly_srgb, leads_back
from tegula.images.repair import (
    NO_END,
    PROFILE_CHUNK,
    bit_fields,
    damaged,
    foreign_kind,
    is_heif,
    not_supported,
    open_heif,
    repaired,
    with_end,
)
from tegula.images.samples import (
    ArrayLike,
    Samples,
    array_samples,
    channels_last,
    image_samples,
    print_samples,
    tiff_samples,
)
from tegula.images.tiff import (
    frame_for_pillow,
    iptc_of,
    main_page,
    metadata_carrier,
    page_count,
    read_values,
    size_of,
)

Source: TypeAlias = "str | Path | bytes | BinaryIO | Image.Image | ArrayLike"
READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")


@dataclass(frozen=True)
class Facts:
    """What a source is, beside its pixels.

    size: width and height of the whole source in pixels, upright.
    format: Pillow's name of the file format, such as "PNG"; None for a picture in memory.
    greyscale: the source has no colour, by its mode, channels or palette.
    depth: bits a channel in the source, 8 for fewer; also of floats.
    jpeg_quality: 1..100, estimated from the quantisation tables; None unless JPEG.
    metadata: what a result takes over, with the ICC profile to restore.
    warnings: sentences on what could not be kept.
    """

    size: Size
    format: str | None
    greyscale: bool
    depth: int
    jpeg_quality: int | None
    metadata: Metadata
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A decoded source, upright and in sRGB.

    rgb: float32 [height, width, 3], 0..1.
    alpha: float32 [height, width], 0..1, or None when the source has no transparency.
    beyond: float32 [height, width, 3], what added to ``rgb`` gives colours that sRGB cannot
        hold; None when the source has none.
    """

    rgb: Float
    alpha: Float | None
    facts: Facts
    beyond: Float | None = None


def decode(source: Source, *, max_pixels: int) -> Picture:
    """Read a picture: first frame, upright by its EXIF orientation, converted to sRGB.

    Reads PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF and, with pillow-heif, HEIC by content,
    whatever the file is called. Sixteen-bit and float samples keep their depth. A PNG gamma
    without a profile counts.

    Args:
        source: a path, the bytes of a file, a binary stream, a Pillow image, a numpy array
            [height, width] or [height, width, channels], or a torch tensor [channels,
            height, width] with or without a leading batch axis of 1. Arrays and tensors
            hold uint8, uint16, booleans, or floats in 0..1; their channels are grey, grey
            and alpha, RGB, or RGBA.
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        PathError: the path is missing, a folder, or unreadable.
        ImageError: not an image of these formats, a damaged one, or an array of another
            shape or type.
        TooLargeError: more than ``max_pixels`` pixels.
    """
    name = name_of(source)
    if isinstance(source, Image.Image):
        check_size(*source.size, max_pixels, name)
        with guarded(name):
            _load_given(source)
            picture = _picture(source, None)
            return _with_remarks(picture, (), further_pictures(source, picture.facts.warnings))
    if isinstance(source, ArrayLike):
        values = channels_last(source, name)
        check_size(values.shape[1], values.shape[0], max_pixels, name)
        return _bare_picture(array_samples(values, name), None)
    with opened_file(source, max_pixels) as opened:
        file, remarks = _repaired(opened, name)
        image = open_image(file, name)
        if image is None or image.format == "TIFF":
            page = main_page(file, name)
            if page is not None:
                return tiff_picture(page, image, file, max_pixels, name)
        if image is None:
            raise _not_an_image(file, name)
        check_size(*image.size, max_pixels, name)
        with guarded(name):
            image, no_end = _loaded(image, file, name)
            picture = _picture(image, file)
            further = further_pictures(image, picture.facts.warnings)
            return _with_remarks(picture, (*remarks, *no_end), further)


def inverted(source: Source, max_pixels: int) -> Image.Image:
    """Return a mask with black and white exchanged.

    Raises:
        ImageError, TooLargeError, PathError: as ``decode``.
    """
    picture = decode(source, max_pixels=max_pixels)
    return to_image(1 - picture.rgb, picture.alpha)


def reopened(image: Image.Image, deep: DeepPixels | None, metadata: Metadata) -> Picture:
    """Return a result as a source again, with all that its file would keep.

    Args:
        image: of mode L, LA, RGB or RGBA.
        deep: the same with sixteen bits a channel, if there is that.
        metadata: what its file would take along.
    """
    if deep is None:
        samples = image_samples(image, None)
    else:
        samples = dataclasses.replace(array_samples(deep.samples, "A result"), depth=deep.depth)
    carrier = Image.new("L", (1, 1))
    if metadata.profile is not None:
        carrier.info["icc_profile"] = metadata.profile
    picture = _finished(carrier, None, samples, turn=1)
    return dataclasses.replace(picture, facts=dataclasses.replace(picture.facts, metadata=metadata))


def in_srgb(image: Image.Image, metadata: Metadata) -> Image.Image:
    """Return a result as sRGB, to be shown beside others; itself where it is that already."""
    if metadata.profile is None:
        return image
    picture = reopened(image, None, metadata)
    return to_image(picture.rgb, picture.alpha)


def upright_size(source: str | Path | bytes, *, max_pixels: int) -> Size:
    """Return the width and height of an image, upright, from its header alone.

    Raises:
        PathError, ImageError, TooLargeError: as ``decode``, as far as the header tells.
    """
    name = name_of(source)
    with opened_file(source, max_pixels) as opened:
        file, _ = _repaired(opened, name, header=True)
        image = open_image(file, name)
        page = main_page(file, name) if image is None or image.format == "TIFF" else None
        if page is not None:
            size = size_of(page)
        elif image is None:
            raise _not_an_image(file, name)
        else:
            # Pillow has exchanged the sides of a turned TIFF file already.
            is_turned = image.format != "TIFF" and orientation(image) >= 5
            size = image.size[::-1] if is_turned else image.size
        check_size(*size, max_pixels, name)
        return size


# Opening what claims to be an image, within limits and without surprises.

# A stream may hold what the largest picture takes without compression, four floats a pixel,
# and as much metadata again as anybody has.
_UNSUPPORTED = re.compile(r"^(unsupported|cannot handle|unknown \w+ (mode|category|method))", re.I)
"""How Pillow's messages begin for kinds of a format that it does not read."""

_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+:)/{1,2}", re.I)
"""How addresses begin; a ``Path`` has lost one of their two slashes."""

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
            f"The input is a {type(source).__name__}; give a path, bytes, a file opened in "
            "binary mode, a Pillow image, a numpy array or a torch tensor."
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
    limit = max_pixels * _BYTES_PER_PIXEL + _HEADROOM
    try:
        data = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        raise PathError(f"The input cannot be read: {error}.") from error
    if len(data) > limit:
        raise TooLargeError(f"The input holds more bytes than an image of {max_pixels:,} pixels.")
    return io.BytesIO(data)


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


def _repaired(
    file: BinaryIO, name: str, *, header: bool = False
) -> tuple[BinaryIO, tuple[str, ...]]:
    with guarded(name):
        found = repaired(file, name, header=header)
    return found.file, found.remarks


def _loaded(image: Image.Image, file: BinaryIO, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode the pixels, also of a JPEG file that lacks nothing but its end marker."""
    try:
        image.load()
    except OSError:
        ended = with_end(file) if image.format in ("JPEG", "MPO") else None
        again = None if ended is None else open_image(ended, name)
        if again is None:
            raise
        again.load()
        return again, (NO_END,)
    return image, ()


def _load_given(image: Image.Image) -> None:
    """Decode the pixels of a caller's image.

    Raises:
        ImageError: it, or the file that it was to be read from, is closed.
    """
    try:
        image.load()
    except (ValueError, AssertionError, AttributeError) as error:
        # Pillow says so, but for a file that it closed itself, and then has no longer.
        if "closed" in str(error) or getattr(image, "fp", image) is None:
            raise ImageError(
                "The input is a Pillow image that is closed; give it before it is closed, or "
                "open it again."
            ) from error
        raise


def _with_remarks(picture: Picture, before: tuple[str, ...], behind: tuple[str, ...]) -> Picture:
    warnings = tuple(dict.fromkeys((*before, *picture.facts.warnings, *behind)))
    return dataclasses.replace(picture, facts=dataclasses.replace(picture.facts, warnings=warnings))


def _not_an_image(file: BinaryIO, name: str) -> ImageError:
    kind = foreign_kind(file)
    if kind is not None:
        return not_supported(name, kind)
    return ImageError(f"{name} is not a PNG, JPEG, WebP, AVIF, HEIC, TIFF, BMP or GIF image.")


# From an opened image to the picture: samples, then colour, then orientation.

_SRGB_GAMMA = 1 / 2.2


def _picture(image: Image.Image, file: BinaryIO | None) -> Picture:
    """Take a picture out of a loaded image; the file is None for an image in memory."""
    if image.mode in ("CMYK", "LAB"):
        samples = print_samples(image, image.info.get("icc_profile") or None)
    else:
        samples = image_samples(image, file)
    return _finished(image, file, samples, orientation(image))


def tiff_picture(
    page: TiffPage, image: Image.Image | None, file: BinaryIO, max_pixels: int, name: str
) -> Picture:
    """Take the picture of a directory; the image is what Pillow opened, if it did."""
    check_size(*size_of(page), max_pixels, name)
    count = page_count(page)
    further = (further_frames(count, "page"),) if count > 1 else ()
    with guarded(name):
        frame = None if image is None else frame_for_pillow(page)
        if image is not None and frame is not None:
            if frame > 0:
                image.seek(frame)
            exif_of(image)  # before Pillow looks at XMP for the orientation
            image.load()
            image.info["photoshop"] = {IPTC_RESOURCE: iptc_of(page)}
            return _with_remarks(_picture(image, file), (), further)
        values = read_values(page, file, name)
        if image is None or page.index != 0:
            image = metadata_carrier(page, file)
        image.info["photoshop"] = {IPTC_RESOURCE: iptc_of(page)}
        samples = tiff_samples(values, image.info.get("icc_profile") or None)
        return _with_remarks(_finished(image, file, samples, values.turn), (), further)


def _finished(image: Image.Image, file: BinaryIO | None, samples: Samples, turn: int) -> Picture:
    """Bring samples to sRGB and upright, and collect what the image says beside its pixels."""
    metadata, stale = read_metadata(image)
    remarks = [*samples.remarks, *stale]
    rgb, alpha, beyond = samples.rgb, samples.alpha, None
    tag = ColourTag() if samples.converted else colour_tag(image, file)
    if tag.overrides or metadata.profile is None:
        metadata = dataclasses.replace(metadata, profile=tag.profile, cicp=tag.cicp)
        remarks += [] if tag.remark is None else [tag.remark]
    if samples.converted:
        # The profile is of no use to the result, which stays in sRGB.
        metadata = dataclasses.replace(metadata, profile=None)
    elif metadata.profile is not None:
        space = colour_space(metadata.profile, greyscale=samples.greyscale)
        if space is not None:
            beyond = None if is_nearly_srgb(space) else into_srgb(rgb, space)
            if not leads_back(space):
                remarks.append(
                    "Nothing leads back to the colour profile of the source; the result is sRGB."
                )
                metadata, beyond = dataclasses.replace(metadata, profile=None), None
        else:
            remarks.append("The colour profile of the source is unusable and is dropped.")
            metadata = dataclasses.replace(metadata, profile=None)
    elif "srgb" not in image.info and not tag.overrides:
        _undo_gamma(rgb, image.info.get("gamma"))
    rgb = _upright(rgb, turn)
    # A JPEG file that holds further pictures, such as a depth map, is JPEG for us. Pillow
    # leaves the format of a TIFF file open that it cannot read.
    file_format = {"MPO": "JPEG", None: samples.format}.get(image.format, image.format)
    facts = Facts(
        size=(rgb.shape[1], rgb.shape[0]),
        format=file_format,
        greyscale=samples.greyscale,
        depth=samples.depth,
        jpeg_quality=estimate_quality(getattr(image, "quantization", None)),
        metadata=metadata,
        warnings=tuple(remarks),
    )
    planes = (None if plane is None else _upright(plane, turn) for plane in (alpha, beyond))
    alpha, beyond = planes
    return Picture(rgb, alpha, facts, beyond)


def _bare_picture(samples: Samples, file_format: str | None) -> Picture:
    """Make a picture of samples that are upright sRGB and come without metadata."""
    size = (samples.rgb.shape[1], samples.rgb.shape[0])
    facts = Facts(
        size,
        file_format,
        samples.greyscale,
        samples.depth,
        jpeg_quality=None,
        metadata=Metadata(),
        warnings=samples.remarks,
    )
    return Picture(samples.rgb, samples.alpha, facts)


def _undo_gamma(rgb: Float, gamma: float | None) -> None:
    """Undo, in place, the gamma that a PNG file declares."""
    if not gamma or not 0.01 < gamma < 100:
        return
    exponent = _SRGB_GAMMA / gamma
    if abs(exponent - 1) >= 0.05:  # sRGB is close enough to 1/2.2 to stay
        np.power(rgb, np.float32(exponent), out=rgb)


def _upright(pixels: Float, turn: int) -> Float:
    """Undo an EXIF orientation, 1..8, of [height, width] or [height, width, 3]."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
