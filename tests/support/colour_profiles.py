"""Small ICC profiles, written byte by byte, for tests that need a colour space."""

from __future__ import annotations

import struct
from collections.abc import Mapping

WHITE = (0.9642, 1.0, 0.8249)


def wide_rgb() -> bytes:
    """A matrix profile with the primaries of Adobe RGB and a gamma of 2.2."""
    return _profile(
        b"RGB ",
        b"XYZ ",
        {
            b"wtpt": _xyz(*WHITE),
            b"rXYZ": _xyz(0.60974, 0.31111, 0.01947),
            b"gXYZ": _xyz(0.20528, 0.62567, 0.06087),
            b"bXYZ": _xyz(0.14919, 0.06322, 0.74457),
            b"rTRC": _gamma(2.2),
            b"gTRC": _gamma(2.2),
            b"bTRC": _gamma(2.2),
        },
    )


def grey(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"wtpt": _xyz(*WHITE), b"kTRC": _gamma(gamma)})


def cmyk() -> bytes:
    """A print profile in which every ink only darkens: no ink white, any full ink black."""
    entries = bytes([255, 128, 128]) + bytes([0, 128, 128]) * 15
    identity = struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    ramps = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramps * 4 + entries + ramps * 3
    return _profile(b"CMYK", b"Lab ", {b"wtpt": _xyz(*WHITE), b"A2B0": table}, b"prtr")


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))


def _gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def _profile(
    space: bytes, connection: bytes, tags: Mapping[bytes, bytes], kind: bytes = b"mntr"
) -> bytes:
    name = b"test\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + b"none\0", **tags}
    directory, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        directory += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I", start + len(body)) + bytes(4) + bytes([2, 0x40, 0, 0])
    header += kind + space + connection + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(round(v * 65536) for v in WHITE)) + bytes(48)
    return header + directory + body
