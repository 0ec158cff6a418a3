"""Redraw mode in integers and numpy: which rectangles are painted, in which order.

The algorithm is that of Ultimate SD Upscale (Coyote-A): tiles on an absolute grid, each
read with some padding, diffused alone and pasted through a blurred mask, so that later
tiles see earlier ones; then passes over the borders of the grid.

Two things differ on purpose. A crop keeps its scale: it is made as large as the model
needs and never resampled, as happens there for most paddings. And it always holds the
whole blurred mask, so that a padding smaller than the blur leaves no hard edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tegula.images.pixels import Float
from tegula.options import ResolvedOptions
from tegula.pipeline.windows import Piece, Window, count_places, grid_windows

if TYPE_CHECKING:
    from tegula.models.bundle import BundleFacts

_KERNEL_DEVIATIONS = 2.5
"""Deviations that the kernel of a blur reaches to each side, as in AUTOMATIC1111's web UI."""


@dataclass(frozen=True)
class CropRule:
    """What crops a model takes: multiples of ``multiple`` from ``minimum`` up, in pixels."""

    minimum: int
    multiple: int

    def fit(self, side: int) -> int:
        """Return the smallest side of a crop that holds ``side``."""
        return max(-(-side // self.multiple) * self.multiple, self.minimum)


@dataclass(frozen=True)
class RedrawTile:
    """One tile: the rectangle of its mask, which may leave the picture, and what is read.

    crop: lies on the canvas: the picture, extended where a crop is larger than it.
    painted: where the blurred mask may be above zero; inside the picture and the crop.
    """

    area: Window
    crop: Window
    painted: Window


@dataclass(frozen=True)
class RedrawPass:
    """Tiles that are painted in this order, with masks of one shape.

    shape: ``flat``, a ramp up to the middle and down again along ``x`` or ``y``, or
        ``radial``, falling from the centre.
    seam_fix: takes the denoise strength of the seam fix.
    """

    tiles: tuple[RedrawTile, ...]
    shape: str
    blur: int
    picture: tuple[int, int]
    seam_fix: bool = False

    def mask(self, tile: RedrawTile) -> Float:
        """Return [crop height, crop width] in 0..1: how far the tile replaces the canvas."""
        area, crop = tile.area, tile.crop
        width, height = self.picture
        return _mask(
            self.shape,
            (area.width, area.height),
            (area.x - crop.x, area.y - crop.y),
            (crop.width, crop.height),
            (min(crop.width, width - crop.x), min(crop.height, height - crop.y)),
            (crop.x == 0, crop.x + crop.width >= width),
            (crop.y == 0, crop.y + crop.height >= height),
            self.blur,
        )

    def one_by_one(self) -> tuple[tuple[int, ...], ...]:
        """Return the indices of the tiles in runs of one."""
        return tuple((index,) for index in range(len(self.tiles)))

    def fronts(self) -> tuple[tuple[int, ...], ...]:
        """Return the indices of the tiles in runs that may be computed at once.

        All tiles of a run read the canvas before any of them is pasted, and then they are
        pasted in order. The picture is the one that the tiles give one by one, because of
        two rules on every pair of an earlier and a later tile:

        * The later one reads what the earlier one paints: it must see the painting, so it
          belongs to a run behind that of the earlier one.
        * The later one paints what the earlier one reads: the earlier one must not see the
          painting, so the later one may share its run but not come in one before it.

        Where both paint the same pixels, one of the rules holds too, as a tile reads all
        that it paints. The first run that the rules allow is taken. Row by row with
        tiles that read their neighbours, the runs are slanted lines that move over the
        picture from its top left corner, hence the name.
        """
        runs: dict[int, list[int]] = {}
        run_of: list[int] = []
        for later, tile in enumerate(self.tiles):
            run = 0
            for other, other_run in zip(self.tiles[:later], run_of, strict=True):
                if overlap(tile.crop, other.painted):
                    run = max(run, other_run + 1)
                elif overlap(tile.painted, other.crop):
                    run = max(run, other_run)
            run_of.append(run)
            runs.setdefault(run, []).append(later)
        return tuple(tuple(runs[run]) for run in sorted(runs))


@dataclass(frozen=True)
class RedrawPlan:
    """The passes over a picture, and the canvas that all their crops lie on."""

    width: int
    height: int
    passes: tuple[RedrawPass, ...]


def lay_out_tiles(width: int, height: int, options: ResolvedOptions, rule: CropRule) -> RedrawPlan:
    """Lay out the tiles of a picture and of the seam fix.

    Args:
        width: of the picture, in pixels, at least 1.
        height: of the picture, in pixels, at least 1.
        options: tile sizes, order, masks and seam fix.
        rule: what crops the model takes.
    """
    layout = _Layout(width, height, options, rule)
    passes = tuple(p for p in (layout.redraw(), *layout.seam_fix()) if p.tiles)
    crops = [tile.crop for p in passes for tile in p.tiles]
    return RedrawPlan(
        max([width, *(crop.x + crop.width for crop in crops)]),
        max([height, *(crop.y + crop.height for crop in crops)]),
        passes,
    )


def redraw_plan(facts: BundleFacts, options: ResolvedOptions) -> RedrawPlan:
    """Return the passes of an upscale that change anything, with crops that the model takes."""
    return lay_out_tiles(options.width, options.height, options, _rule(facts))


def strength_of(tiles: RedrawPass, options: ResolvedOptions) -> float:
    """Return the denoise strength of a pass."""
    return options.seam_fix_denoise if tiles.seam_fix else options.creativity


def piece_of(
    tiles: RedrawPass, tile: RedrawTile, facts: BundleFacts, options: ResolvedOptions
) -> Piece:
    """Return the crop of a tile with its windows: one, but for bands longer than a tile.

    Bands reach over the whole picture; in windows they need no more memory than tiles.
    """
    factor = facts.latent_factor
    width, height = tile.crop.width // factor, tile.crop.height // factor
    side = max(width, height)
    if tiles.seam_fix and options.seam_fix == "band":
        side = _rule(facts).fit(max(options.tile_width, options.tile_height)) // factor
    return Piece(tile.crop, grid_windows(width, height, side, side, options.overlap))


def evaluations_of(
    tiles: RedrawPass, tile: RedrawTile, facts: BundleFacts, options: ResolvedOptions
) -> int:
    """Return how many evaluations a tile takes in one step, one for each prompt in a window."""
    windows = piece_of(tiles, tile, facts, options).windows(facts.latent_factor)
    return count_places(options.placed_regions, windows, facts.latent_factor)


def _rule(facts: BundleFacts) -> CropRule:
    return CropRule(facts.minimum_window, facts.window_multiple)


@dataclass(frozen=True)
class _Layout:
    width: int
    height: int
    options: ResolvedOptions
    rule: CropRule

    @property
    def columns(self) -> int:
        return math.ceil(self.width / self.options.tile_width)

    @property
    def rows(self) -> int:
        return math.ceil(self.height / self.options.tile_height)

    def redraw(self) -> RedrawPass:
        options = self.options
        order = options.tile_order if options.creativity > 0 else "none"
        areas = [self._tile(x, y) for x, y in ordered(self.columns, self.rows, order)]
        return self._pass(areas, "flat", options.tile_blur, options.tile_padding, seam_fix=False)

    def seam_fix(self) -> Iterator[RedrawPass]:
        options = self.options
        if options.seam_fix_denoise == 0 or options.seam_fix == "none":
            return
        padding, blur = options.seam_fix_padding, options.seam_fix_blur
        if options.seam_fix == "band":
            width, half = options.seam_fix_width, options.seam_fix_width // 2
            vertical = [
                Window(column * options.tile_width - half, 0, width, self.height)
                for column in range(1, self.columns)
            ]
            horizontal = [
                Window(0, row * options.tile_height - half, self.width, width)
                for row in range(1, self.rows)
            ]
            yield self._pass(vertical, "x", 0, padding)
            yield self._pass(horizontal, "y", 0, padding)
            return
        half_x, half_y = options.tile_width // 2, options.tile_height // 2
        columns, rows = range(self.columns), range(self.rows)
        below = [self._tile(x, y, 0, half_y) for y in rows[:-1] for x in columns]
        beside = [self._tile(x, y, half_x, 0) for y in rows for x in columns[:-1]]
        yield self._pass(below, "y", blur, padding)
        yield self._pass(beside, "x", blur, padding)
        if options.seam_fix == "half-tile+intersections":
            between = [self._tile(x, y, half_x, half_y) for y in rows[:-1] for x in columns[:-1]]
            yield self._pass(between, "radial", blur, 0)

    def _tile(self, column: int, row: int, right: int = 0, down: int = 0) -> Window:
        width, height = self.options.tile_width, self.options.tile_height
        return Window(column * width + right, row * height + down, width, height)

    def _pass(
        self,
        areas: Iterable[Window],
        shape: str,
        blur: int,
        padding: int,
        *,
        seam_fix: bool = True,
    ) -> RedrawPass:
        reach = blur_reach(blur)
        tiles = tuple(self._placed(area, max(padding, reach), reach) for area in areas)
        return RedrawPass(tiles, shape, blur, (self.width, self.height), seam_fix)

    def _placed(self, area: Window, padding: int, reach: int) -> RedrawTile:
        x, width = self._crop_side(area.x, area.width, padding, self.width)
        y, height = self._crop_side(area.y, area.height, padding, self.height)
        left, right = _clip(area.x - reach, area.x + area.width + reach, self.width)
        top, bottom = _clip(area.y - reach, area.y + area.height + reach, self.height)
        painted = Window(left, top, right - left, bottom - top)
        return RedrawTile(area, Window(x, y, width, height), painted)

    def _crop_side(self, start: int, length: int, padding: int, limit: int) -> tuple[int, int]:
        low, high = _clip(start - padding, start + length + padding, limit)
        uniform = min(length + 2 * padding, limit)
        target = self.rule.fit(uniform if self.options.tile_uniform else high - low)
        low, high = grow(low, high, target, max(limit, target))
        return low, high - low


def ordered(columns: int, rows: int, order: str) -> Iterator[tuple[int, int]]:
    """Yield (column, row) of a grid: row by row, by chess colours, or none at all."""
    everywhere = [(x, y) for y in range(rows) for x in range(columns)]
    if order == "linear":
        yield from everywhere
    elif order == "chess":
        for colour in (0, 1):
            yield from ((x, y) for x, y in everywhere if (x + y) % 2 == colour)


def grow(low: int, high: int, target: int, limit: int) -> tuple[int, int]:
    """Lengthen a stretch to ``target`` within 0..limit: right by half, then left, then right."""
    high = min(high + (target - (high - low)) // 2, limit)
    low = max(high - target, 0)
    return low, min(low + target, limit)


def overlap(first: Window, second: Window) -> bool:
    """Tell whether two rectangles share a pixel."""
    return (
        first.x < second.x + second.width
        and second.x < first.x + first.width
        and first.y < second.y + second.height
        and second.y < first.y + first.height
    )


def blur_reach(blur: int) -> int:
    """Return how many pixels a Gaussian blur of this deviation spreads to each side."""
    return int(_KERNEL_DEVIATIONS * blur + 0.5)


def _clip(low: int, high: int, limit: int) -> tuple[int, int]:
    return max(low, 0), min(high, limit)


@lru_cache(maxsize=64)
def _mask(
    shape: str,
    area: tuple[int, int],
    at: tuple[int, int],
    crop: tuple[int, int],
    inside: tuple[int, int],
    ends_across: tuple[bool, bool],
    ends_down: tuple[bool, bool],
    blur: int,
) -> Float:
    """Blur the shape of an area on its crop; the edge of the picture counts as repeated.

    area, crop: width and height; at: the area's corner on the crop; inside: the part of
    the crop that is picture; ends: whether the picture ends left and right, above and
    below.
    """
    mask = np.zeros((inside[1], inside[0]), np.float32)
    left, top = max(at[0], 0), max(at[1], 0)
    right, bottom = min(at[0] + area[0], inside[0]), min(at[1] + area[1], inside[1])
    cut = slice(top - at[1], bottom - at[1]), slice(left - at[0], right - at[0])
    mask[top:bottom, left:right] = _SHAPES[shape](*area)[cut]
    mask = _blurred(_blurred(mask, blur, ends_across).T, blur, ends_down).T
    rest = ((0, crop[1] - inside[1]), (0, crop[0] - inside[0]))
    padded: Float = np.pad(mask, rest)
    padded.setflags(write=False)
    return padded


def _blurred(mask: Float, blur: int, ends: tuple[bool, bool]) -> Float:
    """Blur along the last axis, repeating the edge at an end of the picture."""
    if blur == 0:
        return mask
    reach = blur_reach(blur)
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1) / blur) / 2)
    kernel /= kernel.sum()
    length = mask.shape[1]
    wide = np.zeros((mask.shape[0], length + 2 * reach), np.float64)
    wide[:, reach : reach + length] = mask
    wide[:, :reach] = mask[:, :1] if ends[0] else 0
    wide[:, reach + length :] = mask[:, -1:] if ends[1] else 0
    out = sum(weight * wide[:, at : at + length] for at, weight in enumerate(kernel))
    return np.asarray(out, np.float32)


def _flat(width: int, height: int) -> Float:
    return np.ones((height, width), np.float32)


def _ramp(width: int, height: int) -> Float:
    """Rise from the left edge to the middle and fall again."""
    middles = np.arange(width, dtype=np.float32) + np.float32(0.5)
    profile = np.minimum(middles, width - middles) * np.float32(2 / width)
    return np.broadcast_to(profile, (height, width))


def _radial(width: int, height: int) -> Float:
    """Fall from the centre to the inscribed ellipse, outside which there is nothing."""
    x = (np.arange(width) + 0.5) / width * 2 - 1
    y = (np.arange(height) + 0.5) / height * 2 - 1
    return np.asarray(np.maximum(0, 1 - np.hypot(x[None], y[:, None])), np.float32)


_SHAPES: dict[str, Callable[[int, int], Float]] = {
    "flat": _flat,
    "x": _ramp,
    "y": lambda width, height: _ramp(height, width).T,
    "radial": _radial,
}
