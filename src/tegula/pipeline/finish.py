"""Finish: from a refined picture to the image that the user gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from tegula.images.adjust import lock_colour, scale_detail, sharpen
from tegula.images.metadata import Metadata, from_srgb
from tegula.images.pixels import Float, Patch, enlarge_alpha, paste, to_bytes
from tegula.options import ResolvedOptions
from tegula.pipeline.prepare import Prepared

_PROFILE_DROPPED = "The colour profile of the source could not be restored; the result is sRGB."


@dataclass(frozen=True)
class Finished:
    """The result: L, LA, RGB or RGBA, what its file takes along, and warnings."""

    image: Image.Image
    metadata: Metadata
    warnings: tuple[str, ...]


def finish(
    refined: Float,
    prescaled: Float,
    prepared: Prepared,
    options: ResolvedOptions,
    mask: Float | None = None,
    patches: Sequence[Patch] = (),
) -> Finished:
    """Scale detail, lock colour, sharpen; restore greyscale, alpha and profile.

    Args:
        refined: float32 [height, width, 3], sRGB, about 0..1. The very array
            ``prescaled`` when nothing was refined: then there is nothing to lock.
        prescaled: float32 of the same shape.
        prepared: the source.
        options: ``detail``, ``colour_lock``, ``window`` and ``sharpen`` count here.
        mask: float32 [height, width] in 0..1, how far the result may differ from
            ``prescaled``; None lets all of it differ.
        patches: restored faces, laid over the sharpened picture.
    """
    done = refined
    if refined is not prescaled:
        done = scale_detail(refined, prescaled, options.detail)
        done = lock_colour(done, prescaled, options)
    done = paste(sharpen(done, options.sharpen), patches)
    if mask is not None:  # last, so that nothing changes where it is black, not even a face
        done = done - prescaled
        done *= mask[..., None]
        done += prescaled
    image = Image.fromarray(to_bytes(done))
    if prepared.facts.greyscale:
        image = image.convert("L")
    metadata, warnings = prepared.facts.metadata, prepared.facts.warnings
    if metadata.profile is not None:
        restored = from_srgb(image, metadata.profile)
        if restored is None:
            metadata = dataclasses.replace(metadata, profile=None)
            warnings = (*warnings, _PROFILE_DROPPED)
        else:
            image = restored
    if prepared.alpha is not None:
        alpha = enlarge_alpha(prepared.alpha, image.width, image.height)
        image.putalpha(Image.fromarray(to_bytes(alpha)))
    return Finished(image, metadata, warnings)
