"""Tone curves of colour profiles, there and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.floating[Any]]"


class Curve(Protocol):
    """A tone curve, usually rising from 0 to 1."""

    def __call__(self, values: Floats) -> Floats:
        """Return the curve at values in 0..1."""

    def inverse(self, results: Floats) -> Floats:
        """Return where the curve has these results; nearest where it has them nowhere."""


@dataclass(frozen=True)
class ParametricCurve:
    """(a x + b) ** g + e from x = d on, c x + f below: the ICC's fourth and most general form."""

    g: float
    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0
    f: float = 0.0

    def __call__(self, values: Floats) -> Floats:
        """Return the curve at these values."""
        power = np.power(np.maximum(self.a * values + self.b, 0), self.g) + self.e
        return np.asarray(np.where(values >= self.d, power, self.c * values + self.f))

    def inverse(self, results: Floats) -> Floats:
        """Return where the curve has these results."""
        at_joint = max(self.a * self.d + self.b, 0.0) ** self.g + self.e
        root = np.power(np.maximum(results - self.e, 0), 1 / self.g)
        power = (root - self.b) / self.a
        line = (results - self.f) / self.c if self.c else np.full_like(results, self.d)
        return np.asarray(np.where(results >= at_joint, power, np.minimum(line, self.d)))


@dataclass(frozen=True, eq=False)
class SampledCurve:
    """Equidistant samples, joined by straight lines.

    samples: 0..1, two at least.
    """

    samples: Floats

    @cached_property
    def _places(self) -> Floats:
        return np.linspace(0, 1, len(self.samples))

    def __call__(self, values: Floats) -> Floats:
        """Return the curve at these values."""
        return np.asarray(np.interp(values, self._places, self.samples), values.dtype)

    def inverse(self, results: Floats) -> Floats:
        """Return where the curve has these results."""
        rising, places = self.samples, self._places
        if rising[-1] < rising[0]:
            rising, places = rising[::-1], places[::-1]
        rising = np.maximum.accumulate(rising)
        return np.asarray(np.interp(results, rising, places), results.dtype)
