"""From whatever the user has to a clean picture: decode, crop, mend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tegula.errors import OptionError
from tegula.images.alpha import fill_hidden
from tegula.images.decode import Facts, decode
from tegula.images.jpeg import soften_blocks
from tegula.images.opening import Source
from tegula.images.pixels import Float
from tegula.models.prescalers.catalogue import LANCZOS
from tegula.options import UpscaleOptions

# Measured on photographs damaged at known quality, by PSNR of the result to the truth.
# The nets were trained on compressed pictures and undo most of it themselves.
MENDED_BELOW = 16
MENDED_BELOW_FOR_RESAMPLING = 75


@dataclass(frozen=True)
class Prepared:
    """A source, ready to be enlarged.

    rgb: float32 [height, width, 3], 0..1, sRGB, cropped; hidden colours filled in.
    alpha: float32 [height, width], 0..1, or None.
    facts: what the source is beside its pixels; its size is that of the whole source.
    mended: JPEG damage was reduced.
    """

    rgb: Float
    alpha: Float | None
    facts: Facts
    mended: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what will be enlarged, in pixels: after the crop."""
        return self.rgb.shape[1], self.rgb.shape[0]


def prepare(source: Source, options: UpscaleOptions) -> Prepared:
    """Decode the source within limits, cut out the crop, and reduce JPEG damage.

    Raises:
        PathError: the path cannot be read.
        ImageError: not an image, or a damaged one.
        TooLargeError: more than ``options.max_pixels`` pixels.
        OptionError: the crop leaves the picture.
    """
    picture = decode(source, max_pixels=options.max_pixels)
    rgb, alpha, facts = picture.rgb, picture.alpha, picture.facts
    if options.crop is not None:
        rows, columns = _slices(options.crop, facts.size)
        rgb = np.ascontiguousarray(rgb[rows, columns])
        alpha = None if alpha is None else np.ascontiguousarray(alpha[rows, columns])
    if alpha is not None:
        rgb = fill_hidden(rgb, alpha)
    quality = facts.jpeg_quality
    resampled = options.prescaler == LANCZOS
    limit = MENDED_BELOW_FOR_RESAMPLING if resampled else MENDED_BELOW
    if quality is None or quality >= limit:
        return Prepared(rgb, alpha, facts, mended=False)
    return Prepared(soften_blocks(rgb, quality), alpha, facts, mended=True)


def _slices(crop: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    x, y, width, height = crop
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > size[0] or y + height > size[1]:
        raise OptionError(
            f"The crop {x},{y},{width},{height} leaves the picture, which is "
            f"{size[0]}x{size[1]}; give x,y,width,height inside it."
        )
    return slice(y, y + height), slice(x, x + width)
