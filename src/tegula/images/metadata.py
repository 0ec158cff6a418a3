"""What a picture file says beside its pixels, and tegula's own settings among it.

The settings of a result are one JSON string. PNG keeps it in a text chunk named
``tegula``; JPEG, WebP, AVIF and TIFF in the XMP packet, as ``tegula:settings``, beside
whatever the source's own packet says. Both hold any Unicode text, and neither takes the
place of a field that belongs to the photographer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape, unescape

from PIL import ExifTags, Image

SETTINGS_KEY = "tegula"
MAX_TEXT = 65_536
_NAMESPACE = "https://tegula.invalid/ns/1.0/"
_SETTINGS = re.compile(r"<tegula:settings>(.*?)</tegula:settings>", re.DOTALL)
_OWN_DESCRIPTION = re.compile(
    rf"<rdf:Description[^>]*{re.escape(_NAMESPACE)}[^>]*>.*?</rdf:Description>\s*", re.DOTALL
)
_XMP_ORIENTATION = re.compile(
    r'\s*tiff:Orientation="[0-9]"|<tiff:Orientation>[0-9]</tiff:Orientation>'
)
_EMPTY_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF>'
    '</x:xmpmeta><?xpacket end="w"?>'
)
_TAGS_OF_THE_OLD_PIXELS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 317, 318}
    | {319, 320, 322, 323, 324, 325, 330, 338, 339, 340, 341, 347, 513, 514, 529, 530, 531, 532}
    | {700, 33723, 34377, 34675}
)
_FIRST_PRIVATE_TAG = 50_000
IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
_STALE_FIELDS = (40_962, 40_963, ExifTags.IFD.Interop)  # width, height, an offset


@dataclass(frozen=True)
class Metadata:
    """What a result takes over from its source.

    exif: a TIFF structure, without orientation, thumbnail and anything that describes
        the source's pixels; camera, date, place and authorship stay.
    xmp: an XMP packet, UTF-8.
    text: PNG text chunks by keyword.
    profile: the ICC profile that the pixels of the file are in.
    dpi: pixels per inch, horizontally and vertically.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    text: Mapping[str, str] = field(default_factory=dict)
    profile: bytes | None = None
    dpi: tuple[float, float] | None = None


def read_metadata(image: Image.Image) -> Metadata:
    """Collect what is worth keeping from an image that Pillow has loaded."""
    return Metadata(
        exif=_exif(image),
        xmp=_without_settings(_xmp(image)),
        text=_text(image),
        profile=image.info.get("icc_profile") or None,
        dpi=_dpi(image),
    )


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8; 1 when there is none or it cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # hostile EXIF raises nearly anything, and is no reason to refuse
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def add_settings(xmp: bytes | None, settings: Mapping[str, Any]) -> bytes:
    """Return the packet with the settings in it; an unreadable packet is replaced."""
    packet = _decoded(xmp)
    packet = _OWN_DESCRIPTION.sub("", packet)
    if "</rdf:RDF>" not in packet:
        packet = _EMPTY_PACKET
    before, end, after = packet.rpartition("</rdf:RDF>")
    description = (
        f'<rdf:Description rdf:about="" xmlns:tegula="{_NAMESPACE}"><tegula:settings>'
        f"{escape(to_json(settings))}</tegula:settings></rdf:Description>"
    )
    return (before + description + end + after).encode()


def settings_of(image: Image.Image) -> dict[str, Any] | None:
    """Return the settings that an opened image carries; None when there are none."""
    text = image.info.get(SETTINGS_KEY)
    if not isinstance(text, str):
        found = _SETTINGS.search(_decoded(_xmp(image)))
        text = unescape(found.group(1)) if found else ""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def to_json(settings: Mapping[str, Any]) -> str:
    """Write settings the way every format stores them."""
    return json.dumps(dict(settings), ensure_ascii=False, allow_nan=False)


def _decoded(xmp: bytes | None) -> str:
    try:
        return (xmp or b"").decode()
    except UnicodeDecodeError:
        return ""


def _without_settings(xmp: bytes | None) -> bytes | None:
    """Drop what an earlier run of tegula wrote, and a packet that held nothing else."""
    packet = _OWN_DESCRIPTION.sub("", _decoded(xmp))
    return packet.encode() if packet not in ("", _EMPTY_PACKET) else None


def _exif(image: Image.Image) -> bytes | None:
    try:
        exif = image.getexif()
        kept = Image.Exif()
        for tag, value in exif.items():
            if tag not in (*IFDS, *_TAGS_OF_THE_OLD_PIXELS) and tag < _FIRST_PRIVATE_TAG:
                kept[tag] = value
        for ifd in IFDS:
            fields = {k: v for k, v in exif.get_ifd(ifd).items() if k not in _STALE_FIELDS}
            if fields:
                kept[ifd] = fields
        return kept.tobytes() if len(kept) else None
    except Exception:  # hostile EXIF raises nearly anything, and is no reason to refuse
        return None


def _xmp(image: Image.Image) -> bytes | None:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(packet, str):
        packet = packet.encode()
    if not isinstance(packet, bytes):
        return None
    return _XMP_ORIENTATION.sub("", packet.decode("utf-8", "surrogateescape")).encode(
        "utf-8", "surrogateescape"
    )


def _text(image: Image.Image) -> dict[str, str]:
    chunks: Mapping[str, Any] = getattr(image, "text", None) or {}
    return {
        key: str(value)
        for key, value in chunks.items()
        if isinstance(value, str)
        and key not in (SETTINGS_KEY, "XML:com.adobe.xmp")
        and not key.startswith("Raw profile type")
        and len(value) <= MAX_TEXT
    }


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = image.info["dpi"]
        dpi = float(x), float(y)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return dpi if all(1 <= value <= 65_535 for value in dpi) else None
