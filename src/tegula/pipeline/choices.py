"""What is chosen for a picture by what was found in it, where the caller leaves it open."""

from __future__ import annotations

from tegula.images.look import Damage

CLEAN_SHARE, DAMAGED_SHARE = 0.65, 0.35
"""Shares of tegula-photo's tuning; docs/decisions/0005 has how they were found."""

_NOISE = (1.5, 4.0)
"""Levels of 255 between which the share falls from that of clean pictures."""
_JPEG = (90, 70)
"""Qualities between which it falls."""


def share_of_tuning(damage: Damage) -> float:
    """Return the share of the prescaler's tuning for a source, in steps of a twentieth.

    Tuning keeps texture that x4plus removes; with it noise and the traces of compression.
    """
    quality = 100 if damage.jpeg_quality is None else damage.jpeg_quality
    how_bad = max(_between(damage.noise, *_NOISE), _between(quality, *_JPEG))
    return round((CLEAN_SHARE + how_bad * (DAMAGED_SHARE - CLEAN_SHARE)) * 20) / 20


def _between(value: float, first: float, last: float) -> float:
    """Return how far a value is on the way from one to the other, 0..1."""
    return min(1.0, max(0.0, (value - first) / (last - first)))
