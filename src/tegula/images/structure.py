"""Telling what has structure from what is flat, whatever its grain."""

from __future__ import annotations

import cv2
import numpy as np

from tegula.images.pixels import Float

_GRAIN = 9
_SURROUNDINGS = 65
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
    around = (_SURROUNDINGS, _SURROUNDINGS)
    strongest = cv2.dilate(np.abs(smooth - tone), np.ones((_GRAIN, _GRAIN), np.uint8))
    structure = cv2.dilate(cv2.blur(strongest, (_GRAIN, _GRAIN)), np.ones(around, np.uint8))
    share = np.clip((_STRUCTURED - structure) / (_STRUCTURED - _FLAT), 0, 1)
    return np.asarray(cv2.blur(share.astype(np.float32), (_GRAIN, _GRAIN)), np.float32)
