"""What tells a sharp source from one that a lens or a resampling left soft by a part of a pixel."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from tegula.images.look import look_at
from tegula.images.pixels import LUMA
from tegula.images.sharpness import SURELY_SHARP, measure_sharpness

NAMES = "astronaut", "coffee", "chelsea", "rocket"


def small(name, blur=0.0, factor=2):
    """A photograph shrunk by area from one that was blurred by so many pixels of the small one."""
    large = getattr(data, name)()[..., :3]
    height, width = (side - side % factor for side in large.shape[:2])
    large = large[:height, :width].astype(np.float32)
    if blur:
        large = cv2.GaussianBlur(large, (0, 0), blur * factor)
    size = width // factor, height // factor
    return np.rint(cv2.resize(large, size, interpolation=cv2.INTER_AREA)).astype(np.uint8)


def shapes(blur):
    """Seeded polygons, drawn four times as large."""
    rng = np.random.default_rng(5)
    large = np.full((768, 768), 128, np.float32)
    for _ in range(150):
        corners = rng.integers(0, 160, (5, 2)) + rng.integers(-96, 704, 2)
        cv2.fillPoly(large, [corners.astype(np.int32)], float(rng.integers(256)))
    if blur:
        large = cv2.GaussianBlur(large, (0, 0), blur * 4)
    return np.rint(cv2.resize(large, (192, 192), interpolation=cv2.INTER_AREA)).astype(np.float32)


def saved(picture, kind, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def is_sharp(picture):
    return look_at(picture.astype(np.float32) / 255).is_sharp


@pytest.mark.parametrize("name", NAMES)
def test_a_photograph_shrunk_without_blur_is_sharp_and_one_with_a_little_is_not(name):
    assert is_sharp(small(name))
    for blur in (0.4, 0.6):
        assert not is_sharp(small(name, blur))


@pytest.mark.parametrize("side", [64, 96, 192])
def test_edges_are_sharp_in_small_pictures_too(side):
    found = [measure_sharpness(shapes(blur)[:side, :side]) for blur in (0, 0.4, 0.8)]
    assert found[0] > SURELY_SHARP > found[1] > found[2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.25, 1.5, 2])
def test_what_was_enlarged_is_not_sharp(name, factor):
    larger = cv2.resize(small(name), None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    assert not is_sharp(larger)


def test_too_little_structure_is_not_known_to_be_sharp():
    ramp = np.tile(np.linspace(20, 220, 128, dtype=np.float32), (128, 1))
    for luma in (ramp, np.full((128, 128), 90, np.float32), shapes(0)[:24, :24]):
        assert measure_sharpness(luma) is None
    dot = ramp.copy()
    dot[60:64, 60:64] = 255
    assert measure_sharpness(dot) is None
    assert not is_sharp(np.repeat(dot[..., None], 3, 2))


def test_where_part_is_out_of_focus_the_rest_decides():
    luma = small("coffee").astype(np.float32) @ LUMA
    luma[:, :150] = cv2.GaussianBlur(luma, (0, 0), 3)[:, :150]
    assert measure_sharpness(luma) > SURELY_SHARP


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "quality"), [("JPEG", 50), ("JPEG", 80), ("WEBP", 75)])
def test_borders_of_blocks_do_not_pass_for_detail(name, kind, quality):
    picture = small(name)
    blocky = saved(picture, kind, quality)
    assert not is_sharp(blocky)
    # Wherever the grid lies since.
    assert not is_sharp(blocky[3:, 5:])
