"""Finish: from a refined picture to the image that the user gets.

All of it happens where the picture lies. It leaves for the host as samples of its file; where the
file has colours of its own, band by band, on the way into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tegula.images.deep import DeepPixels
from tegula.images.metadata import Metadata
from tegula.images.pixels import bands
from tegula.images.profiles import ColourSpace, colour_space, is_nearly_srgb
from tegula.options import ResolvedOptions
from tegula.pipeline.adjust import hold_drawings, lock_colour, scale_detail, sharpen
from tegula.pipeline.exact import Consistency, consistency, hold_to_source, is_enlarged
from tegula.pipeline.likeness import FaceReport, LikenessGuard
from tegula.pipeline.pictures import (
    Patch,
    brightness,
    enlarge_alpha,
    lies_on_host,
    on_device,
    on_host,
    paste,
    picture_work,
    resize_linear,
)
from tegula.pipeline.prepare import Placed

_LARGEST = {torch.uint8: 255, torch.uint16: 65535}
"""Samples of files, by the value that stands for 1."""


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


@dataclass(frozen=True)
class Layers:
    """What lies over a refined picture, of its height and width and where it lies.

    drawn: 0..1, how much of each pixel is held to the source as a drawing; None holds none.
    alpha: enlarged by the net; None leaves that to resampling.
    mask: 0..1, how far the result may differ from the prescaled picture; None lets all differ.
    patches: restored faces, laid over the sharpened picture.
    """

    drawn: Tensor | None = None
    alpha: Tensor | None = None
    mask: Tensor | None = None
    patches: Sequence[Patch] = ()


@picture_work
def finish(
    refined: Tensor,
    prescaled: Tensor,
    source: Placed,
    options: ResolvedOptions,
    layers: Layers = Layers(),
    guard: LikenessGuard | None = None,
) -> Finished:
    """Scale detail, lock colour, sharpen; restore greyscale, alpha and profile; hold to the source.

    Args:
        refined: float32 [height, width, 3], sRGB, about 0..1. The very tensor
            ``prescaled`` when nothing was refined: then there is nothing to lock.
        prescaled: float32 of the same shape.
        source: lying where they do.
        options: ``detail``, ``colour_lock``, ``window``, ``sharpen``, ``keep_grey`` and
            ``exact`` count here.
        layers: what lies over the picture.
        guard: holds faces to those of the source.
    """
    done = _settled(refined, prescaled, source, options, layers.drawn)
    done = paste(sharpen(done, options.sharpen), layers.patches)
    reports: tuple[FaceReport, ...] = ()
    if guard is not None:
        done, reports = guard.hold(done, prescaled)
    if layers.mask is not None:
        # Last, so that nothing changes where it is black, not even a face.
        done = torch.lerp(prescaled, done, layers.mask[..., None])
    if options.keep_grey:
        done = brightness(done)[..., None].expand(-1, -1, 3)
    height, width = done.shape[:2]
    is_held = options.exact and is_enlarged((width, height), source.prepared.size)
    alpha = None
    if source.alpha is not None:
        alpha = layers.alpha
        alpha = enlarge_alpha(source.alpha, width, height) if alpha is None else alpha
        if is_held:
            hold_to_source(alpha[..., None], source.alpha[..., None])
    file = _FileColours.of(source)
    samples, rounded_alpha = file.samples(done, alpha, is_held=is_held)
    found, warnings = _compared(samples, rounded_alpha, file, options)
    image, deep = _file_pixels(samples, rounded_alpha, source)
    return Finished(image, deep, source.prepared.facts.metadata, warnings, found, reports)


def _compared(
    samples: Tensor, alpha: Tensor | None, file: _FileColours, options: ResolvedOptions
) -> tuple[Consistency | None, tuple[str, ...]]:
    """Return how near a result is to its source, and all warnings."""
    prepared = file.source.prepared
    warnings = prepared.facts.warnings
    if not is_enlarged((samples.shape[1], samples.shape[0]), prepared.size):
        return None, (*warnings, *([_SMALLER] if options.exact else []))
    source, of_source = file.floats(file.source.rgb), file.source.alpha
    if alpha is not None and of_source is not None:
        alpha, of_source = alpha.to(samples.device), of_source.to(samples.device)
    found = consistency(samples, source, alpha, of_source)
    if options.exact and not found.is_exact:
        warnings = (*warnings, _NOT_EXACT.format(found.mean, found.worst))
    return found, warnings


_SMALLER = "The result is smaller than the source, so it cannot be exact."
_NOT_EXACT = (
    "Shrunk again, the result is {:.1f} levels of 255 from the source on average and {:.0f} at the "
    "worst pixel: hard edges have no exact result at a factor that is not whole."
)


def _settled(
    refined: Tensor,
    prescaled: Tensor,
    source: Placed,
    options: ResolvedOptions,
    drawn: Tensor | None,
) -> Tensor:
    """Scale what diffusion changed, and hold it to the colours and the drawings of the source."""
    if refined is prescaled:
        return refined
    done = lock_colour(scale_detail(refined, prescaled, options.detail), prescaled, options)
    # Fused exposures have other tones than the source on purpose.
    if drawn is None or options.hdr > 0:
        return done
    done = done.clone() if done is refined else done
    return hold_drawings(done, source.rgb, drawn, source.prepared.look.crisp)


@dataclass(frozen=True)
class _FileColours:
    """The colours and the samples of the file of a source.

    space: None if they are sRGB.
    """

    source: Placed
    space: ColourSpace | None

    @classmethod
    def of(cls, source: Placed) -> _FileColours:
        """Return those of a source."""
        facts = source.prepared.facts
        if facts.metadata.profile is None:
            return cls(source, None)
        space = colour_space(facts.metadata.profile, greyscale=facts.greyscale)
        return cls(source, None if space is None or is_nearly_srgb(space) else space)

    @property
    def is_deep(self) -> bool:
        """Whether a sample has more than eight bits."""
        return self.source.prepared.facts.depth > 8

    def samples(
        self, picture: Tensor, alpha: Tensor | None, *, is_held: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Round a finished picture and its alpha.

        Args:
            picture: [height, width, 3], sRGB, about 0..1.
            alpha: [height, width].
            is_held: hold it to its source before it is rounded.

        Returns:
            uint8 or uint16 [height, width, 1 or 3], and alpha [height, width, 1] likewise.
        """
        sample = torch.uint16 if self.is_deep else torch.uint8
        rounded_alpha = None if alpha is None else _rounded(alpha[..., None], sample)
        if is_held:
            ceiling = None if rounded_alpha is None else _floats_of(rounded_alpha)
            return _rounded(self._held(picture, ceiling), sample), rounded_alpha
        if self.space is None and not self.is_deep:
            return self._bytes(picture), rounded_alpha
        return self._converted(picture, sample), rounded_alpha

    def floats(self, picture: Tensor) -> Tensor:
        """Return a picture in these colours, float32 [height, width, 1 or 3] in 0..1."""
        return self._converted(picture, torch.float32)

    def _bytes(self, picture: Tensor) -> Tensor:
        """Round a picture as it is; of a grey one as Pillow does, from its bytes."""
        rgb = _rounded(picture, torch.uint8)
        if not self.source.prepared.facts.greyscale:
            return rgb
        grey = rgb.new_empty((*rgb.shape[:2], 1))
        weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=rgb.device)
        for rows in bands(rgb.shape[0]):
            total = (rgb[rows].to(torch.int32) * weights).sum(2, keepdim=True, dtype=torch.int32)
            grey[rows] = ((total + 0x8000) >> 16).to(torch.uint8)
        return grey

    def _held(self, picture: Tensor, alpha: Tensor | None) -> Tensor:
        """Return a picture in these colours, held to its source before rounding.

        It is held as it will be shrunk by whoever checks it: in those colours, and
        premultiplied by alpha as that will be rounded.
        """
        picture, source = self.floats(picture), self.floats(self.source.rgb)
        if alpha is None or self.source.alpha is None:
            hold_to_source(picture, source)
            return picture
        ceiling, of_source = alpha.to(picture.device), self.source.alpha.to(picture.device)
        weighted = picture * ceiling
        hold_to_source(weighted, source * of_source[..., None], ceiling)
        for rows in bands(len(picture)):
            visible = ceiling[rows] > 0
            picture[rows] = torch.where(visible, weighted[rows] / ceiling[rows], picture[rows])
        return picture

    def _converted(self, picture: Tensor, sample: torch.dtype) -> Tensor:
        """Bring a picture into these colours.

        What sRGB could not hold went around the networks and is added here, enlarged by the
        filter that cannot overshoot.

        Args:
            picture: float32 [height, width, 3], sRGB, about 0..1.
            sample: uint8, uint16, or float32 in 0..1.

        Returns:
            [height, width, 1 or 3], where the picture lies; on the host if the file has
            colours of its own.
        """
        height, width = picture.shape[:2]
        is_grey, beyond = self.source.prepared.facts.greyscale, self.source.beyond
        if beyond is not None:
            beyond = resize_linear(beyond, (width, height))
        device = picture.device if self.space is None else torch.device("cpu")
        out = torch.empty((height, width, 1 if is_grey else 3), dtype=sample, device=device)
        for rows in bands(height):
            band = picture[rows].clamp(0, 1)
            if is_grey:
                band = brightness(band)[..., None].repeat(1, 1, 3)
            if beyond is not None:
                band += beyond[rows]
            if self.space is not None:
                converted = self.space.from_srgb(on_host(band)).astype(np.float32)
                band = on_device(converted, device)
            out[rows] = _rounded(band[..., 1:2] if is_grey else band, sample)
        return out


