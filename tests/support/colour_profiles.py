"""Small ICC profiles, written byte by byte, for tests that need a colour space."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

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


def p3() -> bytes:
    """Display P3: a matrix profile with sRGB's curve, as a parametric one."""
    curve = parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return matrix_rgb(
        ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
        [curve] * 3,
    )


def matrix_rgb(primaries: Sequence[Sequence[float]], curves: Sequence[bytes]) -> bytes:
    """A matrix profile of CIE XYZ of its primaries, relative to D50, and tags of curves."""
    tags = {
        name: _xyz(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    tags |= dict(zip((b"rTRC", b"gTRC", b"bTRC"), curves, strict=True))
    return _profile(b"RGB ", b"XYZ ", {b"wtpt": _xyz(*WHITE), **tags})


def parametric(function: int, *values: float) -> bytes:
    """A tag of one of the five kinds of parametric curves."""
    numbers = struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))
    return b"para" + bytes(4) + struct.pack(">HH", function, 0) + numbers


def sampled(values: Sequence[float]) -> bytes:
    """A tag of a curve by samples in 0..1."""
    numbers = [round(v * 65535) for v in values]
    return b"curv" + bytes(4) + struct.pack(f">I{len(numbers)}H", len(numbers), *numbers)


def table_rgb(kind: str, *, back: bool = True) -> bytes:
    """A profile of tables that lead from RGB to L*a*b* and back along straight lines.

    L* is red, a* green and b* blue, in the encoding of the kind, so that a lattice of two
    points a side, in which red turns halfway into green on one side, says all.

    Args:
        kind: "mft1", "mft2", or "mAB " for that and "mBA ".
        back: with the tables that lead back.
    """
    corners = [(r, g, b) for r in (0, 1) for g in (0, 1) for b in (0, 1)]
    skewed = [(r, (g + r * b) / 2, b) for r, g, b in corners]
    tables = {}
    for tag, outputs in ((b"A2B0", skewed), (b"B2A0", corners)):
        values = [v for output in outputs for v in output]
        if kind == "mAB ":
            name = b"mAB " if tag == b"A2B0" else b"mBA "
            curves = [parametric(0, g) for g in (1.0, 2.0, 1.0)]
            straight = [parametric(0, 1.0)] * 3
            lattice = bytes([2, 2, 2]) + bytes(13) + bytes([2, 0, 0, 0])
            lattice += struct.pack(">24H", *(round(v * 65535) for v in values))
            b_curves, a_curves = b"".join(straight), b"".join(curves)
            starts = (32, 0, 0, 32 + len(b_curves), 32 + len(b_curves) + len(lattice))
            head = name + bytes(4) + bytes([3, 3, 0, 0]) + struct.pack(">5I", *starts)
            tables[tag] = head + b_curves + lattice + a_curves
            continue
        identity = struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
        head = kind.encode() + bytes(4) + bytes([3, 3, 2, 0]) + identity
        if kind == "mft1":
            ramps = bytes(range(256)) * 3
            tables[tag] = head + ramps + bytes(round(v * 255) for v in values) + ramps
        else:
            bent = struct.pack(">9H", 0, 32768, 65535, 0, 16384, 65535, 0, 32768, 65535)
            ramps = struct.pack(">6H", *(0, 65535) * 3)
            numbers = struct.pack(">24H", *(round(v * 65535) for v in values))
            tables[tag] = head + struct.pack(">2H", 3, 2) + bent + numbers + ramps
    if not back:
        del tables[b"B2A0"]
    return _profile(b"RGB ", b"Lab ", {b"wtpt": _xyz(*WHITE), **tables}, b"prtr")


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
