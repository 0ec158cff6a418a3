"""Adjusting a picture: colour, drawings, detail, sharpness, exposure, flat areas.

Pictures are tensors as in ``pipeline.pictures``, and stay where they lie.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from tegula.images.pixels import bands
from tegula.options import ResolvedOptions
from tegula.pipeline.exact import average_areas, shrink
from tegula.pipeline.pictures import (
    brightness,
    extend,
    gaussian,
    largest_around,
    lies_on_host,
    mean_around,
    picture_work,
    resize_area,
    resize_linear,
    tent,
)

# Holding the colours of a refined picture to those of the prescaled one.
#
# Diffusion drifts in tone: a little for the whole picture, and a little differently from
# window to window. Both locks take the tones from the prescaled picture and the detail
# from the refined one, as in StableSR (Wang et al., 2023), which took its two from wavelet
# decomposition and from AdaIN (Huang and Belongie, 2017). Written here from the mathematics.

_BAND = 512

_CELLS_PER_WINDOW = 16
"""Cells a window, along one side, of the grid on which local statistics are taken."""

# Added to variances before they are divided. The whole picture's only keeps a blank picture
# from a division by zero; the local one, two steps of eight bits, keeps the grain of a flat
# area from counting as contrast.
_WHOLE_NOISE = 1e-5
_LOCAL_NOISE = (2 / 255) ** 2

_STEEPEST, _FLATTEST = 2.0, 0.5


@picture_work
def wavelet_lock(
    refined: Tensor, prescaled: Tensor, *, levels: int = 5, out: Tensor | None = None
) -> Tensor:
    """Take what is coarse from the prescaled picture and what is fine from the refined.

    The à-trous decomposition with the kernel [1 2 1]/4, dilated by 1, 2, .., 2^(levels-1),
    splits a picture into ``levels`` bands of detail and a remainder. The product of those
    kernels is a tent, 2^(levels+1) - 1 wide: so the remainder comes from two running means
    at a cost that does not depend on the width, and, all being linear, the lock adds the
    remainder of the difference. The picture is continued by its edge pixels.

    A result pixel depends on inputs at most 2^levels - 1 = 31 px away. The lock is local:
    it corrects each window and the whole alike, and makes no edge anywhere.

    Args:
        refined: float32 [height, width, 3], 0..1.
        prescaled: float32 of the same shape.
        levels: bands of detail, 1..10; five keep detail up to about 32 px.
        out: where to write; it may be ``refined`` itself.

    Returns:
        ``out`` or a new array of the same shape; may leave 0..1 a little. Beside it,
        memory is needed for a band of 512 rows only.
    """
    side = 2**levels
    band = max(_BAND, side)
    height = refined.shape[0]
    locked = refined.new_empty(refined.shape) if out is None else out
    # The tent reaches ``side`` rows beyond a band. Those above it are kept from before they
    # were locked, since ``out`` may be ``refined`` itself.
    above = refined[:0]
    for top in range(0, height, band):
        bottom, last = min(height, top + band), min(height, top + band + side)
        first = top - len(above)
        drift = refined.new_empty((last - first, *refined.shape[1:]))
        drift[: len(above)] = above
        drift[len(above) :] = refined[top:last]
        torch.sub(prescaled[first:last], drift, out=drift)
        coarse = tent(drift, side)[len(above) :][: bottom - top]
        above = refined[max(0, bottom - side) : bottom].clone()
        torch.add(refined[top:bottom], coarse, out=locked[top:bottom])
    return locked


@picture_work
def adain_lock(
    refined: Tensor, prescaled: Tensor, *, window: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Give each channel the mean and standard deviation of the prescaled picture.

    With a window the two are taken around every pixel, over a tent that is two windows
    wide at its foot, so that they change smoothly and no window shows an edge. The
    contrast is then changed by at most a factor of two, and hardly where both are flat.

    Args:
        refined: float32 [height, width, 3], 0..1.
        prescaled: float32 of the same shape.
        window: side in px for local statistics; None for those of the whole picture.
        out: where to write; it may be ``refined`` itself.

    Returns:
        ``out`` or a new array of the same shape; may leave 0..1 a little.
    """
    locked = refined.new_empty(refined.shape) if out is None else out
    mean, spread = _statistics(refined, window)
    wanted_mean, wanted_spread = _statistics(prescaled, window)
    gain = wanted_spread / spread
    if window is not None:
        gain = gain.clamp(_FLATTEST, _STEEPEST)
    offset = wanted_mean - mean * gain
    for channel in range(refined.shape[2]):
        # In a plane of its own, as strides slow every step down.
        ours = refined[..., channel]
        plane = _spread_out(gain[..., channel], ours)
        plane = ours * plane if plane.numel() == 1 else plane.mul_(ours)
        locked[..., channel] = plane.add_(_spread_out(offset[..., channel], ours))
    return locked


