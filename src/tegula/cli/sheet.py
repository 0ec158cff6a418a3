"""The sheet of `tegula tune`: which part of a picture it shows, and how it is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tegula.images.pixels import LUMA, Float
from tegula.pipeline.adjust import flatness
from tegula.pipeline.pictures import on_device, on_host

_FLAT_SHARE = 0.1
"""Of a part: from here on more flat area makes it no better to judge by."""

# In pixels of the sheet.
_GAP = 12
_NARROWEST = 240
_FONT_SIZE = 13
_LINE = 17
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def liveliest(rgb: Float, side: int) -> tuple[int, int, int, int]:
    """Return the square where most is going on and a tenth at least is flat.

    Args:
        rgb: float32 [height, width, 3] in 0..1.
        side: of the square, in pixels; a picture that is narrower gives a part of its own width.

    Returns:
        x, y, width and height.
    """
    height, width = rgb.shape[:2]
    # Shrunk so that a part has about 64 px a side, which places it finely enough.
    times = max(1.0, side / 64)
    size = max(1, round(width / times)), max(1, round(height / times))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    grey = small @ LUMA
    structure = np.abs(grey - cv2.blur(grey, (3, 3)))
    wide, high = min(side, width), min(side, height)
    across, down = (
        max(1, min(round(length / times), most))
        for length, most in zip((wide, high), size, strict=True)
    )

    def means(values: Float) -> Float:
        sums = cv2.integral(values)
        of_parts = (sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across]) + sums[
            :-down, :-across
        ]
        return np.asarray(of_parts / (across * down), np.float32)

    flat = on_host(flatness(on_device(small, torch.device("cpu"))))
    score = means(structure) * np.minimum(1.0, means(flat) / _FLAT_SHARE + 0.1)
    y, x = np.unravel_index(int(score.argmax()), score.shape)
    left, top = min(width - wide, round(int(x) * times)), min(height - high, round(int(y) * times))
    return left, top, wide, high


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str], columns: int, title: str
) -> Image.Image:
    """Lay pictures out in rows, with labels below them.

    Args:
        pictures: of one size.
        labels: one for each.
        columns: of the sheet.
        title: in a line above.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    width = max(_NARROWEST, *(picture.width for picture in pictures))
    texts = [list(_lines(label, width, font.getlength)) for label in labels]
    rows = -(-len(pictures) // columns)
    height = max(picture.height for picture in pictures)
    step_x, step_y = width + _GAP, height + _GAP + _LINE * max(map(len, texts))
    top = _GAP + _LINE
    sheet = Image.new("RGB", (_GAP + columns * step_x, top + _GAP + rows * step_y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2), title, _INK, font)
    for number, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(number, columns)
        x, y = _GAP + column * step_x, top + _GAP + row * step_y
        sheet.paste(picture, (x, y))
        for line, text in enumerate(lines):
            draw.text((x, y + picture.height + 2 + line * _LINE), text, _INK, font)
    return sheet


def _lines(text: str, width: int, length: Callable[[str], float]) -> Iterator[str]:
    """Break a text into lines of this width at its spaces; a longer word is broken anywhere."""
    line = ""
    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if length(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        line = word
        while length(line) > width:
            fits = max(n for n in range(1, len(line)) if n == 1 or length(line[:n]) <= width)
            yield line[:fits]
            line = line[fits:]
    yield line
