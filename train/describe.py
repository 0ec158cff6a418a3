"""Words for a training crop: measured descriptions, and damage done on purpose.

Descriptions are thresholds on plain statistics. Quality words are learned by contrast:
some targets are damaged and carry the word for their damage, all others may carry the
words for a good picture.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from tegula.models.mini.bundle import VOCABULARY, VOCABULARY_SIZE
from tegula.models.mini.network import LUMA

Plane = NDArray[np.float32]
DAMAGES = ("blurry", "noisy", "jpeg", "oversharpened", "smooth", "grainy")
_HUES = (
    ("red", 0, 9), ("orange", 9, 20), ("yellow", 20, 33), ("green", 33, 80), ("cyan", 80, 98),
    ("blue", 98, 130), ("purple", 130, 172), ("red", 172, 181),
)  # fmt: skip


def luma_of(picture: Plane) -> Plane:
    """Return [h, w] from [h, w, 3]."""
    return np.asarray(picture @ np.array(LUMA, np.float32), np.float32)


def describe(truth: Plane, prescaled: Plane) -> NDArray[np.float32]:
    """Return 1 for each word that fits a crop [h, w, 3] in 0..1, [vocabulary]."""
    luma, before = luma_of(truth), luma_of(prescaled)
    detail, detail_before = _high_band(luma), _high_band(before)
    fits = {
        **_light(luma),
        **_colour(truth),
        "textured": detail > 0.03,
        "plain": detail < 0.008,
        "detailed": detail > 1.3 * detail_before and detail > 0.008,
        "smooth": detail < 0.8 * detail_before,
    }
    return np.array([float(fits.get(word, False)) for word in VOCABULARY], np.float32)


def _high_band(luma: Plane) -> float:
    return float(np.std(luma - cv2.GaussianBlur(luma, (0, 0), 1.0)))


def _light(luma: Plane) -> dict[str, bool]:
    mean, deviation = float(luma.mean()), float(luma.std())
    return {
        "contrast": deviation > 0.24,
        "flat": deviation < 0.08,
        "dark": mean < 0.28,
        "bright": mean > 0.65,
        "night": mean < 0.22 and float(luma.max()) > 0.7,
        "highlights": float((luma > 0.95).mean()) > 0.03,
    }


def _colour(picture: Plane) -> dict[str, bool]:
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
    saturation, hue = hsv[..., 1], hsv[..., 0] / 2
    warmth = float((picture[..., 0] - picture[..., 2]).mean())
    coloured = saturation * hsv[..., 2] > 0.2
    fits = {
        "colourful": float(saturation.mean()) > 0.5,
        "grey": float(saturation.mean()) < 0.12,
        "warm": warmth > 0.12,
        "cold": warmth < -0.06,
    }
    for name, low, high in _HUES:
        share = float((coloured & (hue >= low) & (hue < high)).mean())
        fits[name] = fits.get(name, False) or share > 0.3
    fits["brown"] = fits["orange"] and float(hsv[..., 2].mean()) < 0.5
    return fits


def damage(luma: Plane, word: str, rng: np.random.Generator) -> Plane:
    """Return a luma plane damaged as ``word`` says, one of ``DAMAGES``."""
    if word == "blurry":
        damaged = cv2.GaussianBlur(luma, (0, 0), rng.uniform(0.9, 2.2))
    elif word == "noisy":
        damaged = luma + rng.standard_normal(luma.shape, np.float32) * rng.uniform(0.03, 0.09)
    elif word == "jpeg":
        levels = np.rint(np.clip(luma, 0, 1) * 255).astype(np.uint8)
        quality = int(rng.integers(8, 30))
        data = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        damaged = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255  # type: ignore[union-attr]
    elif word == "oversharpened":
        damaged = luma + rng.uniform(0.8, 2.0) * (luma - cv2.GaussianBlur(luma, (0, 0), 1.3))
    elif word == "smooth":
        damaged = cv2.bilateralFilter(luma, 5, rng.uniform(0.06, 0.15), 2.0)
    else:
        grain = cv2.GaussianBlur(rng.standard_normal(luma.shape, np.float32), (0, 0), 0.7)
        damaged = luma + grain * rng.uniform(0.04, 0.1)
    return np.clip(damaged, 0, 1).astype(np.float32)  # type: ignore[no-any-return]


def draw_words(described: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the words shown for a clean target: none for half the crops, else some."""
    if rng.random() < 0.5:
        return np.zeros(VOCABULARY_SIZE, np.float32)
    kept = (described * (rng.random(VOCABULARY_SIZE) < 0.6)).astype(np.float32)
    if rng.random() < 0.6:
        kept[VOCABULARY.index("sharp")] = 1.0
    return kept
