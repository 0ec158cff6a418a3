"""Transparency beside the picture: no hidden colour may bleed, no edge may blur."""

from __future__ import annotations

import cv2
import numpy as np

from tegula.images.pixels import Float
from tegula.images.resize import enlarge_lanczos

_TRUSTED = 1 / 16
_SPECK = 0.5 / 255
_ROUNDING = 0.45
_STEEPNESS = 1.5


def fill_hidden(rgb: Float, alpha: Float) -> Float:
    """Give transparent pixels the colour of the visible ones around them.

    What lies under full transparency is arbitrary, often black, and every enlargement
    mixes neighbours: that is where dark fringes come from. Colours are averaged over ever
    larger cells, weighted by visibility, and the finest visible one fills the hole
    (push-pull, after Gortler et al., "The Lumigraph", 1996).

    Args:
        rgb: float32 [height, width, 3], 0..1, not multiplied by alpha.
        alpha: float32 [height, width], 0..1.

    Returns:
        float32 [height, width, 3]; the same array when nothing is hidden, or everything.
    """
    visible = np.minimum(alpha * np.float32(1 / _TRUSTED), 1)
    if visible.min() >= 1 or visible.max() <= 0:
        return rgb
    return _pushed_and_pulled(rgb * visible[..., None], visible)


def enlarge_alpha(alpha: Float, width: int, height: int) -> Float:
    """Scale alpha to a size; a cut-out of only 0 and 1 keeps edges about one pixel wide.

    Its outline is rounded a little, so that source pixels do not show as stairs; a
    single opaque pixel still survives.

    Returns:
        float32 [height, width], 0..1.
    """
    scale = min(width / alpha.shape[1], height / alpha.shape[0])
    scaled = enlarge_lanczos(alpha[..., None], (width, height))[..., 0]
    if scale > 1 and _is_cut_out(alpha):
        scaled = cv2.GaussianBlur(scaled, (0, 0), _ROUNDING * scale)
        scaled = (scaled - np.float32(0.5)) * np.float32(_STEEPNESS * scale) + np.float32(0.5)
    np.clip(scaled, 0, 1, out=scaled)
    return scaled


def _is_cut_out(alpha: Float) -> bool:
    return bool((np.minimum(alpha, 1 - alpha) < _SPECK).all())


def _pushed_and_pulled(weighted: Float, weight: Float) -> Float:
    """Fill where the weight is below one from the next coarser level."""
    height, width = weight.shape
    colour = np.asarray(weighted / np.maximum(weight, np.float32(1e-6))[..., None])
    if weight.min() >= 1 or (height == 1 and width == 1):
        return colour
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse_weight = np.asarray(cv2.resize(weight, half, interpolation=cv2.INTER_AREA))
    coarse_colour = np.asarray(cv2.resize(weighted, half, interpolation=cv2.INTER_AREA))
    amplified = np.minimum(coarse_weight * 4, 1)
    share = amplified / np.maximum(coarse_weight, np.float32(1e-6))
    filled = _pushed_and_pulled(
        coarse_colour.reshape(half[1], half[0], 3) * share[..., None], amplified
    )
    around = cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)
    around = around.reshape(height, width, 3)
    colour -= around
    colour *= weight[..., None]
    colour += around
    return colour
