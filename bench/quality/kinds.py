"""``python -m bench.quality.kinds``: auto beside fixed settings, by kinds of source.

There are twelve. The photographs are scikit-image's, which are in the public domain, and drawings
are the bench's; ``--photo portrait=FILE`` puts another photograph in the place of one. Each is
enlarged four times from 96 px a side at most, by the default preset and by what it could have
chosen for all alike. The table says how far auto is behind the best of these by each measure, and
the sheet shows crops of the source, x4plus and the default at 100%.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bench.quality.cache import Cache
from bench.quality.drawings import (
    DRAWINGS,
    can_read,
    kept_extremes,
    read_text,
    right_characters,
)
from bench.quality.judges import JUDGES, Dists, load_judge
from bench.quality.methods import BASELINE, BICUBIC, Method, Runner, find_method
from bench.quality.recipes import Picture, as_png, on_white, shrink
from bench.quality.run import read_photograph
from bench.quality.scores import Jury, Truth, score
from tegula.folders import cache_folder
from tegula.images.pixels import LUMA
from tegula.models.device import pick_device, pick_dtype

SCALE = 4
SIDE = 96
"""Largest side of the small pictures, in pixels."""
AUTO = "balanced"
FIXED = (
    BASELINE,
    "tegula-photo@0.35+colours",
    "tegula-photo@0.65+colours",
    "tegula-photo@0.8+colours",
    "tegula-swift+colours",
    "realesrgan-x4plus-anime",
    "tegula-line",
)
MEASURES: Mapping[str, tuple[str, int]] = {
    "dists": ("DISTS", -1),
    "distance_vgg16": ("distance VGG16", -1),
    "distance_mobilenet": ("distance MobileNetV2", -1),
    "psnr": ("PSNR", 1),
    "read": ("characters read", 1),
    "white": ("white kept", 1),
}
"""Titles of the measures, each with 1 where more is better and -1 where less is."""
WITHIN = 0.03

Damage = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Source:
    """One kind of source.

    truth: [h, w, 3 or 4] in 0..1. small: uint8, SCALE times smaller, damaged. lines: to be read.
    """

    kind: str
    truth: Picture
    small: NDArray[np.uint8]
    lines: Sequence[str] = ()


# What the kinds are made of.


def _compressed(small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=20, subsampling=2)
    return np.asarray(Image.open(file).convert("RGB"))


def _scanned(small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An old print: grey, faded, soft and grainy."""
    grey = cv2.GaussianBlur(small @ LUMA, (0, 0), 0.7)
    grain = np.random.default_rng(3).normal(0, 5, grey.shape)
    levels = np.rint(np.clip(35 + grey * 0.75 + grain, 0, 255)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


_DAMAGES: Mapping[str, Damage] = {"old scan": _scanned, "JPEG 20": _compressed}
"""How the kinds that are damaged come to be so."""


def _packaged(name: str) -> Picture:
    from skimage import data

    levels = np.asarray(getattr(data, name)())
    levels = np.repeat(levels[..., None], 3, axis=2) if levels.ndim == 2 else levels
    return np.asarray(levels / np.float32(255), np.float32)


def _cut(picture: Picture, left: int, top: int, side: int = SIDE * SCALE) -> Picture:
    return picture[top : top + side, left : left + side]


def _resized(picture: Picture, side: int) -> Picture:
    return np.asarray(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA))


def _faces(sizes: Sequence[int]) -> Picture:
    """A wall of one head in many sizes, mirrored every other time."""
    head = _cut(_packaged("astronaut"), 140, 0, 172)
    wall = np.empty((SIDE * SCALE, SIDE * SCALE, 3), np.float32)
    wall[...] = head[:40, :40].mean(axis=(0, 1))
    left = top = row = 0
    for number, size in enumerate(np.resize(sizes, 100)):
        if left + size > wall.shape[1]:
            left, top, row = 0, top + row, 0
        if top + size > wall.shape[0]:
            break
        found = _resized(head, int(size))
        wall[top : top + size, left : left + size] = found[:, ::-1] if number % 2 else found
        left, row = left + size, max(row, size)
    return wall


def _on_white_ground() -> Picture:
    coffee = _packaged("coffee")[:400, 100:500]
    y, x = np.mgrid[:400, :400]
    inside = ((x - 190) / 165) ** 2 + ((y - 215) / 150) ** 2 < 1
    opaque = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), 1.5)[..., None]
    return _cut(np.asarray(coffee * opaque + (1 - opaque), np.float32), 8, 8)


PHOTOGRAPHS: Mapping[str, Callable[[], Picture]] = {
    "portrait": lambda: _cut(_packaged("astronaut"), 96, 0, 256),
    "small faces": lambda: _faces((112, 128)),
    "crowd": lambda: _faces((56, 64, 72, 84, 96)),
    "night": lambda: _cut(_packaged("rocket"), 130, 30),
    "old scan": lambda: _cut(_packaged("astronaut"), 80, 0, 288),
    "JPEG 20": lambda: _cut(_packaged("chelsea")[:, :300], 0, 0, 288),
    "product on white": _on_white_ground,
}
DRAWN = {
    "text": "page sans",
    "screenshot": "window",
    "line art": "ink",
    "icon with alpha": "icons",
    "architecture": "tower",
}


