"""Finish: from a refined picture to the image that the user gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tegula.images.adjust import lock_colour, scale_detail, sharpen
from tegula.images.deep import DeepPixels
from tegula.images.metadata import Metadata
from tegula.images.pixels import Float, Patch, bands, enlarge_alpha, paste, to_bytes
from tegula.images.profiles import ColourSpace, colour_space, is_nearly_srgb
from tegula.options import ResolvedOptions
from tegula.pipeline.prepare import LUMA, Prepared


@dataclass(frozen=True)
class Finished:
    """The result.

    image: L, LA, RGB or RGBA.
    deep: the same with sixteen bits a channel; None of a source with eight.
    metadata: what its file takes along.
    warnings: sentences on what could not be kept.
    """

    image: Image.Image
    deep: DeepPixels | None
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
    facts = prepared.facts
    height, width = done.shape[:2]
    alpha = None if prepared.alpha is None else enlarge_alpha(prepared.alpha, width, height)
    space = None
    if facts.metadata.profile is not None:
        space = colour_space(facts.metadata.profile, greyscale=facts.greyscale)
        space = None if space is None or is_nearly_srgb(space) else space
    deep = None
    if space is None and facts.depth <= 8:
        image = Image.fromarray(to_bytes(done))
        image = image.convert("L") if facts.greyscale else image
    else:
        samples = _restored(done, prepared, space)
        if facts.depth > 8:
            planes = [samples] if alpha is None else [samples, _rounded(alpha[..., None])]
            deep = DeepPixels(np.concatenate(planes, axis=2), facts.depth)
            samples = ((samples + np.uint32(128)) // 257).astype(np.uint8)
        image = Image.fromarray(samples[..., 0] if facts.greyscale else samples)
    if alpha is not None:
        image.putalpha(Image.fromarray(to_bytes(alpha)))
    return Finished(image, deep, facts.metadata, facts.warnings)


def _restored(done: Float, prepared: Prepared, space: ColourSpace | None) -> NDArray[Any]:
    """Return a finished picture in the colours and at the depth of its source.

    What sRGB could not hold went around the networks and is added here, enlarged by the
    filter that cannot overshoot.

    Returns:
        uint8 or uint16 [height, width, 1 or 3].
    """
    height, width = done.shape[:2]
    is_grey, beyond = prepared.facts.greyscale, prepared.beyond
    if beyond is not None:
        beyond = cv2.resize(beyond, (width, height), interpolation=cv2.INTER_LINEAR)
        beyond = beyond.reshape(done.shape)
    kind = np.uint16 if prepared.facts.depth > 8 else np.uint8
    out = np.empty((height, width, 1 if is_grey else 3), kind)
    for rows in bands(height):
        band = np.clip(done[rows], 0, 1)
        if is_grey:
            band[...] = (band @ LUMA)[..., None]
        if beyond is not None:
            band += beyond[rows]
        if space is not None:
            band = space.from_srgb(band).astype(np.float32)
        band = band[..., 1:2] if is_grey else band
        out[rows] = _rounded(band) if kind is np.uint16 else to_bytes(band)
    return out


def _rounded(values: Float) -> NDArray[np.uint16]:
    """Round 0..1 to 0..65535; values outside are clipped."""
    steps: NDArray[np.uint16] = np.rint(np.clip(values, 0, 1) * np.float32(65535)).astype(np.uint16)
    return steps
