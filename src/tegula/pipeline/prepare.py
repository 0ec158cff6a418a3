"""Prepare: from a file to pixels, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tegula.errors import OptionError
from tegula.images.adjust import flatness
from tegula.images.metadata import soften_blocks
from tegula.images.open import Facts, Source, decode, read_mask
from tegula.images.pixels import Float, fill_hidden
from tegula.models.prescalers.catalogue import LANCZOS
from tegula.options import ResolvedOptions, UpscaleOptions, enlarged_part

# From whatever the user has to a clean picture: decode, crop, mend.

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


# Where the picture may change, and how much: mask, strength map, flat areas.


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
