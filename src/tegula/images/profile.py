"""ICC profiles: into sRGB to work in, and back on the way out.

Little CMS, as Pillow binds it, converts eight bits a channel. What a deeper picture
holds below the eighth bit is carried across unchanged, which keeps gradients smooth.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tegula.images.pixels import to_bytes

Float = NDArray[np.float32]
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_CMS_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
_BAND = 1024


def colour_space(profile: bytes) -> str | None:
    """Return "RGB", "GRAY", "CMYK" or another ICC signature; None for a broken profile."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return str(opened.profile.xcolor_space).strip()
    except _CMS_ERRORS:
        return None


def to_srgb(rgb: Float, profile: bytes) -> Float | None:
    """Convert a picture from its RGB or grey profile to sRGB.

    Args:
        rgb: float32 [height, width, 3], 0..1; changed in place when converted. For a
            grey profile the first channel counts.
        profile: the ICC profile that the values are in.

    Returns:
        The picture in sRGB 0..1; None when the profile cannot be used for it.
    """
    mode = {"RGB": "RGB", "GRAY": "L"}.get(colour_space(profile) or "")
    if mode is None:
        return None
    transform = _transform(profile, None, mode, "RGB")
    if transform is None or _changes_nothing(transform, mode):
        return None if transform is None else rgb
    for top in range(0, rgb.shape[0], _BAND):
        band = rgb[top : top + _BAND]
        eight = to_bytes(band)
        source = Image.fromarray(eight if mode == "RGB" else np.ascontiguousarray(eight[..., 0]))
        band -= eight * np.float32(1 / 255)
        band += np.asarray(transform.apply(source)) * np.float32(1 / 255)
        np.clip(band, 0, 1, out=band)
    return rgb


def from_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert an sRGB picture, mode RGB or L, to a profile; the mode stays.

    Returns:
        The picture with the values that the profile gives the same colours; None when
        the profile cannot be used for this mode.
    """
    space = colour_space(profile)
    if space == "GRAY" and image.mode == "L":
        transform = _transform(None, profile, "RGB", "L")
    elif space == "RGB":
        transform = _transform(None, profile, "RGB", "RGB")
    else:
        return None
    if transform is None:
        return None
    if space == "RGB" and _changes_nothing(transform, "RGB"):
        return image
    converted: Image.Image = transform.apply(image.convert("RGB"))
    return converted.getchannel("G") if image.mode == "L" and space == "RGB" else converted


def cmyk_to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert a CMYK picture to sRGB by its profile; None when the profile cannot be used."""
    if colour_space(profile) != "CMYK":
        return None
    transform = _transform(profile, None, "CMYK", "RGB")
    return None if transform is None else transform.apply(image)


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert a CIE L*a*b* picture to sRGB."""
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)


def _transform(
    source: bytes | None, target: bytes | None, source_mode: str, target_mode: str
) -> Any:
    try:
        return ImageCms.buildTransform(
            _opened(source), _opened(target), source_mode, target_mode, _INTENT, _FLAGS
        )
    except _CMS_ERRORS:
        return None


def _opened(profile: bytes | None) -> Any:
    if profile is None:
        return ImageCms.createProfile("sRGB")
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Whether the profile is sRGB under whatever name: a lattice of colours stays put."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    if mode == "L":
        probe = np.repeat(steps[None], 1, axis=0)
        expected = np.repeat(probe[..., None], 3, axis=2)
    else:
        probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(9, 81, 3)
        expected = probe
    moved = np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - expected
    return bool(np.abs(moved).max() <= 1)
