"""What a file says beside its pixels: EXIF, IPTC, text, colour profile, and XMP by ``xmp``.

Metadata that cannot be read, hostile or damaged, is left out; the picture is still taken.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image

from tegula.images.prompts import prompt_in
from tegula.images.xmp import (
    FURTHER,
    GAIN_MAP,
    SETTINGS_KEY,
    XMP_KEYS,
    copied,
    packet_of,
    settings_of,
)

IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
"""The directories within EXIF that are kept."""

# Sizes, strips, tiles, compression, colour and thumbnail of the old pixels, and what Metadata
# holds apart or not at all: orientation, resolution, XMP, IPTC, Photoshop's block, profile.
_LEFT_OUT_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 317, 318}
    | {319, 320, 322, 323, 324, 325, 330, 338, 339, 340, 341, 347, 513, 514, 529, 530, 531, 532}
    | {700, 33723, 34377, 34675}
)
_FIRST_PRIVATE_TAG = 50_000
_LEFT_OUT_FIELDS = (40_962, 40_963, ExifTags.IFD.Interop)  # width, height, an offset


@dataclass(frozen=True)
class Metadata:
    """What a result takes over from its source.

    exif: a TIFF structure, without orientation, thumbnail and anything that describes
        the source's pixels; camera, date, place and authorship stay.
    xmp: an XMP packet, UTF-8, without orientation and tegula's settings; None also when it
        is damaged or longer than ``MAX_XMP``.
    text: PNG text chunks by keyword.
    iptc: records of the IPTC's Information Interchange Model: captions, keywords, rights.
    comment: of a JPEG or GIF file, in whatever encoding it was written.
    profile: the ICC profile that the pixels of the file are in.
    dpi: pixels per inch, horizontally and vertically.
    cicp: of a picture of high dynamic range, whose values stay as they are: primaries,
        transfer, matrix and range by the numbers of ITU-T H.273, as a PNG file has them.
    prompt: that the picture was made with, for the models that read it; a result has its own.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    text: Mapping[str, str] = field(default_factory=dict)
    iptc: bytes | None = None
    comment: bytes | None = None
    profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    cicp: bytes | None = None
    prompt: str = ""


def read_metadata(image: Image.Image) -> tuple[Metadata, tuple[str, ...]]:
    """Collect what is worth keeping from an image that Pillow has loaded.

    Returns:
        That, and sentences on what no longer holds for a result and is left out.
    """
    chunks: Mapping[str, Any] = getattr(image, "text", None) or {}
    packet = packet_of(image)
    xmp = copied(packet)
    exif, is_exif_damaged = _exif(image)
    remarks = list(xmp.stale)
    if packet and not xmp.body:
        remarks.append("XMP of the source is damaged or too long, and is left out.")
    if is_exif_damaged:
        remarks.append("EXIF of the source is damaged and is left out.")
    if xmp.turn not in ("", "1") and orientation(image) == 1:
        remarks.append("The orientation that XMP alone tells does not count, as in browsers.")
    kept = Metadata(
        exif=exif,
        xmp=xmp.packet if xmp.has_properties else None,
        text={
            key: str(value)
            for key, value in chunks.items()
            if isinstance(value, str)
            and key not in (SETTINGS_KEY, *XMP_KEYS)
            and not key.startswith("Raw profile type")
        },
        iptc=_iptc(image),
        comment=_comment(image),
        profile=image.info.get("icc_profile") or None,
        dpi=_dpi(image),
        prompt=_prompt(image, chunks),
    )
    return kept, tuple(remarks)


def _prompt(image: Image.Image, chunks: Mapping[str, Any]) -> str:
    try:
        exif = exif_of(image)
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        model = exif.get(ExifTags.Base.Model)
    except Exception:
        comment = model = None
    return prompt_in(chunks, comment, model, settings_of(image))


def exif_of(image: Image.Image) -> Image.Exif:
    """Return EXIF as the file has it.

    Pillow would add an orientation that stands in XMP alone, which viewers do not follow, and
    would decode a PNG file in search of EXIF behind its pixels.
    """
    raw = image.info.get("exif")
    if isinstance(raw, bytes) and len(raw) <= _LARGEST_EXIF:
        readable = _utf8_as_ascii(raw)
        if readable != raw:
            exif = Image.Exif()
            exif.load(readable)
            return exif
    hidden = {key: image.info.pop(key) for key in XMP_KEYS if key in image.info}
    try:
        return Image.Image.getexif(image)
    finally:
        image.info.update(hidden)


_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/"


def further_pictures(image: Image.Image, remarks: Sequence[str]) -> tuple[str, ...]:
    """Return sentences on what else a file holds, which is not enlarged.

    Args:
        image: that Pillow opened, at the frame that is enlarged.
        remarks: what was said already, which is not repeated.
    """
    try:
        count = int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged later frame raises nearly anything
        count = 1
    found = []
    auxiliary = " ".join(map(str, image.info.get("aux") or ()))
    if "hdrgainmap" in auxiliary:
        found.append(GAIN_MAP)
    if image.info.get("depth_images"):
        found.append("The depth map of the source is left out.")
    if image.format == "MPO":
        # Mostly the gain map or depth map, which a remark on XMP has named.
        if GAIN_MAP not in remarks and FURTHER not in remarks:
            found.append(
                "The source holds further pictures, such as a preview, gain map or depth "
                "map, which are left out."
            )
    elif count > 1:
        what = "page" if image.format == "TIFF" else "frame"
        found.append(further_frames(count, what, image.tell()))
    if any(
        kind == "APP1" and data.startswith(_EXTENDED_XMP)
        for kind, data in getattr(image, "applist", ())
    ):
        found.append("XMP beyond its first segment is left out.")
    return tuple(each for each in found if each not in remarks)


