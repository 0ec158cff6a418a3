"""How much of tegula-photo's tuning suits which damage, judged by networks it never saw.

Usage: python -m bench.shares PHOTOGRAPHS... --work FOLDER

Weights on the straight line from x4plus's to the tuned ones are all good ones; this enlarges
crops of photographs under every damage with a row of shares, keeps the pictures, and judges
them. A second run goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.quality import judges
from bench.quality.measures import flat_energies, luma_of, psnr
from bench.quality.recipes import Picture
from bench.quality.recipes import degrade as damage_of_tables
from bench.quality.totals import PositionMoments, frechet_distance
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.pipeline.adjust import wavelet_lock
from tegula.pipeline.pictures import enlarge_lanczos, on_device, on_host
from tegula.pipeline.prescale import run_network
from train import photos

SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
FACTOR, SIDE = 4, 256
DAMAGES = ("clean", "noise 8", "JPEG 30", "JPEG 50", "JPEG 80", "all", "noise 4", "blur")


def damaged(truth: Picture, damage: str, name: str) -> NDArray[np.uint8]:
    """Return the small picture; damages that the tables have are theirs."""
    kind, _, amount = damage.partition(" ")
    if not amount:
        return damage_of_tables(truth, FACTOR, damage, name)
    small = damage_of_tables(truth, FACTOR, "clean", name)
    if kind == "noise":
        rng = np.random.default_rng(len(name) + int(amount))
        noisy = small + rng.normal(0, float(amount), small.shape)
        return np.asarray(np.rint(noisy.clip(0, 255)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=int(amount))
    return np.asarray(Image.open(file).convert("RGB"), np.uint8)


def enlarged(small: NDArray[np.uint8], prescaler: Prescaler) -> Iterator[Picture]:
    """Yield what each share makes of a picture, colours held to the source."""
    pixels = small.astype(np.float32) / np.float32(255)
    rgb = on_device(pixels, prescaler.device)
    source = enlarge_lanczos(rgb, (FACTOR * small.shape[1], FACTOR * small.shape[0]))
    for share in SHARES:
        yield on_host(wavelet_lock(run_network(rgb, with_share(prescaler, share)), source))


def make(paths: list[Path], work: Path) -> None:
    """Write one file for each photograph and damage: truth, source and all results."""
    prescaler = load_prescaler("tegula-photo", torch.device("cpu"), torch.bfloat16)
    rng = np.random.default_rng(11)
    for path in paths:
        truth = photos.plain_crop(photos.read(path), SIDE, rng)
        for damage in DAMAGES:
            target = work / f"{path.stem} {damage}.npz"
            if target.exists():
                continue
            small = damaged(truth, damage, path.stem)
            results = [
                np.rint(p.clip(0, 1) * 255).astype(np.uint8) for p in enlarged(small, prescaler)
            ]
            whole = np.rint(truth * 255).astype(np.uint8)
            np.savez_compressed(target, truth=whole, small=small, results=np.stack(results))
            print(target.name, flush=True)


class Row:
    """What was measured of one share under one damage."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.moments = {"vgg16": PositionMoments(), "mobilenet": PositionMoments()}
        self.scores: dict[str, list[float]] = {}

    def add(self, **scores: float) -> None:
        """Take the scores of one photograph."""
        for name, score in scores.items():
            self.scores.setdefault(name, []).append(score)


class Bench:
    """Judges kept pictures, one photograph after another."""

    def __init__(self) -> None:
        """Read the judges."""
        self._vgg = judges.load_judge("vgg16", torch.bfloat16)
        self._mobilenet = judges.load_judge("mobilenet", torch.bfloat16)
        self._dists = judges.Dists()
        self.rows: dict[tuple[str, float | None], Row] = {}

    def add(self, damage: str, truth: Picture, results: dict[float, Picture]) -> None:
        """Judge what the shares made of one photograph."""
        seen = self._look(truth)
        self._count(self._row(damage, None), seen)
        for share, picture in results.items():
            row, found = self._row(damage, share), self._look(picture)
            self._count(row, found)
            luma, true = luma_of(picture), luma_of(truth)
            flat, flat_truth, _ = flat_energies(luma, true)
            row.add(
                dists=self._dists(picture, found[0], truth, seen[0]),
                vgg=judges.feature_distance(found[0], seen[0]),
                mobilenet=judges.feature_distance(found[1], seen[1]),
                psnr=psnr(picture, truth),
                flat=flat,
                flat_truth=flat_truth,
            )

    def table(self) -> Iterator[str]:
        """Yield lines of Markdown; distances are those of x4plus, share 0, beside them."""
        names = ("VGG16 Fréchet", "MobileNetV2 Fréchet", "DISTS", "VGG16", "MobileNetV2")
        yield f"| damage | share | {' | '.join(names)} | PSNR | flat energy |"
        yield "|---" * 9 + "|"
        for damage in DAMAGES:
            if (damage, None) not in self.rows:
                continue
            base = self._distances(damage, 0.0)
            for share in SHARES:
                row = self.rows[damage, share].scores
                ratios = np.divide(self._distances(damage, share), base)
                gain = np.mean(row["psnr"]) - np.mean(self.rows[damage, 0.0].scores["psnr"])
                flat = sum(row["flat"]) / max(1e-9, sum(row["flat_truth"]))
                shown = " | ".join(f"{ratio:.3f}" for ratio in ratios)
                yield f"| {damage} | {share:g} | {shown} | {gain:+.2f} dB | {flat:.2f} |"

    def _distances(self, damage: str, share: float) -> list[float]:
        row, truth = self.rows[damage, share], self.rows[damage, None]
        frechet = [frechet_distance(row.moments[n], truth.moments[n]) for n in row.moments]
        return [*frechet, *(float(np.mean(row.scores[n])) for n in ("dists", "vgg", "mobilenet"))]

    def _row(self, damage: str, share: float | None) -> Row:
        return self.rows.setdefault((damage, share), Row())

    def _look(self, picture: Picture) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self._vgg.look(picture), self._mobilenet.look(picture)

    def _count(self, row: Row, found: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        row.moments["vgg16"].add(self._vgg.statistical(found[0]))
        row.moments["mobilenet"].add(self._mobilenet.statistical(found[1]))


def judge(work: Path, bench: Bench, names: list[str]) -> None:
    """Judge all kept pictures of these photographs."""
    for name in names:
        for damage in DAMAGES:
            if (kept := work / f"{name} {damage}.npz").exists():
                content = np.load(kept)
                truth = content["truth"].astype(np.float32) / np.float32(255)
                pictures = content["results"].astype(np.float32) / np.float32(255)
                bench.add(damage, truth, dict(zip(SHARES, pictures, strict=True)))


def main() -> None:
    """Make what is missing, judge, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.shares", description=__doc__)
    parser.add_argument("photographs", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, default=Path("out/shares"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    make(arguments.photographs, arguments.work)
    bench = Bench()
    judge(arguments.work, bench, [path.stem for path in arguments.photographs])
    print("\n".join(bench.table()))


if __name__ == "__main__":
    main()
