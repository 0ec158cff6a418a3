"""The file formats of results, as data.

No decoder or encoder is imported here: the command line needs these names for its help, and
starts without Pillow and numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tegula.errors import InputError, OptionError

EXTENSIONS: Mapping[str, str] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".jfif": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
    ".tif": "tiff",
    ".tiff": "tiff",
}
FORMATS = tuple(dict.fromkeys(EXTENSIONS.values()))

LONGEST_SIDE: Mapping[str, int] = {"jpeg": 65_500, "webp": 16_383, "avif": 65_535}
"""Pixels: libjpeg's own limit, and what fits into 14 bits of WebP and 16 bits of AV1."""


def format_for(path: Path | None, wanted: str | None = None) -> str:
    """Return the format to write: the wanted one, else by the extension, else PNG.

    Raises:
        OptionError: no such format, or the extension stands for none.
    """
    if wanted is not None:
        given, extension = wanted, "." + wanted.lstrip(".")
    elif path is not None:
        given, extension = path.name, path.suffix
    else:
        return "png"
    name = EXTENSIONS.get(extension.lower())
    if name is None:
        raise OptionError(f"The format is one of {', '.join(FORMATS)}, which {given!r} is not.")
    return name


def check_sides(width: int, height: int, name: str) -> None:
    """Refuse a result that its format cannot hold.

    Raises:
        InputError: a side is longer than the format allows.
    """
    limit = LONGEST_SIDE.get(name)
    if limit is not None and max(width, height) > limit:
        raise InputError(
            f"{name.upper()} holds at most {limit} pixels a side and the result is "
            f"{width}x{height}; write PNG or TIFF instead."
        )
