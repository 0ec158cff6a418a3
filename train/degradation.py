"""Second-order degradation: what happens to a photograph before someone wants it larger.

Written from Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with
Pure Synthetic Data" (2021): blur, resize, noise and JPEG, the whole chain twice, with a
sinc filter at the end. Three recipes weigh it: ``heavy`` is the paper's chain, ``light``
one pass of mild damage, ``clean`` a plain shrink.

Pictures are float32 [height, width, 3], sRGB in 0..1; every draw comes from the caller's
``numpy.random.Generator``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.float32]

_INTERPOLATIONS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


@dataclass(frozen=True)
class Strengths:
    """Bounds of one pass of the chain.

    blur: standard deviation of the blur, in pixels of the picture as it is then.
    resize: factor of the random resize in between.
    gaussian, poisson: noise; a standard deviation in 0..1 and a scale of the shot noise.
    jpeg: quality.
    blur_chance, noise_chance, jpeg_chance: how often each is applied at all.
    """

    blur: tuple[float, float]
    resize: tuple[float, float]
    gaussian: tuple[float, float]
    poisson: tuple[float, float]
    jpeg: tuple[int, int]
    blur_chance: float = 1.0
    noise_chance: float = 1.0
    jpeg_chance: float = 1.0


HEAVY_FIRST = Strengths((0.2, 3.0), (0.3, 1.4), (0.004, 0.1), (0.05, 2.5), (35, 95))
HEAVY_SECOND = Strengths(
    (0.2, 1.4), (0.4, 1.2), (0.004, 0.08), (0.05, 2.0), (35, 95), blur_chance=0.8
)
LIGHT = Strengths(
    (0.2, 2.4), (0.8, 1.1), (0.002, 0.04), (0.02, 0.8), (45, 97),
    blur_chance=0.6, noise_chance=0.5, jpeg_chance=0.6,
)  # fmt: skip
RECIPES = ("clean", "light", "heavy")


def degrade(
    picture: Picture,
    factor: int,
    recipe: str,
    rng: np.random.Generator,
    qualities: tuple[int, int] | None = None,
) -> Picture:
    """Return the picture shrunk by ``factor`` after the damage that ``recipe`` names.

    The result holds whole 8-bit levels, as a file would. qualities: bounds of JPEG's quality, in
    place of those of the recipe.
    """
    mild, first_pass, second_pass = (
        each if qualities is None else replace(each, jpeg=qualities)
        for each in (LIGHT, HEAVY_FIRST, HEAVY_SECOND)
    )
    height, width = picture.shape[0] // factor, picture.shape[1] // factor
    if recipe == "clean":
        return _levels(_shrink(picture, width, height, rng))
    if recipe == "light":
        # Noise and JPEG happen to the small file, blur mostly to the scene.
        if rng.random() < LIGHT.blur_chance:
            picture = blur(picture, rng.uniform(*LIGHT.blur), rng)
        small = _shrink(picture, width, height, rng)
        return _levels(_damage(small, mild, rng))
    first = blur(picture, rng.uniform(*HEAVY_FIRST.blur), rng)
    first = _damage(_resize_by(first, rng.uniform(*HEAVY_FIRST.resize), rng), first_pass, rng)
    if rng.random() < HEAVY_SECOND.blur_chance:
        first = blur(first, rng.uniform(*HEAVY_SECOND.blur), rng)
    between = rng.uniform(*HEAVY_SECOND.resize)
    size = (max(8, round(width * between)), max(8, round(height * between)))
    second = add_noise(_resize_to(first, *size, rng), HEAVY_SECOND, rng)
    return _levels(_last_step(second, width, height, second_pass.jpeg, rng))


SOFTEST = 0.7
"""Pixels of the small picture that ``soften`` blurs by at most."""
_SHRINKS = (Image.Resampling.BOX, Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)
_NOISE_OF_A_CLEAN_PICTURE = (0.2, 1.5)
"""Levels of 255."""
_GOOD_JPEG = (93, 100)


def soften(
    picture: Picture,
    factor: int,
    rng: np.random.Generator,
    qualities: tuple[int, int] | None = None,
) -> tuple[Picture, float]:
    """Return the picture shrunk as lenses and good programs do, and its blur, in its pixels.

    Half are shrunk by averaging areas, the others by the low-passes of common programs. Half have
    a little noise, and a fifth were JPEG files of good quality; with ``qualities``, bounds of
    JPEG's quality, all were of those.
    """
    sigma = float(rng.uniform(0, SOFTEST))
    if sigma * factor > 0.2:
        picture = cv2.GaussianBlur(picture, (0, 0), sigma * factor)
    size = picture.shape[1] // factor, picture.shape[0] // factor
    way = _SHRINKS[max(0, int(rng.integers(-1, len(_SHRINKS))))]
    small = np.dstack(
        [np.asarray(Image.fromarray(picture[..., c]).resize(size, way)) for c in range(3)]
    )
    if rng.random() < 0.5:
        noise = rng.standard_normal(small.shape, np.float32)
        small = small + noise * np.float32(rng.uniform(*_NOISE_OF_A_CLEAN_PICTURE) / 255)
    if qualities is not None or rng.random() < 0.2:
        small = jpeg(small, int(rng.integers(*(qualities or _GOOD_JPEG))))
    return _levels(small), sigma


def blur(picture: Picture, sigma: float, rng: np.random.Generator) -> Picture:
    """Blur isotropically, along one direction, or with a ringing sinc filter."""
    kind = rng.random()
    if kind < 0.1:
        kernel = sinc_kernel(rng.uniform(math.pi / 3, math.pi), 7 + 2 * int(rng.integers(0, 5)))
    else:
        other = sigma if kind < 0.6 else float(rng.uniform(0.2, max(0.21, sigma)))
        kernel = gaussian_kernel(sigma, other, rng.uniform(0, math.pi))
    return cv2.filter2D(picture, -1, kernel, borderType=cv2.BORDER_REFLECT_101).astype(np.float32)  # type: ignore[no-any-return]


def gaussian_kernel(along: float, across: float, angle: float) -> Picture:
    """Return a normalised anisotropic Gaussian, wide enough for three deviations."""
    radius = max(1, math.ceil(3 * max(along, across)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    kernel = np.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    return np.asarray(kernel / kernel.sum(), np.float32)


def sinc_kernel(cutoff: float, size: int) -> Picture:
    """Return a circular low-pass filter whose edge rings, ``cutoff`` in radians per pixel."""
    from scipy.special import j1

    y, x = np.mgrid[:size, :size].astype(np.float64) - (size - 1) / 2
    radius = np.hypot(x, y)
    radius[size // 2, size // 2] = 1.0
    kernel = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return np.asarray(kernel / kernel.sum(), np.float32)


def add_noise(picture: Picture, strengths: Strengths, rng: np.random.Generator) -> Picture:
    """Add Gaussian or shot noise, in colour or the same in all channels."""
    channels = 1 if rng.random() < 0.4 else 3
    shape = (*picture.shape[:2], channels)
    if rng.random() < 0.5:
        noise = rng.standard_normal(shape, np.float32) * np.float32(
            rng.uniform(*strengths.gaussian)
        )
    else:
        base = picture if channels == 3 else picture.mean(axis=2, keepdims=True)
        scale = rng.uniform(*strengths.poisson)
        counts = rng.poisson(np.clip(base, 0, 1) * 255.0) / 255.0
        noise = ((counts - base) * scale).astype(np.float32)
    return np.clip(picture + noise, 0, 1).astype(np.float32)  # type: ignore[no-any-return]


def jpeg(picture: Picture, quality: int) -> Picture:
    """Return the picture after JPEG compression and decompression."""
    bgr = cv2.cvtColor(_levels(picture), cv2.COLOR_RGB2BGR)
    data = cv2.imencode(
        ".jpg", np.rint(bgr * 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )[1]
    decoded = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return decoded.astype(np.float32) / np.float32(255)  # type: ignore[no-any-return]


def _damage(picture: Picture, strengths: Strengths, rng: np.random.Generator) -> Picture:
    if rng.random() < strengths.noise_chance:
        picture = add_noise(picture, strengths, rng)
    if rng.random() < strengths.jpeg_chance:
        picture = jpeg(picture, int(rng.integers(*strengths.jpeg)))
    return picture


def _last_step(
    picture: Picture, width: int, height: int, qualities: tuple[int, int], rng: np.random.Generator
) -> Picture:
    """Resize to the final size, sinc and JPEG, in either order."""
    quality = int(rng.integers(*qualities))
    kernel = sinc_kernel(rng.uniform(math.pi / 2, math.pi), 9) if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        return _sinc(jpeg(_resize_to(picture, width, height, rng), quality), kernel)
    return jpeg(_sinc(_resize_to(picture, width, height, rng), kernel), quality)


def _sinc(picture: Picture, kernel: Picture | None) -> Picture:
    if kernel is None:
        return picture
    return np.clip(cv2.filter2D(picture, -1, kernel), 0, 1).astype(np.float32)  # type: ignore[no-any-return]


def _shrink(picture: Picture, width: int, height: int, rng: np.random.Generator) -> Picture:
    if rng.random() < 0.7:
        return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)  # type: ignore[no-any-return]
    # Cubic without a low-pass first, as careless programs do.
    return np.clip(  # type: ignore[no-any-return]
        cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1
    ).astype(np.float32)


def _resize_by(picture: Picture, factor: float, rng: np.random.Generator) -> Picture:
    height, width = picture.shape[:2]
    return _resize_to(picture, max(8, round(width * factor)), max(8, round(height * factor)), rng)


def _resize_to(picture: Picture, width: int, height: int, rng: np.random.Generator) -> Picture:
    interpolation = _INTERPOLATIONS[int(rng.integers(len(_INTERPOLATIONS)))]
    resized = cv2.resize(picture, (width, height), interpolation=interpolation)
    return np.clip(resized, 0, 1).astype(np.float32)  # type: ignore[no-any-return]


def _levels(picture: Picture) -> Picture:
    return (np.rint(np.clip(picture, 0, 1) * 255) / np.float32(255)).astype(np.float32)  # type: ignore[no-any-return]
