"""A small photograph, and how far a picture is from its plain enlargement."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIZE = (64, 48)
_CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"


def photograph(size: tuple[int, int] = SIZE) -> bytes:
    """The example photograph as a PNG."""
    stream = io.BytesIO()
    _small(size).save(stream, "png")
    return stream.getvalue()


def distance(picture: Image.Image, size: tuple[int, int] = SIZE) -> float:
    """Mean difference to the photograph enlarged by interpolation, in levels of 0..255."""
    plain = _small(size).resize(picture.size, Image.Resampling.LANCZOS)
    levels = [np.asarray(one.convert("RGB"), dtype=np.float32) for one in (picture, plain)]
    return float(np.abs(levels[0] - levels[1]).mean())


def _small(size: tuple[int, int]) -> Image.Image:
    with Image.open(_CAT) as cat:
        return ImageOps.fit(cat.convert("RGB"), size, Image.Resampling.LANCZOS)