def lock_colour(
    picture: Tensor, origin: Tensor, options: ResolvedOptions, out: Tensor | None = None
) -> Tensor:
    """Hold the colours of a picture to those of what it was made from, as the options say.

    The prescaled picture is held to the enlarged source, and the refined one to the
    prescaled: nets for enlargement drift in tone as diffusion does. On photographs shrunk
    four times, this halved the colour shift of Real-ESRGAN x4plus and won 0.4 dB of PSNR.

    Both locks act on each window's surroundings, and so on the whole; AdaIN takes the
    statistics of the whole picture when that is no larger than a window.

    Args:
        picture: float32 [height, width, 3].
        origin: of the same shape.
        options: ``colour_lock`` and ``window`` count here.
        out: where to write, if anything changes; it may be ``picture`` itself.

    Returns:
        float32 [height, width, 3]; may leave 0..1 a little.
    """
    if options.colour_lock == "wavelet":
        return wavelet_lock(picture, origin, out=out)
    if options.colour_lock == "adain":
        larger = max(picture.shape[:2]) > options.window
        return adain_lock(picture, origin, window=options.window if larger else None, out=out)
    return picture


def _statistics(picture: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, noise included.

    Of the whole picture that is one number of each; with a window, one for each cell of a
    coarse grid, smoothed over the window. All channels at once, which OpenCV averages in a
    fifth of the time of one after the other.
    """
    height, width = picture.shape[:2]
    if window is None:
        # By rows first: sums of a whole picture would lose digits in float32.
        mean = picture.mean(1).mean(0)
        parts = [torch.square(picture[rows] - mean).mean(1) for rows in bands(height)]
        return mean, torch.sqrt(torch.cat(parts).mean(0) + _WHOLE_NOISE)
    cell = max(1, window // _CELLS_PER_WINDOW)
    grid = (max(1, round(width / cell)), max(1, round(height / cell)))
    # Around one half, the squares are small, and their difference keeps its digits.
    means = average_areas(lambda rows: picture[rows] - 0.5, height, grid)
    squares = average_areas(lambda rows: (picture[rows] - 0.5).square_(), height, grid)
    means, squares = (tent(each, _CELLS_PER_WINDOW) for each in (means, squares))
    variances = (squares - torch.square(means)).clamp_(min=0)
    return means + 0.5, torch.sqrt(variances + _LOCAL_NOISE)


def _spread_out(coarse: Tensor, like: Tensor) -> Tensor:
    """Enlarge a grid to the size of a channel; a single value fits any size as it is."""
    return resize_linear(coarse, (like.shape[1], like.shape[0])) if coarse.numel() > 1 else coarse


# Holding what is drawn to the source.
#
# Nets for enlargement and diffusion leave haze on white paper and rims along letters. A drawing
# has neither: what lies between two places of one colour is of that colour, and what its pixels
# are is known to the level, unless it was damaged.

_SLACK = 0.5
"""How far beyond the darkest and the lightest around a place it may go, as a share of what lies
between them: thin strokes are darker than any pixel of the source that they only partly cover."""
_PASSES = 2
"""The second still wins a tenth of what the first did in likeness of letters, a third nothing."""


@picture_work
def hold_drawings(picture: Tensor, source: Tensor, drawn: Tensor, crisp: float) -> Tensor:
    """Hold the drawn parts of an enlarged picture to its source.

    Where the source is crisp, the result shrunk again is brought to what the source is there
    (by back-projection, as ``hold_to_source`` does, and not as far). Everywhere drawn, a pixel
    is held to the range of the four pixels of the source around it, so that white paper stays
    white.

    Args:
        picture: float32 [height, width, 3], no smaller than ``source`` on either side; it is
            changed.
        source: float32 [rows, columns, 3] in 0..1.
        drawn: float32 [height, width] in 0..1, how much each pixel looks drawn.
        crisp: 0..1, how far the pixels of the source are to be trusted.

    Returns:
        ``picture``, in 0..1 where it is drawn.
    """
    height, width = picture.shape[:2]
    rows, columns = source.shape[:2]
    if height < rows or width < columns:
        return picture
    down, across = (_neighbours(*sides, picture) for sides in ((rows, height), (columns, width)))
    parts = [part for part in bands(height) if bool(drawn[part].any())]
    for _ in range(_PASSES if crisp > 0 and parts else 0):
        missing = source - shrink(picture, (columns, rows))
        for part in parts:  # add what is missing, enlarged linearly
            first, second, share = (each[part] for each in down)
            added = torch.lerp(missing[first], missing[second], share[:, None, None])
            first, second, share = across
            added = torch.lerp(added[:, first], added[:, second], share[:, None])
            picture[part] += added.mul_(drawn[part, :, None]).mul_(crisp)
    for part in parts:
        ends = []
        for pick in (torch.minimum, torch.maximum):
            end = pick(source[down[0][part]], source[down[1][part]])
            ends.append(pick(end[:, across[0]], end[:, across[1]]))
        slack = (ends[1] - ends[0]).mul_(_SLACK)
        lowest, highest = (ends[0] - slack).clamp_(min=0), (ends[1] + slack).clamp_(max=1)
        change = torch.clamp(picture[part], lowest, highest)
        change -= picture[part]
        picture[part] += change.mul_(drawn[part, :, None])
    return picture


def _neighbours(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two source pixels between whose middles each target pixel of a side lies.

    The third tensor says how far it is on the way to the second, 0..1. They lie as ``like``.
    """
    places = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(places).astype(np.int64)
    share = torch.from_numpy((places - first).astype(np.float32)).to(like.device)
    one, other = (
        torch.from_numpy(each.clip(0, source - 1)).to(like.device) for each in (first, first + 1)
    )
    return one, other, share


@picture_work
def scale_detail(refined: Tensor, prescaled: Tensor, amount: float) -> Tensor:
    """Scale the difference that refine made.

    Args:
        refined: float32 [height, width, 3].
        prescaled: of the same shape.
        amount: -1 takes the difference away, 0 changes nothing, 1 doubles it.

    Returns:
        float32 of the same shape; may leave 0..1.
    """
    if amount == 0:
        return refined
    changed = refined - prescaled
    return changed.mul_(amount).add_(refined)


@picture_work
def sharpen(rgb: Tensor, amount: float) -> Tensor:
    """Sharpen with a kernel of three by three pixels.

    Args:
        rgb: float32 [height, width, 3].
        amount: 0 changes nothing; each of the eight neighbours weighs minus a tenth of it.

    Returns:
        float32 of the same shape; may leave 0..1.
    """
    if amount == 0:
        return rgb
    if lies_on_host(rgb):
        kernel = np.full((3, 3), -amount / 10, np.float32)
        kernel[1, 1] = 1 + 8 * amount / 10
        pixels = np.ascontiguousarray(rgb.numpy())
        return torch.from_numpy(
            cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REPLICATE).reshape(rgb.shape)
        )
    # The same kernel is a multiple of the pixel less one of the mean of all nine.
    mean = mean_around(extend(rgb, (1, 1), (1, 1), "edge"), 3)[1:-1, 1:-1]
    return rgb * (1 + 0.9 * amount) - mean * (0.9 * amount)


