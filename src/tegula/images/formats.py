"""File formats as data: those of results, and how files begin that are read, or are not.

No decoder or encoder is imported here: the command line needs these names for its help, and
starts without Pillow and numpy; the server looks at the first bytes of inputs without them, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tegula.errors import ImageError, InputError, OptionError

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


# How files begin.

START = 1024
"""Bytes that tell what a file is."""

_READ = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM|RIFF.{4}WEBP"
    rb"|(II|MM)(\*\0|\0\*|\+\0|\0\+)",
    re.DOTALL,
)
HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
    | {b"mif1", b"msf1", b"mif2", b"1pic"}
)
AVIF_BRANDS = frozenset({b"avif", b"avis"})

_KINDS = (
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL picture"),
    (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "), "a JPEG 2000 picture"),
    (re.compile(rb"8BPS"), "a Photoshop document"),
    (re.compile(rb"gimp xcf"), "a GIMP document"),
    (re.compile(rb"%PDF"), "a PDF document"),
    (re.compile(rb"\x76\x2f\x31\x01"), "an OpenEXR picture"),
    (re.compile(rb"#\?R"), "a Radiance HDR picture"),
    (re.compile(rb"DDS "), "a DDS texture"),
    (re.compile(rb"qoif"), "a QOI picture"),
    (re.compile(rb"P[1-7][\s#]"), "a PNM picture"),
    (re.compile(rb"\0\0[\x01\x02]\0[\x01-\xff]\0"), "an icon or cursor of Windows"),
    (re.compile(rb"icns"), "an icon of macOS"),
    (re.compile(rb"FUJIFILMCCD-RAW|.{4}ftypcrx ", re.DOTALL), "a camera's raw file"),
    (re.compile(rb".{4}ftyp(mp4|isom|qt  |M4V|3gp)", re.DOTALL), "a video"),
    (re.compile(rb"\x1aE\xdf\xa3|RIFF.{4}AVI ", re.DOTALL), "a video"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg[\s>]", re.DOTALL), "an SVG drawing"),
    (re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE), "a web page"),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS, and not the file itself"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive"),
)
_ADVICE = {
    "a video": "take single pictures out of it as PNG or JPEG",
    "a camera's raw file": "develop it and save it as TIFF, PNG or JPEG",
    "a ZIP archive": "unpack it and give the pictures in it",
    "a web page": "give the address or the file of the picture itself",
    "a pointer of Git LFS, and not the file itself": "run `git lfs pull`",
}


def brands_of(start: bytes) -> set[bytes]:
    """Return what kinds of ISO/IEC 14496-12 a file says to be of; none for other files."""
    length = int.from_bytes(start[:4], "big")
    if start[4:8] != b"ftyp" or not 16 <= length <= len(start):
        return set()
    return {start[8:12], *(start[at : at + 4] for at in range(16, length, 4))}


def may_be_read(start: bytes) -> bool:
    """Whether a file that begins so may be a picture of a format that is read."""
    return _READ.match(start) is not None or bool(brands_of(start) & (HEIF_BRANDS | AVIF_BRANDS))


def not_supported(name: str, what: str) -> ImageError:
    """Return the error for a sound file of a kind that is not read."""
    advice = _ADVICE.get(what, "save it as PNG, JPEG or TIFF")
    return ImageError(f"{name} is {what}, which is not supported; {advice}.")


def not_readable(name: str, start: bytes) -> ImageError:
    """Return the error for a file that is not read, by its first bytes."""
    for pattern, what in _KINDS:
        if pattern.match(start):
            return not_supported(name, what)
    return ImageError(f"{name} is not a PNG, JPEG, WebP, AVIF, HEIC, TIFF, BMP or GIF image.")