def _rounded(values: Tensor, sample: torch.dtype) -> Tensor:
    """Round 0..1 to samples of this type, or cut them to that range if it is float32."""
    if sample not in _LARGEST:
        return values.clamp(0, 1)
    out = torch.empty(values.shape, dtype=sample, device=values.device)
    for rows in bands(len(values)):
        whole = values[rows].clamp(0, 1).mul_(_LARGEST[sample]).round_()
        if lies_on_host(out):  # where torch's own conversion takes most of the time of finish
            np.copyto(out[rows].numpy(), whole.numpy(), casting="unsafe")
        else:
            out[rows] = whole
    return out


def _floats_of(samples: Tensor) -> Tensor:
    return samples.float().div_(_LARGEST[samples.dtype])


def _file_pixels(
    samples: Tensor, alpha: Tensor | None, source: Placed
) -> tuple[Image.Image, DeepPixels | None]:
    """Bring samples onto the host, as an image and, if they have sixteen bits, with those."""
    facts, deep = source.prepared.facts, None
    planes = [on_host(each) for each in (samples, alpha) if each is not None]
    if facts.depth > 8:
        deep = DeepPixels(np.concatenate(planes, axis=2), facts.depth)
        planes = [((each + np.uint32(128)) // 257).astype(np.uint8) for each in planes]
    image = Image.fromarray(planes[0][..., 0] if facts.greyscale else planes[0])
    if alpha is not None:
        image.putalpha(Image.fromarray(planes[1][..., 0]))
    return image, deep