# Opening shadows and highlights by fusing exposures made from one picture.

_DARKER_AND_LIGHTER = (-0.9, -0.7, -0.45, -0.25, 0.0, 0.2, 0.4, 0.6, 0.8)
"""Changes of the HSV value at full amount, as shares of it."""

_LARGEST_FUSED = 4_000_000
"""Pixels: nine exposures and the pyramids of each are in memory at once."""

_DARKEST = 1 / 255
"""Added to brightnesses before they are divided, so that black has no gain of its own."""


@picture_work
def fuse_exposures(rgb: Tensor, amount: float) -> Tensor:
    """Fuse nine exposures, made by scaling the HSV value, by what is well exposed in each.

    Exposure fusion after Mertens, Kautz and Van Reeth, 2007. A picture of more than four
    megapixels is fused at that size, and the change of brightness is enlarged and applied
    to it, so that memory stays bounded.

    Args:
        rgb: float32 [height, width, 3], 0..1.
        amount: 0..1; 0 returns the picture itself.

    Returns:
        float32 [height, width, 3], 0..1.
    """
    if amount == 0:
        return rgb
    height, width = rgb.shape[:2]
    shrink = (_LARGEST_FUSED / (height * width)) ** 0.5
    if shrink >= 1:
        return _fused(rgb, amount)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = resize_area(rgb, size)
    gain = _brightest(_fused(small, amount)) / _brightest(small)
    return (rgb * resize_linear(gain, (width, height))[..., None]).clamp_(0, 1)


