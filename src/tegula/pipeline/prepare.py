"""Prepare: from whatever the user has to a clean picture, and where it may change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tegula.images.compression import smooth_chroma, soften_blocks
from tegula.images.decode import Facts, Picture, decode
from tegula.images.look import Look, look_at
from tegula.images.open import Source
from tegula.images.pixels import LUMA, SPECK, TRUSTED, Float, Size, fill_hidden, goes_on_hidden
from tegula.models.prescalers import LANCZOS
from tegula.options import ResolvedOptions, UpscaleOptions
from tegula.pipeline.adjust import flatness
from tegula.pipeline.pictures import BILINEAR, on_device, resample_part
from tegula.resolve import enlarged_part, with_context

# JPEG qualities, measured on photographs damaged at known quality, by PSNR of the result to
# the truth. The nets were trained on compressed pictures and undo most of it themselves.
MENDED_BELOW = 16
MENDED_BELOW_FOR_RESAMPLING = 75
# Before a net nothing is won by smoothing blocks of colour (docs/quality.md), and small things lose
# colour; so it is done where plain resampling follows.


@dataclass(frozen=True)
class Prepared:
    """A source, ready to be enlarged.

    rgb: float32 [height, width, 3], 0..1, sRGB; of a crop with its context; hidden colours
        filled in, unless the picture goes on there.
    alpha: float32 [height, width], 0..1, or None.
    beyond: what sRGB cannot hold of the source, to be added to the result; as in ``Picture``.
    facts: what the source is beside its pixels; its size is that of the whole source.
    mended: JPEG damage was reduced.
    chroma_mended: blocks of colour were.
    look: what was found in the whole source before.
    """

    rgb: Float
    alpha: Float | None
    facts: Facts
    mended: bool
    chroma_mended: bool
    look: Look
    beyond: Float | None = None

    @property
    def size(self) -> Size:
        """Width and height of what will be enlarged, in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]


def prepare(source: Source | Picture, options: UpscaleOptions) -> Prepared:
    """Decode the source within limits, cut out the crop with its context, and reduce JPEG damage.

    Args:
        source: what ``decode`` reads, or what it returned.
        options: crop, limit of pixels, prescaler, hidden colour and what mends JPEG count here.

    Raises:
        PathError: the path cannot be read.
        ImageError: not an image, or a damaged one.
        TooLargeError: more than ``options.max_pixels`` pixels.
        OptionError: the crop leaves the picture.
    """
    if isinstance(source, Picture):
        picture = source
    else:
        picture = decode(source, max_pixels=options.max_pixels)
    rgb, alpha, facts, beyond = picture.rgb, picture.alpha, picture.facts, picture.beyond
    # Of the whole picture, so that a crop shows what the whole will show.
    fills = alpha is not None and not options.keep_hidden_colour and not goes_on_hidden(rgb, alpha)
    look = look_at(rgb, facts.jpeg_quality)
    crop = with_context(options, facts.size).crop
    if crop is not None:
        x, y, width, height = crop
        # Copies, so that the whole source can be freed.
        part = slice(y, y + height), slice(x, x + width)
        rgb = rgb[part].copy()
        alpha = None if alpha is None else alpha[part].copy()
        beyond = None if beyond is None else beyond[part].copy()
    if alpha is not None and fills:
        # An exact result shrinks to all that is visible in the source, however little.
        trusted = SPECK if options.is_exact else TRUSTED
        rgb = fill_hidden(rgb, alpha, trusted)
        beyond = None if beyond is None else fill_hidden(beyond, alpha, trusted)
    quality = look.damage.jpeg_quality if options.auto else facts.jpeg_quality
    mends_chroma, mends = _what_to_mend(quality, look, options)
    if quality is not None and mends_chroma:
        rgb = smooth_chroma(rgb, quality)
    if quality is not None and mends:
        rgb = soften_blocks(rgb, quality)
    return Prepared(rgb, alpha, facts, mends, mends_chroma, look, beyond)


def _what_to_mend(quality: int | None, look: Look, options: UpscaleOptions) -> tuple[bool, bool]:
    """Return whether blocks of colour are mended, and whether those of brightness are."""
    if quality is None:
        return False, False
    is_resampled = options.prescaler == LANCZOS
    limit = MENDED_BELOW_FOR_RESAMPLING if is_resampled else MENDED_BELOW
    mends = quality < limit and not options.is_exact
    # Letters of a colour as bright as what is behind them would lose it.
    mends_chroma = options.auto and is_resampled and mends and look.kind == "photograph"
    return (
        mends_chroma if options.mend_chroma is None else options.mend_chroma,
        mends if options.mend_jpeg is None else options.mend_jpeg,
    )


