"""Grey pictures that say where something holds: masks and strength maps."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tegula.images.decode import decode
from tegula.images.opening import Source
from tegula.images.pixels import Float, to_image

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_WHOLE = (0.0, 0.0, 1.0, 1.0)


def read_mask(
    source: Source,
    size: tuple[int, int],
    max_pixels: int,
    part: tuple[float, float, float, float] = _WHOLE,
) -> Float:
    """Read a mask of any size and bring it to the size of the result.

    Transparent places count as black.

    Args:
        source: a grey picture; of a coloured one the brightness counts.
        size: width and height of the result in pixels.
        max_pixels: of the mask at most.
        part: x, y, width and height of what is wanted, as shares of the mask.

    Returns:
        float32 [height, width] in 0..1.

    Raises:
        ImageError, TooLargeError, PathError: as their names say.
    """
    picture = decode(source, max_pixels=max_pixels)
    grey = picture.rgb @ _LUMA
    if picture.alpha is not None:
        grey = grey * picture.alpha
    height, width = grey.shape
    x, y, across, down = part
    box = (x * width, y * height, (x + across) * width, (y + down) * height)
    # Lanczos would ring into places that the mask leaves out.
    plane = Image.fromarray(np.ascontiguousarray(grey))
    return np.asarray(plane.resize(size, Image.Resampling.BILINEAR, box=box), np.float32)


def inverted(source: Source, max_pixels: int) -> Image.Image:
    """Return a mask with black and white exchanged.

    Raises:
        ImageError, TooLargeError, PathError: as their names say.
    """
    picture = decode(source, max_pixels=max_pixels)
    return to_image(1 - picture.rgb, picture.alpha)
