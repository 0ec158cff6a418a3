"""The passes and tiles of prescale: what size comes after what, and who reads which pixels.

**Context.** On every inner side a tile reads ``facts.overlap`` source pixels that it does
not keep. Deep nets decide between two readings of a texture by what lies far away, so a
few pixels are not enough. Largest difference to the untiled picture, in 1/255, among the
pixels at least so many source pixels inside a tile (float32, crops of up to 352 x 352
of scikit-image's photographs chelsea, astronaut, coffee, rocket and motorcycle; x4plus:
the first three):

    source pixels             16     24     36     48     54     60     66     72
    realesrgan-animevideov3  0.14      0      0      0      0      0      0      0
    realesrgan-x4plus-anime    27     27    3.2    1.2   0.53   0.19   0.01   0.00
    realesrgan-x4plus          37     37     27    9.0    5.6    3.9    1.4   0.33*

    * astronaut and coffee only

The overlaps are 16, 60 and 80. With them, tiled and untiled chelsea at four times its
size differ by at most 0.00, 0.09 and 0.29 (6, 6 and 2 tiles); with tegula-photo, by 0.20.
Those of tegula-swift and tegula-line are 34 and 18, which is as far as their convolutions see.

**Tile size.** A pass has the fewest tiles that a side of ``DEFAULT_TILE`` allows, all of
one shape. The nets enlarge their features in strips, so a large tile costs little
memory: x4plus-anime in bfloat16 adds 0.15 GB at 256 px a side, 0.35 at 512 and 0.49 at
640 (x4plus has the same width, and 0.03 GB more weights). With 80 px of context on both
sides, a 1024 x 1024 picture costs 1.3 times its own pixels in tiles of 640 and 6
times in tiles of 256.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from tegula.images.pixels import LANCZOS_LOBES, Size
from tegula.models.prescalers import PrescalerFacts

DEFAULT_TILE = 640
SMALLEST_CORE = 32
"""Pixels a side that a tile must keep; smaller tiles are nearly all context."""
SMALLEST_INPUT = 32
"""Nets see at least this many pixels a side; smaller pictures are mirrored outwards."""
STRETCH = 1.25
"""A last resize enlarges by at most this; beyond it another pass begins."""


def plan_sizes(source: Size, target: Size, factor: int | None) -> list[Size]:
    """Return the size after each pass; the last is the target, none means no net.

    The passes before the last end at the target over the factor, so the last and most
    expensive pass lands on the target: 8x with a x4 net goes 1 -> 2 -> 8, which costs a
    quarter of 1 -> 4 -> 16 -> 8. What has to be shrunk is shrunk in the first pass.
    """
    ratio = max(target[0] / source[0], target[1] / source[1])
    if factor is None or ratio <= 1:
        return []
    sizes = [target]
    while factor > 1 and ratio > factor * STRETCH:
        sizes.insert(0, _size_before(source, sizes[0], factor))
        ratio /= factor
    return sizes


def _size_before(source: Size, size: Size, factor: int) -> Size:
    width, height = (
        max(math.ceil(larger / factor), min(smaller, larger))
        for smaller, larger in zip(source, size, strict=True)
    )
    return width, height


@dataclass(frozen=True)
class Span:
    """One tile along one axis: source pixels it reads, target pixels it writes."""

    start: int
    stop: int
    first: int
    last: int


def plan_spans(
    source: int, target: int, tile: int, context: int, grid: int = 1, step: int = 1
) -> list[Span]:
    """Cut an axis into the fewest equal tiles of at most ``tile`` source pixels.

    A tile that context would fill is made larger; so is one, by less than ``grid``, whose
    start is moved back to a multiple of it. Several tiles are as long as a multiple of
    ``step``, unless that is more than ``tile``; their neighbours share what is too much.
    Every target pixel is written by one tile, and has at least ``context`` source
    pixels around it inside that tile, or the edge of the picture.
    """
    tile = max(tile, 2 * context + SMALLEST_CORE)
    count = 1 if source <= tile else math.ceil((source - 2 * context) / (tile - 2 * context))
    length = math.ceil((source + (count - 1) * 2 * context) / count)
    if count > 1:
        length = min(-(-length // step) * step, source, max(tile, length))
    starts = [round(n * (source - length) / max(1, count - 1)) for n in range(count)]
    middles = [(a + length + b) / 2 for a, b in itertools.pairwise(starts)]
    cuts = [0, *(round(middle * target / source) for middle in middles), target]
    return [
        Span(start - start % grid, start + length, first, last)
        for start, first, last in zip(starts, cuts, cuts[1:], strict=False)
    ]


def plan_tiles(
    source: Size, size: Size, facts: PrescalerFacts, tile: int = DEFAULT_TILE
) -> list[tuple[Span, Span]]:
    """Return the vertical and horizontal span of every tile of one pass."""
    factor = facts.factor or 1
    vertical, horizontal = (
        plan_spans(a, b, tile, facts.overlap + _reach(a, b, factor), facts.grid, facts.step)
        for a, b in zip(source[::-1], size[::-1], strict=True)
    )
    return list(itertools.product(vertical, horizontal))


def _reach(source: int, target: int, factor: int) -> int:
    """Source pixels that resampling the net's result to the target reads around a cut."""
    coarser = max(1.0, source * factor / target)
    return math.ceil((LANCZOS_LOBES * coarser + 1) / factor) + 1


def padding(side: int, facts: PrescalerFacts) -> int:
    """Return how many mirrored pixels the net sees beyond each end of a side."""
    return max(facts.margin, math.ceil((SMALLEST_INPUT - side) / 2))
