"""The file formats of results, as data: no decoder or encoder is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tegula.errors import InputError, OptionError

EXTENSIONS: Mapping[str, str] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
    ".tif": "tiff",
    ".tiff": "tiff",
}
FORMATS = tuple(dict.fromkeys(EXTENSIONS.values()))
LONGEST_SIDE: Mapping[str, int] = {"jpeg": 65_500, "webp": 16_383, "avif": 65_535}


def format_for(path: Path | None, wanted: str | None = None) -> str:
    """Return the format to write: the wanted one, else by the extension, else PNG.

    Raises:
        OptionError: no such format, or the extension stands for none.
    """
    if wanted is not None:
        name = EXTENSIONS.get("." + wanted.lower().lstrip("."))
    elif path is None:
        name = "png"
    else:
        name = EXTENSIONS.get(path.suffix.lower())
    if name is None:
        asked = wanted if wanted is not None or path is None else path.name
        raise OptionError(f"The format is one of {', '.join(FORMATS)}, which {asked!r} is not.")
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
