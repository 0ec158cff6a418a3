"""What an upscale yields, and how it is written to a file."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from tegula.errors import PathError
from tegula.folders import write_atomically
from tegula.images.deep import DeepPixels
from tegula.images.encode import PNG_LEVEL, Encoded, encode
from tegula.images.formats import format_for
from tegula.images.metadata import Metadata
from tegula.options import ResolvedOptions
from tegula.pipeline.exact import Consistency
from tegula.pipeline.likeness import FaceReport
from tegula.plan import Plan

_LOSSY = ("jpeg", "webp", "avif")

Crop = tuple[int, int, int, int]
"""Left, top, width and height."""


@dataclass(frozen=True)
class UpscaleResult:
    """What an upscale yields.

    image: the result, of mode L, LA, RGB or RGBA.
    source: the source as it was enlarged: upright, cropped, sRGB.
    options: the settings with nothing left open.
    settings: the same and the models, as a result's file keeps them.
    metadata: what the file of the source hands on to the file of the result.
    timings: seconds by stage.
    plan: the work that was done.
    warnings: sentences on options that could not be followed.
    deep: the result with sixteen bits a channel, when the source has more than eight; PNG and
        TIFF files are written of it.
    found: a line on what was found in the source and what was done about it; empty without
        ``auto``.
    consistency: how far the result, shrunk again, is from the source, in the colours of its
        file; of a crop, with the surroundings it was enlarged with. None if it is smaller.
    faces: how like its source each face is, before and after the guard of ``likeness``.
    """

    image: Image.Image
    source: Image.Image
    options: ResolvedOptions
    settings: Mapping[str, object]
    metadata: Metadata
    timings: Mapping[str, float]
    plan: Plan
    warnings: tuple[str, ...]
    deep: DeepPixels | None = None
    found: str = ""
    consistency: Consistency | None = None
    faces: tuple[FaceReport, ...] = ()

    def without_context(self, options: ResolvedOptions, context: Crop, crop: Crop) -> UpscaleResult:
        """Cut away what was enlarged with a crop for the sake of its edges.

        Args:
            options: of the crop alone, as the result has them then.
            context: left, top, width and height of the crop with its context, in the source.
            crop: those of the crop alone.
        """
        box = _within(self.options.offset, (*options.offset, options.width, options.height))
        return dataclasses.replace(
            self,
            image=self.image.crop(box),
            deep=None if self.deep is None else self.deep.crop(box),
            source=self.source.crop(_within(context[:2], crop)),
            options=options,
            faces=tuple(
                dataclasses.replace(face, left=face.left + context[0], top=face.top + context[1])
                for face in self.faces
            ),
        )

    @property
    def seed(self) -> int:
        """The seed that gives this result again."""
        return self.options.seed

    def encoded(
        self,
        file_format: str = "png",
        *,
        quality: int = 95,
        png_level: int = PNG_LEVEL,
        settings: Mapping[str, object] | None = None,
    ) -> Encoded:
        """Return the bytes of a file with the source's profile and metadata and the settings.

        Args:
            file_format: png, jpeg, webp, avif or tiff.
            quality: 1..100, for JPEG, WebP and AVIF.
            png_level: 0..9, how hard PNG is compressed: 1 takes half the time of 4.
            settings: instead of those of the result, to be read by ``tegula upscale --like``.

        Raises:
            OptionError: unknown format, or quality or level out of bounds.
            InputError: a side is longer than the format allows.
        """
        written = encode(
            self.image,
            file_format,
            quality=quality,
            png_level=png_level,
            metadata=self.metadata,
            settings=self.settings if settings is None else settings,
            deep=self.deep,
        )
        warnings = (*written.warnings, *self.lost_exactness(written.format))
        return dataclasses.replace(written, warnings=warnings)

    def lost_exactness(self, file_format: str) -> tuple[str, ...]:
        """Return a sentence where an exact result goes into a file that changes its pixels."""
        if not self.options.exact or self.consistency is None or file_format not in _LOSSY:
            return ()
        return (
            f"{file_format.upper()} changes pixels, so the file is not exact as the result is; "
            "PNG and TIFF keep it.",
        )

    def save(
        self,
        target: str | Path | BinaryIO,
        *,
        file_format: str | None = None,
        quality: int = 95,
        png_level: int = PNG_LEVEL,
    ) -> tuple[str, ...]:
        """Write the result as ``tegula upscale --overwrite`` does, at once or not at all.

        Profile, metadata and settings are kept, and sixteen bits where there are any;
        ``image.save`` would lose them. A file that is there is replaced.

        Args:
            target: a path, whose ending says the format unless ``file_format`` does; or a
                file opened for writing in binary mode, which gets PNG unless it does.
            file_format: png, jpeg, webp, avif or tiff.
            quality: 1..100, for JPEG, WebP and AVIF.
            png_level: 0..9, how hard PNG is compressed.

        Returns:
            Sentences on what the format could not hold.

        Raises:
            OptionError, InputError: as ``encoded`` does.
            PathError: the target is neither, or the file at the path cannot be written;
                nothing is left of it then.
        """
        path = Path(target) if isinstance(target, str | Path) else None
        written = self.encoded(format_for(path, file_format), quality=quality, png_level=png_level)
        if path is not None:
            write_atomically(path, written.data)
        elif isinstance(target, io.TextIOBase) or not hasattr(target, "write"):
            raise PathError(
                f"A result cannot be saved to a {type(target).__name__}; give a path, or a file "
                "opened for writing in binary mode."
            )
        else:
            target.write(written.data)
        return written.warnings

    def _repr_png_(self) -> bytes:
        """Show the result in a notebook."""
        return self.encoded().data


def _within(origin: tuple[int, int], box: Crop) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom of a box as counted from an origin."""
    left, top = box[0] - origin[0], box[1] - origin[1]
    return left, top, left + box[2], top + box[3]
