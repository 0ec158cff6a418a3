"""Between Pillow's many modes and the two arrays that tegula works on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Float = NDArray[np.float32]
_BAND = 1024
_EIGHT_BIT = 255
_SIXTEEN_BIT = 65_535
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY_MODES = ("1", "L", "LA", "La", "F")


def to_bytes(values: Float) -> NDArray[np.uint8]:
    """Round 0..1 to 0..255 in bands of rows, so that no large temporary is made."""
    out = np.empty(values.shape, np.uint8)
    for top in range(0, values.shape[0], _BAND):
        band = np.clip(values[top : top + _BAND], 0, 1)
        band *= 255
        np.rint(band, out=band)
        out[top : top + _BAND] = band
    return out


def to_image(rgb: Float, alpha: Float | None = None) -> Image.Image:
    """Make a Pillow image, RGB or RGBA, of float32 [height, width, 3] in 0..1."""
    image = Image.fromarray(to_bytes(rgb))
    if alpha is not None:
        image.putalpha(Image.fromarray(to_bytes(alpha)))
    return image


def to_floats(values: NDArray[np.generic], white: float) -> Float:
    """Scale numbers of any type so that ``white`` becomes 1; clip to 0..1, NaN to 0."""
    out: Float = np.asarray(values, np.float32) * np.float32(1 / white)
    if np.issubdtype(values.dtype, np.floating):
        np.nan_to_num(out, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    np.clip(out, 0, 1, out=out)
    return out


def as_rgb(grey: Float) -> Float:
    """Repeat one channel three times."""
    return np.repeat(grey[..., None], 3, axis=2)


def is_grey(image: Image.Image) -> bool:
    """Whether the mode, or every colour of the palette, has no colour."""
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY_MODES or image.mode.startswith("I")


def split(image: Image.Image, sample_bits: int | None = None) -> tuple[Float, Float | None]:
    """Return the pixels of a loaded image and its alpha.

    Args:
        image: any mode but CMYK and LAB, which need colour management first.
        sample_bits: bits of a sample in the file where it differs from the mode's.

    Returns:
        float32 [height, width, 3] and, when the image has transparency, float32
        [height, width]; both 0..1.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _split_deep(image)
    transparent = image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(transparent, int):
        return _split_keyed(image, transparent, sample_bits)
    if image.mode in _ALPHA_MODES or transparent is not None:
        straight = image.convert("LA") if image.mode == "La" else image
        pixels = np.asarray(straight.convert("RGBA"))
        return to_floats(pixels[..., :3], _EIGHT_BIT), to_floats(pixels[..., 3], _EIGHT_BIT)
    return to_floats(np.asarray(image.convert("RGB")), _EIGHT_BIT), None


def _split_deep(image: Image.Image) -> tuple[Float, Float | None]:
    values = np.asarray(image)
    if image.mode == "F":
        return as_rgb(to_floats(values, 1)), None
    deeper = image.mode == "I" and values.max(initial=0) > _SIXTEEN_BIT
    rgb = as_rgb(to_floats(values, 2**31 - 1 if deeper else _SIXTEEN_BIT))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        return rgb, (values != transparent).astype(np.float32)
    return rgb, None


def _split_keyed(
    image: Image.Image, transparent: int, sample_bits: int | None
) -> tuple[Float, Float | None]:
    values = np.asarray(image.convert("L"))
    largest = (1 << (sample_bits or 8)) - 1
    key = min(transparent, largest) * 255 // largest
    return as_rgb(to_floats(values, _EIGHT_BIT)), (values != key).astype(np.float32)
