"""What is found in a picture by looking at it."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from support import photograph

from tegula.images.look import Damage, find_damage
from tegula.options import UpscaleOptions
from tegula.pipeline.choices import CLEAN_SHARE, DAMAGED_SHARE, share_of_tuning
from tegula.pipeline.prepare import prepare


def levels(name="astronaut", side=256):
    return np.rint(photograph(side, side, name) * 255).astype(np.uint8)


def compressed(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def noisy(picture, deviation):
    noise = np.random.default_rng(4).normal(0, deviation, picture.shape)
    return np.rint((picture + noise).clip(0, 255)).astype(np.uint8)


def damage_of(picture, file_quality=None):
    return find_damage(picture.astype(np.float32) / 255, file_quality)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("quality", [15, 30, 50, 65, 80])
def test_a_picture_that_was_jpeg_shows_its_quality(name, quality):
    found = damage_of(compressed(levels(name), quality)).jpeg_quality
    assert found == pytest.approx(quality, abs=2)


@pytest.mark.parametrize(("down", "right"), [(3, 5), (0, 7), (4, 0)])
def test_it_does_when_it_was_cropped_since(down, right):
    found = damage_of(compressed(levels(), 50)[down:, right:]).jpeg_quality
    assert found == pytest.approx(50, abs=2)


def test_it_does_when_it_was_saved_again_at_a_better_quality():
    again = compressed(compressed(levels(), 40), 95)
    assert damage_of(again, 95).jpeg_quality == pytest.approx(40, abs=2)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_a_picture_that_never_was_jpeg_shows_none(name):
    shrunk = levels(name, 200)
    assert damage_of(shrunk).jpeg_quality is None
    assert damage_of(noisy(shrunk, 8)).jpeg_quality is None


def test_drawings_and_tiny_pictures_show_none():
    drawn = np.full((160, 160, 3), 255, np.uint8)
    cv2.putText(drawn, "Tegula", (8, 90), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (20, 20, 160), 2)
    drawn[100:140, 20:120] = 90, 160, 30
    assert damage_of(drawn) == Damage(None, 0.0)
    for height, width in ((1, 1), (3, 40), (17, 17)):
        assert damage_of(levels()[:height, :width]) == Damage(None, 0.0)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("deviation", [3, 6, 12])
def test_noise_is_measured_in_levels(name, deviation):
    # Shrunk, so that the photograph's own noise is small.
    picture = noisy(levels(name, 200), deviation)
    assert damage_of(picture).noise == pytest.approx(deviation, rel=0.2, abs=0.5)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "gravel", "grass"])
def test_texture_is_not_taken_for_noise(name):
    if name in ("gravel", "grass"):
        from skimage import data

        grey = getattr(data, name)()
        picture = cv2.cvtColor(cv2.resize(grey, (200, 200), interpolation=3), cv2.COLOR_GRAY2RGB)
    else:
        picture = levels(name, 200)
    assert damage_of(picture).noise < 1.5


def test_the_share_of_tuning_falls_with_damage():
    assert share_of_tuning(Damage(None, 0.3)) == CLEAN_SHARE
    assert share_of_tuning(Damage(95, 0.3)) == CLEAN_SHARE
    assert share_of_tuning(Damage(40, 0.0)) == DAMAGED_SHARE
    assert share_of_tuning(Damage(None, 8.0)) == DAMAGED_SHARE
    between = share_of_tuning(Damage(80, 0.0))
    assert DAMAGED_SHARE < between < CLEAN_SHARE


def test_a_crop_is_judged_by_the_whole_picture():
    file = io.BytesIO()
    Image.fromarray(noisy(levels(), 8)).save(file, "PNG")
    whole = prepare(file.getvalue(), UpscaleOptions())
    part = prepare(file.getvalue(), UpscaleOptions(crop=(0, 0, 20, 20)))
    assert part.damage == whole.damage
    assert whole.damage.noise > 6
