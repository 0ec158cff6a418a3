"""Measures over all pictures of one method: Fréchet distance and naturalness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
_PATCH = 64
_SHAPES = np.arange(0.2, 10.001, 0.01)


@dataclass(frozen=True)
class MapMoments:
    """One feature map of one picture: positions, mean [c], and summed spread about it [c, c]."""

    places: int
    mean: NDArray[np.float64]
    spread: NDArray[np.float32]


def map_moments(feature: Tensor) -> MapMoments:
    """Return the moments of a map [1, c, h, w]."""
    # Single precision is enough about the picture's own mean, and twice as fast.
    x = feature[0].flatten(1)
    mean = x.double().mean(1)
    centred = x - mean.float()[:, None]
    return MapMoments(x.shape[1], mean.cpu().numpy(), (centred @ centred.T).cpu().numpy())


class PositionMoments:
    """Running mean and covariance over the positions of each feature map."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]] = []

    def add(self, maps: Sequence[Tensor]) -> None:
        """Take the feature maps [1, c, h, w] of one picture."""
        self.merge([map_moments(feature) for feature in maps])

    def merge(self, maps: Sequence[MapMoments]) -> None:
        """Take the moments of the maps of one picture."""
        if not self._sums:
            sizes = [len(found.mean) for found in maps]
            self._sums = [(0, np.zeros(c), np.zeros((c, c))) for c in sizes]
        for i, found in enumerate(maps):
            count, first, second = self._sums[i]
            second = second + found.spread + found.places * np.outer(found.mean, found.mean)
            self._sums[i] = (count + found.places, first + found.places * found.mean, second)

    def moments(self) -> list[Moments]:
        """Return mean and covariance per map."""
        found = []
        for count, first, second in self._sums:
            mean = first / count
            found.append((mean, second / count - np.outer(mean, mean)))
        return found


def frechet_distance(a: PositionMoments, b: PositionMoments) -> float:
    """Return the Fréchet distance to ``b``, over the trace of its covariance, mean of the maps.

    Heusel et al. (2017), on early features and all their positions instead of one deep
    vector a picture: a few dozen pictures are enough for that.
    """
    distances = []
    for (mean_a, cov_a), (mean_b, cov_b) in zip(a.moments(), b.moments(), strict=True):
        root = _root(cov_a)
        cross = float(np.trace(_root(root @ cov_b @ root)))
        gap = float(np.square(mean_a - mean_b).sum())
        distances.append(
            (gap + float(np.trace(cov_a + cov_b)) - 2 * cross) / float(np.trace(cov_b))
        )
    return float(np.mean(distances))


def _root(symmetric: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def natural_statistics(luma: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return NIQE's 36 features of each 64 px patch (Mittal et al., 2013), at two scales."""
    scales = []
    for factor, side in ((1, _PATCH), (2, _PATCH // 2)):
        plane = luma.astype(np.float64) * 255
        if factor > 1:
            size = (plane.shape[1] // 2, plane.shape[0] // 2)
            plane = np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA))
        scales.append(_patch_features(normalised(plane), side))
    count = min(len(s) for s in scales)
    return np.hstack([s[:count] for s in scales])


def naturalness(pictures: NDArray[np.float64], truths: NDArray[np.float64]) -> float:
    """Return NIQE's distance between patches and a model fitted to those of the truths."""
    mean_a, mean_b = pictures.mean(0), truths.mean(0)
    spread = (np.cov(pictures.T) + np.cov(truths.T)) / 2
    gap = mean_a - mean_b
    return math.sqrt(float(gap @ np.linalg.pinv(spread) @ gap))


def normalised(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a plane of 0..255 less its local mean, over its local deviation plus 1."""
    mean = cv2.GaussianBlur(plane, (7, 7), 7 / 6)
    deviation = np.sqrt(np.abs(cv2.GaussianBlur(plane * plane, (7, 7), 7 / 6) - mean * mean))
    return np.asarray((plane - mean) / (deviation + 1))


def _patch_features(plane: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    found = []
    for top in range(0, plane.shape[0] - side + 1, side):
        for left in range(0, plane.shape[1] - side + 1, side):
            patch = plane[top : top + side, left : left + side]
            features = [asymmetric_fit(patch)[0], float(np.square(patch).mean())]
            for product in neighbour_products(patch):
                features += asymmetric_fit(product)
            found.append(features)
    return np.array(found)


def neighbour_products(plane: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return the plane times each of four neighbours: beside, below, and both diagonals.

    Pixels at an edge have no neighbour outside and are left out.
    """
    return [
        plane[:, :-1] * plane[:, 1:],
        plane[:-1] * plane[1:],
        plane[:-1, :-1] * plane[1:, 1:],
        plane[1:, :-1] * plane[:-1, 1:],
    ]


def asymmetric_fit(values: NDArray[np.float64]) -> list[float]:
    """Return shape, mean, and left and right variance of an asymmetric Gaussian."""
    left = math.sqrt(float(np.square(values[values < 0]).mean())) if (values < 0).any() else 1e-6
    right = math.sqrt(float(np.square(values[values > 0]).mean())) if (values > 0).any() else 1e-6
    ratio = left / max(right, 1e-9)
    moment = float(np.abs(values).mean()) ** 2 / max(float(np.square(values).mean()), 1e-12)
    wanted = moment * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shape = float(_SHAPES[int(np.abs(_GENERALISED - wanted).argmin())])
    mean = (
        (right - left)
        * math.gamma(2 / shape)
        / math.sqrt(math.gamma(1 / shape) * math.gamma(3 / shape))
    )
    return [shape, mean, left**2, right**2]


_GENERALISED = np.array(
    [math.exp(2 * math.lgamma(2 / s) - math.lgamma(1 / s) - math.lgamma(3 / s)) for s in _SHAPES]
)
