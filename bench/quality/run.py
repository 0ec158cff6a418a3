"""Runs every method over photographs and drawings, degradations and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from bench.quality.cache import Cache, digest
from bench.quality.drawings import (
    Drawing,
    can_read,
    kept_extremes,
    read_text,
    right_characters,
)
from bench.quality.measures import border_energy, luma_of
from bench.quality.methods import SEED, Method, Result, Runner
from bench.quality.recipes import Picture, degrade_to_file, on_white, read_levels
from bench.quality.scores import Jury, MethodScores, PictureScores, Truth, score
from tegula.pipeline.exact import Consistency, consistency

SEAM_WINDOW = 192
_SCORES = "2"
"""Version of the measures; raise it with a change, so that no older score comes from the cache."""


@dataclass(frozen=True)
class Crop:
    """A piece of every method's picture for the page."""

    title: str
    columns: tuple[tuple[str, Picture], ...]


Table = dict[str, dict[str, float]]
"""The measures of each method, by name."""


@dataclass
class Outcome:
    """What a run found.

    tables: by scale and degradation. nets: of each method, those that made its pictures.
    seconds_per_megapixel: of refine. seams, spread: of methods that refine, where asked for.
    truth_brisque: mean BRISQUE of the photographs themselves.
    """

    tables: dict[int, dict[str, Table]]
    nets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds_per_megapixel: dict[str, float] = field(default_factory=dict)
    seams: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    crops: list[Crop] = field(default_factory=list)
    truth_brisque: float | None = None

    def add_nets(self, method: str, nets: tuple[str, ...]) -> None:
        """Remember which nets made a picture; where a look chooses, they differ."""
        self.nets[method] = tuple(dict.fromkeys((*self.nets.get(method, ()), *nets)))


def read_photographs(folder: Path, limit: int | None, multiple: int) -> list[tuple[str, Picture]]:
    """Return (name, picture) of a folder, in order, cut to sides that ``multiple`` divides."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)[:limit]
    return [(path.stem, read_photograph(path, multiple)) for path in paths]


def packaged_photographs(multiple: int) -> list[tuple[str, Picture]]:
    """Return public-domain photographs of scikit-image, where there is no folder."""
    from skimage import data

    pictures = {n: getattr(data, n)() for n in ("astronaut", "coffee", "chelsea", "rocket")}
    scaled = {n: p.astype(np.float32) / np.float32(255) for n, p in pictures.items()}
    return [(name, _cut(picture, multiple)) for name, picture in scaled.items()]


def read_photograph(path: Path, multiple: int) -> Picture:
    """Return a picture of a file, cut to sides that ``multiple`` divides."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise SystemExit(f"{path} is not a picture.")
    return _cut(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.float32) / np.float32(255), multiple)


def _cut(picture: Picture, multiple: int) -> Picture:
    height, width = (side - side % multiple for side in picture.shape[:2])
    return picture[:height, :width]


