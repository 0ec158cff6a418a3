"""A number for seams: gradients across window borders over gradients elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def seam_score(picture: NDArray[np.float32], columns: Iterable[int], rows: Iterable[int]) -> float:
    """Return gradient energy on borders over that of their neighbourhood; 1 is seamless.

    Args:
        picture: [height, width, 3] in 0..1.
        columns: x of vertical borders, between pixels x - 1 and x.
        rows: y of horizontal borders.
    """
    ratios = [
        *_axis_ratios(picture, columns),
        *_axis_ratios(picture.transpose(1, 0, 2), rows),
    ]
    on, near = (sum(part) for part in zip(*ratios, strict=True)) if ratios else (1.0, 1.0)
    return float(on / near)


def _axis_ratios(picture: NDArray[np.float32], borders: Iterable[int]) -> list[tuple[float, float]]:
    steps = np.square(np.diff(picture.astype(np.float64), axis=1)).mean((0, 2))
    reach = 8
    found = []
    for border in borders:
        at = border - 1
        near = np.r_[steps[max(0, at - reach) : at], steps[at + 1 : at + 1 + reach]]
        if 0 <= at < len(steps) and len(near):
            found.append((float(steps[at]), float(near.mean())))
    return found


def border_gradient(
    picture: NDArray[np.float32], step: int, *, shift: int = 0, phase: int = 4
) -> float:
    """Return gradient energy on the borders of tiles over that on lines near by.

    A decoder repeats its own faint pattern in every latent pixel, and a network that halves
    the resolution one in every place of its coarsest level, so a border is compared with
    lines of its own phase only: five on each side.

    Args:
        picture: [height, width, 3] in 0..1.
        step: pixels from border to border, in both directions.
        shift: moves all lines; a multiple of ``phase`` measures what chance makes of lines
            where there is no border.
        phase: pixels of the picture after which the pattern repeats.
    """
    on = near = 0.0
    around = phase * np.array([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
    for turned in (picture, picture.swapaxes(0, 1)):
        energy = np.square(np.diff(turned.astype(np.float64), axis=1)).mean((0, 2))
        for border in range(step + shift, len(energy) - 8 * phase, step):
            on += energy[border - 1]
            near += energy[border - 1 + around].mean()
    return float(on / near)
