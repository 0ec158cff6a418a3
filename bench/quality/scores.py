"""Scores of one picture against its truth, and the summary of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.quality import measures
from bench.quality.brisque import Brisque
from bench.quality.judges import Dists, Judge, feature_distance
from bench.quality.recipes import Picture
from bench.quality.totals import (
    MapMoments,
    PositionMoments,
    frechet_distance,
    map_moments,
    natural_statistics,
    naturalness,
)

Maps = Sequence[Tensor]
DISTS_JUDGE = "vgg16"
"""The judge whose five maps DISTS is defined on."""


@dataclass(frozen=True)
class Jury:
    """Everything that judges. brisque, dists: measured where they are given."""

    judges: Sequence[Judge]
    brisque: Brisque | None = None
    dists: Dists | None = None


@dataclass(frozen=True)
class Truth:
    """A photograph, and what is measured on it once, when it is first needed."""

    name: str
    picture: Picture
    jury: Jury

    @cached_property
    def luma(self) -> NDArray[np.float32]:
        """[h, w]."""
        return measures.luma_of(self.picture)

    @cached_property
    def maps(self) -> Mapping[str, Maps]:
        """What each judge sees."""
        return {judge.name: judge.look(self.picture) for judge in self.jury.judges}

    @cached_property
    def bands(self) -> Mapping[str, float]:
        """The energy of each band."""
        return measures.band_energies(self.luma)


@dataclass(frozen=True)
class PictureScores:
    """Everything measured on one picture.

    row: figures that are averaged. moments: of each judge's maps. natural: NIQE's features of
    each patch. flat: fine energy of picture and truth in flat windows, and their count.
    """

    row: Mapping[str, float]
    moments: Mapping[str, Sequence[MapMoments]]
    natural: NDArray[np.float64]
    flat: tuple[float, float, int]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all of it as named arrays, for a file."""
        found: dict[str, NDArray[Any]] = {
            "natural": self.natural,
            "flat": np.array(self.flat, np.float64),
            **{f"row {name}": np.array(value) for name, value in self.row.items()},
        }
        for judge, maps in self.moments.items():
            for number, one in enumerate(maps):
                upper = one.spread[np.triu_indices(len(one.mean))]
                found[f"moments {judge} {number}"] = np.concatenate(
                    [[np.float64(one.places)], one.mean]
                )
                found[f"spread {judge} {number}"] = upper
        return found

    @classmethod
    def from_arrays(cls, found: Mapping[str, NDArray[Any]]) -> PictureScores:
        """Return what ``arrays`` gave."""
        moments: dict[str, list[MapMoments]] = {}
        for name in sorted(name for name in found if name.startswith("moments ")):
            judge = name.split()[1]
            places, mean = int(found[name][0]), found[name][1:]
            upper = np.zeros((len(mean), len(mean)), np.float32)
            upper[np.triu_indices(len(mean))] = found[name.replace("moments", "spread")]
            spread = upper + np.triu(upper, 1).T
            moments.setdefault(judge, []).append(MapMoments(places, mean, spread))
        row = {n.partition(" ")[2]: float(v) for n, v in found.items() if n.startswith("row ")}
        fine, true, count = found["flat"]
        return cls(row, moments, found["natural"], (float(fine), float(true), int(count)))


def score(picture: Picture, truth: Truth, small: NDArray[np.uint8] | None) -> PictureScores:
    """Measure a picture by the truth's jury; ``small`` is what it was enlarged from."""
    luma = measures.luma_of(picture)
    maps = {judge.name: judge.look(picture) for judge in truth.jury.judges}
    bands = measures.band_energies(luma)
    row = {
        "psnr": measures.psnr(luma, truth.luma),
        "ssim": measures.ssim(luma, truth.luma),
        "colour": measures.colour_shift(picture, truth.picture),
        **{f"distance_{n}": feature_distance(m, truth.maps[n]) for n, m in maps.items()},
        **{f"log_{b}": math.log((bands[b] + 1e-9) / (truth.bands[b] + 1e-9)) for b in bands},
    }
    if small is not None:
        row["consistency"] = measures.consistency(picture, small)
        row["grid"] = measures.grid(luma, truth.luma, round(len(luma) / len(small)))
    if truth.jury.brisque is not None:
        row["brisque"] = truth.jury.brisque.score(luma)
    if truth.jury.dists is not None:
        ours, theirs = maps[DISTS_JUDGE], truth.maps[DISTS_JUDGE]
        row["dists"] = truth.jury.dists(picture, ours, truth.picture, theirs)
    moments = {
        judge.name: [map_moments(found) for found in judge.statistical(maps[judge.name])]
        for judge in truth.jury.judges
    }
    flat = measures.flat_energies(luma, truth.luma)
    return PictureScores(row, moments, natural_statistics(luma), flat)


@dataclass
class MethodScores:
    """The scores of many pictures: of one method, one degradation and one scale."""

    rows: list[Mapping[str, float]] = field(default_factory=list)
    moments: dict[str, PositionMoments] = field(default_factory=dict)
    natural: list[NDArray[np.float64]] = field(default_factory=list)
    flat: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, scores: PictureScores) -> None:
        """Take the scores of one picture."""
        self.rows.append(scores.row)
        self.natural.append(scores.natural)
        self.flat.append(scores.flat)
        for judge, maps in scores.moments.items():
            self.moments.setdefault(judge, PositionMoments()).merge(maps)

    def summary(self, truths: MethodScores) -> dict[str, float]:
        """Return means of the rows and the measures over all pictures together.

        texture_* are geometric means of the energy ratios of the single pictures.
        """
        mean = {k: float(np.mean([row[k] for row in self.rows])) for k in self.rows[0]}
        bands = {f"texture_{k[4:]}": math.exp(v) for k, v in mean.items() if k.startswith("log_")}
        plain = {k: v for k, v in mean.items() if not k.startswith("log_")}
        fine, true, count = (sum(column) for column in zip(*self.flat, strict=True))
        return {
            **{
                f"frechet_{judge}": frechet_distance(moments, truths.moments[judge])
                for judge, moments in self.moments.items()
            },
            **plain,
            **bands,
            "flat": fine / true if count else math.nan,
            "naturalness": naturalness(np.vstack(self.natural), np.vstack(truths.natural)),
        }
