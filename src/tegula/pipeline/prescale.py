"""Prescale: a feed-forward net brings the picture to the size of the result.

The picture runs through the net in tiles, and each tile's result is resampled to its
place in the target at once, so that memory holds the source, the target and one tile,
never the picture at the net's own factor.

``prescale_plan`` says which tiles these are, and how much context they have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tegula.images.pixels import Size
from tegula.images.sharpness import undo_blur
from tegula.models.prescalers import Prescaler
from tegula.models.retry import first_finite, until_it_fits
from tegula.options import ResolvedOptions
from tegula.pipeline.adjust import calm_flat_places, fuse_exposures, hold_drawings, lock_colour
from tegula.pipeline.exact import hold_to_source, is_enlarged
from tegula.pipeline.pictures import (
    enlarge_alpha,
    enlarge_lanczos,
    extend,
    on_device,
    outlines,
    resample_box,
    resize_linear,
)
from tegula.pipeline.prepare import Placed, Prepared, laid_over
from tegula.pipeline.prescale_plan import (
    DEFAULT_TILE,
    SMALLEST_CORE,
    padding,
    plan_sizes,
    plan_tiles,
)
from tegula.pipeline.prescale_work import tile_work, watched, work_of_a_pixel, work_of_passes
from tegula.pipeline.preview import PastedPreview
from tegula.pipeline.shards import Helper, HelperNets, Shards, for_sending
from tegula.progress import SILENT, Cancel, Cancelled, StageProgress, ignore_units

_ALPHA_ROUNDS = 6
"""Rounds of back-projection in which enlarged alpha is held to its source."""

NetCache = dict[tuple[Any, ...], Tensor]
"""What nets made of pictures, before colours were locked, by everything that decides on it."""


@dataclass(frozen=True)
class Prescaled:
    """What the stage leaves to those behind it, float32 at the size of the result.

    picture: [height, width, 3], with the colours of the source.
    enlarged: the source by resampling alone, of the same shape.
    drawn: [height, width] in 0..1, how much of each pixel is held to the source, also after
        refining; None holds none.
    done: likewise where it is held to ``picture``, which a net for drawings made there.
    alpha: [height, width]; None if the source has none.
    from_cache: whether an earlier call had run the nets.
    """

    picture: Tensor
    enlarged: Tensor
    drawn: Tensor | None
    done: Tensor | None
    alpha: Tensor | None
    from_cache: bool


@torch.inference_mode()
def prescale_source(
    source: Placed,
    options: ResolvedOptions,
    part: tuple[float, float, float, float],
    nets: tuple[Prescaler, Prescaler | None],
    progress: StageProgress = SILENT,
    cache: NetCache | None = None,
    shards: Shards | None = None,
) -> Prescaled:
    """Enlarge a source and its alpha by nets, with the colours of the source.

    Args:
        source: lying where the result is to lie.
        options: resolved for it.
        part: x, y, width and height of what it shows, as shares of the whole source.
        nets: the prescaler, and the one for what is drawn, if there is one.
        progress: of the whole stage.
        cache: of earlier calls, to which this one adds; None keeps nothing.
        shards: spreads the tiles over helpers; None runs all of them here.

    Raises:
        CancelledError, NumericalError, OutOfMemoryError: as ``prescale`` does.
    """
    size, prepared, (first, second) = (options.width, options.height), source.prepared, nets
    drawn = share = None
    if second is not None or options.hold_drawings:
        drawn = laid_over(on_device(prepared.look.drawn, source.rgb.device), size, part)
        share = None if second is None else drawn * options.drawing_share
    alpha, picture_end = source.alpha, 1.0
    if alpha is not None and outlines(alpha) is not None:
        # It goes through the first net, as one picture beside those of the source by each net.
        # That nets differ in their work makes the progress uneven, and nothing else.
        picture_end = 1 / 2 if second is None else 1 - 1 / 3
    by_nets, from_cache = _by_nets(
        source, options, nets, share, progress.part(0.0, picture_end), cache, shards
    )
    if alpha is not None:
        alpha_progress = dataclasses.replace(
            progress.part(picture_end, 1.0), on_unit=ignore_units, on_picture=None
        )
        alpha = prescale_alpha(alpha, size, first, alpha_progress, shards)
    enlarged = enlarge_lanczos(source.rgb, size)
    # How much of each pixel a net for drawings made; None where none did.
    well_drawn = share if second is not None and second.facts.draws else None
    if first.facts.draws:
        well_drawn = by_nets.new_ones(by_nets.shape[:2])
    picture = _locked(by_nets, enlarged, options, well_drawn)
    picture = calm_flat_places(picture, options.mend_flat)
    held, done = drawn if options.hold_drawings else None, None
    if held is not None and well_drawn is not None:
        done = torch.minimum(held, well_drawn)
        held = held - done
    if held is not None:
        picture = hold_drawings(picture, source.rgb, held, prepared.look.crisp)
    picture = fuse_exposures(picture, options.hdr)
    return Prescaled(picture, enlarged, held, done, alpha, from_cache)


def _by_nets(
    source: Placed,
    options: ResolvedOptions,
    nets: tuple[Prescaler, Prescaler | None],
    share: Tensor | None,
    progress: StageProgress,
    cache: NetCache | None,
    shards: Shards | None,
) -> tuple[Tensor, bool]:
    """Return what the nets make of a picture, and whether it came from the cache.

    ``share`` is that of the second net at each pixel.
    """
    size, (first, second), rgb = (options.width, options.height), nets, source.rgb
    key = () if cache is None else _key(source.prepared, options)
    if cache is not None and key in cache:
        progress.on_unit(1, 1)
        return cache[key].clone(), True  # what follows writes into it
    if options.mend_blur:
        sharpened = undo_blur(source.prepared.rgb, options.mend_blur)
        rgb = on_device(np.clip(sharpened, 0, 1, out=sharpened), rgb.device)
    if second is not None and share is not None:
        picture = prescale_mixed(rgb, size, (first, second), share, progress, shards)
    else:
        picture = prescale(rgb, size, first, progress=progress, shards=shards)
    if cache is not None:
        cache[key] = picture.clone()
    return picture, False


def _key(prepared: Prepared, options: ResolvedOptions) -> tuple[Any, ...]:
    """Return all that decides on what the nets make."""
    nets = "prescaler", "tuning", "drawing_prescaler", "drawing_share"
    names = ("width", "height", "mend_blur", *nets)
    pixels = hashlib.blake2b(np.ascontiguousarray(prepared.rgb).data).digest()
    return pixels, *(getattr(options, name) for name in names)


def _locked(
    picture: Tensor, enlarged: Tensor, options: ResolvedOptions, well_drawn: Tensor | None
) -> Tensor:
    """Hold a prescaled picture to the colours of its source, but where it is well drawn.

    The lock leaves a haze of some levels around letters, and what a net for drawings makes
    has the right colours already.
    """
    if well_drawn is None:
        return lock_colour(picture, enlarged, options, out=picture)
    locked = lock_colour(picture, enlarged, options)
    return torch.lerp(locked, picture, well_drawn[..., None])


@torch.inference_mode()
def prescale(
    rgb: Tensor,
    target: Size,
    prescaler: Prescaler,
    *,
    progress: StageProgress = SILENT,
    shards: Shards | None = None,
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
        shards: spreads the tiles of each pass over helpers; None runs all of them here.

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
        later = tuple(itertools.pairwise(sizes[index:]))
        this = _Pass(size, done, later, None if later else preview, shards)
        enlarge = partial(_enlarge, rgb, prescaler, this, progress)
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
    shards: Shards | None = None,
) -> Tensor:
    """Enlarge a picture by two nets and blend what they made, softly.

    Args:
        rgb: float32 [height, width, 3], sRGB in 0..1, at least 1x1.
        target: width and height of the result in pixels.
        nets: the first and the second.
        second: float32 [target[1], target[0]] in 0..1, the share of the second net; it lies
            where ``rgb`` does.
        progress: counts the tiles of both, as far as they are alike.
        shards: spreads the tiles of both over helpers.

    Returns:
        float32 [target[1], target[0], 3] in 0..1.

    Raises:
        CancelledError, NumericalError, OutOfMemoryError: as ``prescale`` does.
    """
    source = rgb.shape[1], rgb.shape[0]
    first = work_of_passes(nets[0], source, target)
    first_share = first / max(1.0, first + work_of_passes(nets[1], source, target))

    def part(number: int) -> StageProgress:
        def on_unit(done: int, total: int) -> None:
            progress.on_unit(done + number * total, 2 * total)

        of_work = progress.part(first_share, 1.0) if number else progress.part(0.0, first_share)
        on_picture = None if number else progress.on_picture
        return dataclasses.replace(of_work, on_unit=on_unit, on_picture=on_picture)

    result, other = (
        prescale(rgb, target, net, progress=part(number), shards=shards)
        for number, net in enumerate(nets)
    )
    return result.lerp_(other, second[..., None])


@torch.inference_mode()
def prescale_alpha(
    alpha: Tensor,
    target: Size,
    prescaler: Prescaler,
    progress: StageProgress = SILENT,
    shards: Shards | None = None,
) -> Tensor:
    """Enlarge alpha by the net of the picture where it has outlines, and by resampling elsewhere.

    Resampling leaves a rim around a crisp icon that is as wide as the factor. What the net
    makes is held to the source, or it would leave a haze where nothing is.

    Args:
        alpha: float32 [height, width] in 0..1.
        target: width and height of the result in pixels.
        prescaler: that of the picture.
        progress: of this part of the work alone.
        shards: spreads the tiles over helpers.

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
    net = prescale(grey, target, prescaler, progress=progress, shards=shards).mean(2)
    if is_enlarged(target, size):
        hold_to_source(net[..., None], alpha[..., None], rounds=_ALPHA_ROUNDS)
    return smooth.lerp_(net, resize_linear(edges, target)).clamp_(0, 1)


