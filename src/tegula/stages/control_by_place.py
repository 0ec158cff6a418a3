"""Where the picture may change, and how much: mask, strength map, flat areas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tegula.images.masks import read_mask
from tegula.images.opening import Source
from tegula.images.pixels import Float
from tegula.images.structure import flatness
from tegula.options import ResolvedOptions, UpscaleOptions, enlarged_part
from tegula.stages.prepare import Prepared


@dataclass(frozen=True)
class ControlByPlace:
    """Both at the size of the result, float32 [height, width] in 0..1, or None.

    mask: how far the result may differ from the prescaled picture.
    strength_map: share of the denoise strength.
    """

    mask: Float | None
    strength_map: Float | None

    def strength(self, prescaled: Float, flat_skip: float) -> Float | None:
        """Return the share of the denoise strength at each pixel; None is all of it.

        Args:
            prescaled: float32 [height, width, 3] in 0..1.
            flat_skip: share of the steps that flat areas skip.
        """
        shares = [] if self.strength_map is None else [self.strength_map]
        if self.mask is not None:
            shares.append((self.mask > 0).astype(np.float32))
        if flat_skip > 0:
            shares.append(1 - np.float32(flat_skip) * flatness(prescaled))
        if not shares:
            return None
        return np.asarray(np.prod(shares, axis=0, dtype=np.float32))


def read_control(
    mask: Source | None,
    strength_map: Source | None,
    asked: UpscaleOptions,
    options: ResolvedOptions,
    prepared: Prepared,
) -> ControlByPlace:
    """Read mask and strength map and lay them over what is enlarged.

    Raises:
        ImageError, TooLargeError, PathError: one of them cannot be read.
    """
    size = (options.width, options.height)
    part = enlarged_part(asked, prepared.facts.size)
    read = [
        None if source is None else read_mask(source, size, asked.max_pixels, part)
        for source in (mask, strength_map)
    ]
    return ControlByPlace(read[0], read[1])
