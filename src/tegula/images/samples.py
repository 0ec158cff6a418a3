"""Samples: float32 of whatever mode, depth and channels a picture has.

Pillow decodes nearly everything, but narrows the deeper colour of PNG and AVIF files to eight
bits. OpenCV reads it; it is only given files whose size and checksums have been checked. TIFF
files that Pillow does not read correctly have a module of their own. Arrays and tensors need no
decoder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tegula.errors import ImageError
from tegula.images.colour_tags import avif_facts
from tegula.images.pixels import OVERSHOOT, Float, float_remarks
from tegula.images.profiles import cmyk_to_srgb, lab_to_srgb, srgb_of_lab
from tegula.images.tiff import TiffValues

_EIGHT_BIT, _SIXTEEN_BIT = 255, 65_535
_SHALLOW, _DEEP = 8, 16
_PNG_DEPTH_AND_COLOUR = slice(24, 26)
_GREY_PNG_COLOURS = (0, 4)
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY_MODES = ("1", "L", "LA", "La")
_RED_FIRST, _BLUE_FIRST = slice(3), slice(2, None, -1)


@runtime_checkable
class ArrayLike(Protocol):
    """A numpy array or a torch tensor, known by what it can do."""

    @property
    def shape(self) -> Any:
        """Its length along each axis."""

    def __array__(self) -> Any:
        """Return it as a numpy array."""


@dataclass(frozen=True)
class Samples:
    """Pixels as the source has them: not yet upright, nor in sRGB.

    rgb: float32 [height, width, 3], 0..1; three equal channels where the source is grey.
    alpha: float32 [height, width], 0..1, or None when there is no transparency.
    greyscale: the source has no colour, by its mode, channels or palette.
    depth: bits a channel in the source, 8 for fewer.
    converted: they are sRGB already, and a profile of the source says nothing of them.
    format: of the file, where Pillow did not open it.
    remarks: sentences on what was left out.
    """

    rgb: Float
    alpha: Float | None
    greyscale: bool
    depth: int = 8
    converted: bool = False
    format: str | None = None
    remarks: tuple[str, ...] = ()


def image_samples(image: Image.Image, file: BinaryIO | None) -> Samples:
    """Return the samples of a loaded image at the depth of its file.

    Args:
        image: of any mode but CMYK and LAB.
        file: that it was read from, if any.
    """
    if _is_widened(image):
        remark = "The source is of mode I and nowhere above 255; it is read as 0 to 255."
        return dataclasses.replace(_pillow_samples(image.convert("L"), _SHALLOW), remarks=(remark,))
    bits, is_grey_png = 8, False
    if file is not None and image.format == "PNG":
        file.seek(0)
        bits, colour = file.read(_PNG_DEPTH_AND_COLOUR.stop)[_PNG_DEPTH_AND_COLOUR]
        is_grey_png = colour in _GREY_PNG_COLOURS
    elif file is not None and image.format in ("AVIF", "HEIF"):
        bits = avif_facts(file).bits
    # Pillow narrows what is deeper to eight bits, but for grey PNG files without alpha.
    if file is not None and bits > _SHALLOW and not image.mode.startswith("I"):
        samples = _deep_samples(image, file, bits)
        if samples is not None:
            # Of grey with alpha, OpenCV makes three equal channels and alpha.
            grey = samples.greyscale or is_grey_png
            return dataclasses.replace(samples, greyscale=grey, depth=bits)
    depth = _DEEP if image.mode.startswith("I") else _SHALLOW
    remarks = () if bits <= depth else (f"The source is read with {depth} of its {bits} bits.",)
    samples = _pillow_samples(image, bits)
    return dataclasses.replace(samples, depth=depth, remarks=(*samples.remarks, *remarks))


def _is_widened(image: Image.Image) -> bool:
    """Whether an image is eight bits in the wide mode I, as ``convert("I")`` leaves them.

    Of sixteen bits it would be all but black. An image that was opened from a file has the
    depth of that, however dark it is.
    """
    if image.mode != "I" or image.format is not None:
        return False
    return 0 < int(np.asarray(image).max(initial=0)) <= _EIGHT_BIT


def _pillow_samples(image: Image.Image, bits: int) -> Samples:
    """Return the samples that Pillow decoded; ``bits`` is the depth of those in the file."""
    key = image.info.get("transparency")
    if image.mode == "F":
        return array_samples(np.asarray(image), "The input")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        # Mode I has 32 bits, of which files mostly use sixteen.
        white = _SIXTEEN_BIT if values.max(initial=0) <= _SIXTEEN_BIT else 2**31 - 1
    elif image.mode in ("1", "L") and isinstance(key, int):
        values, white = np.asarray(image.convert("L")), _EIGHT_BIT
        # Pillow widens samples of one, two and four bits to eight, but leaves the one that
        # stands for transparency as it is in the file.
        largest = (1 << bits) - 1
        key = min(key, largest) * _EIGHT_BIT // largest
    else:
        # Grey multiplied by alpha converts to nothing but plain grey with alpha.
        straight = image.convert("LA") if image.mode == "La" else image
        has_alpha = image.mode in _ALPHA_MODES or key is not None
        pixels = np.asarray(straight.convert("RGBA" if has_alpha else "RGB"))
        samples = _split(pixels, _EIGHT_BIT)
        return dataclasses.replace(samples, greyscale=_is_grey(image))
    alpha = (values != key).astype(np.float32) if isinstance(key, int) else None
    return Samples(_as_rgb(_to_floats(values, white)), alpha, greyscale=True)


def _is_grey(image: Image.Image) -> bool:
    """Whether the mode, or every colour of the palette, has no colour."""
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY_MODES


def print_samples(image: Image.Image, profile: bytes | None) -> Samples:
    """Return the samples of a CMYK or L*a*b* image of eight bits, in sRGB.

    CMYK without a usable profile is converted as if inks were ideal.
    """
    converted = None
    if image.mode == "LAB":
        converted = lab_to_srgb(image)
    elif profile is not None:
        converted = cmyk_to_srgb(image, profile)
    pixels = np.asarray(image.convert("RGB") if converted is None else converted)
    remark = f"The source is {image.mode}; the result is sRGB."
    return dataclasses.replace(_split(pixels, _EIGHT_BIT), converted=True, remarks=(remark,))


def tiff_samples(source: TiffValues, profile: bytes | None) -> Samples:
    """Return the samples of a TIFF picture; L*a*b* and CMYK in sRGB."""
    depth, remarks = source.depth, source.remarks
    if source.space == "cmyk":
        samples = print_samples(Image.fromarray(source.values, "CMYK"), profile)
        depth, remarks = _SHALLOW, (f"The source is read with 8 of its {depth} bits.", *remarks)
    elif source.space == "lab":
        samples = _split(srgb_of_lab(source.values), 1)
        remark = "The source is LAB; the result is sRGB."
        samples = dataclasses.replace(samples, converted=True, remarks=(remark,))
    else:
        samples = _split(source.values, 1)
    remarks = (*samples.remarks, *remarks)
    return dataclasses.replace(samples, depth=depth, format="TIFF", remarks=remarks)


def _deep_samples(image: Image.Image, file: BinaryIO, bits: int) -> Samples | None:
    """Decode a PNG, AVIF or HEIC file at full depth; None when OpenCV cannot."""
    file.seek(0)
    if image.format == "HEIF":
        from pillow_heif import open_heif  # it has opened the image already

        # It gives the bits of a sample as the upper ones of sixteen.
        upper = np.asarray(open_heif(file, convert_hdr_to_8bit=False))
        white = (2**bits - 1) << (_DEEP - bits)
        return _split(upper, white) if upper.dtype == np.uint16 else None
    try:
        values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None or values.dtype != np.uint16:
        return None
    return _split(values, 2**bits - 1, _BLUE_FIRST)


def channels_last(source: ArrayLike, name: str) -> NDArray[Any]:
    """Return an array or tensor as [height, width, channels], of the type it has.

    Args:
        source: a numpy array [height, width] or [height, width, channels], or a torch
            tensor [height, width] or [channels, height, width]; a leading axis of 1 is
            a batch of one.
        name: how messages call it.

    Raises:
        ImageError: another shape.
    """
    values, layout = source, "an array [height, width, channels]"
    # Torch is not imported for this: only tensors can be detached.
    is_tensor = hasattr(source, "detach")
    if is_tensor:
        tensor: Any = source
        tensor = tensor.detach().cpu()
        # Numpy has no bfloat16.
        values = tensor.float() if tensor.is_floating_point() else tensor
        layout = "a tensor [channels, height, width]"
    array = np.asarray(values)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        return array[..., None]
    if array.ndim == 3 and is_tensor:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
        shape = ", ".join(map(str, source.shape))
        raise ImageError(f"{name} has the shape [{shape}]; give {layout} with 1 to 4 channels.")
    return array


def array_samples(values: NDArray[Any], name: str) -> Samples:
    """Return the samples of [height, width, channels]: grey, grey and alpha, RGB or RGBA.

    Raises:
        ImageError: neither uint8, uint16, booleans nor floats in 0..1.
    """
    white = {"bool": 1, "uint8": _EIGHT_BIT, "uint16": _SIXTEEN_BIT}.get(values.dtype.name)
    if white is None and values.dtype.kind != "f":
        raise ImageError(
            f"{name} holds {values.dtype.name}; give uint8, uint16, or floats from 0 to 1."
        )
    remarks: tuple[str, ...] = ()
    if white is None and values.size:
        # These two pass over NaN, and say nothing of an array that holds nothing else.
        low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            raise ImageError(
                f"{name} holds floats from {low:g} to {high:g}; give floats from 0 to 1, or uint8."
            )
        remarks = float_remarks(values)
    depth = _DEEP if values.dtype == np.uint16 else _SHALLOW
    return dataclasses.replace(_split(values, white or 1), depth=depth, remarks=remarks)


def _split(values: NDArray[Any], white: float, order: slice = _RED_FIRST) -> Samples:
    """Split [height, width] or [height, width, 1..4] into colour, in this order, and alpha."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    alpha = _to_floats(values[..., -1], white) if channels in (2, 4) else None
    if channels >= 3:
        return Samples(_to_floats(values[..., order], white), alpha, greyscale=False)
    grey = values if values.ndim == 2 else values[..., 0]
    return Samples(_as_rgb(_to_floats(grey, white)), alpha, greyscale=True)


def _to_floats(values: NDArray[Any], white: float) -> Float:
    """Scale numbers of any type so that ``white`` becomes 1; clip to 0..1, NaN to 0."""
    out: Float = np.multiply(values, np.float32(1 / white), dtype=np.float32, order="C")
    if values.dtype.kind == "f":
        np.nan_to_num(out, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    np.clip(out, 0, 1, out=out)
    return out


def _as_rgb(grey: Float) -> Float:
    """Repeat one channel three times."""
    return np.repeat(grey[..., None], 3, axis=2)
