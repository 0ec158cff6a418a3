"""Sixteen-bit and float colour, which Pillow narrows to eight bits or does not read.

OpenCV reads them. It is only given files whose size has been checked, and PNG files
only after their checksums have been.
"""

from __future__ import annotations

from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from tegula.images.pixels import Float, as_rgb, to_floats

_PNG_DEPTH_AND_COLOUR = slice(24, 26)
_GREY_PNG_COLOURS = (0, 4)
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS = 256, 257, 258
_DEEP = 16


def png_header(file: BinaryIO) -> tuple[int, bool]:
    """Return the bits of a sample of a PNG file, and whether it is grey."""
    file.seek(0)
    depth, colour = file.read(_PNG_DEPTH_AND_COLOUR.stop)[_PNG_DEPTH_AND_COLOUR]
    return depth, colour in _GREY_PNG_COLOURS


def needs_deep_reading(image: Image.Image, file: BinaryIO) -> bool:
    """Whether Pillow would narrow the samples of this opened image."""
    if image.format == "PNG":
        return png_header(file)[0] == _DEEP and not image.mode.startswith("I")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_TIFF_BITS, (8,))
        return image.mode in ("RGB", "RGBA") and max(bits) == _DEEP
    return False


def deep_tiff_size(file: BinaryIO) -> tuple[int, int] | None:
    """Return width and height that a TIFF file claims; None unless it has deep samples."""
    file.seek(0)
    try:
        header = file.read(8)
        directory = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(directory.next)
        directory.load(file)
        if max(directory[_TIFF_BITS]) < _DEEP:
            return None
        return int(directory[_TIFF_WIDTH]), int(directory[_TIFF_HEIGHT])
    except Exception:  # a hostile directory raises nearly anything: it is no TIFF then
        return None


def read_deep(file: BinaryIO) -> tuple[Float, Float | None, bool] | None:
    """Decode with OpenCV at full depth.

    Returns:
        float32 [height, width, 3] in 0..1, the alpha or None, and whether the file is
        grey; None when OpenCV cannot read it. Float samples are taken as 0..1.
    """
    file.seek(0)
    try:
        values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None:
        return None
    return _ordered(to_floats(values, _white(values)))


def _white(values: NDArray[np.generic]) -> float:
    return {"u": 256.0**values.dtype.itemsize - 1}.get(values.dtype.kind, 1.0)


def _ordered(values: Float) -> tuple[Float, Float | None, bool]:
    if values.ndim == 2:
        return as_rgb(values), None, True
    alpha = np.ascontiguousarray(values[..., 3]) if values.shape[2] == 4 else None
    return np.ascontiguousarray(values[..., 2::-1]), alpha, False