def _brightest(rgb: Tensor) -> Tensor:
    return rgb.amax(2) + _DARKEST


def _fused(rgb: Tensor, amount: float) -> Tensor:
    if not lies_on_host(rgb):
        return _fused_by_torch(rgb, amount)
    hsv = cv2.cvtColor(np.ascontiguousarray(rgb.numpy()), cv2.COLOR_RGB2HSV)
    exposures = []
    for change in _DARKER_AND_LIGHTER:
        exposed = hsv.copy()
        exposed[..., 2] = np.clip(hsv[..., 2] * (1 + change * amount), 0, 1)
        # OpenCV's fusion takes 0..255, of floats too, and returns 0..1.
        exposures.append(cv2.cvtColor(exposed, cv2.COLOR_HSV2RGB) * np.float32(255))
    fused = torch.from_numpy(cv2.createMergeMertens().process(exposures))
    return fused.nan_to_num_().clamp_(0, 1)


_NO_WEIGHT = 1e-12
"""Added to weights, so that a place without contrast in any exposure has some."""


def _fused_by_torch(rgb: Tensor, amount: float) -> Tensor:
    """Fuse as OpenCV does by default: by contrast and saturation, in pyramids of both.

    In grey or flat areas of a picture all weights are near zero, and rounding decides between the
    exposures. So rounding happens here where it does in OpenCV.
    """
    value = rgb.amax(2, keepdim=True)

    def exposed(change: float) -> Tensor:
        # Another HSV value, with hue and saturation as they are, scales all three channels.
        brighter = (value * (1 + change * amount)).clamp_(0, 1)
        scaled = brighter - (value - rgb) * (brighter / value.clamp(min=1e-9))
        return scaled.mul_(255).mul_(1 / 255)

    weights = [_weight(exposed(change)) for change in _DARKER_AND_LIGHTER]
    total = torch.stack(weights).sum(0)
    levels = int(math.log2(min(rgb.shape[:2])))
    fused: list[Tensor] = []
    for change, weight in zip(_DARKER_AND_LIGHTER, weights, strict=True):
        picture, share = exposed(change), (weight / total)[..., None]
        for level in range(levels + 1):
            smaller = _halved(picture) if level < levels else picture
            detail = picture if level == levels else picture - _doubled(smaller, picture)
            if len(fused) <= level:
                fused.append(torch.zeros_like(detail))
            fused[level] += detail * share
            picture, share = smaller, _halved(share) if level < levels else share
    result = fused.pop()
    while fused:
        larger = fused.pop()
        result = larger + _doubled(result, larger)
    return result.nan_to_num_().clamp_(0, 1)


def _weight(exposed: Tensor) -> Tensor:
    grey = extend(brightness(exposed), (1, 1), (1, 1), "mirrored at the middle")
    # In pairs, so that four equal ones sum without rounding.
    sides = (grey[:-2, 1:-1] + grey[2:, 1:-1]) + (grey[1:-1, :-2] + grey[1:-1, 2:])
    contrast = (sides - 4 * grey[1:-1, 1:-1]).abs_()
    mean = (exposed[..., 0] + exposed[..., 1] + exposed[..., 2]).mul_(1 / 3)
    off = exposed - mean[..., None]
    return contrast * torch.sqrt(off.square_().sum(2)) + _NO_WEIGHT


_BINOMIAL = (1, 4, 6, 4, 1)