def further_frames(count: int, what: str, number: int = 0) -> str:
    """Return the sentence on the frames or pages of a file; there are at least 2.

    Args:
        count: how many there are.
        what: "frame" or "page".
        number: of the one that is enlarged, from 0.
    """
    which = "the first" if number == 0 else f"number {number + 1}"
    return f"The source has {count} {what}s, of which only {which} is enlarged."


_ASCII, _UTF8 = 2, 129
_LARGEST_EXIF = 2**20  # what is larger is a whole TIFF file


def _utf8_as_ascii(exif: bytes) -> bytes:
    """Return EXIF whose fields of EXIF 3.0's type for UTF-8, which Pillow skips, are ASCII.

    The bytes of the texts stay. Most programs write UTF-8 into fields of ASCII anyway.
    """
    data = bytearray(exif)
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}.get(exif[start : start + 2])
    if order is None:
        return exif
    try:
        places = list(struct.unpack_from(f"{order}I", data, start + 4))
        for place in places:
            (count,) = struct.unpack_from(f"{order}H", data, start + place)
            for at in range(start + place + 2, start + place + 2 + 12 * count, 12):
                tag, kind, _, value = struct.unpack_from(f"{order}HHII", data, at)
                if kind == _UTF8:
                    struct.pack_into(f"{order}H", data, at + 2, _ASCII)
                if tag in IFDS and len(places) <= len(IFDS):
                    places.append(value)
    except struct.error:
        pass  # what is damaged is for Pillow to judge
    return bytes(data)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8; 1 when there is none or it cannot be read."""
    try:
        value = exif_of(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # hostile EXIF raises nearly anything
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


class _Text(str):
    """Text of EXIF, which Pillow reads as Latin-1 and would write as ASCII: it keeps its bytes."""

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:  # noqa: ARG002
        return super().encode("latin-1", "replace")


def _with_bytes(value: Any) -> Any:
    if isinstance(value, str):
        return _Text(value)
    return tuple(map(_with_bytes, value)) if isinstance(value, tuple) else value


def keep_text(exif: Image.Exif) -> Image.Exif:
    """Let Pillow write the texts of an EXIF structure as the bytes that they were read from."""
    for tag, value in list(exif.items()):
        exif[tag] = _with_bytes(value)
    for ifd in IFDS:
        fields = exif.get_ifd(ifd)
        fields |= {key: _with_bytes(value) for key, value in fields.items()}
    return exif


def _exif(image: Image.Image) -> tuple[bytes | None, bool]:
    """Return what is kept of EXIF, and whether it is damaged."""
    try:
        exif = exif_of(image)
        if not len(exif) and image.info.get("exif"):
            # Pillow may have failed at it before, in search of a resolution, and keeps silent.
            Image.Exif().load(image.info["exif"])
        kept = Image.Exif()
        for tag, value in exif.items():
            if tag not in IFDS and tag not in _LEFT_OUT_TAGS and tag < _FIRST_PRIVATE_TAG:
                kept[tag] = _with_bytes(value)
        for ifd in IFDS:
            fields = {
                key: _with_bytes(value)
                for key, value in exif.get_ifd(ifd).items()
                if key not in _LEFT_OUT_FIELDS
            }
            if fields:
                kept[ifd] = fields
        return (kept.tobytes() if len(kept) else None), False
    except Exception:  # hostile EXIF raises nearly anything
        return None, True


def _comment(image: Image.Image) -> bytes | None:
    comments = [data for kind, data in getattr(image, "applist", ()) if kind == "COM"]
    comment = b"\n".join(comments) or image.info.get("comment")
    return bytes(comment) if isinstance(comment, bytes | bytearray) and comment else None


# IPTC: in JPEG and PNG files inside a block of Photoshop's resources, in TIFF files bare.

IPTC_RESOURCE = 0x0404
_RESOURCE = b"8BIM"
_IIM_MARKER = b"\x1c"


def _iptc(image: Image.Image) -> bytes | None:
    try:
        found = (image.info.get("photoshop") or {}).get(IPTC_RESOURCE)
        for kind in ("iptc", "8bim"):
            text = image.info.get(f"Raw profile type {kind}")
            if found is None and text is not None:
                found = _resource(bytes.fromhex("".join(str(text).split("\n")[3:])))
    except Exception:  # hostile blocks raise nearly anything
        return None
    return found if isinstance(found, bytes) and found.startswith(_IIM_MARKER) else None


def _resource(data: bytes) -> bytes | None:
    """Return the IPTC records of a block of Photoshop's resources, or of none."""
    at = data.find(_RESOURCE + IPTC_RESOURCE.to_bytes(2, "big"))
    if at < 0:
        return data
    at += 6
    at += data[at] + 1 + (data[at] + 1) % 2
    length = int.from_bytes(data[at : at + 4], "big")
    return data[at + 4 : at + 4 + length]


def photoshop_block(iptc: bytes) -> bytes:
    """Return IPTC records inside a block of Photoshop's resources."""
    head = _RESOURCE + IPTC_RESOURCE.to_bytes(2, "big") + b"\0\0"
    return head + len(iptc).to_bytes(4, "big") + iptc + bytes(len(iptc) % 2)


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = image.info["dpi"]
        dpi = float(x), float(y)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return dpi if all(1 <= value <= 65_535 for value in dpi) else None
