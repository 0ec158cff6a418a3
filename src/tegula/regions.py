"""Regions: prompts for parts of a picture, in pixels of the source, of the result, or as shares."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tegula.errors import OptionError

_NUMBER = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*"
_REGION_FORM = re.compile(rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}:(.*)", re.DOTALL)
_FEATHER = 0.125
"""Share of a region's shorter side over which it fades in."""


@dataclass(frozen=True)
class Region:
    """A rectangle of the source, as shares of its width and height, and what it shows."""

    x: float
    y: float
    width: float
    height: float
    prompt: str


@dataclass(frozen=True)
class PlacedRegion:
    """A region in pixels of the result: its edges, how far inside it fades in, its prompt."""

    left: float
    top: float
    right: float
    bottom: float
    feather: float
    prompt: str


def parse_region(text: str, source: tuple[int, int] | None = None) -> Region:
    """Read ``x,y,width,height:prompt``.

    The numbers are pixels of the source or, when none is above 1, shares of it.

    Args:
        text: as above; the prompt may hold colons.
        source: width and height of the source in pixels; None checks the form alone.

    Raises:
        OptionError: it has another form, or lies outside the source.
    """
    found = _REGION_FORM.fullmatch(text)
    if found is None or not found[5].strip():
        raise OptionError(
            f"A region is x,y,width,height:prompt in pixels or shares of the source, not {text!r}."
        )
    x, y, width, height = (float(number) for number in found.groups()[:4])
    sides = (1.0, 1.0) if max(x, y, width, height) <= 1 else source
    if width == 0 or height == 0:
        raise OptionError(f"The region {text!r} has no width or no height.")
    if sides is None:
        return Region(x, y, width, height, found[5].strip())
    if x >= sides[0] or y >= sides[1]:
        raise OptionError(f"The region {text!r} lies outside the picture.")
    right, bottom = min(x + width, sides[0]), min(y + height, sides[1])
    across, down = 1 / sides[0], 1 / sides[1]
    return Region(x * across, y * down, (right - x) * across, (bottom - y) * down, found[5].strip())


def place_region(
    region: Region, result: tuple[int, int], part: tuple[float, float, float, float]
) -> PlacedRegion:
    """Return where a region lies on the result.

    Args:
        region: as shares of the whole source.
        result: width and height in pixels.
        part: x, y, width and height of what is enlarged, as shares of the whole source.
    """
    across, down = result[0] / part[2], result[1] / part[3]
    return PlacedRegion(
        (region.x - part[0]) * across,
        (region.y - part[1]) * down,
        (region.x + region.width - part[0]) * across,
        (region.y + region.height - part[1]) * down,
        min(region.width * across, region.height * down) * _FEATHER,
        region.prompt,
    )
