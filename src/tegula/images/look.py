"""What the pixels of a picture show of it, before anything is done to it.

Damage is measured on at most ``_SEEN`` pixels, and what is drawn on levels of eight bits, so
that a look takes a few tenths of a second whatever the size of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from tegula.images.compression import shows_blocks, trace_jpeg
from tegula.images.pixels import LUMA, Float, bands
from tegula.images.sharpness import measure_blur, measure_softness

_SEEN = 1_500_000
"""Pixels: enough for every measure here, and few enough for all of them in a moment."""

_BLOCK = 8


@dataclass(frozen=True)
class Damage:
    """What compression and sensors left in a picture.

    jpeg_quality: 1..100 on the scale of the Independent JPEG Group's library, by the tables of a
        JPEG file or, where the pixels show a coarser compression before, by those; None
        where there is no trace of JPEG.
    noise: standard deviation a channel, in levels of 255.
    """

    jpeg_quality: int | None
    noise: float


Kind = Literal["photograph", "drawing", "mixed"]
"""A drawing is anything with flat areas and hard edges: text, a screenshot, line art, a chart."""


@dataclass(frozen=True)
class Look:
    """What was found in a picture.

    damage: of the whole.
    kind: what it is for the most part.
    drawn: float32 [rows, columns] in 0..1, how much each cell of the whole picture looks drawn.
    crisp: 0..1, how sure it is that what is drawn was never compressed, scanned or resampled.
    blur: octaves of detail that are missing: 1 is as soft as a picture that was enlarged twice.
    softness: pixels of blur that a lens or resampling left, as ``measure_softness`` has it; None
        where that cannot be told or undone, or where it shows borders of blocks of a compression
        of which nothing is known.
        Noise passes for finest detail, so it says nothing of noisy pictures.
    is_grey: no pixel has colour.
    flat: share of the picture in which nothing but grain or a slow gradient is.
    on_white: share of the picture that is pure white, where white surrounds the rest.
    """

    damage: Damage
    kind: Kind
    drawn: Float
    crisp: float = 0.0
    blur: float = 0.0
    softness: float | None = None
    is_grey: bool = False
    flat: float = 0.0
    on_white: float = 0.0

    @property
    def is_all_drawn(self) -> bool:
        """Whether no part is photographed; a single cell says too little to be one."""
        others = int(np.count_nonzero(self.drawn < _MOSTLY))
        return self.kind == "drawing" and others <= max(1, _FEW_OTHERS * self.drawn.size)


_ENLARGED = 0.3
"""Octaves from which a picture counts as enlarged: kinks between its old pixels pass for finest
detail. Of photographs with a blur of up to 0.6 px nine in ten lack less."""


def look_at(rgb: Float, file_quality: int | None = None) -> Look:
    """Look at a picture.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        file_quality: as ``find_damage`` takes it.
    """
    damage = find_damage(rgb, file_quality)
    kind, drawn, crisp, flat = _find_drawn(rgb, damage)
    luma = _middle(rgb) @ LUMA * np.float32(255)
    blur, softness = measure_blur(luma), None
    is_known = damage.jpeg_quality is not None or not shows_blocks(luma)
    if kind == "photograph" and blur < _ENLARGED and is_known:
        softness = measure_softness(luma)
    grey, white = is_grey(rgb), share_of_white(rgb)
    return Look(damage, kind, drawn, crisp, blur, softness, grey, flat, white)


_GREY = np.float32(1.5 / 255)
"""Difference of channels that rounding leaves."""
_WHITE = np.float32(253.5 / 255)
_NOT_WHITE = 0.1
"""Share of the edge up to which other things may touch it."""


def is_grey(rgb: Float) -> bool:
    """Tell whether no pixel of a picture, float32 [height, width, 3] in 0..1, has colour."""
    return all(
        np.abs(rgb[rows, :, channel] - rgb[rows, :, 1]).max(initial=0) <= _GREY
        for rows in bands(rgb.shape[0])
        for channel in (0, 2)
    )


def share_of_white(rgb: Float) -> float:
    """Return how much of a picture is white, if nearly all of its edge is; else 0.

    Args:
        rgb: float32 [height, width, 3], 0..1.
    """
    edge = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    if (edge.min(axis=1) < _WHITE).mean() > _NOT_WHITE:
        return 0.0
    height, width = rgb.shape[:2]
    # One pixel in each square of so many counts for all of them.
    step = max(1, round((height * width / _SEEN) ** 0.5))
    return float((rgb[::step, ::step].min(axis=2) >= _WHITE).mean())


def find_damage(rgb: Float, file_quality: int | None = None) -> Damage:
    """Measure the damage of a picture.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        file_quality: what the quantisation tables of its file say; None unless JPEG.
    """
    levels = _middle(rgb) * np.float32(255)
    traced = trace_jpeg(levels @ LUMA)
    found = [quality for quality in (file_quality, traced) if quality is not None]
    return Damage(min(found, default=None), measure_noise(levels))


def _middle(rgb: Float) -> Float:
    """Return the middle of a picture, cut where blocks of JPEG have their corners."""
    height, width = rgb.shape[:2]
    share = min(1.0, (_SEEN / (height * width)) ** 0.5)
    rows, columns = (max(1, round(side * share)) for side in (height, width))
    top, left = ((whole - part) // 2 for whole, part in ((height, rows), (width, columns)))
    top, left = top - top % _BLOCK, left - left % _BLOCK
    return rgb[top : top + rows, left : left + columns]


# Noise.

_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6
"""The difference of two Laplacians, which sees no plane and no edge along an axis; of white
noise it keeps the deviation (J. Immerkaer, "Fast noise variance estimation", 1996)."""

_CALM = 0.1
"""Share of the blocks, the calmest, that noise is measured in: texture is noise to the kernel."""
_BLACK = 16
"""Levels from black and from white within which noise is cut off."""
_FEWEST_BLOCKS = 16
_CALMEST_OF_NOISE = 0.8
"""The deviation in the calmest blocks over the true one, measured with seeded noise."""


def measure_noise(levels: Float) -> float:
    """Return the standard deviation of the noise of a channel, in the unit of the picture.

    Blocks that are one colour throughout say nothing, as do those that are cut off at black
    or white.

    Args:
        levels: float32 [height, width, channels], 0..255.
    """
    if min(levels.shape[:2]) < 4 * _BLOCK:
        return 0.0
    fine = _calm_energy(levels)
    half = levels.shape[1] // 2, levels.shape[0] // 2
    coarse = _calm_energy(cv2.resize(levels, half, interpolation=cv2.INTER_AREA))
    # At half size a quarter of the energy of noise is left, and about all that of texture.
    return float(np.sqrt(max(0.0, fine - coarse) * 4 / 3)) / _CALMEST_OF_NOISE


def _calm_energy(levels: Float) -> float:
    """Return the energy of what the kernel sees in the calm blocks of a picture."""
    height, width = (side - side % _BLOCK for side in levels.shape[:2])
    cut = np.ascontiguousarray(levels[:height, :width])
    response = np.square(cv2.filter2D(cut, -1, _KERNEL, borderType=cv2.BORDER_REFLECT_101))
    shape = (height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK, levels.shape[2])
    energy = response.reshape(shape).mean(axis=(1, 3))
    tone = cut.reshape(shape).mean(axis=(1, 3))
    says = (energy > 0) & (tone > _BLACK) & (tone < 255 - _BLACK)
    return float(np.quantile(energy[says], _CALM)) if says.sum() >= _FEWEST_BLOCKS else 0.0


# What is drawn, and what was photographed.
#
# In drawings differences between neighbours are nothing or large; in photographs most that are
# not nothing are small. Compression and noise put small ones everywhere, so what counts as
# nothing grows with them. By trying on twenty photographs, thirty plots, maps, posters and
# documents and text of 9 to 24 px, each as it is, at half size, and as JPEG of 80, 50 and 30.

_CELL = 16
_STRONG = 40
"""Levels between neighbours from which they are an edge."""
_WEAK = 14
"""Levels above nothing up to which a difference is a weak one."""
_NOTHING = ((30, 50, 80, 90, 96, 100), (12.0, 10.0, 7.0, 5.0, 3.0, 2.0))
"""Levels that count as nothing, by the quality of JPEG."""
_MOST_NOISE = 5.0
"""Levels that count as noise here; small letters look like more, and above it so much counts as
nothing that noisy photographs look drawn: 14 of 312 up to 8 levels, none up to 5."""
_STRUCTURED = 0.02
"""Share of edges in a cell and its neighbours from which these tell what they are."""
_BLANK = 0.999
"""Share of equal neighbours in a cell and those around it from which it is of one colour."""
_FEWEST_ROWS = 32
"""Pixels of a side: fewer tell too little."""
_PLAIN = 0.9
"""Share of neighbours in a cell that differ by nothing from which it is flat."""
_SURELY, _MOSTLY, _HARDLY = 0.6, 0.5, 0.3
"""How much a place looks drawn from which it is taken for so, or for the kind of the picture, and
up to which it is taken for photographed."""
_WEAK_NO, _WEAK_YES = 0.6, 0.4
"""Shares of weak ones among weak and strong differences, of what is not drawn and of what is."""
_FLAT_NO, _FLAT_YES = 0.2, 0.35
"""Shares of a cell that differ by nothing, likewise."""
_EQUAL_NO, _EQUAL_YES = 0.6, 0.85
"""Shares of equal neighbours among near ones, likewise."""
_FEWEST_EDGES = 0.05
"""Share of structured cells around a place from which it may be taken for photographed."""
_LEAST = np.float32(1e-3)
"""Stands in for a share of 0 where it is divided by."""
_PLAIN_PARTS = 70
"""Quality of JPEG from which parts of a picture can be told apart."""
_LARGE = 0.08
"""Share of the picture that a part of the other kind needs to count."""
_FEW_OTHERS = 0.01
"""Share of the cells up to which those that do not look drawn are no part of their own."""
_NEAR = 12
"""Levels up to which neighbours are near each other: in what a program drew such are equal, and
stay so in no JPEG, no scan and no photograph."""
_DAMAGED, _CRISP = 0.75, 0.9
"""Share of equal neighbours among the near ones, where there are edges: drawings have 0.82 to 0.99
of it, 0.77 at most once they were JPEG of any quality, and photographs 0.25."""
_SPREAD = 7
"""Cells around a place, on a side, that decide together what it is."""


@dataclass(frozen=True)
class _Cells:
    """Shares of the neighbours in each cell, float32 [rows, columns], by how they differ.

    flat: by nothing. weak, strong: by little, and by an edge. equal: not at all. near: by so
        little that a program would have drawn them equal.
    """

    flat: Float
    weak: Float
    strong: Float
    equal: Float
    near: Float

    @classmethod
    def of(cls, rgb: Float, nothing: float) -> _Cells:
        """Compare all neighbours of a picture; ``nothing`` is in levels of 255."""
        grey = np.rint(rgb @ LUMA * 255).clip(0, 255).astype(np.uint8)
        height, width = grey.shape
        beyond = (0, -height % _CELL + 1, 0, -width % _CELL + 1)
        grey = cv2.copyMakeBorder(grey, *beyond, cv2.BORDER_REPLICATE)
        differences = np.maximum(
            cv2.absdiff(grey[:-1, 1:], grey[:-1, :-1]), cv2.absdiff(grey[1:, :-1], grey[:-1, :-1])
        )
        return cls(
            flat=_share_of_cells(differences <= nothing),
            weak=_share_of_cells((differences > nothing) & (differences < nothing + _WEAK)),
            strong=_share_of_cells(differences >= _STRONG),
            equal=_share_of_cells(differences == 0),
            near=_share_of_cells(differences <= _NEAR),
        )

    def drawn(self) -> Float:
        """Return how much each cell looks drawn by itself, 0..1."""
        weak = self.weak / np.maximum(self.weak + self.strong, _LEAST)
        as_scanned = _ramp(weak, _WEAK_NO, _WEAK_YES) * _ramp(self.flat, _FLAT_NO, _FLAT_YES)
        equal = self.equal / np.maximum(self.near, _LEAST)
        return np.asarray(np.maximum(as_scanned, _ramp(equal, _EQUAL_NO, _EQUAL_YES)))


def _find_drawn(rgb: Float, damage: Damage) -> tuple[Kind, Float, float, float]:
    """Return the kind, how much each cell looks drawn, how crisp it is, what is flat."""
    quality = 100 if damage.jpeg_quality is None else damage.jpeg_quality
    nothing = max(float(np.interp(quality, *_NOTHING)), 2 * min(damage.noise, _MOST_NOISE))
    cells = _Cells.of(rgb, nothing)
    drawn, flat = cells.drawn(), float((cells.flat > _PLAIN).mean())
    structured = (cells.strong > _STRUCTURED).astype(np.float32)
    if min(rgb.shape[:2]) < _FEWEST_ROWS or not structured.any():
        return "photograph", np.zeros_like(drawn), 0.0, flat
    # Flat cells say nothing of themselves, and take after what is around them.
    edges = drawn * structured
    spread = (min(_SPREAD, *drawn.shape),) * 2
    weights = cv2.blur(structured, spread, borderType=cv2.BORDER_REPLICATE)
    around = cv2.blur(edges, spread, borderType=cv2.BORDER_REPLICATE)
    around = np.where(weights > _LEAST, around / np.maximum(weights, _LEAST), 0).astype(np.float32)
    is_photographed = (around < _HARDLY) & (weights > _FEWEST_EDGES)
    parts = float((around > _SURELY).mean()), float(is_photographed.mean())
    whole = float(edges.sum() / structured.sum())
    kind: Kind = "drawing" if whole > _MOSTLY else "photograph"
    equal = float((cells.equal * edges).sum() / max(float((cells.near * edges).sum()), 1e-3))
    crisp = min(1.0, max(0.0, (equal - _DAMAGED) / (_CRISP - _DAMAGED)))
    # Parts that are drawn are crisp, or it is known why they are not; else texture looks like them.
    can_tell = quality >= _PLAIN_PARTS and (crisp > 0 or damage.jpeg_quality is not None)
    if min(parts) >= _LARGE and can_tell:
        kind = "mixed"
    # What is of one colour to the level is none that a lens saw.
    blank = (cells.equal > _BLANK).astype(np.float32)
    return kind, np.maximum(_ramp(around, _HARDLY, _MOSTLY), blank), crisp, flat


def _share_of_cells(pixels: NDArray[np.bool_]) -> Float:
    """Return the share of the pixels of each cell and its neighbours, [rows, columns]."""
    size = pixels.shape[1] // _CELL, pixels.shape[0] // _CELL
    cells = cv2.resize(pixels.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.blur(cells, (3, 3), borderType=cv2.BORDER_REPLICATE))


def _ramp(values: Float, first: float, last: float) -> Float:
    """Return how far values are on the way from one to the other, 0..1."""
    return np.asarray(np.clip((values - first) / (last - first), 0, 1), np.float32)
