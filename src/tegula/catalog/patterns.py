"""Upscaling a pattern whose opposite edges meet, so that they meet in the result too."""

from __future__ import annotations

import dataclasses

from tegula.images.open import Source, decode
from tegula.images.pixels import margins, to_image, unwrapped, wrapped
from tegula.options import UpscaleOptions, target_size
from tegula.progress import Cancelled, OnProgress
from tegula.upscaler import Upscaler, UpscaleResult


def upscale_pattern(
    upscaler: Upscaler,
    source: Source,
    options: UpscaleOptions,
    mask: Source | None,
    on_progress: OnProgress | None,
    cancelled: Cancelled,
) -> UpscaleResult:
    """Upscale with an eighth of the picture repeated beyond each edge.

    The result is sRGB and has no metadata of the source.

    Raises:
        InputError, PathError, ModelError, CancelledError: as ``Upscaler.upscale`` does.
    """
    picture = decode(source, max_pixels=options.max_pixels)
    image = to_image(picture.rgb, picture.alpha)
    width, height = target_size(options, *image.size)
    across, down = margins(*image.size)
    far = max(1, round(across * width / image.width))
    deep = max(1, round(down * height / image.height))
    if mask is not None:
        black = decode(mask, max_pixels=options.max_pixels)
        flat = to_image(black.rgb, black.alpha)
        mask = wrapped(flat, *margins(*flat.size))
    result = upscaler.upscale(
        wrapped(image, across, down),
        options.replaced(size=(width + 2 * far, height + 2 * deep), scale=None, resolution=None),
        mask=mask,
        on_progress=on_progress,
        cancelled=cancelled,
    )
    return dataclasses.replace(result, image=unwrapped(result.image, far, deep))
