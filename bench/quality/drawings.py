"""Twenty pictures that are no photographs, drawn by a seeded program, and what is read off them.

Each is drawn at the size of the truth from the same units, pixels of the small picture: letters of
8 px are so large in the source whatever it is enlarged by. What is drawn is drawn four times as
large and averaged, so that every edge is smooth and no two machines differ by a rasteriser's
rounding of thin lines. Fonts are Debian's ``fonts-dejavu-core``, ``fonts-liberation`` and
``fonts-noto-core``.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench.quality.recipes import Picture, shrink

Colour = tuple[int, int, int] | tuple[int, int, int, int]
Point = tuple[float, float]

WIDTH, HEIGHT = 112, 64
LETTERS = 8
"""Size of the letters that are read, in pixels of the small picture."""
_FINER = 4
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_FONTS = {
    "sans": "DejaVuSans.ttf",
    "bold": "DejaVuSans-Bold.ttf",
    "mono": "DejaVuSansMono.ttf",
    "serif": "LiberationSerif-Regular.ttf",
    "arial": "LiberationSans-Regular.ttf",
    "arabic": "NotoNaskhArabic-Regular.ttf",
    "hebrew": "NotoSansHebrew-Regular.ttf",
    "devanagari": "NotoSansDevanagari-Regular.ttf",
    "thai": "NotoSansThai-Regular.ttf",
}
_SENTENCES = (
    "the river runs below old stone walls and every morning boats carry bread fish wool salt "
    "down to market where people trade news for letters from far away towns while children "
    "watch birds cross quiet fields before winter brings snow over hills roads bridges farms "
    "Monday Paris June Anna seven hundred twenty three Oxford garden kitchen window"
)
_WORDS = _SENTENCES.split()
_CODES = list("ABCDEFGHKLMNPRTUVWXYZabdefghkmnrtuy2345679")
"""Letters of codes, which no dictionary helps to read; those that look alike are left out."""


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(_FONTS[name], size)
    except OSError as error:
        raise SystemExit(
            f"Drawings need the font {_FONTS[name]}: apt install fonts-dejavu-core "
            "fonts-liberation fonts-noto-core."
        ) from error


class Canvas:
    """Draws in pixels of the small picture."""

    def __init__(self, scale: int, background: Colour) -> None:
        """Take how many times larger than the small picture the truth is."""
        self.unit = scale * _FINER
        mode = "RGBA" if len(background) == 4 else "RGB"
        self.image = Image.new(mode, (WIDTH * self.unit, HEIGHT * self.unit), background)
        self._draw = ImageDraw.Draw(self.image)

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.unit, y * self.unit) for x, y in points]

    def text(
        self, at: Point, words: str, colour: Colour, font: str = "sans", size: float = LETTERS
    ) -> None:
        """Write words, their upper left corner ``at``."""
        face = _font(font, round(size * self.unit))
        self._draw.text(self._scaled([at])[0], words, fill=colour, font=face)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0) -> None:
        """Draw a line through points."""
        drawn = max(1, round(width * self.unit))
        self._draw.line(self._scaled(points), fill=colour, width=drawn, joint="curve")

    def box(
        self,
        corners: tuple[float, float, float, float],
        fill: Colour | None,
        outline: Colour | None = None,
        width: float = 1.0,
        radius: float = 0.0,
    ) -> None:
        """Draw a box from its upper left to its lower right corner."""
        x0, y0, x1, y1 = (round(c * self.unit) for c in corners)
        drawn = max(1, round(width * self.unit)) if outline else 0
        self._draw.rounded_rectangle(
            (x0, y0, x1 - 1, y1 - 1), radius * self.unit, fill, outline, drawn
        )

    def disc(
        self,
        middle: Point,
        radius: float,
        fill: Colour | None,
        outline: Colour | None = None,
        width: float = 1.0,
    ) -> None:
        """Draw a disc, or a circle of an ``outline`` colour and ``width`` in pixels."""
        x, y = middle
        corners = self._scaled([(x - radius, y - radius), (x + radius, y + radius)])
        drawn = max(1, round(width * self.unit))
        self._draw.ellipse([*corners[0], *corners[1]], fill, outline, drawn)

    def shape(self, points: Sequence[Point], fill: Colour) -> None:
        """Draw a filled shape."""
        self._draw.polygon(self._scaled(points), fill)

    def picture(self) -> Picture:
        """Return [h, w, 3 or 4] in 0..1 at the size of the truth."""
        levels = np.asarray(self.image, np.float32) / np.float32(255)
        found = shrink(levels, (self.image.width // _FINER, self.image.height // _FINER))
        return np.asarray(np.rint(np.clip(found, 0, 1) * 255) / 255, np.float32)


@dataclass(frozen=True)
class Drawing:
    """One drawing.

    kind: "text" and others. background: with four numbers it has alpha. draw: draws, and
    returns the lines that are to be read off it, if they are English and of 8 px.
    """

    name: str
    kind: str
    background: Colour
    draw: Callable[[Canvas, np.random.Generator], Sequence[str]]

    def at(self, scale: int) -> tuple[Picture, Sequence[str]]:
        """Return the truth at ``scale`` times the small picture, and its lines."""
        seed = int.from_bytes(self.name.encode()[:8].ljust(8), "little")
        canvas = Canvas(scale, self.background)
        lines = self.draw(canvas, np.random.default_rng(seed))
        return canvas.picture(), lines


# Text.


def _page(
    font: str, ink: Colour, size: float = LETTERS
) -> Callable[[Canvas, np.random.Generator], Sequence[str]]:
    def draw(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
        lines: list[str] = []
        top = 3.0
        while top + 1.3 * size < HEIGHT:
            line = ""
            width = 0.0
            while True:
                word = str(rng.choice(_WORDS))
                if rng.random() < 0.4:
                    word = "".join(rng.choice(_CODES, 5))
                longer = f"{line} {word}".strip()
                width = _font(font, 100).getlength(longer) * size / 100
                if width > WIDTH - 8:
                    break
                line = longer
            canvas.text((4, top), line, ink, font, size)
            lines.append(line)
            top += 1.45 * size
        return lines

    return draw


def _foreign(
    font: str, lines: Sequence[str], sizes: Sequence[float] = (8, 8, 11, 14)
) -> Callable[[Canvas, np.random.Generator], Sequence[str]]:
    def draw(canvas: Canvas, _rng: np.random.Generator) -> Sequence[str]:
        top = 2.0
        for line, size in zip(lines, sizes, strict=True):
            canvas.text((4, top), line, _BLACK, font, size)
            top += 1.35 * size
        return ()

    return draw


# Screens.


def _window(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
    canvas.box((6, 4, 106, 60), (240, 240, 240), (90, 90, 90), 1, radius=2)
    canvas.box((7, 5, 105, 14), (45, 90, 160))
    canvas.text((9, 5), "Settings", _WHITE, "bold", 7)
    canvas.line([(97, 7), (102, 12)], _WHITE, 1)
    canvas.line([(102, 7), (97, 12)], _WHITE, 1)
    for row, word in enumerate(("Colour", "Sharpen", "Frame")):
        top = 18 + 9 * row
        canvas.box((10, top, 16, top + 6), _WHITE, (80, 80, 80), 0.8)
        if row != 1:
            canvas.line([(11, top + 3), (13, top + 5), (15.5, top + 1)], (20, 120, 40), 1)
        canvas.text((20, top - 1.5), word, _BLACK, "arial", 8)
    canvas.line([(60, 20), (102, 20)], (170, 170, 170), 1)
    canvas.disc((60 + 30 * rng.random(), 20), 2.5, (45, 90, 160))
    canvas.box((38, 48, 68, 57), (225, 225, 225), (120, 120, 120), 0.7, radius=1.5)
    canvas.box((72, 48, 102, 57), (45, 90, 160), (30, 60, 110), 0.7, radius=1.5)
    canvas.text((43, 48.5), "Cancel", _BLACK, "arial", 6.5)
    canvas.text((83, 48.5), "OK", _WHITE, "arial", 6.5)
    return ()


def _editor(canvas: Canvas, _rng: np.random.Generator) -> Sequence[str]:
    code = (
        (("def ", (200, 120, 220)), ("area", (110, 180, 250)), ("(w, h):", (220, 220, 220))),
        (("    if ", (200, 120, 220)), ("w < 0:", (220, 220, 220))),
        (("        w = ", (220, 220, 220)), ("-w", (240, 180, 100))),
        (("    # both", (110, 140, 110)),),
        (("    return ", (200, 120, 220)), ("w * h", (220, 220, 220))),
        (("print", (110, 180, 250)), ("(area(2, 3))", (220, 220, 220))),
    )
    canvas.box((0, 0, 10, HEIGHT), (45, 45, 52))
    for row, parts in enumerate(code):
        x, top = 13.0, 2 + 10 * row
        canvas.text((3, top), str(row + 1), (120, 120, 120), "mono", 7)
        for words, colour in parts:
            canvas.text((x, top), words, colour, "mono", 7)
            x += _font("mono", 100).getlength(words) * 7 / 100
    return ()


def _sheet(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
    canvas.box((0, 0, WIDTH, 9), (230, 233, 238))
    for column in range(5):
        x = 12 + 22 * column
        canvas.line([(x, 0), (x, HEIGHT)], (190, 190, 190), 0.5)
        canvas.text((x + 8, 0.5), "ABCDE"[column], (60, 60, 60), "arial", 7)
        for row in range(6):
            number = f"{rng.integers(1, 999) / 10:.1f}"
            canvas.text((x + 3, 9.8 + 9 * row), number, _BLACK, "arial", 6.5)
    for row in range(7):
        y = 9 + 9 * row
        canvas.line([(0, y), (WIDTH, y)], (190, 190, 190), 0.5)
        canvas.text((4, y + 0.8), str(row + 1), (60, 60, 60), "arial", 6.5)
    canvas.box((34, 27, 56, 36), None, (30, 120, 70), 1)
    return ()


def _menu(canvas: Canvas, _rng: np.random.Generator) -> Sequence[str]:
    canvas.box((0, 0, WIDTH, 10), (250, 250, 250))
    for x, word in ((3, "File"), (22, "Edit"), (42, "View"), (66, "Help")):
        canvas.text((x, 0.5), word, _BLACK, "sans", 7)
    canvas.box((20, 10, 84, 62), _WHITE, (150, 150, 150), 0.6)
    canvas.box((20.6, 21, 83.4, 31), (50, 120, 215))
    entries = (("Undo", "Ctrl+Z"), ("Repeat", "Ctrl+Y"), ("Cut", "Ctrl+X"), ("Paste", "Ctrl+V"))
    for row, (word, keys) in enumerate(entries):
        ink = _WHITE if row == 1 else _BLACK
        top = 11 + 10 * row + (3 if row > 1 else 0)
        canvas.text((23, top), word, ink, "sans", 7)
        canvas.text((55, top + 0.5), keys, ink if row == 1 else (120, 120, 120), "sans", 6.5)
    canvas.line([(22, 33), (82, 33)], (205, 205, 205), 0.6)
    return ()


# Lines, icons, maps, houses.


def _random_colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(low, high, 3))
    return red, green, blue


def _ink(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
    for _ in range(5):
        start, turn = rng.random(2) * (WIDTH, HEIGHT), rng.random() * 6.3
        points, heading = [(float(start[0]), float(start[1]))], turn
        for _ in range(60):
            heading += rng.normal() * 0.25
            x, y = points[-1]
            points.append((x + 1.5 * math.cos(heading), y + 1.5 * math.sin(heading)))
        canvas.line(points, _BLACK, float(rng.choice([0.5, 0.8, 1.2, 2.0])))
    for row in range(14):
        canvas.line([(70 + row * 2.2, 40), (62 + row * 2.2, 58)], _BLACK, 0.5)
    canvas.disc((30, 30), 15, None, outline=_BLACK, width=1.0)
    canvas.disc((25, 26), 2, _BLACK)
    canvas.disc((35, 26), 2, _BLACK)
    return ()


def _plan(canvas: Canvas, _rng: np.random.Generator) -> Sequence[str]:
    blue = (20, 50, 110)
    canvas.box((8, 8, 78, 56), None, blue, 1.5)
    canvas.line([(44, 8), (44, 30)], blue, 1.2)
    canvas.line([(8, 34), (60, 34)], blue, 1.2)
    for step in range(10):
        canvas.line([(62, 36 + 2 * step), (77, 36 + 2 * step)], blue, 0.4)
    canvas.disc((26, 46), 7, None, outline=blue, width=0.6)
    canvas.line([(16, 46), (36, 46)], blue, 0.4)
    canvas.line([(26, 37), (26, 55)], blue, 0.4)
    canvas.line([(8, 61), (78, 61)], blue, 0.4)
    for end in (8, 44, 78):
        canvas.line([(end - 1.5, 62.5), (end + 1.5, 59.5)], blue, 0.6)
    for row, angle in enumerate(np.linspace(0, math.pi / 2, 12)):
        far = 22 if row % 3 == 0 else 18
        x, y = math.cos(angle), math.sin(angle)
        canvas.line([(86 + 8 * x, 10 + 8 * y), (86 + far * x, 10 + far * y)], blue, 0.5)
    canvas.text((84, 44), "3.20", blue, "arial", 8)
    return ()


def _icons(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
    for number in range(8):
        x, y = 4 + 27 * (number % 4), 4 + 30 * (number // 4)
        a, b = _random_colour(rng, 30, 226), _random_colour(rng, 30, 226)
        dark = (40, 40, 48, 255)
        first, second = (*a, 255), (*b, 255)
        canvas.box((x, y, x + 24, y + 24), (*a, 90), radius=5)
        if number % 4 == 0:
            canvas.disc((x + 12, y + 12), 8, second, outline=dark, width=1.2)
            canvas.line([(x + 12, y + 12), (x + 12, y + 6)], dark, 1.2)
            canvas.line([(x + 12, y + 12), (x + 16, y + 14)], dark, 1.2)
        elif number % 4 == 1:
            canvas.shape([(x + 4, y + 13), (x + 12, y + 4), (x + 20, y + 13)], second)
            canvas.box((x + 7, y + 12, x + 17, y + 21), first, dark, 1)
        elif number % 4 == 2:
            star = [
                (
                    x + 12 + (9 if k % 2 == 0 else 4) * math.sin(k * math.pi / 5),
                    y + 12 - (9 if k % 2 == 0 else 4) * math.cos(k * math.pi / 5),
                )
                for k in range(10)
            ]
            canvas.shape(star, second)
        else:
            canvas.box((x + 4, y + 7, x + 20, y + 18), (255, 255, 255, 255), dark, 1.2)
            canvas.line([(x + 4, y + 7), (x + 12, y + 14), (x + 20, y + 7)], dark, 1.2)
    return ()


def _badges(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
    for number in range(3):
        x = 20 + 36 * number
        colour = _random_colour(rng, 20, 200)
        canvas.disc((x, 32), 16, (*colour, 255))
        canvas.disc((x, 32), 13, None, outline=(255, 255, 255, 200), width=1)
        canvas.text((x - 8, 24), "AtR"[number], (255, 255, 255, 255), "bold", 14)
        canvas.disc((x + 11, 20), 5, (220, 40, 40, 255))
        canvas.text((x + 9, 15.5), str(number + 2), (255, 255, 255, 255), "bold", 7)
    return ()


def _town(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
    canvas.box((70, 6, 104, 30), (200, 225, 180))
    river = [(x, 48 + 7 * math.sin(x / 17)) for x in range(-4, WIDTH + 5, 2)]
    canvas.line(river, (160, 200, 235), 7)
    for _ in range(26):
        x, y = rng.random(2) * (WIDTH - 10, HEIGHT - 10)
        w, h = 3 + 5 * rng.random(2)
        canvas.box((x, y, x + w, y + h), (222, 212, 200), (180, 168, 155), 0.4)
    streets = [[(0, 20), (60, 24), (WIDTH, 14)], [(30, 0), (36, 30), (28, HEIGHT)]]
    for street in [*streets, [(66, 0), (62, 40), (80, HEIGHT)]]:
        canvas.line(street, (190, 170, 120), 4)
        canvas.line(street, (255, 240, 190), 3)
    canvas.line([(0, 36), (WIDTH, 33)], (90, 90, 90), 0.7)
    for x in range(0, WIDTH, 4):
        canvas.line([(x, 34.8 - x / 40), (x, 37 - x / 40)], (90, 90, 90), 0.4)
    canvas.text((74, 13), "Park", (40, 100, 40), "sans", 7)
    canvas.text((4, 12), "Mill St", (60, 60, 60), "sans", 6)
    return ()


def _heights(canvas: Canvas, _rng: np.random.Generator) -> Sequence[str]:
    for number in range(11):
        ring = []
        for turn in np.linspace(0, 2 * math.pi, 80):
            far = 4 + 5 * number + 2.5 * math.sin(3 * turn + 0.4 * number)
            ring.append((58 + 1.4 * far * math.cos(turn), 30 + far * 0.8 * math.sin(turn)))
        canvas.line(ring, (165, 110, 60), 0.9 if number % 5 == 0 else 0.45)
    path = [(0, 60), (24, 50), (40, 44), (52, 34), (58, 30)]
    for (x0, y0), (x1, y1) in itertools.pairwise(path):
        for step in range(6):
            near, far = step / 6, (step + 0.5) / 6
            ends = [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (near, far)]
            canvas.line(ends, (190, 30, 60), 0.9)
    canvas.shape([(58, 26), (61, 31), (55, 31)], _BLACK)
    canvas.text((63, 24), "1842", _BLACK, "arial", 7)
    return ()


def _tower(canvas: Canvas, _rng: np.random.Generator) -> Sequence[str]:
    canvas.shape([(10, 64), (10, 2), (70, 8), (70, 64)], (176, 190, 205))
    for row in range(22):
        y = 4 + 2.8 * row
        canvas.line([(10, y), (70, 8 + (y - 2) * 0.9)], (96, 108, 125), 0.5)
    for column in range(25):
        x = 10 + 60 * (1 - (1 - column / 24) ** 1.3)
        canvas.line([(x, 2 + (x - 10) / 10), (x, 64)], (120, 132, 150), 0.5)
    canvas.box((74, 20, 108, 64), (205, 185, 160))
    for row in range(14):
        for column in range(11):
            x, y = 75.5 + 3 * column, 22 + 3 * row
            canvas.box((x, y, x + 1.6, y + 2), (70, 75, 90))
    return ()


def _facade(canvas: Canvas, rng: np.random.Generator) -> Sequence[str]:
    for row in range(32):
        y = 2 * row
        canvas.line([(0, y), (WIDTH, y)], (205, 190, 180), 0.35)
        for x in range(0, WIDTH, 4):
            at = x + 2 * (row % 2)
            canvas.line([(at, y), (at, y + 2)], (205, 190, 180), 0.35)
    for column in range(5):
        for row in range(2):
            x, y = 6 + 21 * column, 5 + 31 * row
            canvas.box((x, y, x + 14, y + 22), (235, 230, 220))
            canvas.box((x + 2, y + 2, x + 12, y + 20), (60, 75, 95))
            canvas.line([(x + 7, y + 2), (x + 7, y + 20)], (235, 230, 220), 0.8)
            for bar in (8, 14):
                canvas.line([(x + 2, y + bar), (x + 12, y + bar)], (235, 230, 220), 0.6)
            if rng.random() < 0.5:
                for slat in range(9):
                    high = y + 2.5 + 2 * slat
                    canvas.line([(x + 2, high), (x + 12, high)], (150, 120, 80), 0.7)
    return ()


_PAPER = (255, 255, 255)
_CLEAR = (255, 255, 255, 0)
DRAWINGS: Sequence[Drawing] = (
    Drawing("page sans", "text", _PAPER, _page("sans", _BLACK)),
    Drawing("page arial", "text", _PAPER, _page("arial", _BLACK)),
    Drawing("page serif", "text", _PAPER, _page("serif", _BLACK)),
    Drawing("page mono", "text", _PAPER, _page("mono", _BLACK)),
    Drawing("page night", "text", _BLACK, _page("sans", _WHITE)),
    Drawing(
        "cyrillic greek",
        "text",
        _PAPER,
        _foreign("sans", ("Река бежит под мостом", "Το ποτάμι κυλά", "Утро в саду", "Γη Ωκεανός")),  # noqa: RUF001
    ),
    Drawing(
        "arabic hebrew",
        "text",
        _PAPER,
        _foreign("arabic", ("النهر يجري تحت الجسر", "صباح الخير يا مدينة", "كتاب قديم", "بيت")),
    ),
    Drawing(
        "devanagari",
        "text",
        _PAPER,
        _foreign("devanagari", ("नदी पुल के नीचे बहती है", "सुबह का बाज़ार", "पुरानी किताब", "घर")),
    ),
    Drawing("window", "screen", (90, 140, 140), _window),
    Drawing("editor", "screen", (30, 30, 36), _editor),
    Drawing("sheet", "screen", _PAPER, _sheet),
    Drawing("menu", "screen", (225, 228, 232), _menu),
    Drawing("ink", "lines", _PAPER, _ink),
    Drawing("plan", "lines", _PAPER, _plan),
    Drawing("icons", "icons", _CLEAR, _icons),
    Drawing("badges", "icons", _CLEAR, _badges),
    Drawing("town map", "map", (242, 239, 233), _town),
    Drawing("contour map", "map", (250, 247, 236), _heights),
    Drawing("tower", "houses", (215, 230, 245), _tower),
    Drawing("facade", "houses", (178, 92, 70), _facade),
)


# What is read off a result.


def kept_extremes(picture: Picture, truth: Picture, scale: int) -> Mapping[str, tuple[int, int]]:
    """Return, for pure white and pure black, how many pixels stay so, and how many there are.

    Counted are pixels of the truth that are at least one pixel of the small picture from any
    other colour; white stays white at 254 or more of 255 in each channel, black at 1 or less.
    """
    kernel = np.ones((2 * scale + 1, 2 * scale + 1), np.uint8)
    found = {}
    for name, sign in (("white", 1), ("black", -1)):
        there = np.all(truth == (1 if sign > 0 else 0), axis=2).astype(np.uint8)
        inside = cv2.erode(there, kernel, borderValue=1).astype(bool)
        near = picture >= 253.5 / 255 if sign > 0 else picture <= 1.5 / 255
        stay = np.asarray(np.all(near, axis=2)) & inside
        found[name] = (int(stay.sum()), int(inside.sum()))
    return found


def can_read() -> bool:
    """Whether tesseract is on this machine."""
    return shutil.which("tesseract") is not None


def read_text(picture: Picture) -> str:
    """Return what tesseract reads in a picture of one block of English text."""
    levels = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.png"
        # Margins help it to find the first line.
        bordered = cv2.copyMakeBorder(levels, 24, 24, 24, 24, cv2.BORDER_REPLICATE)
        Image.fromarray(bordered).save(path, dpi=(300, 300))
        command = ["tesseract", str(path), "-", "--psm", "6", "-l", "eng"]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={"OMP_THREAD_LIMIT": "1"}
        )
    return done.stdout


def right_characters(found: str, lines: Sequence[str]) -> int:
    """Return how many characters of the lines, without spaces, were read right, in their order.

    The length of the longest common subsequence, less what was read beyond it.
    """
    truth, read = ("".join("".join(text).split()) for text in (lines, found))
    previous = np.zeros(len(truth) + 1, np.int64)
    letters = np.array([ord(letter) for letter in truth])
    for letter in read:
        diagonal = previous[:-1] + (letters == ord(letter))
        row = np.concatenate([[0], np.maximum(previous[1:], diagonal)])
        previous = np.maximum.accumulate(row)
    common = int(previous[-1])
    return max(0, common - max(0, len(read) - len(truth)))
