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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rocket", "camera", "astronaut"])
def test_tile_borders_are_no_steeper_than_without_tiles(upscaler, name):
    photograph = getattr(data, name)()
    without = border_gradient(upscaled(upscaler, photograph))
    fixed = upscaled(upscaler, photograph, **SEAM_FIX, **TILES)
    assert border_gradient(fixed) / without == pytest.approx(1, abs=0.03)


@pytest.mark.slow
def test_the_measure_sees_tiles_that_are_cut_hard(upscaler):
    photograph = data.rocket()
    without = border_gradient(upscaled(upscaler, photograph))
    hard = upscaled(upscaler, photograph, tile_blur=0, tile_padding=0, **TILES)
    assert border_gradient(hard) / without > 1.04
