"""XMP packets: what of a source's own holds for its result, and the settings of that within it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import XMLGenerator, escape
from xml.sax.xmlreader import AttributesImpl

import defusedxml.sax
from PIL import Image

SETTINGS_KEY = "tegula"

MAX_XMP = 1_048_576
"""Bytes of the longest XMP packet that is read; cameras and editors write a few thousand."""

XMP_KEYS = ("xmp", "XML:com.adobe.xmp")
"""Under which Pillow has the packet of a file."""


# The settings of a result, in its file.
#
# They are one JSON string. PNG keeps it in a text chunk named ``tegula``; JPEG, WebP, AVIF
# and TIFF in the XMP packet, as ``tegula:settings``, beside whatever the source's own packet
# says. Both hold any Unicode text, and neither takes the place of a field that belongs to the
# photographer.

_NAMESPACE = "https://tegula.invalid/ns/1.0/"
_PREFIX = "xmlns:tegula"
_SETTINGS = "tegula:settings"
_ORIENTATION = "tiff:Orientation"
_FRAME = ("x:xmpmeta", "rdf:RDF")
_BEGIN = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
_END = '<?xpacket end="w"?>'
_EMPTY = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF></x:xmpmeta>'
)
GAIN_MAP = (
    "The gain map of the source, which brightens it on HDR screens, is left out, and its marks "
    "in XMP with it."
)
FURTHER = (
    "XMP describes further pictures, a video or sound in the file, which are left out, and what "
    "it says of them too."
)
# What XMP says of things that a result does not have.
_STALE = (
    (
        re.compile("hdrgm:|HDRGainMap:"),
        GAIN_MAP,
    ),
    (
        re.compile("GPano:.*Pixels$"),
        "Sizes of the panorama in XMP no longer hold and are left out.",
    ),
    (
        re.compile(
            "G?Container:|GImage:|GDepth:|GAudio:|(GCamera|Camera):(MicroVideo|MotionPhoto)"
        ),
        FURTHER,
    ),
)
_NOT_IN_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")


def to_json(settings: Mapping[str, Any]) -> str:
    """Write settings the way every format stores them; what XML cannot hold is escaped."""
    text = json.dumps(dict(settings), ensure_ascii=False, allow_nan=False)
    return _NOT_IN_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def settings_of(image: Image.Image) -> dict[str, Any] | None:
    """Return the settings that an opened image carries; None when there are none."""
    text = image.info.get(SETTINGS_KEY)
    if not isinstance(text, str):
        text = copied(packet_of(image)).settings
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def add_settings(xmp: bytes | None, settings: Mapping[str, Any]) -> bytes:
    """Return the packet with the settings in it; an unreadable packet is replaced."""
    body = copied(xmp).body
    if "</rdf:RDF>" not in body:
        body = _EMPTY
    before, end, after = body.rpartition("</rdf:RDF>")
    description = (
        f'<rdf:Description rdf:about="" {_PREFIX}="{_NAMESPACE}"><{_SETTINGS}>'
        f"{escape(to_json(settings))}</{_SETTINGS}></rdf:Description>"
    )
    return f"{_BEGIN}{before}{description}{end}{after}{_END}".encode()


def packet_of(image: Image.Image) -> bytes | None:
    """Return the XMP packet of an opened image."""
    packet = next((image.info[key] for key in XMP_KEYS if image.info.get(key)), None)
    if isinstance(packet, str):
        packet = packet.encode("utf-8", "replace")
    return packet if isinstance(packet, bytes) else None


def copied(xmp: bytes | None) -> XmpCopy:
    """Copy a packet; the copy of none, of a damaged one and of one too long is empty."""
    copy = XmpCopy()
    if xmp is None or len(xmp) > MAX_XMP:
        return copy
    try:
        defusedxml.sax.parseString(xmp.rstrip(b"\0 "), copy, forbid_dtd=True)
    except Exception:  # hostile XML raises nearly anything
        return XmpCopy()
    return copy


class XmpCopy(XMLGenerator):
    """Copies an XMP packet without orientation, tegula's settings and what no longer holds.

    The packet streams through, so that the time grows with its length alone, however deep
    it is. Prefixes are compared as they are written: all writers of XMP use the customary
    ones. Comments, processing instructions and the padding around the packet are left out.

    has_properties: there is more in the copy than ``_FRAME``.
    stale: sentences on what was left out because it does not hold for a result.
    turn: the orientation that was left out.
    """

    def __init__(self) -> None:
        self._out = io.StringIO()
        super().__init__(self._out)
        self._left_out: list[str] = []
        self._settings: list[str] = []
        self.has_properties = False
        self.turn = ""
        self.stale: dict[str, None] = {}

    @property
    def body(self) -> str:
        """The copy, without a frame of processing instructions."""
        return self._out.getvalue()

    @property
    def packet(self) -> bytes:
        """The copy within its frame, as a file holds it."""
        return f"{_BEGIN}{self.body}{_END}".encode()

    @property
    def settings(self) -> str:
        """The text of the settings that were left out."""
        return "".join(self._settings)

    def startDocument(self) -> None:  # noqa: N802
        """Write nothing: a packet has no XML declaration."""

    def startElement(self, name: str, attrs: AttributesImpl) -> None:  # noqa: N802
        """Write an element with the attributes that hold, or leave out all that is in it."""
        # A description of our own holds nothing else. In one that another program merged
        # with its own, the settings may have become an attribute.
        attributes = dict(attrs.items())
        ours = name == "rdf:Description" and _PREFIX in attributes
        ours = ours and attributes.keys() <= {"rdf:about", _PREFIX}
        if self._left_out or ours or name in (_SETTINGS, _ORIENTATION) or self._is_stale(name):
            self._left_out.append(name)
            return
        self._settings.append(attributes.pop(_SETTINGS, ""))
        self.turn += attributes.pop(_ORIENTATION, "")
        attributes = {key: text for key, text in attributes.items() if not self._is_stale(key)}
        super().startElement(name, AttributesImpl(attributes))
        self.has_properties |= name not in _FRAME

    def _is_stale(self, name: str) -> bool:
        found = next((said for pattern, said in _STALE if pattern.match(name)), None)
        if found is not None:
            self.stale[found] = None
        return found is not None

    def endElement(self, name: str) -> None:  # noqa: N802
        """Write the end of an element, unless it was left out."""
        if self._left_out:
            self._left_out.pop()
        else:
            super().endElement(name)

    def characters(self, content: str) -> None:
        """Write text, or keep that of the settings and the orientation."""
        if not self._left_out:
            super().characters(content)
        elif self._left_out[-1] == _SETTINGS:
            self._settings.append(content)
        elif self._left_out[-1] == _ORIENTATION:
            self.turn += content.strip()

    def processingInstruction(self, target: str, data: str) -> None:  # noqa: N802
        """Write nothing: the copy gets a frame of its own."""
