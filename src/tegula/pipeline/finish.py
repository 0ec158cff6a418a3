"""Finish: from a refined picture to the image that the user gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tegula.images.adjust import hold_drawings, lock_colour, scale_detail, sharpen
from tegula.images.deep import DeepPixels
from tegula.images.exact import Consistency, consistency, hold_to_source, is_enlarged
from tegula.images.metadata import Metadata
from tegula.images.pixels import LUMA, Float, Patch, bands, enlarge_alpha, paste, to_bytes
from tegula.images.profiles import ColourSpace, colour_space, is_nearly_srgb
from tegula.options import ResolvedOptions
from tegula.pipeline.likeness import FaceReport, LikenessGuard
from tegula.pipeline.prepare import Prepared

Kind = type[np.uint8] | type[np.uint16] | type[np.float32]


@dataclass(frozen=True)
class Finished:
    """The result.

    image: L, LA, RGB or RGBA.
    deep: the same with sixteen bits a channel; None of a source with eight.
    metadata: what its file takes along.
    warnings: sentences on what could not be kept.
    consistency: how far it is from the source when shrunk again; None if it is smaller.
    faces: how like those of the source its faces are, where that was compared.
    """

    image: Image.Image
    deep: DeepPixels | None
    metadata: Metadata
    warnings: tuple[str, ...]
    consistency: Consistency | None
    faces: tuple[FaceReport, ...] = ()


def finish(
    refined: Float,
    prescaled: Float,
    prepared: Prepared,
    options: ResolvedOptions,
    mask: Float | None = None,
    patches: Sequence[Patch] = (),
    drawn: Float | None = None,
    alpha: Float | None = None,
    guard: LikenessGuard | None = None,
) -> Finished:
    """Scale detail, lock colour, sharpen; restore greyscale, alpha and profile; hold to the source.

    Args:
        refined: float32 [height, width, 3], sRGB, about 0..1. The very array
            ``prescaled`` when nothing was refined: then there is nothing to lock.
        prescaled: float32 of the same shape.
        prepared: the source.
        options: ``detail``, ``colour_lock``, ``window``, ``sharpen``, ``keep_grey`` and
            ``exact`` count here.
        mask: float32 [height, width] in 0..1, how far the result may differ from
            ``prescaled``; None lets all of it differ.
        patches: restored faces, laid over the sharpened picture.
        drawn: float32 [height, width] in 0..1, how much of each pixel is held to the source as
            a drawing; None holds none.
        alpha: float32 [height, width], enlarged by the net; None leaves that to resampling.
        guard: holds faces to those of the source.
    """
    done = _settled(refined, prescaled, prepared, options, drawn)
    done = paste(sharpen(done, options.sharpen), patches)
    reports: tuple[FaceReport, ...] = ()
    if guard is not None and done is not prescaled:
        done, reports = guard.hold(done, prescaled)
    if mask is not None:  # last, so that nothing changes where it is black, not even a face
        done = done - prescaled
        done *= mask[..., None]
        done += prescaled
    if options.keep_grey:
        done = np.repeat((done @ LUMA)[..., None], 3, axis=2)
    height, width = done.shape[:2]
    is_held = options.exact and is_enlarged((width, height), prepared.size)
    if prepared.alpha is not None:
        alpha = enlarge_alpha(prepared.alpha, width, height) if alpha is None else alpha
        if is_held:
            hold_to_source(alpha[..., None], prepared.alpha[..., None])
    space = None
    if prepared.facts.metadata.profile is not None:
        space = colour_space(prepared.facts.metadata.profile, greyscale=prepared.facts.greyscale)
        space = None if space is None or is_nearly_srgb(space) else space
    image, deep = _file_pixels(done, alpha, prepared, space, is_held=is_held)
    found, warnings = _compared(image, deep, prepared, space, options)
    return Finished(image, deep, prepared.facts.metadata, warnings, found, reports)


def _compared(
    image: Image.Image,
    deep: DeepPixels | None,
    prepared: Prepared,
    space: ColourSpace | None,
    options: ResolvedOptions,
) -> tuple[Consistency | None, tuple[str, ...]]:
    """Return how near a result is to its source, and all warnings."""
    warnings = prepared.facts.warnings
    if not is_enlarged(image.size, prepared.size):
        return None, (*warnings, *([_SMALLER] if options.exact else []))
    pixels = np.atleast_3d(np.asarray(image)) if deep is None else deep.samples
    source = _in_file_colours(prepared.rgb, prepared, space, np.float32)
    found = consistency(pixels, source, prepared.alpha)
    if options.exact and not found.is_exact:
        warnings = (*warnings, _NOT_EXACT.format(found.mean, found.worst))
    return found, warnings


_SMALLER = "The result is smaller than the source, so it cannot be exact."


def _settled(
    refined: Float,
    prescaled: Float,
    prepared: Prepared,
    options: ResolvedOptions,
    drawn: Float | None,
) -> Float:
    """Scale what diffusion changed, and hold it to the colours and the drawings of the source."""
    if refined is prescaled:
        return refined
    done = lock_colour(scale_detail(refined, prescaled, options.detail), prescaled, options)
    # Fused exposures have other tones than the source on purpose.
    if drawn is None or options.hdr > 0:
        return done
    done = done.copy() if done is refined else done
    return hold_drawings(done, prepared.rgb, drawn, prepared.look.crisp)


def _file_pixels(
    done: Float,
    alpha: Float | None,
    prepared: Prepared,
    space: ColourSpace | None,
    *,
    is_held: bool,
) -> tuple[Image.Image, DeepPixels | None]:
    """Round a finished picture to the samples of its file, and to sixteen bits if that is deep."""
    facts, deep = prepared.facts, None
    if space is None and facts.depth <= 8 and not is_held:
        image = Image.fromarray(to_bytes(done))
        image = image.convert("L") if facts.greyscale else image
    else:
        kind: Kind = np.uint16 if facts.depth > 8 else np.uint8
        if is_held:
            samples = _held(done, alpha, prepared, space, kind)
        else:
            samples = _in_file_colours(done, prepared, space, kind)
        if facts.depth > 8:
            planes = [samples] if alpha is None else [samples, _rounded(alpha[..., None])]
            deep = DeepPixels(np.concatenate(planes, axis=2), facts.depth)
            samples = ((samples + np.uint32(128)) // 257).astype(np.uint8)
        image = Image.fromarray(samples[..., 0] if facts.greyscale else samples)
    if alpha is not None:
        image.putalpha(Image.fromarray(to_bytes(alpha)))
    return image, deep


_NOT_EXACT = (
    "Shrunk again, the result is {:.1f} levels of 255 from the source on average and {:.0f} at the "
    "worst pixel: hard edges have no exact result at a factor that is not whole."
)


def _held(
    done: Float, alpha: Float | None, prepared: Prepared, space: ColourSpace | None, kind: Kind
) -> NDArray[Any]:
    """Return a finished picture in the colours of its file, held to its source before rounding.

    It is held as it will be shrunk by whoever checks it: in those colours, and premultiplied
    by alpha as that will be rounded.
    """
    picture = _in_file_colours(done, prepared, space, np.float32)
    source = _in_file_colours(prepared.rgb, prepared, space, np.float32)
    if alpha is None or prepared.alpha is None:
        hold_to_source(picture, source)
    else:
        steps = np.float32(65535 if kind is np.uint16 else 255)
        ceiling = (np.rint(alpha * steps) / steps)[..., None]
        weighted = picture * ceiling
        hold_to_source(weighted, source * prepared.alpha[..., None], ceiling)
        np.divide(weighted, ceiling, out=picture, where=ceiling > 0)
    return _ROUNDING[kind](picture)


def _in_file_colours(
    picture: Float, prepared: Prepared, space: ColourSpace | None, kind: Kind
) -> NDArray[Any]:
    """Bring a picture into the colours of the file of its source.

    What sRGB could not hold went around the networks and is added here, enlarged by the
    filter that cannot overshoot.

    Args:
        picture: float32 [height, width, 3], sRGB, about 0..1.
        prepared: the source.
        space: the colours of its file; None if they are sRGB.
        kind: of the samples: uint8, uint16, or float32 in 0..1.

    Returns:
        [height, width, 1 or 3].
    """
    height, width = picture.shape[:2]
    is_grey, beyond = prepared.facts.greyscale, prepared.beyond
    if beyond is not None:
        beyond = cv2.resize(beyond, (width, height), interpolation=cv2.INTER_LINEAR)
        beyond = beyond.reshape(picture.shape)
    out = np.empty((height, width, 1 if is_grey else 3), kind)
    for rows in bands(height):
        band = np.clip(picture[rows], 0, 1)
        if is_grey:
            band[...] = (band @ LUMA)[..., None]
        if beyond is not None:
            band += beyond[rows]
        if space is not None:
            band = space.from_srgb(band).astype(np.float32)
        out[rows] = _ROUNDING[kind](band[..., 1:2] if is_grey else band)
    return out


def _rounded(values: Float) -> NDArray[np.uint16]:
    """Round 0..1 to 0..65535; values outside are clipped."""
    steps: NDArray[np.uint16] = np.rint(np.clip(values, 0, 1) * np.float32(65535)).astype(np.uint16)
    return steps


def _clipped(values: Float) -> Float:
    return np.clip(values, 0, 1)


_ROUNDING: Mapping[Kind, Callable[[Float], NDArray[Any]]] = {
    np.uint8: to_bytes,
    np.uint16: _rounded,
    np.float32: _clipped,
}
