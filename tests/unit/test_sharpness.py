"""How soft a lens or a resampling left a source, in parts of a pixel, and undoing that."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from tegula.images.look import look_at
from tegula.images.pixels import LUMA
from tegula.images.sharpness import measure_sharpness, measure_softness, undo_blur
from tegula.options import MOST_MENDED_BLUR

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


def softness(picture, file_quality=None):
    return look_at(picture.astype(np.float32) / 255, file_quality).softness


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blur", [0.0, 0.2, 0.4, 0.5])
def test_softness_is_the_blur_before_a_photograph_was_shrunk(name, blur):
    assert softness(small(name, blur)) == pytest.approx(blur, abs=0.2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blur", [0.4, 0.5])
def test_undoing_what_was_measured_comes_near_the_sharp_photograph(name, blur):
    sharp, soft = small(name).astype(np.float32), small(name, blur).astype(np.float32)
    mended = np.clip(undo_blur(soft, softness(soft)), 0, 255)
    assert np.square(mended - sharp).mean() < 0.7 * np.square(soft - sharp).mean()


@pytest.mark.parametrize("blur", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3), (1, 1, 3), (3, 30)])
def test_undoing_a_blur_keeps_what_is_plain(blur, shape):
    plain = np.full(shape, 0.3, np.float32)
    assert np.allclose(undo_blur(plain, blur), plain, atol=1e-5)
    assert undo_blur(plain, blur).shape == shape


def test_undoing_a_blur_raises_each_wave_by_what_the_blur_took():
    x = np.arange(200)
    for cycles in (0.1, 0.25, 0.4):
        wave = np.tile(np.sin(2 * np.pi * cycles * x), (30, 1)).astype(np.float32)
        left = np.exp(-2 * (np.pi * 0.4 * cycles) ** 2)
        assert np.allclose(undo_blur(wave * left, 0.4)[:, 30:-30], wave[:, 30:-30], atol=0.04)
    noise = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    assert undo_blur(noise, MOST_MENDED_BLUR).std() < 8


@pytest.mark.parametrize("side", [64, 96, 192])
def test_edges_are_sharp_in_small_pictures_too(side):
    found = [measure_sharpness(shapes(blur)[:side, :side]) for blur in (0, 0.4, 0.8)]
    assert found[0] > 1.7 > found[1] > found[2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [2, 3])
def test_what_was_enlarged_is_too_soft_to_be_mended(name, factor):
    larger = cv2.resize(small(name), None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    assert softness(larger) is None


def test_too_little_structure_is_not_known_to_be_sharp():
    ramp = np.tile(np.linspace(20, 220, 128, dtype=np.float32), (128, 1))
    for luma in (ramp, np.full((128, 128), 90, np.float32), shapes(0)[:24, :24]):
        assert measure_softness(luma) is None
    dot = ramp.copy()
    dot[60:64, 60:64] = 255
    assert measure_softness(dot) is None
    assert softness(np.repeat(dot[..., None], 3, 2)) is None


def test_where_part_is_out_of_focus_the_rest_decides():
    luma = small("coffee").astype(np.float32) @ LUMA
    luma[:, :150] = cv2.GaussianBlur(luma, (0, 0), 3)[:, :150]
    assert measure_softness(luma) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_borders_of_blocks_of_which_nothing_is_known_are_not_sharpened(name):
    blocky = saved(small(name), "WEBP", 75)
    assert softness(blocky) is None
    # Wherever the grid lies since.
    assert softness(blocky[3:, 5:]) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blur", [0.0, 0.4])
@pytest.mark.parametrize("quality", [80, 95])
def test_softness_is_measured_through_jpeg_of_good_quality(name, blur, quality):
    picture = small(name, blur)
    found = softness(saved(picture, "JPEG", quality), quality)
    assert found == pytest.approx(softness(picture), abs=0.22)
