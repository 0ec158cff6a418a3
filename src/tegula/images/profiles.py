"""Colour: what numbers mean that are not sRGB, in floats and without clipping."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tegula.images.pixels import Float, bands

# The white of ICC's connection space, and sRGB's primaries adapted to it (IEC 61966-2-1,
# by Bradford's matrix).
D50 = np.array([0.9642, 1.0, 0.8249])
_SRGB_TO_D50 = np.array(
    [
        [0.43606567, 0.38514709, 0.14306641],
        [0.22248840, 0.71687317, 0.06060791],
        [0.01391602, 0.09707642, 0.71409607],
    ]
)
_D50_TO_SRGB = np.linalg.inv(_SRGB_TO_D50)


def srgb_encoded(linear: NDArray[np.floating]) -> NDArray[np.floating]:
    """Apply sRGB's curve, mirrored below zero and continued above one."""
    size = np.abs(linear)
    curved = 1.055 * np.power(size, 1 / 2.4) - 0.055
    return np.asarray(np.copysign(np.where(size <= 0.0031308, size * 12.92, curved), linear))


def srgb_of_lab(lab: Float) -> Float:
    """Convert CIE L*a*b* (D50, L* in 0..100) to sRGB; what sRGB cannot hold leaves 0..1.

    Args:
        lab: float32 [height, width, 3].
    """
    out = np.empty_like(lab)
    for rows in bands(lab.shape[0]):
        out[rows] = srgb_encoded(_xyz_of_lab(lab[rows]) @ _D50_TO_SRGB.T)
    return out


def _xyz_of_lab(lab: NDArray[np.floating]) -> NDArray[np.floating]:
    """Convert CIE L*a*b* to XYZ (CIE 15), both relative to D50."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    return np.asarray(np.where(f > 6 / 29, f**3, (f - 4 / 29) * (3 * (6 / 29) ** 2)) * D50)
