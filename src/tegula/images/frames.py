"""Animations and files of several pages: read picture by picture, written as one file.

The frames of an animation are whole pictures here, of one size: a decoder lays the parts that a
file stores over each other. Pages are pictures of their own, of any size.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import Image, TiffImagePlugin

from tegula.errors import InputError
from tegula.images.decode import Picture, decode, tiff_picture
from tegula.images.deep import DeepPixels
from tegula.images.encode import PNG_LEVEL, Encoded, encode, writer_parameters
from tegula.images.metadata import Metadata, further_frames
from tegula.images.open import check_size, guarded, name_of, open_image, opened_file
from tegula.images.repair import repaired
from tegula.images.tiff import main_page, whole_pages

_ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
_WRITES_ANIMATIONS = ("png", "webp", "avif")
_USUAL_DURATION = 100
"""Milliseconds of a frame that says 0 or nothing, as browsers have it."""


@dataclass(frozen=True)
class FrameFacts:
    """What a file of several pictures is.

    kind: frames of an animation, or pages.
    count: of pictures, at least 1.
    durations: of frames, in milliseconds.
    loop: how often the animation runs; 0 is for ever.
    """

    kind: Literal["frame", "page"]
    count: int
    durations: tuple[float, ...] = ()
    loop: int = 0

    @property
    def sentence(self) -> str:
        """What ``decode`` says of a file of which it reads the first picture alone."""
        return further_frames(self.count, self.kind)


def frame_facts(source: str | Path | bytes, max_pixels: int) -> FrameFacts:
    """Return how many pictures a file holds, and how long each is shown.

    Raises:
        PathError, ImageError, TooLargeError: as ``decode``, as far as headers tell.
    """
    one = FrameFacts("frame", 1)
    name = name_of(source)
    with opened_file(source, max_pixels) as opened:
        with guarded(name):
            file = repaired(opened, name, animated=True).file
        image = open_image(file, name)
        if image is None or image.format == "TIFF":
            page = main_page(file, name)
            with guarded(name):
                return one if page is None else FrameFacts("page", max(1, len(whole_pages(page))))
        if image.format not in _ANIMATIONS:
            return one
        check_size(*image.size, max_pixels, name)
        with guarded(name):
            frames = _frame_numbers(image)
            durations = []
            for number in frames:
                image.seek(number)
                if image.format in ("WEBP", "AVIF"):
                    image.load()  # which is when it learns of the time
                durations.append(float(image.info.get("duration") or 0) or _USUAL_DURATION)
            # GIF counts how often it starts again, the others how often it runs.
            loop = image.info.get("loop", 1 if image.format == "GIF" else 0)
            if image.format == "GIF" and "loop" in image.info and loop:
                loop += 1
        return FrameFacts("frame", len(frames), tuple(durations), int(loop))


def read_frames(
    source: str | Path | bytes, facts: FrameFacts, max_pixels: int
) -> Iterator[Picture]:
    """Read the pictures of a file one after the other, as ``decode`` reads the first.

    The first one has the metadata of the file, and sentences on what is left out.

    Args:
        source: as of ``frame_facts``.
        facts: what that returned.
        max_pixels: of each picture, at most.

    Raises:
        PathError, ImageError, TooLargeError: as ``decode``.
    """
    first = decode(source, max_pixels=max_pixels)
    remarks = [each for each in first.facts.warnings if each != facts.sentence]
    if facts.kind == "frame" and first.facts.depth > 8:
        remarks.append(f"Frames are read with 8 of their {first.facts.depth} bits a channel.")
    name = name_of(source)
    with opened_file(source, max_pixels) as opened:
        with guarded(name):
            file = repaired(opened, name, animated=True).file
        read = _pages if facts.kind == "page" else _frames
        for number, picture in enumerate(read(file, name, max_pixels)):
            kept = tuple(each for each in picture.facts.warnings if each != facts.sentence)
            about = dataclasses.replace(picture.facts, warnings=kept)
            if number == 0:
                profile = picture.facts.metadata.profile
                metadata = dataclasses.replace(first.facts.metadata, profile=profile)
                about = dataclasses.replace(
                    first.facts, metadata=metadata, depth=about.depth, warnings=tuple(remarks)
                )
            yield dataclasses.replace(picture, facts=about)


def _pages(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Picture]:
    main = main_page(file, name)
    with guarded(name):
        pages = [] if main is None else whole_pages(main)
    for page in pages:
        # Pillow keeps to the first page that it was asked for.
        yield tiff_picture(page, open_image(file, name), file, max_pixels, name)


def _frames(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Picture]:
    image = open_image(file, name)
    if image is None:
        return
    for number in _frame_numbers(image):
        with guarded(name):
            image.seek(number)
            image.load()
            frame = image.copy()
        yield decode(frame, max_pixels=max_pixels)


def _frame_numbers(image: Image.Image) -> range:
    """Return the frames of an animation; a PNG file may show another picture without one."""
    count = int(getattr(image, "n_frames", 1))
    return range(1 if getattr(image, "default_image", False) and count > 1 else 0, count)


def check_frames(facts: FrameFacts, file_format: str) -> None:
    """Refuse a format that cannot hold the pictures of a file.

    Raises:
        InputError: says which format would.
    """
    if facts.count == 1 or file_format == "tiff":
        return
    if facts.kind == "page":
        raise InputError(
            f"{file_format.upper()} holds one picture, and the source has {facts.count} pages; "
            "write TIFF, or leave --frames all out."
        )
    if file_format not in _WRITES_ANIMATIONS:
        raise InputError(
            f"{file_format.upper()} holds one picture, and the source has {facts.count} frames; "
            "write PNG, WebP, AVIF or TIFF, or leave --frames all out."
        )


def encode_frames(
    results: Sequence[tuple[Image.Image, DeepPixels | None]],
    facts: FrameFacts,
    file_format: str,
    *,
    quality: int,
    png_level: int = PNG_LEVEL,
    metadata: Metadata,
    settings: Mapping[str, Any],
) -> Encoded:
    """Write the results of all frames or pages into one file.

    Args:
        results: one for each picture; those of frames have one size.
        facts: of the source.
        file_format: as ``encode`` takes it.
        quality: as ``encode`` takes it.
        png_level: as ``encode`` takes it.
        metadata: of the first picture.
        settings: as ``encode`` takes them.

    Raises:
        InputError: the format holds one picture, or no side so long.
    """
    check_frames(facts, file_format)
    first, deep = results[0]
    head = encode(
        first,
        file_format,
        quality=quality,
        png_level=png_level,
        metadata=metadata,
        settings=settings,
        deep=deep,
    )
    if file_format == "tiff":
        bare = Metadata(profile=metadata.profile, dpi=metadata.dpi)
        others = (encode(image, "tiff", metadata=bare, deep=more) for image, more in results[1:])
        data = _joined([head.data, *(each.data for each in others)])
        lost = ("TIFF has pages, and not how long each is shown.",) if facts.kind == "frame" else ()
        return Encoded(data, file_format, (*head.warnings, *lost))
    mode = "RGBA" if any(image.mode in ("LA", "RGBA") for image, _ in results) else "RGB"
    images = [image.convert(mode) for image, _ in results]
    parameters = writer_parameters(file_format, images[0], quality, metadata, settings)
    parameters |= {"duration": [round(each) for each in facts.durations], "loop": facts.loop}
    if file_format == "png":
        parameters["compress_level"] = png_level
    buffer = io.BytesIO()
    images[0].save(buffer, file_format, save_all=True, append_images=images[1:], **parameters)
    return Encoded(buffer.getvalue(), file_format, head.warnings)


def _joined(files: Sequence[bytes]) -> bytes:
    """Join TIFF files of one page each into one of all pages."""
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer) as writer:
        for data in files:
            writer.write(data)
            writer.newFrame()
    return buffer.getvalue()
