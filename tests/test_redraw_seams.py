"""Redraw with a seam fix leaves no more gradient on tile borders than there is without tiles."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

from tegula import UpscaleOptions
from tegula.upscaler import Upscaler

TILE, LATENT = 96, 4
SIDE = 320
ASKED = {"scale": 2, "seed": 1, "prescaler": "realesrgan-animevideov3", "creativity": 0.6}
SEAM_FIX = {"seam_fix": "half-tile+intersections", "seam_fix_denoise": 0.6}
TILES = {"mode": "redraw", "tile_width": TILE, "tile_height": TILE}


@pytest.fixture(scope="module")
def upscaler():
    return Upscaler.load("mini", device="cpu", precision="fp32")


def border_gradient(picture):
    """Gradient energy on tile borders over that on lines near by, at the same latent phase."""
    on = near = 0.0
    for turned in (picture, picture.swapaxes(0, 1)):
        energy = np.square(np.diff(turned.astype(float), axis=1)).mean((0, 2))
        for border in range(TILE, len(energy) - 8 * LATENT, TILE):
            around = [border - 1 + step * LATENT for step in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)]
            on, near = on + energy[border - 1], near + energy[around].mean()
    return on / near


def upscaled(upscaler, photograph, **options):
    image = Image.fromarray(photograph).convert("RGB").resize((SIDE, SIDE))
    return np.asarray(upscaler.upscale(image, UpscaleOptions(**(ASKED | options))).image) / 255


def against_no_tiles(upscaler, **options):
    """Border gradients over those of canvas mode, the geometric mean over photographs.

    One photograph has six borders, and what lies on them by chance moves its ratio by 5%.
    """
    photographs = [getattr(data, name)() for name in ("rocket", "camera", "astronaut")]
    ratios = [
        border_gradient(upscaled(upscaler, photograph, **TILES, **options))
        / border_gradient(upscaled(upscaler, photograph))
        for photograph in photographs
    ]
    return np.exp(np.log(ratios).mean())


@pytest.mark.slow
def test_tile_borders_are_as_steep_as_without_tiles(upscaler):
    assert against_no_tiles(upscaler, **SEAM_FIX) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_the_measure_sees_tiles_that_are_cut_hard(upscaler):
    assert against_no_tiles(upscaler, tile_blur=0, tile_padding=0) > 1.04
