"""A canvas to draw on at random, and the fonts to write with.

Lengths are pixels of the small picture, and what is drawn is larger than the truth and averaged,
so that edges are smooth.

Fonts are whatever TrueType and OpenType fonts are found; Debian's ``fonts-dejavu``,
``fonts-liberation``, ``fonts-noto-core``, ``fonts-lato``, ``fonts-roboto-unhinted``,
``fonts-open-sans``, ``fonts-crosextra-carlito``, ``fonts-ebgaramond``, ``fonts-comic-neue``,
``fonts-firacode``, ``fonts-cantarell`` and ``fonts-inter`` for what is shipped.
"""

from __future__ import annotations

import colorsys
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

FACTOR = 4
_FINER = 3
_UNIT = FACTOR * _FINER
WHITE, BLACK = (255, 255, 255), (0, 0, 0)

NOT_TRAINED_ON = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf",
    "LiberationSerif-Regular.ttf", "LiberationSans-Regular.ttf",
    "NotoNaskhArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf",
)  # fmt: skip
"""The fonts of the bench."""

_FOLDERS = ("/usr/share/fonts",)
_LATIN = (
    "DejaVu", "Liberation", "Lato", "Roboto", "OpenSans", "Carlito", "EBGaramond", "ComicNeue",
    "FiraCode", "Cantarell", "Inter", "NotoSans-", "NotoSerif-", "NotoSansDisplay",
    "NotoSerifDisplay",
)  # fmt: skip
_SCRIPTS = {
    "Arabic": (0x621, 0x64A), "Nastaliq": (0x621, 0x64A), "Hebrew": (0x5D0, 0x5EA),
    "Devanagari": (0x905, 0x94D), "Thai": (0xE01, 0xE39), "Bengali": (0x995, 0x9B9),
    "Tamil-": (0xB85, 0xBB9), "Telugu": (0xC05, 0xC39), "Kannada": (0xC85, 0xCB9),
    "Malayalam": (0xD05, 0xD39), "Georgian": (0x10D0, 0x10F0), "Armenian": (0x561, 0x586),
    "Ethiopic": (0x1200, 0x1248), "Khmer-": (0x1780, 0x17A2), "Lao": (0xE81, 0xEB0),
    "Myanmar": (0x1000, 0x1021), "Sinhala": (0xD85, 0xDC6), "Gujarati": (0xA85, 0xAB9),
    "Gurmukhi": (0xA05, 0xA39), "Yi-": (0xA000, 0xA48C), "Tangut": (0x17000, 0x17200),
    "Tibetan": (0xF40, 0xF69), "Math": (0x2200, 0x22FF), "Symbols2": (0x2600, 0x26FF),
}  # fmt: skip
"""The letters that are drawn of a font, by a part of its name. Yi and Tangut are as dense as
Chinese, of which the packages hold no small font."""
_CYRILLIC, _GREEK = (0x410, 0x44F), (0x391, 0x3C9)
_PARTS = (
    "an ber co da el fi gra ho in jo ka lu mer no or pen qui re sto ta un ver wa xi yo zu ch th "
    "ing ed ly tion al ous str ff mm ll rn il"
)
_SYLLABLES = _PARTS.split()
_MARKS = ".,:;!?-+*/=()[]{}<>&%$#@\"'"


@dataclass(frozen=True)
class Face:
    """One font, and the ranges of letters to take from it; none: Latin words."""

    path: str
    letters: tuple[int, int] | None


def find_faces(folders: Sequence[str] = ()) -> list[Face]:
    """Return the fonts below these folders and the system's, but for the bench's.

    ``TEGULA_TRAIN_FONTS`` names more folders, separated as in ``PATH``.
    """
    more = os.environ.get("TEGULA_TRAIN_FONTS", "").split(os.pathsep)
    paths = {
        path.name: path
        for folder in (*_FOLDERS, *more, *folders)
        if folder
        for path in sorted(Path(folder).rglob("*.[to]tf"))
        if path.name not in NOT_TRAINED_ON
    }
    faces = []
    for name, path in sorted(paths.items()):
        if name.startswith(_LATIN):
            faces.append(Face(str(path), None))
            if name.startswith(("DejaVu", "Liberation", "NotoSans-", "NotoSerif-", "Roboto")):
                faces += [Face(str(path), _CYRILLIC), Face(str(path), _GREEK)]
        else:
            faces += [Face(str(path), span) for key, span in _SCRIPTS.items() if key in name][:1]
    if not faces:
        raise SystemExit("No fonts found; apt install fonts-dejavu fonts-liberation.")
    return faces


@functools.lru_cache(maxsize=512)
def _font(path: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, pixels)


