"""Colour: what numbers mean that are not sRGB, in floats and without clipping.

Profiles of a matrix and three curves, which nearly all pictures have, and of one grey curve
are computed as the ICC's specification (ICC.1:2022) says. So are the tables of scanners and
printers: ``lut8Type``, ``lut16Type``, ``lutAToBType`` and ``lutBToAType``. Colours that sRGB
cannot hold come out beyond 0..1 and find back from there. The intent is relative colorimetric,
without black point compensation: what counts is that the way back undoes the way in. Only CMYK
and L*a*b* of eight bits, which stay sRGB, go through Little CMS.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image, ImageCms

from tegula.images.curves import Curve, Floats, ParametricCurve, SampledCurve
from tegula.images.pixels import Float, bands

Stage: TypeAlias = "Callable[[Floats], Floats]"

# The white of ICC's connection space, and the columns of sRGB's primaries adapted to it
# (IEC 61966-2-1, by Bradford's matrix).
D50 = np.array([0.9642, 1.0, 0.8249])
_SRGB_TO_D50 = np.array(
    [
        [0.43606567, 0.38514709, 0.14306641],
        [0.22248840, 0.71687317, 0.06060791],
        [0.01391602, 0.09707642, 0.71409607],
    ]
)
_D50_TO_SRGB = np.linalg.inv(_SRGB_TO_D50)

_NEARLY_SRGB = 1.5 / 255
"""A profile that moves no colour by more than this is sRGB under another name."""

_LATTICE = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 3), axis=-1)

_CARRIED_FROM = 2e-4
"""What is nearer to sRGB than this is rounding, and not a colour beyond it."""


class ColourSpace(Protocol):
    """What the numbers of a picture mean. All arrays are [..., 3]; grey is three equal channels."""

    def to_srgb(self, values: Floats) -> Floats:
        """Return sRGB of values in 0..1; it leaves 0..1 where sRGB cannot hold the colour."""

    def from_srgb(self, srgb: Floats) -> Floats:
        """Return the values of sRGB colours, which may lie beyond 0..1."""


def colour_space(profile: bytes, *, greyscale: bool) -> ColourSpace | None:
    """Return what an ICC profile says of RGB, or of grey; None when it is of no use for that.

    Args:
        profile: the file of the profile.
        greyscale: the picture is grey; profiles of RGB serve it too.
    """
    try:
        with np.errstate(all="ignore"):
            space = _parsed(profile, greyscale=greyscale)
            if space is None:
                return None
            probe = space.to_srgb(_LATTICE)
            if leads_back(space):
                probe = space.from_srgb(probe)
            return space if np.isfinite(probe).all() else None
    except Exception:  # a hostile profile raises nearly anything
        return None


def leads_back(space: ColourSpace) -> bool:
    """Whether ``from_srgb`` works; the profiles of some scanners lead one way only."""
    return not isinstance(space, TableSpace) or bool(space.back)


def is_nearly_srgb(space: ColourSpace) -> bool:
    """Whether the space is sRGB under whatever name: a lattice of colours stays put."""
    lattice = _LATTICE
    if isinstance(space, GreySpace):
        lattice = np.repeat(_LATTICE[..., :1], 3, axis=-1)
    return bool(np.abs(space.to_srgb(lattice) - lattice).max() <= _NEARLY_SRGB)


def into_srgb(rgb: Float, space: ColourSpace) -> Float | None:
    """Convert a picture to sRGB, in place.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        space: what its numbers mean.

    Returns:
        What has to be added for the colours that sRGB cannot hold, float32 [height, width, 3];
        None when it holds them all.
    """
    beyond: Float | None = None
    for rows in bands(rgb.shape[0]):
        wide = space.to_srgb(rgb[rows]).astype(np.float32)
        np.clip(wide, 0, 1, out=rgb[rows])
        wide -= rgb[rows]
        if np.abs(wide).max(initial=0) > _CARRIED_FROM:
            if beyond is None:
                beyond = np.zeros_like(rgb)
            beyond[rows] = wide
    return beyond


@dataclass(frozen=True, eq=False)
class MatrixSpace:
    """RGB by three curves and a matrix of primaries.

    curves: from values to linear light.
    matrix: [3, 3], from linear light to CIE XYZ relative to D50; the columns are the primaries.
    """

    curves: Sequence[Curve]
    matrix: Floats

    @cached_property
    def _to_linear_srgb(self) -> Floats:
        return (_D50_TO_SRGB @ self.matrix).astype(np.float32)

    def to_srgb(self, values: Floats) -> Floats:
        """As ``ColourSpace`` has it."""
        linear = np.stack([c(values[..., i]) for i, c in enumerate(self.curves)], axis=-1)
        return srgb_encoded(linear @ self._to_linear_srgb.T)

    def from_srgb(self, srgb: Floats) -> Floats:
        """As ``ColourSpace`` has it."""
        linear = srgb_decoded(srgb) @ np.linalg.inv(self._to_linear_srgb).T
        return np.stack([c.inverse(linear[..., i]) for i, c in enumerate(self.curves)], axis=-1)


@dataclass(frozen=True, eq=False)
class GreySpace:
    """Grey by one curve.

    curve: from values to luminance, or to lightness.
    in_lightness: what the curve gives is CIE L* in 0..1.
    """

    curve: Curve
    in_lightness: bool = False

    def to_srgb(self, values: Floats) -> Floats:
        """As ``ColourSpace`` has it."""
        light = self.curve(values[..., 0])
        if self.in_lightness:
            light = _f_inverse((light * 100 + 16) / 116)
        return np.repeat(srgb_encoded(light)[..., None], 3, axis=-1)

    def from_srgb(self, srgb: Floats) -> Floats:
        """As ``ColourSpace`` has it."""
        light = srgb_decoded(srgb) @ _SRGB_TO_D50[1].astype(np.float32)
        if self.in_lightness:
            light = (_f(light) * 116 - 16) / 100
        return np.repeat(self.curve.inverse(light)[..., None], 3, axis=-1)


@dataclass(frozen=True, eq=False)
class TableSpace:
    """RGB by tables in either direction.

    forward, back: stages from values to CIE L*a*b* and from there to values; none of the latter
        where nothing leads back.
    """

    forward: Sequence[Stage]
    back: Sequence[Stage]

    def to_srgb(self, values: Floats) -> Floats:
        """As ``ColourSpace`` has it."""
        lab = reduce(lambda now, stage: stage(now), self.forward, values)
        return srgb_encoded(_xyz_of_lab(lab) @ _D50_TO_SRGB.T)

    def from_srgb(self, srgb: Floats) -> Floats:
        """As ``ColourSpace`` has it."""
        lab = _lab_of_xyz(srgb_decoded(srgb) @ _SRGB_TO_D50.T)
        return reduce(lambda now, stage: stage(now), self.back, lab)


# sRGB and CIE L*a*b*.


def srgb_encoded(linear: Floats) -> Floats:
    """Apply sRGB's curve, mirrored below zero and continued above one."""
    size = np.abs(linear)
    curved = 1.055 * np.power(size, 1 / 2.4) - 0.055
    return np.asarray(np.copysign(np.where(size <= 0.0031308, size * 12.92, curved), linear))


