"""How sharp a picture is, and undoing the little blur that a lens or a soft resampling leaves.

Two measures answer two questions. Octaves of missing detail tell a picture that was enlarged from
one that was not; a lens or a soft resampling takes a few tenths of a pixel, which is far less than
an octave, and can be undone where there is little noise.
"""

from __future__ import annotations

import itertools

import cv2
import numpy as np

from tegula.images.pixels import Float
from tegula.options import MOST_MENDED_BLUR

_BLOCK = 8

_OCTAVES = 3
_STEEP = 0.98
"""Quantile of the differences of neighbours: that of the sharpest edges, not of noise."""
_SMOOTH, _SHARP = 0.54, 0.64
"""The steepest differences, of those of the picture at half size: 0.5 where edges are smooth, as
halving doubles every slope; 0.56 to 1.1 in photographs, 0.55 to 0.67 in enlarged ones."""
_WHOLE = 0.9
"""Share of an octave that must be missing for the next one to be looked at, too."""
_STEEPEST_OF_NOTHING = 4.0
"""Levels: a picture with no steeper edge at any size has none to judge by."""


def measure_blur(luma: Float) -> float:
    """Return how many octaves of detail a picture lacks, 0..3.

    Args:
        luma: float32 [height, width], 0..255.
    """
    steep, missing = [], 0.0
    for _ in range(_OCTAVES + 1):
        if min(luma.shape) < 2 * _BLOCK:
            break
        down, across = (np.abs(np.diff(luma, axis=axis)) for axis in (0, 1))
        differences = np.maximum(down[:, 1:], across[1:])
        steep.append(float(np.quantile(differences, _STEEP)))
        half = luma.shape[1] // 2, luma.shape[0] // 2
        luma = np.asarray(cv2.resize(luma, half, interpolation=cv2.INTER_AREA))
    for fine, coarse in itertools.pairwise(steep):
        if coarse < _STEEPEST_OF_NOTHING:
            return 0.0
        octave = min(1.0, max(0.0, (_SHARP - fine / coarse) / (_SHARP - _SMOOTH)))
        missing += octave
        if octave < _WHOLE:
            break
    return missing


# The finest detail. How much of it a picture has depends on what it shows; how much of it a further
# blur takes depends on that far less. A filter for the finest octave sees half a cycle a pixel best
# but slower waves, too, and a blur leaves most of these. Where a picture has nothing left near half
# a cycle, what the filter sees is slow, and little of it goes; where it has, most goes. So the
# picture is blurred once more, and what its finest octave loses by that in each block is compared
# with what the octave below loses (in the manner of F. Crete et al., "The blur effect", 2007). Of
# some thousand features of edges, spectra and blocks this told best a photograph that was shrunk
# without blur from one with a blur of 0.4 px; docs/decisions/0008 has the figures.

_FINEST = np.array([[-1 / 8, 3 / 8, -3 / 8, 1 / 8]], np.float32)
"""A third difference: most at half a cycle a pixel."""
_NEXT = np.array([[-1 / 4, 0, 2 / 4, 0, -1 / 4]], np.float32)
"""A second difference over two pixels: most at a quarter of a cycle, nothing at half a cycle."""
_AGAIN = 0.8
"""Pixels, the standard deviation of the further blur; 0.5 and 1.1 tell the two apart less well."""
_ROUNDING = 0.02
"""What rounding to levels leaves of energy in the finest octave, in square levels."""
_STRUCTURE = 4.0
"""Square levels in the next octave from which a block has something to judge by."""
_HALF, _SHARPEST = 0.5, 0.75
"""Blocks that count: the half with the most structure; and the quantile of these that stands for
the picture, since what lies out of focus says nothing of what lies in it."""
_FEWEST_BLOCKS = 24
"""Blocks, counted once for each direction, below which there is too little to judge by."""
_SHARP_ENOUGH = 1.8
"""The mean of photographs that were shrunk by area: 1.78 after half the size, 1.88 after a quarter,
with a deviation of 0.15."""
_BISECTIONS = 6
"""Rounds of halving between 0 and ``MOST_MENDED_BLUR``: to a hundredth of a pixel."""


