"""Prescale: a feed-forward net brings the picture to the size of the result.

The picture runs through the net in tiles, and each tile's result is resampled to its
place in the target at once, so that memory holds the source, the target and one tile,
never the picture at the net's own factor.

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

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tegula.images.pixels import LANCZOS_LOBES, Size
from tegula.models.prescalers import Prescaler, PrescalerFacts
from tegula.models.retry import first_finite, until_it_fits
from tegula.pipeline.exact import hold_to_source, is_enlarged
from tegula.pipeline.pictures import (
    enlarge_alpha,
    enlarge_lanczos,
    extend,
    outlines,
    resample_box,
    resize_linear,
)
from tegula.pipeline.prescale_work import watched, work_of_a_pixel
from tegula.pipeline.preview import PastedPreview
from tegula.progress import SILENT, StageProgress

DEFAULT_TILE = 640
SMALLEST_CORE = 32
"""Pixels a side that a tile must keep; smaller tiles are nearly all context."""
SMALLEST_INPUT = 32
"""Nets see at least this many pixels a side; smaller pictures are mirrored outwards."""
_ALPHA_ROUNDS = 6
"""In which enlarged alpha is held to its source."""
STRETCH = 1.25
"""A last resize enlarges by at most this; beyond it another pass begins."""


@torch.inference_mode()
def prescale(
    rgb: Tensor,
    target: Size,
    prescaler: Prescaler,
    *,
    progress: StageProgress = SILENT,
) -> Tensor:
    """Enlarge a picture to exactly the target size.

    A target no larger than the source is resampled without the net.

    Args:
        rgb: float32 [height, width, 3], sRGB in 0..1, at least 1x1. The result lies where it
            does, whatever device the net runs on; only tiles go to and fro.
        target: width and height of the result in pixels.
        prescaler: from ``load_prescaler``.
        progress: counts tiles; the total grows if they had to be made smaller. Its cancel
            is checked before every layer of the net, and its share grows after every layer
            by the work of it. It is shown the source, enlarged softly, and over it the tiles
            of the last pass as they are ready.

    Returns:
        float32 [target[1], target[0], 3] in 0..1.

    Raises:
        CancelledError: the caller wants to stop.
        NumericalError: the net returned NaN or infinity in float32 too.
        OutOfMemoryError: not even the smallest tile fits.
    """
    progress.cancel.check()
    source = (rgb.shape[1], rgb.shape[0])
    smallest = 2 * prescaler.facts.overlap + SMALLEST_CORE
    sizes = plan_sizes(source, target, prescaler.facts.factor)
    if not sizes:
        progress.on_unit(1, 1)
        return enlarge_lanczos(rgb, target)
    preview = PastedPreview(rgb, target, progress.on_picture)
    done, side = _Done(), max(DEFAULT_TILE, smallest)
    for index, size in enumerate(sizes):
        later = list(itertools.pairwise(sizes[index:]))
        shown = None if later else preview
        enlarge = partial(_enlarge, rgb, size, prescaler, progress, done, later, shown)
        # A tile that was too large for one pass is too large for the next, too.
        (rgb, done), side = until_it_fits(
            enlarge,
            side,
            lambda failed: max(failed // 2, smallest) if failed > smallest else None,
            f"A tile of {smallest} px does not fit into memory; take a smaller prescaler, free "
            "memory, or compute on the CPU.",
        )
    return rgb


@torch.inference_mode()
def prescale_mixed(
    rgb: Tensor,
    target: Size,
    nets: tuple[Prescaler, Prescaler],
    second: Tensor,
    progress: StageProgress = SILENT,
) -> Tensor:
    """Enlarge a picture by two nets and blend what they made, softly.

    Args:
        rgb: float32 [height, width, 3], sRGB in 0..1, at least 1x1.
        target: width and height of the result in pixels.
        nets: the first and the second.
        second: float32 [target[1], target[0]] in 0..1, the share of the second net; it lies
            where ``rgb`` does.
        progress: counts the tiles of both, as far as they are alike.

    Returns:
        float32 [target[1], target[0], 3] in 0..1.

    Raises:
        CancelledError, NumericalError, OutOfMemoryError: as ``prescale`` does.
    """
    source = rgb.shape[1], rgb.shape[0]
    first = _work_of_passes(nets[0], source, target)
    first_share = first / max(1.0, first + _work_of_passes(nets[1], source, target))

    def part(number: int) -> StageProgress:
        def on_unit(done: int, total: int) -> None:
            progress.on_unit(done + number * total, 2 * total)

        of_work = progress.part(first_share, 1.0) if number else progress.part(0.0, first_share)
        on_picture = None if number else progress.on_picture
        return dataclasses.replace(of_work, on_unit=on_unit, on_picture=on_picture)

    result, other = (
        prescale(rgb, target, net, progress=part(number)) for number, net in enumerate(nets)
    )
    return result.lerp_(other, second[..., None])


@torch.inference_mode()
def prescale_alpha(
    alpha: Tensor, target: Size, prescaler: Prescaler, progress: StageProgress = SILENT
) -> Tensor:
    """Enlarge alpha by the net of the picture where it has outlines, and by resampling elsewhere.

    Resampling leaves a rim around a crisp icon that is as wide as the factor. What the net
    makes is held to the source, or it would leave a haze where nothing is.

    Args:
        alpha: float32 [height, width] in 0..1.
        target: width and height of the result in pixels.
        prescaler: that of the picture.
        progress: of this part of the work alone.

    Returns:
        float32 [target[1], target[0]] in 0..1.

    Raises:
        CancelledError, NumericalError, OutOfMemoryError: as ``prescale`` does.
    """
    smooth, size = enlarge_alpha(alpha, *target), (alpha.shape[1], alpha.shape[0])
    edges = outlines(alpha)
    if edges is None or not plan_sizes(size, target, prescaler.facts.factor):
        return smooth
    grey = alpha[..., None].expand(-1, -1, 3)
    net = prescale(grey, target, prescaler, progress=progress).mean(2)
    if is_enlarged(target, size):
        hold_to_source(net[..., None], alpha[..., None], rounds=_ALPHA_ROUNDS)
    return smooth.lerp_(net, resize_linear(edges, target)).clamp_(0, 1)


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


def plan_spans(source: int, target: int, tile: int, context: int, grid: int = 1) -> list[Span]:
    """Cut an axis into the fewest equal tiles of at most ``tile`` source pixels.

    A tile that context would fill is made larger; so is one, by less than ``grid``, whose
    start is moved back to a multiple of it.
    Every target pixel is written by one tile, and has at least ``context`` source
    pixels around it inside that tile, or the edge of the picture.
    """
    tile = max(tile, 2 * context + SMALLEST_CORE)
    count = 1 if source <= tile else math.ceil((source - 2 * context) / (tile - 2 * context))
    length = math.ceil((source + (count - 1) * 2 * context) / count)
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
        plan_spans(a, b, tile, facts.overlap + _reach(a, b, factor), facts.grid)
        for a, b in zip(source[::-1], size[::-1], strict=True)
    )
    return list(itertools.product(vertical, horizontal))


@dataclass(frozen=True)
class _Done:
    """What is done of all passes: tiles, and work as ``_tile_work`` counts it."""

    tiles: int = 0
    work: float = 0.0


def _enlarge(
    rgb: Tensor,
    size: Size,
    prescaler: Prescaler,
    progress: StageProgress,
    done: _Done,
    later: Sequence[tuple[Size, Size]],
    preview: PastedPreview | None,
    tile: int,
) -> tuple[Tensor, _Done]:
    """Run one pass; return its result and what is done after it.

    Args:
        rgb: float32 [height, width, 3] in 0..1.
        size: width and height of the result.
        prescaler: one with a network.
        progress: counts the tiles and the work of all passes.
        done: what the passes before have done.
        later: sizes before and after the passes that follow.
        preview: is given the tiles; None where other passes follow.
        tile: longest side of a tile in source pixels.
    """
    source = (rgb.shape[1], rgb.shape[0])
    # Of the tiles of this pass and of those that follow.
    works = [_tile_work(prescaler, *pair, tile) for pair in ((source, size), *later)]
    total = done.tiles + sum(map(len, works))
    total_work = done.work + sum(map(sum, works))
    prescaler = prescaler.reaching(source, size)
    facts = prescaler.facts
    grid = plan_tiles(source, size, facts, tile)
    result = rgb.new_empty((size[1], size[0], 3))
    scale, factor = (size[0] / source[0], size[1] / source[1]), facts.factor or 1
    for (y, x), work in zip(grid, works[0], strict=True):
        within = progress.part(done.work / total_work, (done.work + work) / total_work)
        larger = run_network(rgb[y.start : y.stop, x.start : x.stop], prescaler, within)
        left, right = ((edge / scale[0] - x.start) * factor for edge in (x.first, x.last))
        top, bottom = ((edge / scale[1] - y.start) * factor for edge in (y.first, y.last))
        result[y.first : y.last, x.first : x.last] = resample_box(
            larger, (x.last - x.first, y.last - y.first), (left, top, right, bottom)
        )
        done = _Done(done.tiles + 1, done.work + work)
        progress.on_unit(done.tiles, total)
        if preview is not None and done.tiles < total:
            preview.paste(result, (y.first, y.last), (x.first, x.last), len(grid))
    return result, done


def _tile_work(
    prescaler: Prescaler, source: Size, size: Size, tile: int = DEFAULT_TILE
) -> list[float]:
    """Return the work of every tile of one pass."""
    head = prescaler.reaching(source, size)
    each = work_of_a_pixel(head)
    return [
        each * math.prod(s.stop - s.start + 2 * padding(s.stop - s.start, head.facts) for s in pair)
        for pair in plan_tiles(source, size, head.facts, tile)
    ]


def _work_of_passes(prescaler: Prescaler, source: Size, target: Size) -> float:
    sizes = [source, *plan_sizes(source, target, prescaler.facts.factor)]
    return sum(sum(_tile_work(prescaler, *pair)) for pair in itertools.pairwise(sizes))


def _reach(source: int, target: int, factor: int) -> int:
    """Source pixels that resampling the net's result to the target reads around a cut."""
    coarser = max(1.0, source * factor / target)
    return math.ceil((LANCZOS_LOBES * coarser + 1) / factor) + 1