class Sketch:
    """A canvas, the chance, and the fonts; lengths in pixels of the small picture."""

    def __init__(self, side: int, rng: np.random.Generator, faces: Sequence[Face]) -> None:
        """Take the side of the small picture."""
        self.side, self.rng = side, rng
        self._latin = [face for face in faces if face.letters is None] or list(faces)
        self._other = [face for face in faces if face.letters is not None] or list(faces)
        self.image = Image.new("RGB", (side * _UNIT, side * _UNIT), WHITE)
        self._draw = ImageDraw.Draw(self.image)

    # What is drawn.

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """Draw a line through points."""
        drawn = max(1, round(width * _UNIT))
        self._draw.line(_scaled(points), fill=colour, width=drawn, joint="curve")

    def box(
        self, corners: tuple[float, float, float, float], fill: Colour | None,
        outline: Colour | None = None, width: float = 1.0, radius: float = 0.0,
    ) -> None:  # fmt: skip
        """Draw a box from its upper left to its lower right corner."""
        x0, y0, x1, y1 = (round(c * _UNIT) for c in corners)
        if x1 - x0 < 2 or y1 - y0 < 2:
            return
        drawn = max(1, round(width * _UNIT)) if outline else 0
        rounding = min(radius * _UNIT, (x1 - x0) / 2 - 1, (y1 - y0) / 2 - 1)
        self._draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), rounding, fill, outline, drawn)

    def disc(
        self, middle: Point, radius: float, fill: Colour | None,
        outline: Colour | None = None, width: float = 1.0,
    ) -> None:  # fmt: skip
        """Draw a disc or a circle."""
        x, y = middle
        corners = _scaled([(x - radius, y - radius), (x + radius, y + radius)])
        drawn = max(1, round(width * _UNIT)) if outline else 0
        self._draw.ellipse([*corners[0], *corners[1]], fill, outline, drawn)

    def shape(self, points: Sequence[Point], fill: Colour) -> None:
        """Draw a filled shape."""
        self._draw.polygon(_scaled(points), fill)

    def text(self, at: Point, words: str, colour: Colour, face: Face, size: float) -> float:
        """Write words, their upper left corner ``at``; returns their width."""
        font = _font(face.path, max(8, round(size * _UNIT)))
        self._draw.text(_scaled([at])[0], words, fill=colour, font=font)
        return float(font.getlength(words)) / _UNIT

    def gradient(self, first: Colour, last: Colour) -> None:
        """Fill everything with a slow change from one colour to another."""
        angle, side = self.rng.uniform(0, 2 * math.pi), self.image.width
        y, x = np.mgrid[:side, :side].astype(np.float32) / np.float32(side) - np.float32(0.5)
        share = (x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)) + 0.7) / 1.4
        share = np.clip(share, 0, 1)[..., None]
        levels = np.array(first) * (1 - share) + np.array(last) * share
        self.image.paste(Image.fromarray(np.rint(levels).astype(np.uint8)))

    def truth(self) -> NDArray[np.uint8]:
        """Return [4 side, 4 side, 3]."""
        size = (self.side * FACTOR, self.side * FACTOR)
        return np.asarray(cv2.resize(np.asarray(self.image), size, interpolation=cv2.INTER_AREA))

    # What is chosen.

    def chance(self, share: float) -> bool:
        """Return true so often."""
        return bool(self.rng.random() < share)

    def between(self, low: float, high: float) -> float:
        """Return a number; a whole one half the time, as programs place things."""
        value = float(self.rng.uniform(low, high))
        return round(value) if self.chance(0.5) and high - low > 2 else value

    def point(self, beyond: float = 0.0) -> Point:
        """Return a place, maybe so far outside."""
        x, y = self.rng.uniform(-beyond, self.side + beyond, 2)
        return float(x), float(y)

    def colour(self, light: tuple[float, float] = (0.0, 1.0)) -> Colour:
        """Return a colour of a lightness in this range."""
        hue, saturation = self.rng.random(), self.rng.random() ** 0.7
        values = colorsys.hls_to_rgb(hue, float(self.rng.uniform(*light)), saturation)
        red, green, blue = (round(255 * value) for value in values)
        return red, green, blue

    def pair(self) -> tuple[Colour, Colour]:
        """Return paper and ink: black on white mostly, then light and dark of any colour."""
        chosen = self.rng.random()
        if chosen < 0.45:
            return WHITE, BLACK
        if chosen < 0.55:
            return BLACK, WHITE
        if chosen < 0.65:
            return WHITE, self.colour((0.0, 0.45))
        if chosen < 0.7:
            return self.colour((0.85, 1.0)), BLACK
        light, dark = self.colour((0.6, 1.0)), self.colour((0.0, 0.4))
        return (light, dark) if self.chance(0.6) else (dark, light)

    def size(self, low: float = 6.0, high: float = 40.0) -> float:
        """Return a size of letters, small ones the most often."""
        share = self.rng.random() ** 2.2
        return float(low * (high / low) ** share)

    def face(self, latin: float = 0.8) -> Face:
        """Return a font."""
        faces = self._latin if self.chance(latin) else self._other
        return faces[int(self.rng.integers(len(faces)))]

    def word(self, face: Face) -> str:
        """Return a word in the letters of a font: no real one, so that none is learnt."""
        rng = self.rng
        if face.letters is not None:
            low, high = face.letters
            return "".join(chr(int(c)) for c in rng.integers(low, high + 1, rng.integers(1, 8)))
        chosen = rng.random()
        if chosen < 0.15:
            return str(round(float(rng.uniform(0, 9999)), int(rng.integers(0, 3))))
        if chosen < 0.35:
            letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789" + _MARKS
            return "".join(rng.choice(list(letters), int(rng.integers(2, 8))))
        word = "".join(rng.choice(_SYLLABLES, int(rng.integers(1, 4))))
        word = word.capitalize() if chosen < 0.5 else word.upper() if chosen < 0.56 else word
        return word + (str(rng.choice(list(".,;:!?"))) if rng.random() < 0.12 else "")

    def words(self, face: Face, count: int) -> str:
        """Return so many words."""
        return " ".join(self.word(face) for _ in range(count))


def _scaled(points: Sequence[Point]) -> list[Point]:
    return [(x * _UNIT, y * _UNIT) for x, y in points]
