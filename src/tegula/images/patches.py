"""Small pictures that are laid over a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Patch:
    """A piece of a picture.

    x, y: of its first pixel in the large picture.
    pixels: float32 [height, width, 3], wholly inside the large picture.
    weight: float32 [height, width] in 0..1; 0 leaves the large picture.
    """

    x: int
    y: int
    pixels: Float
    weight: Float


def paste(picture: Float, patches: Sequence[Patch]) -> Float:
    """Return a picture with patches over it, later ones above earlier ones.

    Args:
        picture: float32 [height, width, 3]; comes back itself when there are no patches.
        patches: what to lay over it.
    """
    if not patches:
        return picture
    result: Float = picture.copy()
    for patch in patches:
        height, width = patch.weight.shape
        below = result[patch.y : patch.y + height, patch.x : patch.x + width]
        below += (patch.pixels - below) * patch.weight[..., None]
    return result
