"""A before/after picture, small enough to look at and large enough to judge by."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_DIVIDER = 4
_SMALLEST_PANEL = 96
_TEXT = 15
_CELL = 16
_WHITE = (255, 255, 255)
_INK = (20, 20, 20)
_CHECKS = 8
_CHECK_TONES = (255, 225)


def side_by_side(before: Image.Image, after: Image.Image, *, width: int = 1600) -> Image.Image:
    """Put the source, enlarged by bicubic interpolation, beside the result.

    Bicubic is what a viewer does to a small picture: it neither flatters the source nor
    shows it as blocks. The upper row holds both whole. When they had to be shrunk for
    that, a lower row holds the same detail of both, pixel for pixel as in the result:
    the square where the result has most structure.

    Args:
        before: the source, upright, of any size.
        after: the result.
        width: of the whole comparison, at most, in px.

    Returns:
        RGB, about ``width`` wide or less.
    """
    left, right = _opaque(before), _opaque(after)
    panel = max(_SMALLEST_PANEL, (width - _DIVIDER) // 2)
    shrink = min(1.0, panel / right.width, panel / right.height)
    rows = [_row(_fitted(left, right.size, shrink), _fitted(right, right.size, shrink))]
    if shrink < 1:
        box = _busiest(right, min(panel, right.width), min(panel // 2, right.height))
        rows.append(_row(_detail(left, right.size, box), right.crop(box)))
    return _stacked(rows)


def _opaque(image: Image.Image) -> Image.Image:
    """Lay transparency on a chequered ground, as viewers do."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    y, x = np.indices((image.height, image.width), dtype=np.int32, sparse=True)
    checks = np.take(np.array(_CHECK_TONES, np.uint8), (x // _CHECKS + y // _CHECKS) % 2)
    ground = Image.fromarray(checks).convert("RGB")
    ground.paste(coloured, mask=coloured.getchannel("A"))
    return ground


def _fitted(image: Image.Image, size: tuple[int, int], shrink: float) -> Image.Image:
    """Scale to a share of the result's size; magnify a tiny picture in whole pixels."""
    width, height = (max(1, round(side * shrink)) for side in size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    times = _SMALLEST_PANEL // max(width, height)
    if times < 2:
        return image
    return image.resize((width * times, height * times), Image.Resampling.NEAREST)


def _detail(
    before: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]
) -> Image.Image:
    """Enlarge the part of the source that lies under a box of the result."""
    x, y = before.width / size[0], before.height / size[1]
    part = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    target = (box[2] - box[0], box[3] - box[1])
    return before.resize(target, Image.Resampling.BICUBIC, box=part)


def _row(left: Image.Image, right: Image.Image) -> Image.Image:
    panel = max(_SMALLEST_PANEL, left.width)
    height = max(left.height, 2 * _TEXT)
    row = Image.new("RGB", (2 * panel + _DIVIDER, height), _WHITE)
    for image, text, x in ((left, "before", 0), (right, "after", panel + _DIVIDER)):
        row.paste(image, (x + (panel - image.width) // 2, (height - image.height) // 2))
        _label(row, text, x)
    return row


def _label(row: Image.Image, text: str, x: int) -> None:
    draw = ImageDraw.Draw(row)
    font = ImageFont.load_default(_TEXT)
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    draw.rectangle((x, 0, x + width + 12, height + 8), fill=_INK)
    draw.text((x + 6, 3), text, font=font, fill=_WHITE)


def _busiest(image: Image.Image, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the box of this size with the most structure, found on a grid of cells."""
    structure = np.abs(cv2.Laplacian(np.asarray(image.convert("L")), cv2.CV_16S))
    grid = (-(-image.width // _CELL), -(-image.height // _CELL))
    cells = cv2.resize(structure, grid, interpolation=cv2.INTER_AREA).reshape(grid[::-1])
    across, down = min(grid[0], -(-width // _CELL)), min(grid[1], -(-height // _CELL))
    sums = np.pad(cells.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    totals = sums[down:, across:] - sums[:-down, across:]
    totals = totals - sums[down:, :-across] + sums[:-down, :-across]
    row, column = np.unravel_index(int(totals.argmax()), totals.shape)
    left = min(int(column) * _CELL, image.width - width)
    top = min(int(row) * _CELL, image.height - height)
    return left, top, left + width, top + height


def _stacked(rows: list[Image.Image]) -> Image.Image:
    width = max(row.width for row in rows)
    height = sum(row.height for row in rows) + _DIVIDER * (len(rows) - 1)
    sheet = Image.new("RGB", (width, height), _WHITE)
    y = 0
    for row in rows:
        sheet.paste(row, ((width - row.width) // 2, y))
        y += row.height + _DIVIDER
    return sheet