def sources(photographs: Mapping[str, Path]) -> list[Source]:
    """Return the twelve; photographs by kind replace those that are packaged."""
    found = []
    drawings = {drawing.name: drawing for drawing in DRAWINGS}
    for kind in (*PHOTOGRAPHS, *DRAWN):
        lines: Sequence[str] = ()
        if kind in photographs:
            whole = read_photograph(photographs[kind], SCALE)
            side = min(SIDE * SCALE, *whole.shape[:2])
            truth = _cut(whole, (whole.shape[1] - side) // 2, (whole.shape[0] - side) // 2, side)
        elif kind in DRAWN:
            truth, lines = drawings[DRAWN[kind]].at(SCALE)
        else:
            truth = PHOTOGRAPHS[kind]()
        size = truth.shape[1] // SCALE, truth.shape[0] // SCALE
        small = np.rint(np.clip(shrink(truth, size), 0, 1) * 255).astype(np.uint8)
        damage = _DAMAGES.get(kind)
        found.append(Source(kind, truth, small if damage is None else damage(small), lines))
    return found


# Measuring and showing.


def measure(source: Source, picture: Picture, truth: Truth) -> dict[str, float]:
    """Return what ``MEASURES`` names, as far as the source has it."""
    found = dict(score(picture, truth, None).row)
    white, count = kept_extremes(picture, truth.picture, SCALE)["white"]
    if count > truth.luma.size // 100:
        found["white"] = white / count
    if source.lines and can_read():
        letters = sum(len(line.replace(" ", "")) for line in source.lines)
        found["read"] = right_characters(read_text(picture), source.lines) / letters
    return {name: found[name] for name in MEASURES if name in found}


def shortfall(auto: float, fixed: Sequence[float], sign: int) -> float:
    """Return by what share auto is worse than the best of the fixed, or minus, better."""
    best = max(fixed) if sign > 0 else min(fixed)
    return sign * (best - auto) / max(abs(best), 1e-6)


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Return, of each kind and measure, auto, the best fixed setting, and how far it is behind."""
    lines = ["| kind | measure | auto | best fixed | | behind by |", "|---|---|---|---|---|---|"]
    for kind, methods in rows.items():
        for name, (title, sign) in MEASURES.items():
            if name not in methods[names[0]]:
                continue
            auto, fixed = methods[names[0]][name], [methods[other][name] for other in names[1:]]
            best = max(fixed) if sign > 0 else min(fixed)
            share = shortfall(auto, fixed, sign)
            mark = f"**{share:.0%}**" if share > WITHIN else f"{share:.0%}"
            winner = names[1 + fixed.index(best)]
            lines.append(f"| {kind} | {title} | {auto:.3f} | {best:.3f} | {winner} | {mark} |")
    return "\n".join(lines)


def sheet(crops: Mapping[str, Sequence[tuple[str, Picture]]]) -> Image.Image:
    """Return crops of all kinds, one row each, at 100%."""
    rows = list(crops.items())
    width, height, head, gap = 236, 160, 14, 4
    across = len(rows[0][1])
    image = Image.new("RGB", (across * (width + gap), len(rows) * (height + head)), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for row, (kind, columns) in enumerate(rows):
        top = row * (height + head)
        for column, (name, picture) in enumerate(columns):
            middle = [
                max(0, (side - n) // 2)
                for side, n in zip(picture.shape, (height, width), strict=False)
            ]
            part = picture[middle[0] : middle[0] + height, middle[1] : middle[1] + width]
            levels = np.rint(np.clip(part, 0, 1) * 255).astype(np.uint8)
            image.paste(Image.fromarray(levels), (column * (width + gap), top + head))
            draw.text((column * (width + gap) + 2, top + 1), f"{kind} · {name}", (0, 0, 0))
    return image


def main() -> None:
    """Parse the command line, run, and write table and sheet."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality.kinds", description=__doc__)
    parser.add_argument("--photo", action="append", default=[], metavar="KIND=FILE")
    parser.add_argument("--out", type=Path, default=Path("out/kinds"))
    arguments = parser.parse_args()
    given = dict(each.split("=", 1) for each in arguments.photo)
    if unknown := set(given) - {*PHOTOGRAPHS, *DRAWN}:
        raise SystemExit(f"There is no kind {', '.join(sorted(unknown))}.")
    cache = Cache(cache_folder() / "bench")
    dtype = pick_dtype(pick_device("cpu"), "auto")
    judges = [load_judge(name, dtype) for name in JUDGES if name in ("vgg16", "mobilenet")]
    runner, jury = Runner(cache), Jury(judges, None, Dists())
    methods: dict[str, Method] = {name: find_method(name) for name in (AUTO, *FIXED)}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    crops: dict[str, list[tuple[str, Picture]]] = {}
    for source in sources({kind: Path(file) for kind, file in given.items()}):
        truth = Truth(source.kind, on_white(source.truth), jury)
        before = runner.run(as_png(source.small), SCALE, find_method(BICUBIC)).picture
        crops[source.kind] = [("source", before)]
        for name, method in methods.items():
            picture = runner.run(as_png(source.small), SCALE, method).picture
            rows.setdefault(source.kind, {})[name] = measure(source, picture, truth)
            if name in (AUTO, BASELINE):
                crops[source.kind].append(("tegula" if name == AUTO else "x4plus", picture))
        crops[source.kind][1:] = crops[source.kind][:0:-1]
        print(table({source.kind: rows[source.kind]}, list(methods)), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "kinds.md").write_text(table(rows, list(methods)) + "\n")
    sheet(crops).save(arguments.out / "kinds.jpg", quality=90)


if __name__ == "__main__":
    main()
