"""Scores of one method under one degradation, and their summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.quality import measures
from bench.quality.brisque import Brisque
from bench.quality.features import EarlyFeatures
from bench.quality.totals import (
    PositionMoments,
    frechet_distance,
    natural_statistics,
    naturalness,
)

Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Truth:
    """A photograph and what is measured on it once."""

    name: str
    picture: Picture
    luma: NDArray[np.float32]
    features: list[Tensor]
    bands: Mapping[str, float]
    natural: NDArray[np.float64]


def measure_truth(name: str, picture: Picture, features: EarlyFeatures) -> Truth:
    """Return a photograph with its own measures."""
    luma = measures.luma_of(picture)
    maps = measures.extract(features, picture)
    return Truth(name, picture, luma, maps, measures.band_energies(luma), natural_statistics(luma))


@dataclass
class MethodScores:
    """Everything measured on one method, one degradation and one scale.

    brisque: measures BRISQUE as well, where it is given.
    """

    brisque: Brisque | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    moments: PositionMoments = field(default_factory=PositionMoments)
    natural: list[NDArray[np.float64]] = field(default_factory=list)
    flat: list[tuple[float, float, int]] = field(default_factory=list)

    def add(
        self, picture: Picture, truth: Truth, small: NDArray[np.uint8], features: EarlyFeatures
    ) -> dict[str, float]:
        """Measure one picture; returns its row."""
        luma = measures.luma_of(picture)
        maps = measures.extract(features, picture)
        self.moments.add(maps)
        self.natural.append(natural_statistics(luma))
        self.flat.append(measures.flat_energies(luma, truth.luma))
        bands = measures.band_energies(luma)
        row = {
            "psnr": measures.psnr(luma, truth.luma),
            "ssim": measures.ssim(luma, truth.luma),
            "perceptual": measures.perceptual_distance(maps, truth.features),
            "colour": measures.colour_shift(picture, truth.picture),
            "consistency": measures.consistency(picture, small),
            **{f"log_{b}": math.log((bands[b] + 1e-9) / (truth.bands[b] + 1e-9)) for b in bands},
        }
        if self.brisque is not None:
            row["brisque"] = self.brisque.score(luma)
        self.rows.append(row)
        return row

    def summary(self, truths: PositionMoments, natural: NDArray[np.float64]) -> dict[str, float]:
        """Return means of the rows and the measures over all pictures together.

        texture_* are geometric means of the energy ratios of the single pictures.
        """
        mean = {k: float(np.mean([row[k] for row in self.rows])) for k in self.rows[0]}
        bands = {f"texture_{k[4:]}": math.exp(v) for k, v in mean.items() if k.startswith("log_")}
        plain = {k: v for k, v in mean.items() if not k.startswith("log_")}
        fine, true, count = (sum(column) for column in zip(*self.flat, strict=True))
        return {
            "frechet": frechet_distance(self.moments, truths),
            **plain,
            **bands,
            "flat": fine / true if count else math.nan,
            "naturalness": naturalness(np.vstack(self.natural), natural),
        }
