"""Runs every method over photographs, degradations and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from bench.quality.brisque import read_brisque
from bench.quality.features import EarlyFeatures
from bench.quality.measures import luma_of, seam_score
from bench.quality.methods import Method, Runner
from bench.quality.recipes import Picture, degrade
from bench.quality.scores import MethodScores, Truth, measure_truth
from bench.quality.totals import PositionMoments
from tegula.upscaler import Upscaler

SEAM_WINDOW = 192
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Crop:
    """A piece of every method's picture for the page."""

    title: str
    columns: tuple[tuple[str, Picture], ...]


@dataclass(frozen=True)
class Outcome:
    """tables[scale][degradation][method][measure]; seams and spread per method.

    truth_brisque: mean BRISQUE of the photographs themselves.
    """

    tables: dict[int, dict[str, dict[str, dict[str, float]]]]
    seconds_per_megapixel: dict[str, float]
    seams: dict[str, float]
    spread: dict[str, float]
    crops: list[Crop]
    truth_brisque: float


def read_photographs(folder: Path, limit: int | None, multiple: int) -> list[tuple[str, Picture]]:
    """Return (name, picture) of a folder, cut to sides that ``multiple`` divides."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)[:limit]
    return [(path.stem, _read(path, multiple)) for path in paths]


def packaged_photographs(multiple: int) -> list[tuple[str, Picture]]:
    """Return public-domain photographs of scikit-image, where there is no folder."""
    from skimage import data

    pictures = {n: getattr(data, n)() for n in ("astronaut", "coffee", "chelsea", "rocket")}
    scaled = {n: p.astype(np.float32) / np.float32(255) for n, p in pictures.items()}
    return [(name, _cut(picture, multiple)) for name, picture in scaled.items()]


def _read(path: Path, multiple: int) -> Picture:
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise SystemExit(f"{path} is not a picture.")
    return _cut(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.float32) / np.float32(255), multiple)


def _cut(picture: Picture, multiple: int) -> Picture:
    height, width = (side - side % multiple for side in picture.shape[:2])
    return picture[:height, :width]


def run(
    photographs: Sequence[tuple[str, Picture]],
    scales: Sequence[int],
    degradations: Sequence[str],
    methods: Sequence[Method],
    on_progress: Callable[[str], None],
) -> Outcome:
    """Measure everything; the picture of each method is kept only as a crop."""
    features = EarlyFeatures("lite0", stages=3)
    truths = [measure_truth(name, picture, features) for name, picture in photographs]
    runner = Runner(Upscaler.load("mini"))
    bench = _Bench(truths, runner, features, methods, on_progress)
    tables = {s: {d: bench.table(s, d) for d in degradations} for s in scales}
    refined = [m for m in methods if m.options.creativity != 0]
    return Outcome(
        tables,
        {name: sum(v) / len(v) for name, v in bench.seconds.items()},
        {m.name: bench.seams(m, max(scales)) for m in refined},
        {m.name: bench.spread(m, max(scales)) for m in refined},
        bench.crops,
        float(np.mean([bench.brisque.score(truth.luma) for truth in truths])),
    )


class _Bench:
    """The loop over photographs with what it keeps."""

    def __init__(
        self,
        truths: list[Truth],
        runner: Runner,
        features: EarlyFeatures,
        methods: Sequence[Method],
        on_progress: Callable[[str], None],
    ) -> None:
        self._truths, self._runner, self._features = truths, runner, features
        self._methods, self._on_progress = methods, on_progress
        self._truth_moments = PositionMoments()
        for truth in truths:
            self._truth_moments.add(truth.features)
        self._natural = np.vstack([t.natural for t in truths])
        self.brisque = read_brisque()
        self.seconds: dict[str, list[float]] = {}
        self.crops: list[Crop] = []

    def table(self, scale: int, degradation: str) -> dict[str, dict[str, float]]:
        """Return the summary of every method under one degradation."""
        scores = {m.name: MethodScores(self.brisque) for m in self._methods}
        for number, truth in enumerate(self._truths):
            self._on_progress(f"{scale}x {degradation} {number + 1}/{len(self._truths)}")
            small = degrade(truth.picture, scale, degradation, truth.name)
            pictures = []
            for method in self._methods:
                result = self._runner.run(small, scale, method.options)
                scores[method.name].add(result.picture, truth, small, self._features)
                pictures.append((method.name, result.picture))
                if result.seconds:
                    per_megapixel = result.seconds * 1e6 / truth.luma.size
                    self.seconds.setdefault(method.name, []).append(per_megapixel)
            self.crops.append(_crop(f"{truth.name} · {scale}x · {degradation}", truth, pictures))
        return {n: s.summary(self._truth_moments, self._natural) for n, s in scores.items()}

    def seams(self, method: Method, scale: int) -> float:
        """Return the mean seam score over four photographs, with small windows."""
        found = []
        for truth in self._truths[:4]:
            small = degrade(truth.picture, scale, "clean", truth.name)
            options = replace(method.options, window=SEAM_WINDOW)
            result = self._runner.run(small, scale, options)
            luma = luma_of(result.picture)
            plain = self._runner.run(small, scale, method.options)
            columns, rows = list(result.columns), list(result.rows)
            found.append(
                seam_score(luma, columns, rows) / seam_score(luma_of(plain.picture), columns, rows)
            )
        return float(np.mean(found))

    def spread(self, method: Method, scale: int) -> float:
        """Return the deviation of luma over seeds, in levels of 255, over four photographs."""
        found = []
        for truth in self._truths[:4]:
            small = degrade(truth.picture, scale, "clean", truth.name)
            lumas = [
                luma_of(self._runner.run(small, scale, replace(method.options, seed=s)).picture)
                for s in SEEDS
            ]
            found.append(float(np.std(lumas, axis=0).mean()) * 255)
        return float(np.mean(found))


def _crop(title: str, truth: Truth, pictures: list[tuple[str, Picture]], side: int = 192) -> Crop:
    """Return the liveliest of nine places, the same in all pictures."""
    height, width = truth.luma.shape
    side = min(side, height, width)
    places = [
        (round((height - side) * y), round((width - side) * x))
        for y in (0.1, 0.5, 0.9)
        for x in (0.1, 0.5, 0.9)
    ]
    top, left = max(
        places, key=lambda p: float(np.std(truth.luma[p[0] : p[0] + side, p[1] : p[1] + side]))
    )
    cut = (slice(top, top + side), slice(left, left + side))
    columns = (("truth", truth.picture[cut]), *((n, p[cut].copy()) for n, p in pictures))
    return Crop(title, tuple(columns))
