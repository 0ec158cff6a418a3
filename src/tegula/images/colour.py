"""Holding the colours of a refined picture to those of the prescaled one.

Diffusion drifts in tone: a little for the whole picture, and a little differently from
window to window. Both locks take the tones from the prescaled picture and the detail
from the refined one, as in StableSR (Wang et al., 2023), which took its two from wavelet
decomposition and from AdaIN (Huang and Belongie, 2017). Written here from the mathematics.
"""

from __future__ import annotations

import cv2
import numpy as np

from tegula.images.pixels import Float

_BAND = 512
_CELLS_PER_WINDOW = 16
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
    statistics = _whole if window is None else _local
    for channel in range(refined.shape[2]):
        ours, theirs = refined[..., channel], prescaled[..., channel]
        mean, spread = statistics(ours, window)
        wanted_mean, wanted_spread = statistics(theirs, window)
        gain = wanted_spread / spread
        if window is not None:
            gain = np.clip(gain, _FLATTEST, _STEEPEST)
        offset = wanted_mean - mean * gain
        np.multiply(ours, _spread_out(gain, ours), out=locked[..., channel])
        locked[..., channel] += _spread_out(offset, ours)
    return locked


def _tent(values: Float, side: int) -> Float:
    """Convolve with a tent of half-width ``side``: two running means, edges continued."""
    padded = cv2.copyMakeBorder(values, side, side, side, side, cv2.BORDER_REPLICATE)
    left, right = side // 2 - 1, side // 2
    once = cv2.blur(padded, (side, side), anchor=(left, left))
    twice = cv2.blur(once, (side, side), anchor=(right, right))
    return np.asarray(twice[side:-side, side:-side])


def _whole(channel: Float, _window: int | None) -> tuple[Float, Float]:
    mean = channel.mean(dtype=np.float64)
    variance = np.square(channel - np.float32(mean)).mean(dtype=np.float64)
    spread = np.sqrt(variance + _WHOLE_NOISE)
    return np.full((1, 1), mean, np.float32), np.full((1, 1), spread, np.float32)


def _local(channel: Float, window: int | None) -> tuple[Float, Float]:
    """Return mean and deviation on a coarse grid of cells, smoothed over the window."""
    cell = max(1, (window or 1) // _CELLS_PER_WINDOW)
    height, width = channel.shape
    grid = (max(1, round(width / cell)), max(1, round(height / cell)))
    centred = channel - np.float32(0.5)
    mean = _tent(cv2.resize(centred, grid, interpolation=cv2.INTER_AREA), _CELLS_PER_WINDOW)
    np.square(centred, out=centred)
    square = _tent(cv2.resize(centred, grid, interpolation=cv2.INTER_AREA), _CELLS_PER_WINDOW)
    variance = np.maximum(square - np.square(mean), 0)
    return mean + np.float32(0.5), np.sqrt(variance + np.float32(_LOCAL_NOISE))


def _spread_out(coarse: Float, like: Float) -> Float:
    if coarse.size == 1:
        return coarse
    size = (like.shape[1], like.shape[0])
    return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR))