def padding(side: int, facts: PrescalerFacts) -> int:
    """Return how many mirrored pixels the net sees beyond each end of a side."""
    return max(facts.margin, math.ceil((SMALLEST_INPUT - side) / 2))


@torch.inference_mode()
def run_network(rgb: Tensor, prescaler: Prescaler, progress: StageProgress = SILENT) -> Tensor:
    """Run the net over a whole picture, again in float32 where the result is not finite.

    Args:
        rgb: float32 [height, width, 3] in 0..1, at least 1x1.
        prescaler: one with a network.
        progress: its cancel is checked before every layer of the net, and its share is that
            of this picture.

    Returns:
        float32 [height * factor, width * factor, 3] in 0..1, where the net runs.

    Raises:
        CancelledError: the caller wants to stop.
        NumericalError: float32 gave NaN or infinity too.
    """
    height, width = rgb.shape[:2]
    factor = prescaler.facts.factor or 1
    down, right = (padding(side, prescaler.facts) for side in (height, width))
    padded = extend(rgb.to(prescaler.device), (down, down), (right, right), "mirrored")
    x = padded.permute(2, 0, 1)[None]
    each = work_of_a_pixel(prescaler)

    def attempt(network: nn.Module) -> list[Tensor]:
        with watched(network, x.shape[-2] * x.shape[-1] * each, progress):
            return [network(x)]

    networks = filter(None, (prescaler.network, prescaler.full_precision))
    (y,) = first_finite(
        [partial(attempt, network) for network in networks],
        f"Prescaler {prescaler.facts.name} returned NaN or infinity, in full precision too; "
        "use another prescaler.",
    )
    picture = y[0].clamp(0, 1).permute(1, 2, 0)
    rows = slice(down * factor, (down + height) * factor)
    return picture[rows, right * factor : (right + width) * factor]
