"""Redraw with a seam fix leaves no more gradient on tile borders than there is without tiles."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

from bench.seams import border_gradient
from tegula import UpscaleOptions
from tegula.pipeline.prescale import prescale
from tegula.upscaler import Upscaler

TILE, SIDE = 96, 320
COARSEST = 16
"""Pixels in one place of mini's coarsest level; it repeats a faint pattern that often."""
CHOSEN = {
    "scale": 2, "seed": 1, "prescaler": "realesrgan-animevideov3", "creativity": 0.6,
    "resemblance": 0.1, "auto": False,
}  # fmt: skip
SEAM_FIX = {"seam_fix": "half-tile+intersections", "seam_fix_denoise": 0.6}
TILES = {"mode": "redraw", "tile_width": TILE, "tile_height": TILE}


@pytest.fixture(scope="module")
def upscaler():
    """An upscaler that enlarges each photograph once, for all the ways to refine it."""
    enlarged = {}

    def prescale_once(rgb, *given, **named):
        key = rgb.numpy().tobytes()
        if key not in enlarged:
            enlarged[key] = prescale(rgb, *given, **named)
        return enlarged[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tegula.pipeline.prescale.prescale", prescale_once)
        yield Upscaler.load("mini", device="cpu", precision="fp32")


def upscaled(upscaler, photograph, **options):
    image = Image.fromarray(photograph).convert("RGB").resize((SIDE, SIDE))
    return np.asarray(upscaler.upscale(image, UpscaleOptions(**(CHOSEN | options))).image) / 255


@pytest.fixture(scope="module")
def photographs(upscaler):
    """Photographs, each with the picture below refine and the borders of canvas mode."""
    found = []
    for name in ("rocket", "camera", "astronaut"):
        photograph = getattr(data, name)()
        below = upscaled(upscaler, photograph, creativity=0.0)
        found.append((photograph, below, added_gradient(upscaler, photograph, below)))
    return found


def added_gradient(upscaler, photograph, below, **options):
    """Border gradient of what refine adds to the picture below it, in which it has no part."""
    added = upscaled(upscaler, photograph, **options) - below
    return border_gradient(added, TILE, phase=COARSEST)


def against_no_tiles(upscaler, photographs, **options):
    """Border gradients of what tiles add, over those of what canvas mode adds.

    The geometric mean over photographs: what lies on the borders of one by chance moves its
    ratio by a tenth.
    """
    ratios = [
        added_gradient(upscaler, photograph, below, **TILES, **options) / whole
        for photograph, below, whole in photographs
    ]
    return np.exp(np.log(ratios).mean())


@pytest.mark.slow
def test_tile_borders_are_as_steep_as_without_tiles(upscaler, photographs):
    assert against_no_tiles(upscaler, photographs, **SEAM_FIX) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most", "count"),
    # Tiles that fade show in any photograph; what a hard cut does depends on what lies under it.
    [({}, 0.8, 1), ({"tile_blur": 0, "tile_padding": 0}, 0.9, 3)],
)
def test_the_measure_sees_tiles_that_fade_into_each_other_or_are_cut_hard(
    upscaler, photographs, options, most, count
):
    assert against_no_tiles(upscaler, photographs[:count], **options) < most


def test_the_measure_is_1_where_no_line_is_special_and_sees_a_step():
    noise = np.random.default_rng(0).random((600, 600, 3), np.float32)
    assert border_gradient(noise, TILE) == pytest.approx(1, abs=0.02)
    stepped = noise.copy()
    for border in range(TILE, 600, TILE):
        stepped[:, border:] += 0.2
    assert border_gradient(stepped, TILE) > 1.05
    assert border_gradient(stepped, TILE, shift=40) == pytest.approx(1, abs=0.02)