def srgb_decoded(values: Floats) -> Floats:
    """Undo ``srgb_encoded``."""
    size = np.abs(values)
    curved = np.power((size + 0.055) / 1.055, 2.4)
    return np.asarray(np.copysign(np.where(size <= 0.04045, size / 12.92, curved), values))


def srgb_of_lab(lab: Float) -> Float:
    """Convert CIE L*a*b* (D50, L* in 0..100) to sRGB; what sRGB cannot hold leaves 0..1.

    Args:
        lab: float32 [height, width, 3].
    """
    out = np.empty_like(lab)
    for rows in bands(lab.shape[0]):
        out[rows] = srgb_encoded(_xyz_of_lab(lab[rows]) @ _D50_TO_SRGB.T)
    return out


def _xyz_of_lab(lab: Floats) -> Floats:
    """Convert CIE L*a*b* to XYZ (CIE 15), both relative to D50."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    return np.asarray(_f_inverse(f) * D50)


def _lab_of_xyz(xyz: Floats) -> Floats:
    x, y, z = np.moveaxis(_f(xyz / D50), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _f(light: Floats) -> Floats:
    """The function of light that L*a*b* is made of."""
    line = light * (841 / 108) + 4 / 29
    return np.asarray(np.where(light > (6 / 29) ** 3, np.cbrt(light), line))


def _f_inverse(f: Floats) -> Floats:
    return np.asarray(np.where(f > 6 / 29, f**3, (f - 4 / 29) * (108 / 841)))


# Reading profiles.

_IDENTITY = ParametricCurve(1.0)
_TAG_TABLE, _TAG_ENTRY = 128, struct.Struct(">4sII")
_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")
_PARAMETERS = ("g", "gab", "gabc", "gabcd", "gabcdef")
_XYZ_RANGE = 1 + 32767 / 32768


def _parsed(profile: bytes, *, greyscale: bool) -> ColourSpace | None:
    space, connection = profile[16:20], profile[20:24]
    if profile[36:40] != b"acsp" or profile[12:16] not in _CLASSES:
        return None
    (count,) = struct.unpack_from(">I", profile, _TAG_TABLE)
    entries = [_TAG_ENTRY.unpack_from(profile, _TAG_TABLE + 4 + 12 * i) for i in range(count)]
    tags = {name: profile[start : start + length] for name, start, length in entries}
    if space == b"GRAY" and greyscale:
        return GreySpace(_curve(tags[b"kTRC"])[0], connection == b"Lab ")
    if space != b"RGB ":
        return None
    forward, back = (
        next((tags[name] for name in names if name in tags), None)
        for names in ((b"A2B1", b"A2B0"), (b"B2A1", b"B2A0"))
    )
    if forward is not None and (back is not None or b"rXYZ" not in tags):
        return TableSpace(
            _stages(forward, connection, to_connection=True),
            [] if back is None else _stages(back, connection, to_connection=False),
        )
    return MatrixSpace(
        [_curve(tags[name])[0] for name in (b"rTRC", b"gTRC", b"bTRC")],
        np.stack([_fixed(tags[name], 8, 3) for name in (b"rXYZ", b"gXYZ", b"bXYZ")], axis=1),
    )


def _fixed(data: bytes, start: int, count: int) -> Floats:
    """Return numbers of sixteen bits before the point and sixteen after."""
    return np.frombuffer(data, ">i4", count, start) / 65536


def _curve(data: bytes, start: int = 0) -> tuple[Curve, int]:
    """Return a curve and where its bytes end."""
    kind = data[start : start + 4]
    if kind == b"para":
        (function,) = struct.unpack_from(">H", data, start + 8)
        names = _PARAMETERS[function]
        values = dict(zip(names, map(float, _fixed(data, start + 12, len(names))), strict=True))
        if function in (1, 2):  # flat below the foot of the power
            flat = values.pop("c", 0.0)
            values |= {"d": -values["b"] / values["a"], "e": flat, "f": flat}
        return ParametricCurve(**values), start + 12 + 4 * len(names)
    if kind != b"curv":
        raise ValueError(kind)
    (count,) = struct.unpack_from(">I", data, start + 8)
    samples = np.frombuffer(data, ">u2", count, start + 12)
    end = start + 12 + 2 * count
    if count == 0:
        return _IDENTITY, end
    if count == 1:
        return ParametricCurve(int(samples[0]) / 256), end
    return SampledCurve(samples / 65535), end


def _curves(data: bytes, start: int, count: int) -> Stage:
    curves = []
    for _ in range(count):
        curve, end = _curve(data, start)
        curves.append(curve)
        start = -(-end // 4) * 4
    return partial(_each, curves)


def _each(curves: Sequence[Curve], values: Floats) -> Floats:
    return np.stack([c(np.clip(values[..., i], 0, 1)) for i, c in enumerate(curves)], axis=-1)


def _stages(data: bytes, connection: bytes, *, to_connection: bool) -> list[Stage]:
    """Return the stages of a table, to or from L*a*b*."""
    kind, (inputs, outputs) = data[:4], data[8:10]
    if kind in (b"mft1", b"mft2"):
        stages = _old_table(data, inputs, outputs, has_matrix=not to_connection)
    elif kind == (b"mAB " if to_connection else b"mBA "):
        stages = _new_table(data, inputs, outputs, to_connection=to_connection)
    else:
        raise ValueError(kind)
    if connection == b"XYZ ":
        if to_connection:
            return [*stages, lambda v: _lab_of_xyz(v * _XYZ_RANGE)]
        return [lambda lab: _xyz_of_lab(lab) / _XYZ_RANGE, *stages]
    # The table of sixteen bits keeps the encoding of version 2, where 0xFF00 is L* = 100.
    top = 65535 / 65280 if kind == b"mft2" else 1.0
    scale, shift = np.array([100, 255, 255]) * top, np.array([0, 128, 128])
    if to_connection:
        return [*stages, lambda v: v * scale - shift]
    return [lambda lab: (lab + shift) / scale, *stages]


def _old_table(data: bytes, inputs: int, outputs: int, *, has_matrix: bool) -> list[Stage]:
    """Return the stages of ``lut8Type`` and ``lut16Type``: matrix, curves, lattice, curves."""
    grid, start = data[10], 48
    kind: np.dtype[Any] = np.dtype("u1")
    before = after = 256
    if data[:4] == b"mft2":
        before, after = struct.unpack_from(">2H", data, 48)
        kind, start = np.dtype(">u2"), 52
    lengths = [inputs * before, grid**inputs * outputs, outputs * after]
    numbers = np.frombuffer(data, kind, sum(lengths), start) / (256.0**kind.itemsize - 1)
    first, lattice, last = np.split(numbers, np.cumsum(lengths)[:2])
    matrix = _fixed(data, 12, 9).reshape(3, 3)
    is_used = has_matrix and inputs == 3 and not np.array_equal(matrix, np.eye(3))
    return [
        *([lambda values: values @ matrix.T] if is_used else []),
        partial(_each, [SampledCurve(samples) for samples in first.reshape(inputs, before)]),
        partial(_interpolated, lattice.reshape(*[grid] * inputs, outputs)),
        partial(_each, [SampledCurve(samples) for samples in last.reshape(outputs, after)]),
    ]


def _new_table(data: bytes, inputs: int, outputs: int, *, to_connection: bool) -> list[Stage]:
    """Return the stages of ``lutAToBType`` and ``lutBToAType``, of which any may be missing."""
    b_start, matrix_start, m_start, lattice_start, a_start = struct.unpack_from(">5I", data, 12)
    colours = outputs if to_connection else inputs  # on the side of the connection space
    devices = inputs if to_connection else outputs
    stages: list[Stage] = []
    if a_start:
        stages.append(_curves(data, a_start, devices))
    if lattice_start:
        sizes = tuple(data[lattice_start : lattice_start + inputs])
        kind: np.dtype[Any] = np.dtype({1: "u1", 2: ">u2"}[data[lattice_start + 16]])
        count = int(np.prod(sizes)) * outputs
        numbers = np.frombuffer(data, kind, count, lattice_start + 20)
        lattice = numbers.reshape(*sizes, outputs) / (256.0**kind.itemsize - 1)
        stages.append(partial(_interpolated, lattice))
    if m_start:
        stages.append(_curves(data, m_start, colours))
    if matrix_start:
        matrix, offset = np.split(_fixed(data, matrix_start, 12), [9])
        stages.append(lambda values: values @ matrix.reshape(3, 3).T + offset)
    stages.append(_curves(data, b_start, colours))
    return stages if to_connection else stages[::-1]


def _interpolated(lattice: Floats, values: Floats) -> Floats:
    """Look values in 0..1 up in a lattice [n, n, ..., outputs].

    The corners that count are those on the way from the lowest of a cell to the highest, along
    the axis with the largest share first. In three dimensions this is tetrahedral
    interpolation, as Little CMS has it; neutral colours stay neutral.
    """
    top = np.array(lattice.shape[:-1]) - 1
    place = np.clip(values, 0, 1) * top
    corner = np.clip(np.floor(place).astype(np.intp), 0, np.maximum(top - 1, 0))
    share = place - corner
    order = np.argsort(-share, axis=-1)
    falling = np.take_along_axis(share, order, axis=-1)
    weights = -np.diff(falling, axis=-1, prepend=1, append=0)
    out = weights[..., :1] * lattice[tuple(np.moveaxis(corner, -1, 0))]
    for step in range(len(top)):
        axis = order[..., step : step + 1]
        along = np.take_along_axis(corner, axis, axis=-1) + 1
        np.put_along_axis(corner, axis, np.minimum(along, top[axis]), axis=-1)
        at = tuple(np.moveaxis(corner, -1, 0))
        out += weights[..., step + 1 : step + 2] * lattice[at]
    return np.asarray(out)


# CMYK and L*a*b* of eight bits, by Little CMS as Pillow binds it; they stay sRGB.

_CMS_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def cmyk_to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert a CMYK picture to sRGB by its profile; None when the profile cannot be used."""
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if str(opened.profile.xcolor_space).strip() != "CMYK":
            return None
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(opened, srgb, "CMYK", "RGB", intent, flags).apply(image)
    except _CMS_ERRORS:
        return None


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert a CIE L*a*b* picture to sRGB."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