def middle_square(picture: Picture, side: int | None) -> Picture:
    """Return the middle square of a picture, or all of it where it is no larger."""
    if side is None:
        return picture
    top, left = (max(0, (length - side) // 2) for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


@dataclass(frozen=True)
class Bench:
    """What measures photographs and drawings; everything it measures is kept in the cache."""

    runner: Runner
    jury: Jury
    cache: Cache
    on_progress: Callable[[str], None]

    def run(
        self,
        photographs: Sequence[tuple[str, Picture]],
        scales: Sequence[int],
        degradations: Sequence[str],
        methods: Sequence[Method],
        *,
        extras: int = 0,
    ) -> Outcome:
        """Measure everything; the picture of each method is kept only as a crop.

        extras: over how many photographs seams and the spread over seeds are measured.
        """
        outcome = Outcome({s: {d: {} for d in degradations} for s in scales})
        truths = MethodScores()
        found: dict[tuple[int, str, str], MethodScores] = {}
        shrunk: dict[tuple[int, str, str], list[Consistency]] = {}
        seconds: dict[str, list[float]] = {}
        # Photographs outermost: what the judges see of a truth is large, and kept for it alone.
        for number, (name, picture) in enumerate(photographs, 1):
            truth = Truth(name, picture, self.jury)
            truths.add(self._score(truth.picture, truth, None))
            for scale in scales:
                for degradation in degradations:
                    title = f"{name} · {scale}x · {degradation}"
                    file = degrade_to_file(picture, scale, degradation, name)
                    small = read_levels(file)
                    source = np.asarray(small / np.float32(255), np.float32)
                    pictures = []
                    for method in methods:
                        self.on_progress(f"{number}/{len(photographs)} {title} · {method.name}")
                        result = self.runner.run(file, scale, method)
                        key = (scale, degradation, method.name)
                        scores = self._score(result.picture, truth, small)
                        found.setdefault(key, MethodScores()).add(scores)
                        shrunk.setdefault(key, []).append(_consistency(result.picture, source))
                        outcome.add_nets(method.name, result.nets)
                        if result.seconds:
                            per_megapixel = result.seconds * 1e6 / truth.luma.size
                            seconds.setdefault(method.name, []).append(per_megapixel)
                        pictures.append((method.name, result.picture))
                    outcome.crops.append(_crop(title, truth, pictures))
        for (scale, degradation, method_name), one in found.items():
            near = shrunk[scale, degradation, method_name]
            outcome.tables[scale][degradation][method_name] = {
                **one.summary(truths),
                "off_mean": float(np.mean([each.mean for each in near])),
                "off_worst": max(each.worst for each in near),
            }
        outcome.seconds_per_megapixel = {n: float(np.mean(s)) for n, s in seconds.items()}
        if self.jury.brisque is not None:
            outcome.truth_brisque = float(np.mean([row["brisque"] for row in truths.rows]))
        for method in methods if extras else ():
            if method.refines:
                pieces = photographs[:extras]
                outcome.seams[method.name] = self._seams(method, pieces, max(scales))
                outcome.spread[method.name] = self._spread(method, pieces, max(scales))
        return outcome

    def run_drawings(
        self,
        drawings: Sequence[Drawing],
        scales: Sequence[int],
        degradations: Sequence[str],
        methods: Sequence[Method],
    ) -> Outcome:
        """Measure drawings: means over all, and what is read off those that hold text."""
        outcome = Outcome({s: {d: {} for d in degradations} for s in scales})
        found: dict[tuple[int, str, str], list[dict[str, float]]] = {}
        for number, drawing in enumerate(drawings, 1):
            for scale in scales:
                picture, lines = drawing.at(scale)
                truth = Truth(drawing.name, on_white(picture), self.jury)
                for degradation in degradations:
                    title = f"{drawing.name} · {scale}x · {degradation}"
                    file = degrade_to_file(picture, scale, degradation, drawing.name)
                    pictures = []
                    for method in methods:
                        self.on_progress(f"{number}/{len(drawings)} {title} · {method.name}")
                        result = self.runner.run(file, scale, method)
                        row = dict(self._score(result.picture, truth, None).row)
                        if drawing.kind == "text":
                            row["text_ssim"] = row["ssim"]
                        row |= self._read(result.picture, lines) if lines else {}
                        kept = kept_extremes(result.picture, truth.picture, scale)
                        for name, (stay, count) in kept.items():
                            row |= {f"stay_{name}": stay, f"count_{name}": count}
                        found.setdefault((scale, degradation, method.name), []).append(row)
                        outcome.add_nets(method.name, result.nets)
                        pictures.append((method.name, result.picture))
                    outcome.crops.append(_crop(title, truth, pictures))
        for (scale, degradation, method_name), rows in found.items():
            outcome.tables[scale][degradation][method_name] = _drawn(rows)
        return outcome

    def _read(self, picture: Picture, lines: Sequence[str]) -> dict[str, float]:
        """Return how many characters were read right, and how many there are."""
        if not can_read():
            return {}
        key = digest("read", _SCORES, *lines, picture)
        found = self.cache.arrays(
            key, lambda: {"right": np.array(right_characters(read_text(picture), lines))}
        )
        count = sum(len(line.replace(" ", "")) for line in lines)
        return {"stay_read": float(found["right"]), "count_read": count}

    def _score(
        self, picture: Picture, truth: Truth, small: NDArray[np.uint8] | None
    ) -> PictureScores:
        parts: list[NDArray[Any]] = [picture, truth.picture]
        parts += [] if small is None else [small]
        words = [f"{judge.name} {judge.dtype}" for judge in self.jury.judges]
        words += [str(self.jury.brisque is not None), str(self.jury.dists is not None)]
        key = digest("scores", _SCORES, *words, *parts)
        return PictureScores.from_arrays(
            self.cache.arrays(key, lambda: score(picture, truth, small).arrays())
        )

    def _run(self, name: str, picture: Picture, scale: int, method: Method) -> Result:
        return self.runner.run(degrade_to_file(picture, scale, "clean", name), scale, method)

    def _seams(
        self, method: Method, photographs: Sequence[tuple[str, Picture]], scale: int
    ) -> float:
        """Return the mean seam score, with small windows, over that of usual ones."""
        found = []
        for name, picture in photographs:
            self.on_progress(f"seams · {name} · {method.name}")
            result = self._run(name, picture, scale, _with(method, window=SEAM_WINDOW))
            plain = luma_of(self._run(name, picture, scale, method).picture)
            columns, rows = list(result.columns), list(result.rows)
            found.append(
                border_energy(luma_of(result.picture), columns, rows)
                / border_energy(plain, columns, rows)
            )
        return float(np.mean(found))

    def _spread(
        self, method: Method, photographs: Sequence[tuple[str, Picture]], scale: int
    ) -> float:
        """Return the deviation of luma over seeds, in levels of 255."""
        found = []
        for name, picture in photographs:
            self.on_progress(f"seeds · {name} · {method.name}")
            lumas = [
                luma_of(self._run(name, picture, scale, _with(method, seed=SEED + n)).picture)
                for n in range(3)
            ]
            found.append(float(np.std(lumas, axis=0).mean()) * 255)
        return float(np.mean(found))


def _consistency(picture: Picture, source: Picture) -> Consistency:
    return consistency(torch.from_numpy(picture), torch.from_numpy(source))


def _drawn(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means of what each row has; what is counted becomes a share of all there is."""
    names = sorted({name for row in rows for name in row if not name.startswith("log_")})
    sums = {name: [row[name] for row in rows if name in row] for name in names}
    table = {}
    for name, values in sums.items():
        kind, _, what = name.partition("_")
        if kind == "stay":
            table[what] = sum(values) / max(1, sum(sums[f"count_{what}"]))
        elif kind != "count":
            table[name] = float(np.mean(values))
    return table


def _with(method: Method, **named: int) -> Method:
    if method.options is None:
        raise ValueError(f"{method.name} has no options")
    return replace(method, options=method.options.replaced(**named))


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
