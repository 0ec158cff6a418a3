"""Decoding pictures: whatever is given becomes float32 arrays, upright and in sRGB.

A picture goes through here once and forward: ``open.py`` opens it and checks its size, its
samples are decoded, brought to sRGB and turned upright.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image
from tifffile import TiffPage

from tegula.errors import ImageError
from tegula.images.colour_tags import ColourTag, colour_tag
from tegula.images.compression import estimate_quality
from tegula.images.deep import DeepPixels
from tegula.images.metadata import (
    IPTC_RESOURCE,
    Metadata,
    exif_of,
    further_frames,
    further_pictures,
    orientation,
    read_metadata,
)
from tegula.images.open import (
    Source,
    check_size,
    guarded,
    name_of,
    not_an_image,
    open_image,
    opened_file,
    repaired_file,
)
from tegula.images.pixels import Float, Size, to_image
from tegula.images.profiles import colour_space, into_srgb, is_nearly_srgb, leads_back
from tegula.images.repair import NO_END, with_end
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

_SRGB_GAMMA = 1 / 2.2


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
        return _bare_picture(array_samples(values, name))
    with opened_file(source, max_pixels) as opened:
        file, remarks = repaired_file(opened, name)
        image = open_image(file, name)
        if image is None or image.format == "TIFF":
            page = main_page(file, name)
            if page is not None:
                return tiff_picture(page, image, file, max_pixels, name)
        if image is None:
            raise not_an_image(file, name)
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


# From an opened image to the picture: samples, then colour, then orientation.


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


def _bare_picture(samples: Samples) -> Picture:
    """Make a picture of samples that are upright sRGB and come without metadata."""
    size = (samples.rgb.shape[1], samples.rgb.shape[0])
    facts = Facts(
        size,
        format=None,
        greyscale=samples.greyscale,
        depth=samples.depth,
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