@dataclass(frozen=True)
class _Done:
    """What is done of all passes: tiles, and work as ``tile_work`` counts it."""

    tiles: int = 0
    work: float = 0.0


@dataclass(frozen=True)
class _Pass:
    """One pass of several.

    size: width and height of its result.
    done: what the passes before have done.
    later: sizes before and after the passes that follow.
    preview: is given the tiles; None where other passes follow.
    shards: spreads the tiles; None runs all of them here.
    """

    size: Size
    done: _Done
    later: Sequence[tuple[Size, Size]]
    preview: PastedPreview | None
    shards: Shards | None = None


@dataclass(frozen=True)
class TileTask:
    """One tile of a pass for a helper; its part of the result comes back, at its final size.

    What the net itself makes is up to sixteen times as much, and stays there.

    prescaler, tuning: its name, and the share of its tuning if it has any.
    before, after: sizes of the whole picture, which decide which head of the net runs.
    rgb: [height, width, 3], with context.
    size, box: of the part, as ``resample_box`` takes them.
    """

    prescaler: str
    tuning: float | None
    before: Size
    after: Size
    rgb: Tensor
    size: Size
    box: tuple[float, float, float, float]

    def run(self, nets: HelperNets, cancel: Cancel) -> Sequence[Tensor]:
        """Return the part, [size[1], size[0], 3].

        Raises:
            ModelError: the helper has no such prescaler.
            CancelledError, NumericalError: as their names say.
            RuntimeError: the tile does not fit into memory; the sender may try smaller ones.
        """
        prescaler = nets.prescaler(self.prescaler, self.tuning).reaching(self.before, self.after)
        larger = run_network(self.rgb, prescaler, StageProgress(cancel=cancel))
        return [for_sending(resample_box(larger, self.size, self.box))]


