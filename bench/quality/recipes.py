"""How the bench damages a photograph before it is enlarged again.

Every recipe is seeded by photograph and recipe, so that all methods get the same
pixels and a run repeats. Blur is of the large picture; noise and JPEG of the small one.
"""

from __future__ import annotations

import hashlib
import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.float32]
DEGRADATIONS = {
    "clean": "area shrink alone",
    "blur": "Gaussian blur before the shrink, 1.6 px at 4x (0.4 px of the small picture)",
    "noise": "Gaussian noise of 8/255 in the small picture, per channel",
    "jpeg": "JPEG of quality 50 of the small picture, 4:2:0",
    "all": "half as strong blur and noise, then JPEG of quality 65",
}
"""What a run takes where no damage is named."""
JPEGS = {f"jpeg{quality}": quality for quality in (10, 20, 30, 75, 80, 85, 90, 95)}
"""Other qualities, as far as they are asked for by name."""


def degrade(picture: Picture, scale: int, degradation: str, name: str) -> NDArray[np.uint8]:
    """Return the small picture, uint8; sides of ``picture`` are multiples of ``scale``.

    A picture with alpha keeps it where it is clean; all other recipes see it on white.
    """
    return read_levels(degrade_to_file(picture, scale, degradation, name))


def degrade_to_file(picture: Picture, scale: int, degradation: str, name: str) -> bytes:
    """Return the small picture as its owner has it: a JPEG file after JPEG, else PNG."""
    if degradation != "clean":
        picture = on_white(picture)
    seed = hashlib.sha256(f"{name} {degradation} {scale}".encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, "little"))
    share = {"blur": 1.0, "all": 0.5}.get(degradation, 0.0)
    if share:
        picture = cv2.GaussianBlur(picture, (0, 0), 0.4 * scale * share)
    size = (picture.shape[1] // scale, picture.shape[0] // scale)
    small = shrink(picture, size)
    share = {"noise": 1.0, "all": 0.5}.get(degradation, 0.0)
    if share:
        small = small + rng.standard_normal(small.shape, np.float32) * np.float32(8 / 255 * share)
    levels = np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8)
    quality = {"jpeg": 50, "all": 65, **JPEGS}.get(degradation)
    return as_png(levels) if quality is None else _as_jpeg(levels, quality)


def shrink(picture: Picture, size: tuple[int, int]) -> Picture:
    """Return [h, w, 3 or 4] by area; with alpha, colour counts by its opacity."""
    if picture.shape[2] == 3:
        return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.float32)
    alpha = picture[..., 3:]
    whole = np.dstack([picture[..., :3] * alpha, alpha])
    found = np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), np.float32)
    found[..., :3] /= np.maximum(found[..., 3:], 1e-6)
    return found


def on_white(picture: Picture) -> Picture:
    """Return [h, w, 3]: what shows of a picture, with or without alpha, on white."""
    if picture.shape[2] == 3:
        return picture
    return picture[..., :3] * picture[..., 3:] + (1 - picture[..., 3:])


def as_png(levels: NDArray[np.uint8]) -> bytes:
    """Return a file of 8-bit levels [h, w, 3 or 4]."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _as_jpeg(levels: NDArray[np.uint8], quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality, subsampling=2)
    return file.getvalue()


def read_levels(file: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a file, uint8 [h, w, 3 or 4]."""
    return np.asarray(Image.open(io.BytesIO(file)))
