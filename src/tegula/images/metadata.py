"""What a file says about its picture: ICC profile, EXIF, XMP, JPEG tables."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import XMLGenerator, escape
from xml.sax.xmlreader import AttributesImpl

import defusedxml.sax
import numpy as np
from PIL import ExifTags, Image, ImageCms

from tegula.images.pixels import Float, to_bytes

# ICC profiles: into sRGB to work in, and back on the way out.
#
# Little CMS, as Pillow binds it, converts eight bits a channel. What a deeper picture
# holds below the eighth bit is carried across unchanged, which keeps gradients smooth.

_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_CMS_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
_BAND = 1024


def colour_space(profile: bytes) -> str | None:
    """Return "RGB", "GRAY", "CMYK" or another ICC signature; None for a broken profile."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return str(opened.profile.xcolor_space).strip()
    except _CMS_ERRORS:
        return None


def to_srgb(rgb: Float, profile: bytes) -> Float | None:
    """Convert a picture from its RGB or grey profile to sRGB.

    Args:
        rgb: float32 [height, width, 3], 0..1; changed in place when converted. For a
            grey profile the first channel counts.
        profile: the ICC profile that the values are in.

    Returns:
        The picture in sRGB 0..1; None when the profile cannot be used for it.
    """
    mode = {"RGB": "RGB", "GRAY": "L"}.get(colour_space(profile) or "")
    if mode is None:
        return None
    transform = _transform(profile, None, mode, "RGB")
    if transform is None or _changes_nothing(transform, mode):
        return None if transform is None else rgb
    for top in range(0, rgb.shape[0], _BAND):
        band = rgb[top : top + _BAND]
        eight = to_bytes(band)
        source = Image.fromarray(eight if mode == "RGB" else np.ascontiguousarray(eight[..., 0]))
        band -= eight * np.float32(1 / 255)
        band += np.asarray(transform.apply(source)) * np.float32(1 / 255)
        np.clip(band, 0, 1, out=band)
    return rgb