def _enlarge(
    rgb: Tensor, prescaler: Prescaler, this: _Pass, progress: StageProgress, tile: int
) -> tuple[Tensor, _Done]:
    """Run one pass; return its result and what is done after it.

    Args:
        rgb: float32 [height, width, 3] in 0..1.
        prescaler: one with a network.
        this: the pass.
        progress: counts the tiles and the work of all passes.
        tile: longest side of a tile in source pixels.
    """
    size, done = this.size, this.done
    source = (rgb.shape[1], rgb.shape[0])
    # Of the tiles of this pass and of those that follow.
    works = [tile_work(prescaler, *pair, tile) for pair in ((source, size), *this.later)]
    total = done.tiles + sum(map(len, works))
    total_work = done.work + sum(map(sum, works))
    head = prescaler.reaching(source, size)
    facts = head.facts
    grid = plan_tiles(source, size, facts, tile)
    result = rgb.new_empty((size[1], size[0], 3))
    scale, factor = (size[0] / source[0], size[1] / source[1]), facts.factor or 1

    def cut(number: int) -> tuple[Tensor, Size, tuple[float, float, float, float]]:
        """Return the pixels of a tile, and which part of what becomes of them has which size."""
        y, x = grid[number]
        left, right = ((edge / scale[0] - x.start) * factor for edge in (x.first, x.last))
        top, bottom = ((edge / scale[1] - y.start) * factor for edge in (y.first, y.last))
        part = (x.last - x.first, y.last - y.first)
        return rgb[y.start : y.stop, x.start : x.stop], part, (left, top, right, bottom)

    def here(number: int) -> Tensor:
        before = sum(works[0][:number])
        within = progress.part(
            (done.work + before) / total_work, (done.work + before + works[0][number]) / total_work
        )
        pixels, part, box = cut(number)
        return resample_box(run_network(pixels, head, within), part, box)

    def away(number: int, helper: Helper, given_up: Cancelled) -> Tensor:
        pixels, part, box = cut(number)
        tuning = None if prescaler.line is None else prescaler.line.at
        name = prescaler.facts.name
        task = TileTask(name, tuning, source, size, for_sending(pixels), part, box)
        return helper.run(task, given_up)[0]

    if this.shards is None:
        parts: Iterator[Tensor] = map(here, range(len(grid)))
    else:
        parts = this.shards.run([(size, *each) for each in grid], here, away, progress.cancel)
    ready = done
    for (y, x), part in zip(grid, parts, strict=True):
        result[y.first : y.last, x.first : x.last] = part
        ready = _Done(ready.tiles + 1, ready.work + works[0][ready.tiles - done.tiles])
        progress.on_share(ready.work / total_work)  # a helper's tile reports none itself
        progress.on_unit(ready.tiles, total)
        if this.preview is not None and ready.tiles < total:
            this.preview.paste(result, (y.first, y.last), (x.first, x.last), len(grid))
    return result, ready


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

    networks = filter(None, (prescaler.fastest, prescaler.full_precision))
    (y,) = first_finite(
        [partial(attempt, network) for network in networks],
        f"Prescaler {prescaler.facts.name} returned NaN or infinity, in full precision too; "
        "use another prescaler.",
    )
    picture = y[0].clamp(0, 1).permute(1, 2, 0)
    rows = slice(down * factor, (down + height) * factor)
    return picture[rows, right * factor : (right + width) * factor]
