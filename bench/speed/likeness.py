"""How good a result is: its seams, and how far it is from the untiled one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bench.seams import seam_score
from bench.speed.job import Picture
from bench.speed.loop import FACTOR, tile_grid


@dataclass(frozen=True)
class Reference:
    """The result without any tiles, in fp32, with all the work of the job."""

    untiled: Picture
    tile: int

    def judge(self, result: Picture, overlap: float) -> Mapping[str, float]:
        """Return the seam score on the borders of the tiles, 1 as untiled, and the distance.

        The distance is the mean absolute difference, of a range of 1.
        """
        grid = tile_grid(len(self.untiled), self.tile, overlap)
        borders = [_inside(starts, self.tile, len(result)) for starts in (grid.columns, grid.rows)]
        return {
            "seam": seam_score(result, *borders) / seam_score(self.untiled, *borders),
            "distance": float(np.abs(result - self.untiled).mean()),
        }


def _inside(starts: tuple[int, ...], tile: int, side: int) -> list[int]:
    edges = {edge for start in starts for edge in (start * FACTOR, start * FACTOR + tile)}
    return sorted(edge for edge in edges if 0 < edge < side)