def from_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert an sRGB picture, mode RGB or L, to a profile; the mode stays.

    Returns:
        The picture with the values that the profile gives the same colours; None when
        the profile cannot be used for this mode.
    """
    space = colour_space(profile)
    if space == "GRAY" and image.mode == "L":
        transform = _transform(None, profile, "RGB", "L")
    elif space == "RGB":
        transform = _transform(None, profile, "RGB", "RGB")
    else:
        return None
    if transform is None:
        return None
    if space == "RGB" and _changes_nothing(transform, "RGB"):
        return image
    converted: Image.Image = transform.apply(image.convert("RGB"))
    return converted.getchannel("G") if image.mode == "L" and space == "RGB" else converted


def cmyk_to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert a CMYK picture to sRGB by its profile; None when the profile cannot be used."""
    if colour_space(profile) != "CMYK":
        return None
    transform = _transform(profile, None, "CMYK", "RGB")
    return None if transform is None else transform.apply(image)


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert a CIE L*a*b* picture to sRGB."""
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)


def _transform(
    source: bytes | None, target: bytes | None, source_mode: str, target_mode: str
) -> Any:
    try:
        return ImageCms.buildTransform(
            _opened(source), _opened(target), source_mode, target_mode, _INTENT, _FLAGS
        )
    except _CMS_ERRORS:
        return None


def _opened(profile: bytes | None) -> Any:
    if profile is None:
        return ImageCms.createProfile("sRGB")
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Whether the profile is sRGB under whatever name: a lattice of colours stays put."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    if mode == "L":
        probe = np.repeat(steps[None], 1, axis=0)
        expected = np.repeat(probe[..., None], 3, axis=2)
    else:
        probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(9, 81, 3)
        expected = probe
    moved = np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - expected
    return bool(np.abs(moved).max() <= 1)


# What a picture file says beside its pixels, and tegula's own settings among it.
#
# The settings of a result are one JSON string. PNG keeps it in a text chunk named
# ``tegula``; JPEG, WebP, AVIF and TIFF in the XMP packet, as ``tegula:settings``, beside
# whatever the source's own packet says. Both hold any Unicode text, and neither takes the
# place of a field that belongs to the photographer.

SETTINGS_KEY = "tegula"
MAX_TEXT = 65_536
MAX_XMP = 1_048_576
"""Bytes of the longest XMP packet that is read; cameras and editors write a few thousand."""

_NAMESPACE = "https://tegula.invalid/ns/1.0/"
_PREFIX = "xmlns:tegula"
_SETTINGS = "tegula:settings"
_ORIENTATION = "tiff:Orientation"
_BEGIN = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
_END = '<?xpacket end="w"?>'
_EMPTY = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF></x:xmpmeta>'
)
_NOT_IN_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")
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
    xmp: an XMP packet, UTF-8, without orientation and tegula's settings; None also when it
        is damaged or longer than ``MAX_XMP``.
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
        xmp=_kept_xmp(image),
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
    body = _copied(xmp).body
    if "</rdf:RDF>" not in body:
        body = _EMPTY
    before, end, after = body.rpartition("</rdf:RDF>")
    description = (
        f'<rdf:Description rdf:about="" {_PREFIX}="{_NAMESPACE}"><{_SETTINGS}>'
        f"{escape(to_json(settings))}</{_SETTINGS}></rdf:Description>"
    )
    return f"{_BEGIN}{before}{description}{end}{after}{_END}".encode()


def settings_of(image: Image.Image) -> dict[str, Any] | None:
    """Return the settings that an opened image carries; None when there are none."""
    text = image.info.get(SETTINGS_KEY)
    if not isinstance(text, str):
        text = _copied(_xmp(image)).settings
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def to_json(settings: Mapping[str, Any]) -> str:
    """Write settings the way every format stores them; what XML cannot hold is escaped."""
    text = json.dumps(dict(settings), ensure_ascii=False, allow_nan=False)
    return _NOT_IN_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Copy(XMLGenerator):
    """Copies an XMP packet without tegula's settings, and without the orientation.

    Prefixes are compared as they are written: all writers of XMP use the customary ones,
    and resolving them would take time that grows with the depth of the packet. Comments
    and processing instructions are left out, and so is the padding around the packet.

    settings: the text of the settings that were left out.
    holds_more: the copy has properties, and not only their frame.
    """

    def __init__(self) -> None:
        self._out = io.StringIO()
        super().__init__(self._out)
        self._left_out: list[str] = []
        self._settings: list[str] = []
        self.holds_more = False

    @property
    def body(self) -> str:
        return self._out.getvalue()

    @property
    def settings(self) -> str:
        return "".join(self._settings)

    def startDocument(self) -> None:  # noqa: N802
        """Leave the XML declaration out: a packet has none."""

    def startElement(self, name: str, attrs: AttributesImpl) -> None:  # noqa: N802
        ours = name == "rdf:Description" and {*attrs.keys()} <= {"rdf:about", _PREFIX}
        ours = ours and _PREFIX in attrs
        if self._left_out or ours or name in (_SETTINGS, _ORIENTATION):
            self._left_out.append(name)
            return
        self._settings += [attrs[_SETTINGS]] if _SETTINGS in attrs else []
        kept = {k: v for k, v in attrs.items() if k not in (_SETTINGS, _ORIENTATION)}
        super().startElement(name, AttributesImpl(kept))
        self.holds_more |= name not in ("x:xmpmeta", "rdf:RDF")

    def endElement(self, name: str) -> None:  # noqa: N802
        if self._left_out:
            self._left_out.pop()
        else:
            super().endElement(name)

    def characters(self, content: str) -> None:
        if not self._left_out:
            super().characters(content)
        elif self._left_out[-1] == _SETTINGS:
            self._settings.append(content)

    def processingInstruction(self, target: str, data: str) -> None:  # noqa: N802
        """Leave it out: the copy gets a frame of its own."""


def _copied(xmp: bytes | None) -> _Copy:
    """Read a packet; the copy of none, of a damaged one and of one too long is empty."""
    copy = _Copy()
    if xmp is None or len(xmp) > MAX_XMP:
        return copy
    try:
        defusedxml.sax.parseString(xmp.rstrip(b"\0 "), copy, forbid_dtd=True)
    except Exception:  # hostile XML raises nearly anything, and is no reason to refuse
        return _Copy()
    return copy


def _kept_xmp(image: Image.Image) -> bytes | None:
    copy = _copied(_xmp(image))
    return f"{_BEGIN}{copy.body}{_END}".encode() if copy.holds_more else None


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
        packet = packet.encode("utf-8", "replace")
    return packet if isinstance(packet, bytes) else None


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


# What JPEG compression did to a picture, and undoing a little of it.

_SHIFTS = ((0, 0), (1, 4), (2, 2), (3, 6), (4, 1), (5, 5), (6, 3), (7, 7))
_BLOCK = 8
_MARGIN = 16
# The luminance table of the JPEG standard (ITU-T T.81, table K.1), row by row.
# fmt: off
_LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
])
# fmt: on


def estimate_quality(tables: Mapping[int, Sequence[int]] | None) -> int | None:
    """Return the quality, 1..100, whose standard luminance table is nearest to the file's.

    Exact for files of the Independent JPEG Group's library and its kin; for cameras and
    editors with tables of their own it is the nearest in coarseness.
    """
    table = np.asarray((tables or {}).get(0, ()))
    if table.shape != _LUMINANCE.shape:
        return None
    qualities = np.arange(1, 101)
    percent = np.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    candidates = np.clip((_LUMINANCE * percent[:, None] + 50) // 100, 1, 255)
    distance = np.abs(np.log(candidates) - np.log(np.maximum(table, 1))).sum(axis=1)
    return int(qualities[distance.argmin()])


def soften_blocks(rgb: Float, quality: int) -> Float:
    """Reduce blocks and ringing by compressing shifted copies again and averaging.

    Re-application of JPEG (A. Nosratinia, "Enhancement of JPEG-compressed images by
    re-application of JPEG", 2001): each shifted copy has its block borders elsewhere, so
    that the mean keeps what all agree on. Half of the source is mixed in, which measured
    better than the mean alone at every quality.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        quality: 1..100, as estimated from the file.

    Returns:
        float32 of the same shape, 0..1.
    """
    height, width = rgb.shape[:2]
    border = ((_BLOCK, _MARGIN), (_BLOCK, _MARGIN), (0, 0))
    padded = np.pad(to_bytes(rgb), border, "symmetric")
    mean = np.zeros_like(rgb)
    for down, right in _SHIFTS:
        shifted = padded[_BLOCK - down :, _BLOCK - right :]
        again = _compressed(shifted[: height + _BLOCK, : width + _BLOCK], quality)
        mean += again[down : down + height, right : right + width]
    mean *= np.float32(0.5 / (255 * len(_SHIFTS)))
    mean += 0.5 * rgb
    return mean


def _compressed(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], quality: int) -> Float:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"), np.float32)
