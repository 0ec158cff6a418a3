"""Adjusting a picture: colour, drawings, detail, sharpness, exposure, flat areas."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from tegula.images.exact import shrink
from tegula.images.pixels import Float, bands
from tegula.options import ResolvedOptions

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


def wavelet_lock(
    refined: Float, prescaled: Float, *, levels: int = 5, out: Float | None = None
) -> Float:
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
    locked = np.empty_like(refined) if out is None else out
    # The tent reaches ``side`` rows beyond a band. Those above it are kept from before they
    # were locked, since ``out`` may be ``refined`` itself.
    above = refined[:0]
    for top in range(0, height, band):
        bottom, last = min(height, top + band), min(height, top + band + side)
        drift = np.concatenate([above, refined[top:last]])
        np.subtract(prescaled[top - len(above) : last], drift, out=drift)
        coarse = _tent(drift, side)[len(above) :][: bottom - top]
        above = refined[max(0, bottom - side) : bottom].copy()
        np.add(refined[top:bottom], coarse, out=locked[top:bottom])
    return locked


def adain_lock(
    refined: Float, prescaled: Float, *, window: int | None = None, out: Float | None = None
) -> Float:
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
    locked = np.empty_like(refined) if out is None else out
    for channel in range(refined.shape[2]):
        ours, theirs = refined[..., channel], prescaled[..., channel]
        mean, spread = _statistics(ours, window)
        wanted_mean, wanted_spread = _statistics(theirs, window)
        gain = wanted_spread / spread
        if window is not None:
            gain = np.clip(gain, _FLATTEST, _STEEPEST)
        offset = wanted_mean - mean * gain
        np.multiply(ours, _spread_out(gain, ours), out=locked[..., channel])
        locked[..., channel] += _spread_out(offset, ours)
    return locked


def lock_colour(
    picture: Float, origin: Float, options: ResolvedOptions, out: Float | None = None
) -> Float:
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


def _tent(values: Float, side: int) -> Float:
    """Convolve with a tent of half-width ``side``: two running means, edges continued.

    A mean over an even number of pixels lies half a pixel off its middle. One is taken half
    a pixel to the left and up, the other to the right and down, so the tent is symmetric.
    """
    padded = cv2.copyMakeBorder(values, side, side, side, side, cv2.BORDER_REPLICATE)
    left, right = side // 2 - 1, side // 2
    once = cv2.blur(padded, (side, side), anchor=(left, left))
    twice = cv2.blur(once, (side, side), anchor=(right, right))
    return np.asarray(twice[side:-side, side:-side])


def _statistics(channel: Float, window: int | None) -> tuple[Float, Float]:
    """Return mean and standard deviation, noise included, as [rows, columns].

    Of the whole picture that is one of each; with a window, one for each cell of a coarse
    grid, smoothed over the window.
    """
    if window is None:
        mean = channel.mean(dtype=np.float64)
        variance = np.square(channel - np.float32(mean)).mean(dtype=np.float64)
        deviation = np.sqrt(variance + _WHOLE_NOISE)
        return np.full((1, 1), mean, np.float32), np.full((1, 1), deviation, np.float32)
    cell = max(1, window // _CELLS_PER_WINDOW)
    height, width = channel.shape
    grid = (max(1, round(width / cell)), max(1, round(height / cell)))
    # Around one half, the squares are small, and their difference keeps its digits.
    centred = channel - np.float32(0.5)
    means = _tent(cv2.resize(centred, grid, interpolation=cv2.INTER_AREA), _CELLS_PER_WINDOW)
    np.square(centred, out=centred)
    squares = _tent(cv2.resize(centred, grid, interpolation=cv2.INTER_AREA), _CELLS_PER_WINDOW)
    variances = np.maximum(squares - np.square(means), 0)
    return means + np.float32(0.5), np.sqrt(variances + np.float32(_LOCAL_NOISE))


def _spread_out(coarse: Float, like: Float) -> Float:
    """Enlarge a grid to the size of a channel; a single value fits any size as it is."""
    if coarse.size == 1:
        return coarse
    size = (like.shape[1], like.shape[0])
    return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR))


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


def hold_drawings(picture: Float, source: Float, drawn: Float, crisp: float) -> Float:
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
    down, across = _neighbours(rows, height), _neighbours(columns, width)
    parts = [part for part in bands(height) if drawn[part].any()]
    for _ in range(_PASSES if crisp > 0 and parts else 0):
        missing = source - shrink(picture, (columns, rows))
        for part in parts:  # add what is missing, enlarged linearly
            first, second, share = (each[part] for each in down)
            added = missing[first] + (missing[second] - missing[first]) * share[:, None, None]
            first, second, share = across
            added = added[:, first] + (added[:, second] - added[:, first]) * share[:, None]
            picture[part] += added * (drawn[part, :, None] * np.float32(crisp))
    for part in parts:
        ends = []
        for pick in (np.minimum, np.maximum):
            end = pick(source[down[0][part]], source[down[1][part]])
            ends.append(pick(end[:, across[0]], end[:, across[1]]))
        slack = (ends[1] - ends[0]) * np.float32(_SLACK)
        lowest, highest = np.maximum(ends[0] - slack, 0), np.minimum(ends[1] + slack, 1)
        change = np.clip(picture[part], lowest, highest)
        change -= picture[part]
        change *= drawn[part, :, None]
        picture[part] += change
    return picture


def _neighbours(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Float]:
    """Return the two source pixels between whose middles each target pixel of a side lies.

    The third array says how far it is on the way to the second, 0..1.
    """
    places = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(places).astype(np.intp)
    share = (places - first).astype(np.float32)
    return np.clip(first, 0, source - 1), np.clip(first + 1, 0, source - 1), share


def scale_detail(refined: Float, prescaled: Float, amount: float) -> Float:
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
    changed *= np.float32(amount)
    changed += refined
    return np.asarray(changed)


def sharpen(rgb: Float, amount: float) -> Float:
    """Sharpen with a kernel of three by three pixels.

    Args:
        rgb: float32 [height, width, 3].
        amount: 0 changes nothing; each of the eight neighbours weighs minus a tenth of it.

    Returns:
        float32 of the same shape; may leave 0..1.
    """
    if amount == 0:
        return rgb
    kernel = np.full((3, 3), -amount / 10, np.float32)
    kernel[1, 1] = 1 + 8 * amount / 10
    return np.asarray(cv2.filter2D(rgb, -1, kernel, borderType=cv2.BORDER_REPLICATE))


# Opening shadows and highlights by fusing exposures made from one picture.

_DARKER_AND_LIGHTER = (-0.9, -0.7, -0.45, -0.25, 0.0, 0.2, 0.4, 0.6, 0.8)
"""Changes of the HSV value at full amount, as shares of it."""

_LARGEST_FUSED = 4_000_000
"""Pixels: nine exposures and the pyramids of each are in memory at once."""

_DARKEST = np.float32(1 / 255)
"""Added to brightnesses before they are divided, so that black has no gain of its own."""


def fuse_exposures(rgb: Float, amount: float) -> Float:
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
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    gain = _brightness(_fused(small, amount)) / _brightness(small)
    brighter = rgb * cv2.resize(gain, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    return np.asarray(np.clip(brighter, 0, 1, out=brighter))


def _fused(rgb: Float, amount: float) -> Float:
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    exposures = []
    for change in _DARKER_AND_LIGHTER:
        exposed = hsv.copy()
        exposed[..., 2] = np.clip(hsv[..., 2] * (1 + change * amount), 0, 1)
        # OpenCV's fusion takes 0..255, of floats too, and returns 0..1.
        exposures.append(cv2.cvtColor(exposed, cv2.COLOR_HSV2RGB) * np.float32(255))
    fused = cv2.createMergeMertens().process(exposures)
    return np.asarray(np.clip(np.nan_to_num(fused, copy=False), 0, 1, out=fused))


def _brightness(rgb: Float) -> Float:
    return np.asarray(rgb.max(axis=2) + _DARKEST)


# Telling what has structure from what is flat, whatever its grain.

# Sides of the kernels in pixels: what is averaged away as grain, what is taken off as tone
# or gradient, and over what area a deviation is taken and spread.
_GRAIN, _SURROUNDINGS, _AREA = 17, 65, 33

_FLAT, _STRUCTURED = 0.006, 0.018
"""Deviation of brightness, without its slope and grain, at which an area counts as either."""


def flatness(rgb: Float) -> Float:
    """Return how flat the surroundings of each pixel are.

    Grain is averaged away first, so a grainy sky is flat; so is a plain gradient.

    Args:
        rgb: float32 [height, width, 3] in 0..1.

    Returns:
        float32 [height, width] in 0..1: 1 where nothing but tone and grain is near.
    """
    smooth = cv2.GaussianBlur(rgb.max(axis=2), (_GRAIN, _GRAIN), 0)
    tone = cv2.GaussianBlur(smooth, (_SURROUNDINGS, _SURROUNDINGS), 0)
    deviation = np.sqrt(cv2.blur(np.square(smooth - tone), (_AREA, _AREA)))
    nearby = cv2.dilate(deviation, np.ones((_AREA, _AREA), np.uint8))
    share = np.clip((_STRUCTURED - nearby) / (_STRUCTURED - _FLAT), 0, 1)
    return np.asarray(cv2.blur(share.astype(np.float32), (_GRAIN, _GRAIN)), np.float32)
