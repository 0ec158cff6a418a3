"""What the net for drawings learns from: text, screens, lines, cartoons, charts and maps.

A seeded program of its own. It shares neither seeds, layouts nor fonts with the bench's
(``bench.quality.drawings``), whose letters must be letters that no training saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.sketch import BLACK, WHITE, Colour, Face, Point, Sketch


def _fill(sketch: Sketch, colour: Colour) -> None:
    sketch.box((0, 0, sketch.side, sketch.side), colour)


def _column(
    sketch: Sketch, left: float, top: float, right: float, bottom: float, ink: Colour
) -> None:
    """Write lines of one font into a column."""
    face, size = sketch.face(), sketch.size()
    spacing = size * sketch.rng.uniform(1.15, 1.7)
    while top + size < bottom:
        x = left + (sketch.between(0, 10) if sketch.chance(0.15) else 0)
        while x < right:
            x += sketch.text((x, top), sketch.word(face), ink, face, size) + size * 0.28
        top += spacing
        if sketch.chance(0.12):
            face, size = sketch.face(), sketch.size()
            spacing = size * sketch.rng.uniform(1.15, 1.7)


def _page(sketch: Sketch) -> None:
    paper, ink = sketch.pair()
    _fill(sketch, paper)
    side = sketch.side
    columns = 1 if sketch.chance(0.7) else 2
    for number in range(columns):
        left = number * side / columns + sketch.between(1, 6)
        _column(sketch, left, sketch.between(-6, 6), (number + 1) * side / columns - 3, side, ink)
    if sketch.chance(0.2):
        y = sketch.between(10, side - 10)
        sketch.line([(3, y), (side - 3, y)], ink, sketch.between(0.4, 1.5))


def _sheet(sketch: Sketch) -> None:
    paper, ink = sketch.pair()
    _fill(sketch, paper)
    face, size = sketch.face(0.95), sketch.size(6, 12)
    rule = sketch.colour((0.5, 0.85)) if paper == WHITE else ink
    high, wide = round(size * 1.4), sketch.between(16, 40)
    width = float(sketch.rng.choice([0.5, 1.0, 1.0]))
    for row in range(int(sketch.side / high) + 1):
        sketch.line([(0, row * high), (sketch.side, row * high)], rule, width)
        for column in range(int(sketch.side / wide) + 1):
            if sketch.chance(0.8):
                at = (column * wide + 2, row * high + 0.1 * size)
                sketch.text(at, sketch.word(face)[:5], ink, face, size)
    for column in range(int(sketch.side / wide) + 1):
        sketch.line([(column * wide, 0), (column * wide, sketch.side)], rule, width)


@dataclass(frozen=True)
class _Theme:
    """Colours and letters of a screen."""

    panel: Colour
    ink: Colour
    accent: Colour
    face: Face


def _screen(sketch: Sketch) -> None:
    dark = sketch.chance(0.35)
    ground = sketch.colour((0.02, 0.2)) if dark else sketch.colour((0.85, 1.0))
    panel = sketch.colour((0.08, 0.25)) if dark else WHITE
    ink = sketch.colour((0.75, 1.0)) if dark else sketch.colour((0.0, 0.3))
    theme = _Theme(panel, ink, sketch.colour((0.3, 0.6)), sketch.face(0.95))
    _fill(sketch, ground)
    if sketch.chance(0.6):
        high = sketch.between(8, 16)
        sketch.box((0, 0, sketch.side, high), theme.accent if sketch.chance(0.5) else panel)
        shown = WHITE if dark else ink
        sketch.text((3, 1), sketch.words(theme.face, 4), shown, theme.face, high * 0.65)
    for _ in range(int(sketch.rng.integers(5, 14))):
        _widget(sketch, theme)


def _widget(sketch: Sketch, theme: _Theme) -> None:
    """Draw something to read or to press anywhere."""
    x, y = sketch.between(-4, sketch.side - 14), sketch.between(8, sketch.side - 8)
    size = sketch.size(6, 14)
    label = sketch.words(theme.face, int(sketch.rng.integers(1, 3)))
    kind, edge = int(sketch.rng.integers(7)), sketch.colour((0.3, 0.8))
    width = float(sketch.rng.choice([0.5, 1.0, 1.0, 1.5]))
    if kind == 0:  # a button
        wide, radius = sketch.between(20, 44), sketch.between(0, 5)
        filled = theme.accent if sketch.chance(0.5) else theme.panel
        sketch.box((x, y, x + wide, y + 1.6 * size), filled, edge, width, radius)
        shown = WHITE if filled == theme.accent else theme.ink
        sketch.text((x + 4, y + 0.2 * size), label[:9], shown, theme.face, size)
    elif kind == 1:  # a box to tick
        sketch.box((x, y, x + size, y + size), theme.panel, edge, width, sketch.between(0, 2))
        if sketch.chance(0.6):
            ticks = ((0.2, 0.5), (0.42, 0.75), (0.85, 0.2))
            sketch.line([(x + a * size, y + b * size) for a, b in ticks], theme.accent, 1.2)
        sketch.text((x + 1.4 * size, y - 0.1 * size), label, theme.ink, theme.face, size)
    elif kind == 2:  # a slider
        wide = sketch.between(20, 50)
        sketch.line([(x, y), (x + wide, y)], edge, 1 + width)
        sketch.disc((x + wide * sketch.rng.random(), y), 3, theme.accent, theme.panel, width)
    elif kind == 3:  # a field
        corners = (x, y, x + sketch.between(24, 60), y + 1.7 * size)
        sketch.box(corners, theme.panel, edge, width, sketch.between(0, 3))
        sketch.text((x + 3, y + 0.25 * size), label, theme.ink, theme.face, size)
    elif kind == 4:
        _entries(sketch, theme, (x, y), size, edge, width)
    elif kind == 5:
        _icon(sketch, (x, y), sketch.between(8, 20))
    else:
        ink = theme.ink if sketch.chance(0.7) else theme.accent
        sketch.text((x, y), label, ink, theme.face, size)


def _entries(
    sketch: Sketch, theme: _Theme, at: Point, size: float, edge: Colour, width: float
) -> None:
    """Draw a list of which one entry is chosen."""
    (x, y), wide, rows = at, sketch.between(30, 60), int(sketch.rng.integers(2, 6))
    sketch.box((x, y, x + wide, y + rows * 1.5 * size), theme.panel, edge, width)
    chosen = int(sketch.rng.integers(rows))
    for row in range(rows):
        top = y + row * 1.5 * size
        if row == chosen:
            sketch.box((x + 1, top, x + wide - 1, top + 1.5 * size), theme.accent)
        shown = WHITE if row == chosen else theme.ink
        word = sketch.word(theme.face)[:8]
        sketch.text((x + 3, top + 0.15 * size), word, shown, theme.face, size)


def _icon(sketch: Sketch, at: Point, side: float) -> None:
    x, y = at
    ink, filled = sketch.colour((0.0, 0.5)), sketch.colour((0.3, 0.9))
    width = float(sketch.rng.uniform(0.6, 2.0))
    sketch.box((x, y, x + side, y + side), filled, ink, width, sketch.between(0, side / 3))
    middle = (x + side / 2, y + side / 2)
    for _ in range(int(sketch.rng.integers(1, 4))):
        if sketch.chance(0.5):
            sketch.disc(middle, side * sketch.rng.uniform(0.1, 0.4), sketch.colour(), ink, width)
        else:
            turns = sketch.rng.uniform(0, 2 * math.pi, int(sketch.rng.integers(2, 5)))
            far = side * 0.4
            ends = [(middle[0] + far * math.cos(t), middle[1] + far * math.sin(t)) for t in turns]
            sketch.line([middle, *ends], ink, width)


def _spline(sketch: Sketch, count: int, step: float) -> list[Point]:
    """Return a smooth wandering line."""
    heading, turning = sketch.rng.uniform(0, 2 * math.pi), 0.0
    points = [sketch.point(4)]
    bend = sketch.rng.uniform(0.02, 0.12)
    for _ in range(count):
        turning = 0.85 * turning + float(sketch.rng.normal()) * bend
        heading += turning
        x, y = points[-1]
        points.append((x + step * math.cos(heading), y + step * math.sin(heading)))
    return points


def _hatch(sketch: Sketch, ink: Colour) -> None:
    """Draw parallel lines over a patch, maybe crossed by others."""
    x, y = sketch.point()
    angle, far = sketch.rng.uniform(0, math.pi), sketch.between(8, 30)
    gap, width = sketch.rng.uniform(1.6, 5.0), sketch.rng.uniform(0.3, 1.0)
    for turn in (0.0, math.pi / 2 if sketch.chance(0.6) else 1.0)[: 1 + sketch.chance(0.3)]:
        c, s = math.cos(angle + turn), math.sin(angle + turn)
        for row in range(int(far / gap)):
            a = row * gap - far / 2
            reach = far / 2 * sketch.rng.uniform(0.8, 1.0)
            ends = [(x - a * s + d * c, y + a * c + d * s) for d in (-reach, reach)]
            sketch.line(ends, ink, width)


def _ink(sketch: Sketch) -> None:
    paper, ink = sketch.pair()
    _fill(sketch, paper)
    for _ in range(int(sketch.rng.integers(6, 22))):
        width = float(sketch.rng.choice([0.3, 0.5, 0.8, 1.0, 1.5, 2.5, 4.0]))
        count, step = int(sketch.rng.integers(10, 90)), sketch.rng.uniform(0.8, 2.0)
        points = _spline(sketch, count, step)
        sketch.line(points, ink, width)
        if sketch.chance(0.2):
            sketch.shape(points, ink if sketch.chance(0.5) else paper)
            sketch.line([*points, points[0]], ink, width)
    for _ in range(int(sketch.rng.integers(0, 5))):
        _hatch(sketch, ink)
    for _ in range(int(sketch.rng.integers(0, 6))):
        inner = None if sketch.chance(0.6) else ink
        sketch.disc(sketch.point(), sketch.between(1, 20), inner, ink, sketch.rng.uniform(0.4, 2))


def _plan(sketch: Sketch) -> None:
    paper, ink = sketch.pair()
    _fill(sketch, paper)
    face, size, side = sketch.face(0.95), sketch.size(6, 12), sketch.side
    for _ in range(int(sketch.rng.integers(6, 18))):
        x, y = sketch.between(0, side), sketch.between(0, side)
        x1, y1 = sketch.between(0, side), sketch.between(0, side)
        width = float(sketch.rng.choice([0.4, 0.5, 1.0, 1.0, 1.5, 2.0]))
        kind = int(sketch.rng.integers(5))
        if kind == 0:
            sketch.box((min(x, x1), min(y, y1), max(x, x1), max(y, y1)), None, ink, width)
        elif kind == 1:
            sketch.line([(x, y), (x1, y)], ink, width)
        elif kind == 2:
            sketch.line([(x, y), (x, y1)], ink, width)
        elif kind == 3:
            sketch.line([(x, y), (x1, y1)], ink, width)
        else:
            sketch.text((x, y), sketch.word(face), ink, face, size)
    if sketch.chance(0.5):
        _hatch(sketch, ink)


def _cartoon(sketch: Sketch) -> None:
    _fill(sketch, sketch.colour((0.4, 1.0)))
    outline = BLACK if sketch.chance(0.6) else sketch.colour((0.0, 0.3))
    width = float(sketch.rng.uniform(0.5, 2.5)) if sketch.chance(0.8) else 0.0
    for _ in range(int(sketch.rng.integers(4, 14))):
        x, y = sketch.point()
        count, far = int(sketch.rng.integers(3, 9)), sketch.rng.uniform(5, 30)
        wobble = sketch.rng.uniform(0.6, 1.2, count)
        turns = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        radii = np.interp(turns, np.linspace(0, 2 * math.pi, count, endpoint=False), wobble,
                          period=2 * math.pi) * far  # fmt: skip
        if sketch.chance(0.7):
            radii = np.convolve(np.tile(radii, 3), np.ones(9) / 9, "same")[60:120]
        ring = [
            (x + r * math.cos(t), y + r * math.sin(t)) for r, t in zip(radii, turns, strict=True)
        ]
        sketch.shape(ring, sketch.colour())
        if width:
            sketch.line([*ring, ring[0], ring[1]], outline, width)
        if sketch.chance(0.4):
            for dx in (-far / 4, far / 4):
                sketch.disc((x + dx, y), far / 8, WHITE, outline, max(0.4, width / 2))
                sketch.disc((x + dx, y), far / 18, BLACK)


def _chart(sketch: Sketch) -> None:
    paper, ink = (WHITE, BLACK) if sketch.chance(0.7) else sketch.pair()
    _fill(sketch, paper)
    side, face, size = sketch.side, sketch.face(0.98), sketch.size(6, 10)
    left, bottom = sketch.between(8, 20), side - sketch.between(8, 16)
    rule = sketch.colour((0.6, 0.9))
    for row in range(1, 8):
        y = bottom - row * (bottom - 4) / 7
        sketch.line([(left, y), (side - 3, y)], rule, 0.5)
        sketch.text((1, y - size / 2), str(row * 10), ink, face, size)
    kind = int(sketch.rng.integers(3))
    if kind == 0:
        wide = sketch.between(3, 9)
        for number in range(int((side - left) / wide)):
            top = sketch.between(6, bottom - 2)
            x = left + number * wide
            sketch.box((x + 1, top, x + wide, bottom), sketch.colour((0.2, 0.7)))
    elif kind == 1:
        for _ in range(int(sketch.rng.integers(1, 5))):
            values = np.cumsum(sketch.rng.normal(size=16)) * 4 + bottom / 2
            xs = np.linspace(left, side - 4, 16)
            points = [(float(x), float(y)) for x, y in zip(xs, values, strict=True)]
            colour = sketch.colour((0.1, 0.6))
            sketch.line(points, colour, sketch.rng.uniform(0.5, 1.8))
            for point in points if sketch.chance(0.5) else ():
                sketch.disc(point, 1.5, colour if sketch.chance(0.5) else paper, colour, 0.6)
    else:
        for _ in range(60):
            sketch.disc(sketch.point(), sketch.rng.uniform(0.6, 2), sketch.colour((0.1, 0.6)))
    sketch.line([(left, 3), (left, bottom), (side - 3, bottom)], ink, 1)
    sketch.text((left, bottom + 1), sketch.words(face, 6), ink, face, size)


def _map(sketch: Sketch) -> None:
    _fill(sketch, sketch.colour((0.88, 0.98)))
    side, face = sketch.side, sketch.face(0.98)
    if sketch.chance(0.5):
        brown, x, y = sketch.colour((0.3, 0.6)), *sketch.point()
        waves, gap = sketch.rng.uniform(-3, 3, 3), sketch.rng.uniform(2.5, 6)
        for number in range(1, 24):
            turns = np.linspace(0, 2 * math.pi, 90)
            far = gap * number + sum(w * np.sin((k + 2) * turns) for k, w in enumerate(waves))
            ring = [(x + float(f) * math.cos(t), y + float(f) * math.sin(t))
                    for f, t in zip(far, turns, strict=True)]  # fmt: skip
            sketch.line(ring, brown, 0.9 if number % 5 == 0 else 0.45)
    else:
        for _ in range(30):
            x, y = sketch.point()
            corners = (x, y, x + sketch.between(3, 12), y + sketch.between(3, 12))
            sketch.box(corners, sketch.colour((0.7, 0.95)), sketch.colour((0.5, 0.8)), 0.4)
    sketch.line(_spline(sketch, 80, 2), (160, 200, 235), sketch.between(3, 9))
    for _ in range(int(sketch.rng.integers(2, 7))):
        street, width = _spline(sketch, 70, 2.5), sketch.rng.uniform(1, 5)
        sketch.line(street, sketch.colour((0.4, 0.7)), width + 1)
        sketch.line(street, sketch.colour((0.8, 1.0)), width)
    for _ in range(int(sketch.rng.integers(2, 8))):
        size = sketch.size(6, 12)
        sketch.text(sketch.point(), sketch.words(face, 2), sketch.colour((0, 0.35)), face, size)
    if sketch.chance(0.3):
        sketch.line([(0, sketch.between(0, side)), (side, sketch.between(0, side))], BLACK, 0.7)


def _house(sketch: Sketch) -> None:
    wall, dark = sketch.colour((0.4, 0.95)), sketch.colour((0.1, 0.6))
    _fill(sketch, wall)
    across, down = sketch.rng.uniform(2.2, 12, 2)
    width = sketch.rng.uniform(0.3, 1.0)
    lean = sketch.rng.uniform(-0.3, 0.3) if sketch.chance(0.4) else 0.0
    side = sketch.side
    if sketch.chance(0.5):
        for row in range(int(side / down) + 20):
            y = row * down - 10 * down
            sketch.line([(0, y), (side, y + lean * side)], dark, width)
        for column in range(int(side / across) + 1):
            sketch.line([(column * across, 0), (column * across, side)], dark, width)
    else:
        share = sketch.rng.uniform(0.4, 0.8)
        for row in range(int(side / down) + 1):
            for column in range(int(side / across) + 1):
                x, y = column * across, row * down
                sketch.box((x, y, x + share * across, y + share * down), dark)


def _poster(sketch: Sketch) -> None:
    sketch.gradient(sketch.colour(), sketch.colour())
    for _ in range(int(sketch.rng.integers(2, 7))):
        face, size = sketch.face(0.9), sketch.size(8, 60)
        colour = WHITE if sketch.chance(0.4) else sketch.colour()
        sketch.text(sketch.point(8), sketch.words(face, 2), colour, face, size)
    for _ in range(int(sketch.rng.integers(0, 4))):
        _icon(sketch, sketch.point(), sketch.between(8, 30))


KINDS: tuple[tuple[Callable[[Sketch], None], float], ...] = (
    (_page, 0.40), (_sheet, 0.05), (_screen, 0.16), (_ink, 0.12), (_plan, 0.05),
    (_cartoon, 0.06), (_chart, 0.05), (_map, 0.05), (_house, 0.03), (_poster, 0.03),
)  # fmt: skip
"""What is drawn, and how often."""


def draw(side: int, rng: np.random.Generator, faces: Sequence[Face]) -> NDArray[np.uint8]:
    """Return a random drawing, uint8 [4 side, 4 side, 3]; ``side`` is that of the small picture."""
    sketch = Sketch(side, rng, faces)
    kinds, shares = zip(*KINDS, strict=True)
    kinds[int(rng.choice(len(kinds), p=shares))](sketch)
    return sketch.truth()
