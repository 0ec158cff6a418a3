"""Opening shadows and highlights by fusing exposures made from one picture."""

from __future__ import annotations

import cv2
import numpy as np

from tegula.images.pixels import Float

_DARKER_AND_LIGHTER = (-0.9, -0.7, -0.45, -0.25, 0.0, 0.2, 0.4, 0.6, 0.8)
_LARGEST_FUSED = 4_000_000
_DARKEST = np.float32(1 / 255)


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
        exposures.append(cv2.cvtColor(exposed, cv2.COLOR_HSV2RGB) * np.float32(255))
    fused = cv2.createMergeMertens().process(exposures)
    return np.asarray(np.clip(np.nan_to_num(fused, copy=False), 0, 1, out=fused))


def _brightness(rgb: Float) -> Float:
    return np.asarray(rgb.max(axis=2) + _DARKEST)
