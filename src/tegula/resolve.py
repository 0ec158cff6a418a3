"""From the options of a caller to those of one upscale: sizes, crops, and what was left open."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

from tegula.errors import OptionError, TooLargeError
from tegula.options import Preset, PresetValues, ResolvedOptions, UpscaleOptions
from tegula.regions import parse_region, place_region

_CONTEXT = 32
"""Source pixels around a crop: what the prescalers look at around a place, for the most part."""

_GRID = 64
"""Pixels of the result; what a latent pixel of any depth of the nets covers divides it."""


def enlargement(options: UpscaleOptions, width: int, height: int) -> tuple[float, float]:
    """Return how many times as wide and as high a whole source of this size becomes."""
    if options.size is not None:
        return options.size[0] / width, options.size[1] / height
    if options.resolution is not None:
        return (options.resolution / min(width, height),) * 2
    return (2.0 if options.scale is None else options.scale,) * 2


def target_size(options: UpscaleOptions, width: int, height: int) -> tuple[int, int]:
    """Return the width and height of the result for a whole source of this size.

    A crop is enlarged as it would be within the whole.

    Raises:
        TooLargeError: the result would have more pixels than ``options.max_pixels``.
    """
    factors = enlargement(options, width, height)
    if options.crop is not None:
        width, height = options.crop[2:]
    target = max(1, round(width * factors[0])), max(1, round(height * factors[1]))
    if target[0] * target[1] > options.max_pixels:
        raise TooLargeError(
            f"The result would be {target[0]}x{target[1]} = {target[0] * target[1]:,} pixels; "
            f"at most {options.max_pixels:,} are allowed (max_pixels)."
        )
    return target


def enlarged_part(
    options: UpscaleOptions, source_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return x, y, width and height of what is enlarged, as shares of the whole source."""
    if options.crop is None:
        return 0.0, 0.0, 1.0, 1.0
    (x, y, across, down), (width, height) = options.crop, source_size
    return x / width, y / height, across / width, down / height


def with_context(options: UpscaleOptions, source_size: tuple[int, int]) -> UpscaleOptions:
    """Widen a crop so that its middle becomes what it becomes within the whole picture.

    Nets look at what lies around a place, and they answer differently when their grid lies
    elsewhere. So the part that is really enlarged is wider on all sides, and begins where
    the nets' grid has a line in the whole, as nearly as whole source pixels allow.

    Raises:
        OptionError: the crop leaves the picture.
    """
    if options.crop is None:
        return options
    starts, sides = [], []
    factors = enlargement(options, *source_size)
    for start, side, length, factor in zip(
        options.crop[:2], options.crop[2:], source_size, factors, strict=True
    ):
        if side < 1 or start + side > length:
            raise OptionError(
                f"The crop {','.join(map(str, options.crop))} leaves the picture, which is "
                f"{source_size[0]}x{source_size[1]}; give x,y,width,height inside it."
            )
        latest = max(0, start - _CONTEXT)
        candidates = range(latest, max(-1, latest - math.ceil(_GRID / factor) - 1), -1)
        first = min(candidates, key=lambda at: round(abs(math.remainder(at * factor, _GRID)), 6))
        starts.append(first)
        sides.append(min(length, start + side + _CONTEXT) - first)
    wider = options.model_copy(update={"crop": (*starts, *sides)})
    pixels = math.prod(side * factor for side, factor in zip(sides, factors, strict=True))
    return wider if pixels <= options.max_pixels else options


def preset_values(presets: Mapping[str, PresetValues], name: Preset) -> PresetValues:
    """Return the values of a preset of a bundle.

    ``exact`` follows from ``faithful``: no diffusion invents anything, and the result is held.
    ``best`` is ``balanced``; the look of the source chooses its net without regard to time.
    """
    if name == "best":
        return presets["balanced"]
    if name == "exact":
        return presets["faithful"].replaced(creativity=0.0, exact=True)
    return presets[name]


def resolve(
    options: UpscaleOptions,
    presets: Mapping[str, PresetValues],
    default_window: int,
    source_size: tuple[int, int],
    chosen: Mapping[str, Any] | None = None,
) -> ResolvedOptions:
    """Fill what the caller left open from the preset, and draw a seed if none is given.

    What was chosen by the look of the source goes before the preset, and what the caller gives
    before both.

    Raises:
        TooLargeError: the result would have more pixels than ``options.max_pixels``.
        OptionError: a region lies outside the source.
    """
    size = target_size(options, *source_size)
    part = enlarged_part(options, source_size)
    regions = (parse_region(text, source_size) for text in options.regions)
    open_otherwise = {
        **dict(preset_values(presets, options.preset)),
        "window": default_window,
        "seed": secrets.randbits(31),
        "drawing_prescaler": "",
        "drawing_share": 1.0,
        "hold_drawings": False,
        "keep_grey": False,
        "mend_jpeg": False,
        "mend_chroma": False,
        "mend_blur": 0.0,
        "mend_flat": 0.0,
        "likeness": 0.0,
        **(chosen or {}),
    }
    given = {name: value for name, value in options if value is not None}
    whole, offset = None, (0, 0)
    if options.crop is not None:
        across, down = enlargement(options, *source_size)
        whole = max(1, round(source_size[0] * across)), max(1, round(source_size[1] * down))
        offset = round(options.crop[0] * across), round(options.crop[1] * down)
    return ResolvedOptions(
        **{
            **open_otherwise,
            **given,
            "width": size[0],
            "height": size[1],
            "whole": whole,
            "offset": offset,
            "placed_regions": tuple(place_region(region, size, part) for region in regions),
        }
    )
