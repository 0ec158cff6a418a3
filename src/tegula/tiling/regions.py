"""How much each prompt counts at each latent pixel, for regions with soft edges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tegula.regions import PlacedRegion
from tegula.tiling.windows import Window


def prompt_shares(
    boxes: Sequence[PlacedRegion], window: Window, factor: int
) -> list[NDArray[np.float32]]:
    """Return the share of the common prompt and of each region's; they sum to one.

    Later regions lie over earlier ones.

    Args:
        boxes: from ``place_region``.
        window: in pixels of the result.
        factor: pixels per latent pixel.

    Returns:
        float32 [window height / factor, window width / factor] each.
    """
    xs = window.x + (np.arange(window.width // factor, dtype=np.float64) + 0.5) * factor
    ys = window.y + (np.arange(window.height // factor, dtype=np.float64) + 0.5) * factor
    shares: list[NDArray[np.float64]] = [np.ones((len(ys), len(xs)))]
    for box in boxes:
        over = np.outer(
            _rise(ys, box.top, box.bottom, box.feather),
            _rise(xs, box.left, box.right, box.feather),
        )
        shares = [share * (1 - over) for share in shares] + [over]
    return [share.astype(np.float32) for share in shares]


def count_told(regions: Sequence[PlacedRegion], windows: Sequence[Window], factor: int) -> int:
    """Return how many pairs there are of a window and a prompt that has a share in it."""
    if not regions:
        return len(windows)
    return sum(bool(s.any()) for w in windows for s in prompt_shares(regions, w, factor))


def _rise(at: NDArray[np.float64], low: float, high: float, feather: float) -> NDArray[np.float64]:
    """Rise from the edges inwards as a squared sine; full at an edge that the result cuts."""
    inside = np.minimum(at - low if low > 0 else np.inf, high - at)
    return np.asarray(np.sin(np.clip(inside / feather, 0, 1) * np.pi / 2) ** 2)