@dataclass(frozen=True)
class Placed:
    """The pixels of a prepared source as tensors, where the picture is worked on.

    rgb: [height, width, 3]. alpha: [height, width]. beyond: as ``Prepared`` has it.
    """

    prepared: Prepared
    rgb: Tensor
    alpha: Tensor | None
    beyond: Tensor | None

    @classmethod
    def on(cls, device: torch.device, prepared: Prepared) -> Placed:
        """Bring a source onto a device; on the host nothing is copied."""
        planes = prepared.rgb, prepared.alpha, prepared.beyond
        rgb, alpha, beyond = (None if p is None else on_device(p, device) for p in planes)
        assert rgb is not None  # noqa: S101 - for the types alone
        return cls(prepared, rgb, alpha, beyond)


def laid_over(plane: Tensor, size: Size, part: tuple[float, float, float, float]) -> Tensor:
    """Bring a part of a plane to the size of a result.

    Args:
        plane: [rows, columns] in 0..1, of a whole picture.
        size: width and height of the result.
        part: x, y, width and height of what it shows, as shares of the whole.

    Returns:
        [size[1], size[0]] in 0..1.
    """
    height, width = plane.shape
    x, y, across, down = part
    box = (x * width, y * height, (x + across) * width, (y + down) * height)
    # Lanczos would ring into places that a mask leaves out.
    return resample_part(plane, size, box, BILINEAR)


# Where the picture may change, and how much: mask, strength map, flat areas.


@dataclass(frozen=True)
class SpatialControl:
    """Mask and strength map at the size of the result, [height, width] in 0..1, as it lies.

    mask: how far the result may differ from the prescaled picture; None lets all of it differ.
    strength_map: share of the denoise strength; None is all of it.
    weight: what the control scale is multiplied by, from 0 on; None is 1 everywhere.
    """

    mask: Tensor | None
    strength_map: Tensor | None
    weight: Tensor | None = None

    def mask_without(self, done: Tensor | None) -> Tensor | None:
        """Return the mask less what is done already and is to stay as prescaled.

        Args:
            done: [height, width] in 0..1; None where nothing is.
        """
        if done is None:
            return self.mask
        return 1 - done if self.mask is None else self.mask * (1 - done)

    @torch.inference_mode()
    def strength(self, prescaled: Tensor, flat_skip: float) -> Tensor | None:
        """Return the share of the denoise strength at each pixel; None is all of it.

        Args:
            prescaled: float32 [height, width, 3] in 0..1.
            flat_skip: share of the steps that flat areas skip.
        """
        shares = [] if self.strength_map is None else [self.strength_map]
        if self.mask is not None:
            # A place that changes a little is refined in full and mixed in when finishing.
            shares.append((self.mask > 0).float())
        if flat_skip > 0:
            shares.append(1 - flat_skip * flatness(prescaled))
        return math.prod(shares[1:], start=shares[0]) if shares else None


def read_spatial_control(
    mask: Source | None,
    strength_map: Source | None,
    options: UpscaleOptions,
    resolved: ResolvedOptions,
    placed: Placed,
) -> SpatialControl:
    """Read mask and strength map and lay them over what is enlarged, where that lies.

    Raises:
        ImageError, TooLargeError, PathError: one of them cannot be read.
    """
    size = (resolved.width, resolved.height)
    part, device = enlarged_part(options, placed.prepared.facts.size), placed.rgb.device
    planes = [
        None if source is None else read_mask(source, size, options.max_pixels, part, device)
        for source in (mask, strength_map)
    ]
    return SpatialControl(*planes)


_HOST = torch.device("cpu")


def read_mask(
    source: Source,
    size: Size,
    max_pixels: int,
    part: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    device: torch.device = _HOST,
) -> Tensor:
    """Read a mask of any size and bring it to the size of the result.

    Transparent places count as black.

    Args:
        source: a grey picture; of a coloured one the brightness counts.
        size: width and height of the result in pixels.
        max_pixels: of the mask at most.
        part: x, y, width and height of what is wanted, as shares of the mask.
        device: where the result lies.

    Returns:
        float32 [height, width] in 0..1.

    Raises:
        ImageError, TooLargeError, PathError: it cannot be read.
    """
    picture = decode(source, max_pixels=max_pixels)
    grey = picture.rgb @ LUMA
    if picture.alpha is not None:
        grey = grey * picture.alpha
    return laid_over(on_device(grey, device), size, part)
