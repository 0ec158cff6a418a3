"""Which photographs are trained on, and sharp crops of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from train.degradation import Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Plots, logos, documents, drawings and posters among the CID22 and CLIC files.
NOT_PHOTOGRAPHS = (
    "1454613116", "1536017106", "14768480444", "26103251787", "35875869841", "3DPieChart",
    "4cd6910a0b7b", "1129482", "604308447488", "Abstract-Art", "AgilityCourse", "Beam-Space",
    "Boxplot", "EPICA", "Lungs-Cross", "No-interference", "Performance-Graph", "StockQuote",
    "Temperament", "Verkehrstote", "adriankierman", "akfcrc", "klepas", "newplot", "nicubunu",
    "ularapi", "a10ae819a2d2", "2062426", "258947",
)  # fmt: skip

# Drawn wallpapers in the Debian packages; the rest of their large files are photographs.
NOT_PHOTOGRAPHIC_FOLDERS = (
    "Altai", "Canopee", "Cascade", "Cluster", "Elarun", "Flow", "FlyingKonqui", "Honeywave",
    "IceCold", "Kay", "Kokkini", "MilkyWay", "Opal", "Patak", "SafeLanding", "Shell", "Volna",
    "mate/desktop", "mate/abstract", "Next", "Mountain", "lxqt", "Painting", "Infinite-Sea",
)  # fmt: skip


def find_photographs(folders: tuple[Path, ...]) -> list[Path]:
    """Return the photographs below these folders, sorted by name, drawings left out."""
    found = [p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES]
    return sorted((p for p in found if _is_photograph(p)), key=lambda p: (p.name, str(p)))


def _is_photograph(path: Path) -> bool:
    # Links repeat a picture under other sizes' names; small files are thumbnails.
    if path.is_symlink() or path.stat().st_size < 60_000 or path.name.startswith(NOT_PHOTOGRAPHS):
        return False
    folder = path.as_posix()
    return not any(f"/{name}" in folder for name in NOT_PHOTOGRAPHIC_FOLDERS)


def split(photographs: list[Path], held_out_every: int) -> tuple[list[Path], list[Path]]:
    """Return (training, held out); checkpoints are chosen on the held-out ones."""
    held_out = photographs[::held_out_every]
    return [p for p in photographs if p not in held_out], held_out


def read(path: Path) -> Picture:
    """Return a photograph, shrunk where its pixels are finer than its sharpness.

    JPEG wallpapers of 2 megapixels and more are soft at full size; half size is sharp.
    """
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ValueError(f"{path} is not a picture.")
    if path.suffix.lower() != ".png":
        factor = 0.5 if max(bgr.shape) < 4000 else 0.3
        bgr = cv2.resize(bgr, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.float32) / np.float32(255)  # type: ignore[no-any-return]


def crops_of(picture: NDArray[np.generic]) -> int:
    """Return how many crops a picture is worth: more for larger ones, not in proportion."""
    return max(1, round((picture.shape[0] * picture.shape[1] / 512**2) ** 0.7))  # type: ignore[no-any-return]


class Photographs:
    """Photographs in memory, 8-bit [h, w, 3] each, drawn by how many crops they are worth."""

    def __init__(self, pictures: Sequence[NDArray[np.uint8]]) -> None:
        self._pictures = pictures
        worth = np.array([float(crops_of(picture)) for picture in pictures])
        self._shares = worth / worth.sum()

    def draw(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Return one of them."""
        return self._pictures[int(rng.choice(len(self._pictures), p=self._shares))]


def random_crop(picture: Picture, side: int, rng: np.random.Generator) -> Picture:
    """Return a crop of ``side`` squared, mirrored and turned, the liveliest of three.

    One in four is shrunk first, so that all scales of texture are seen sharp.
    """
    least = min(picture.shape[:2])
    if least >= side * 1.5 and rng.random() < 0.35:
        factor = rng.uniform(side / least, 1.0)
        picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        least = min(picture.shape[:2])
    if least < side:
        picture = cv2.resize(
            picture, None, fx=side / least + 0.01, fy=side / least + 0.01,
            interpolation=cv2.INTER_CUBIC,
        )  # fmt: skip
    best = max((_cut(picture, side, rng) for _ in range(3)), key=lambda c: _liveliness(c, rng))
    turned = np.rot90(best, int(rng.integers(4)))
    return np.ascontiguousarray(turned[:, ::-1] if rng.random() < 0.5 else turned)


def plain_crop(picture: Picture, side: int, rng: np.random.Generator) -> Picture:
    """Return a crop as it comes: calm places are as likely as they are common."""
    return _cut(picture, side, rng)


def _cut(picture: Picture, side: int, rng: np.random.Generator) -> Picture:
    top = int(rng.integers(0, picture.shape[0] - side + 1))
    left = int(rng.integers(0, picture.shape[1] - side + 1))
    return np.clip(picture[top : top + side, left : left + side], 0, 1)


def _liveliness(crop: Picture, rng: np.random.Generator) -> float:
    # Noise in the choice keeps calm crops in the set: skies must be learned too.
    luma = crop.mean(axis=2)
    energy = float(np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean())
    return energy * float(rng.uniform(0.2, 1.0))
