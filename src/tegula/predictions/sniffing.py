"""What bytes are, by how they begin; names and headers of clients are not believed."""

from __future__ import annotations

import mimetypes
import re
import unicodedata
from pathlib import PurePath

UNKNOWN = "application/octet-stream"

_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"BM", "image/bmp"),
    (b"\xff\x0a", "image/jxl"),
    (b"\x00\x00\x00\x0cJXL ", "image/jxl"),
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
)
_BRANDS = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"mif1": "image/heif",
}
_EXTENSIONS = {
    "image/jpeg": ".jpg",
    "image/tiff": ".tif",
    "image/webp": ".webp",
    "image/avif": ".avif",
}
_LONGEST_NAME = 120


def content_type_of(head: bytes, claimed: str | None = None) -> str:
    """Return the type of bytes that begin so.

    A claim counts only where the beginning says nothing, and never as a type that a
    browser would run.
    """
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        return _BRANDS[head[8:12]]
    claim = (claimed or "").partition(";")[0].strip().lower()
    harmless = claim in ("text/plain", "application/json", "text/csv")
    return claim if harmless else UNKNOWN


def safe_name(name: str | None, content_type: str) -> str:
    """Return a name for a file: no folders, no odd characters, the right extension."""
    plain = unicodedata.normalize("NFC", PurePath((name or "").replace("\\", "/")).name)
    plain = re.sub(r"[^\w. -]", "_", plain).strip(" .")[-_LONGEST_NAME:]
    stem = plain or "file"
    extension = _EXTENSIONS.get(content_type) or mimetypes.guess_extension(content_type) or ""
    guessed = mimetypes.guess_type(stem)[0]
    if content_type == UNKNOWN or guessed == content_type:
        return stem
    return f"{PurePath(stem).stem if guessed else stem}{extension}"
