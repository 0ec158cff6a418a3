"""Telling what has structure from what is flat, whatever its grain."""

from __future__ import annotations

import cv2
import numpy as np

from tegula.images.pixels import Float

_GRAIN = 17
_SURROUNDINGS = 65
_AREA = 33
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