def measure_sharpness(luma: Float) -> float | None:
    """Return how much finest detail a picture has, of what it could have.

    Args:
        luma: float32 [height, width], 0..255.

    Returns:
        The logarithm of the energy that a further blur takes from the finest octave, over that
        which it takes from the next: about 1.4 in a photograph softened by 0.4 px, 1.8 in a sharp
        one. None where there is too little structure to tell.
    """
    height, width = (side - side % _BLOCK for side in luma.shape)
    if min(height, width) < 4 * _BLOCK:
        return None
    luma = np.ascontiguousarray(luma[:height, :width])
    again = cv2.GaussianBlur(luma, (0, 0), _AGAIN, borderType=cv2.BORDER_REFLECT_101)
    following = _energies(luma, _NEXT)
    counts = (following >= np.quantile(following, _HALF)) & (following > _STRUCTURE)
    if np.count_nonzero(counts) < _FEWEST_BLOCKS:
        return None
    taken = []
    for kernel, before in ((_FINEST, _energies(luma, _FINEST)), (_NEXT, following)):
        after = _energies(np.asarray(again), kernel)[counts]
        taken.append(np.log((before[counts] + _ROUNDING) / (after + _ROUNDING)))
    return float(np.quantile(taken[0] - taken[1], _SHARPEST))


def _energies(luma: Float, kernel: Float) -> Float:
    """Return the mean square of what a kernel sees in each block, across and down, [blocks]."""
    size = luma.shape[1] // _BLOCK, luma.shape[0] // _BLOCK
    found = []
    for turned in (kernel, kernel.T):
        seen = cv2.filter2D(luma, -1, turned, borderType=cv2.BORDER_REFLECT_101)
        found.append(cv2.resize(np.square(seen), size, interpolation=cv2.INTER_AREA).ravel())
    return np.concatenate(found)


def measure_softness(luma: Float) -> float | None:
    """Return by how much a photograph is softer than one that was shrunk by averaging areas.

    It is the blur that must be undone (``undo_blur``) for the finest detail to be as strong as in
    sharp photographs. Noise counts as finest detail, so of a noisy picture it says too little.

    Args:
        luma: float32 [height, width], 0..255.

    Returns:
        The standard deviation of a Gaussian, pixels in 0..``MOST_MENDED_BLUR``; None where there
        is too little structure to tell, or more is missing than can be undone.
    """

    def lacks(blur: float) -> bool | None:
        found = measure_sharpness(undo_blur(luma, blur) if blur else luma)
        return None if found is None else found < _SHARP_ENOUGH

    is_soft = lacks(0.0)
    if not is_soft:
        return None if is_soft is None else 0.0
    if lacks(MOST_MENDED_BLUR) is not False:
        return None
    low, high = 0.0, MOST_MENDED_BLUR
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if lacks(middle) else (low, middle)
    return (low + high) / 2


_REACH = 12
"""Pixels on either side that the filter reads; beyond, its weights are under a thousandth."""
_LEAST_LEFT = 0.01
"""What is added to the square of the share that a blur left of a wave, per axis: nothing is
raised more than five times, and what a blur of 0.4 px took as good as whole."""


def undo_blur(plane: Float, blur: float) -> Float:
    """Undo a Gaussian blur, by Wiener's filter for little and white noise.

    Args:
        plane: float32 [height, width] or [height, width, channels].
        blur: standard deviation in pixels, above 0 and up to ``MOST_MENDED_BLUR``.

    Returns:
        float32 of the same shape; where edges were cut it leaves the range of ``plane``.
    """
    waves = np.fft.rfftfreq(8 * _REACH)
    left = np.exp(-2 * np.square(np.pi * blur * waves))
    gains = left / (np.square(left) + _LEAST_LEFT) * (1 + _LEAST_LEFT)
    kernel = np.fft.fftshift(np.fft.irfft(gains))[3 * _REACH : 5 * _REACH + 1]
    kernel /= kernel.sum()
    along = kernel.astype(np.float32)
    border = cv2.BORDER_REFLECT_101
    return np.asarray(cv2.sepFilter2D(plane, -1, along, along, borderType=border), np.float32)
