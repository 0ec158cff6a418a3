"""More or less of what diffusion added, and sharpening."""

from __future__ import annotations

import cv2
import numpy as np

from tegula.images.pixels import Float


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