def _halved(picture: Tensor) -> Tensor:
    """Blur and take every second pixel of both sides, as pyramids are built."""
    for axis in (0, 1):
        rows, columns = ((2, 2), (0, 0)) if axis == 0 else ((0, 0), (2, 2))
        around = extend(picture, rows, columns, "mirrored at the middle")
        length = picture.shape[axis]
        parts = (around.narrow(axis, tap, length) for tap in range(5))
        every_second = (slice(None),) * axis + (slice(None, None, 2),)
        weighted = (part[every_second] * (w / 16) for part, w in zip(parts, _BINOMIAL, strict=True))
        picture = sum(weighted, start=torch.zeros(()).to(picture))
    return picture


def _doubled(picture: Tensor, like: Tensor) -> Tensor:
    """Enlarge a level of a pyramid to the size of the one below it."""
    for axis in (0, 1):
        # Mirrored at the middle before the first pixel, continued by the last one after it.
        before = picture.narrow(axis, min(1, picture.shape[axis] - 1), 1)
        after = picture.narrow(axis, picture.shape[axis] - 1, 1)
        around, count = torch.cat([before, picture, after], axis), picture.shape[axis]
        left, middle, right = (around.narrow(axis, tap, count) for tap in range(3))
        even, odd = (left + 6 * middle + right) / 8, (middle + right) / 2
        both = torch.stack([even, odd], axis + 1).flatten(axis, axis + 1)
        picture = both.narrow(axis, 0, like.shape[axis])
    return picture


# Telling what has structure from what is flat, whatever its grain.

# Sides of the kernels in pixels: what is averaged away as grain, what is taken off as tone
# or gradient, and over what area a deviation is taken and spread.
_GRAIN, _SURROUNDINGS, _AREA = 17, 65, 33

_FLAT, _STRUCTURED = 0.006, 0.018
"""Deviation of brightness, without its slope and grain, at which an area counts as either."""


@picture_work
def flatness(rgb: Tensor) -> Tensor:
    """Return how flat the surroundings of each pixel are.

    Grain is averaged away first, so a grainy sky is flat; so is a plain gradient.

    Args:
        rgb: float32 [height, width, 3] in 0..1.

    Returns:
        float32 [height, width] in 0..1: 1 where nothing but tone and grain is near.
    """
    smooth = gaussian(rgb.amax(2), _GRAIN)
    deviation = mean_around((smooth - gaussian(smooth, _SURROUNDINGS)).square_(), _AREA).sqrt_()
    nearby = largest_around(deviation, _AREA)
    share = ((_STRUCTURED - nearby) / (_STRUCTURED - _FLAT)).clamp_(0, 1)
    return mean_around(share, _GRAIN)


_FINE = 1.5
"""Pixels, the deviation of the Gaussian that is taken off: what is finer is judged and weakened."""
_FINE_AREA = 25
"""Side in pixels over which the energy of what is fine is taken."""
_REACH = 6 + _FINE_AREA // 2
"""Rows beyond a band that its results depend on."""


@picture_work
def calm_flat_places(picture: Tensor, noise: float) -> Tensor:
    """Take so much fine noise out of a picture, which shows in flat places alone.

    Wiener's filter by place: what is finer than some pixels keeps the share of its energy that is
    above the noise. Where detail is strong that is as good as all; where nothing but noise is,
    nothing stays.

    Args:
        picture: float32 [height, width, 3], 0..1; changed in place.
        noise: standard deviation of brightness, in levels of 255.

    Returns:
        ``picture``. Beside it, memory is needed for a band of 512 rows only.
    """
    power = (noise / 255) ** 2
    if power == 0:
        return picture
    height, above = picture.shape[0], picture[:0]
    for top in range(0, height, _BAND):
        bottom, first = min(height, top + _BAND), len(above)
        around = torch.cat([above, picture[top : bottom + _REACH]])
        above = picture[max(0, bottom - _REACH) : bottom].clone()
        fine = around - gaussian(around, deviation=_FINE)
        energy = mean_around(brightness(fine).square_(), _FINE_AREA)
        lost = (power / energy.clamp_(min=power))[..., None]
        picture[top:bottom] -= (fine * lost)[first:][: bottom - top]
    return picture
