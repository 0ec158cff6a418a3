from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tegula.images.encode import side_by_side


def picture(width, height, colour):
    return Image.new("RGB", (width, height), colour)


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (2, 2)), ((3, 200), (12, 800)), ((400, 3), (1600, 12)), ((500, 300), (2000, 1200))],
)
def test_the_comparison_is_bounded_whatever_the_sizes(before, after):
    sheet = side_by_side(picture(*before, "red"), picture(*after, "blue"), width=600)
    assert sheet.mode == "RGB"
    assert sheet.width <= 600
    assert sheet.height <= 500


def test_the_source_is_left_and_the_result_right_in_each_row():
    sheet = side_by_side(picture(100, 100, "red"), picture(800, 800, "blue"), width=404)
    for y in (150, 290):
        assert sheet.getpixel((100, y)) == (255, 0, 0)
        assert sheet.getpixel((304, y)) == (0, 0, 255)
    assert sheet.getpixel((201, 100)) == (255, 255, 255)


def test_a_result_that_fits_is_shown_once_pixel_for_pixel():
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    sheet = side_by_side(picture(100, 100, "red"), Image.fromarray(noise), width=1600)
    assert sheet.size == (404, 200)
    assert np.array_equal(np.asarray(sheet)[40:, 204:], noise[40:])


def test_the_detail_is_where_the_structure_is_and_not_scaled():
    values = np.full((1000, 1000, 3), 128, np.uint8)
    values[700:760, 620:700] = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    sheet = side_by_side(picture(250, 250, "gray"), Image.fromarray(values), width=404)
    shown = np.asarray(sheet)[204:, 204:]
    corner = values[700:720, 620:640]
    tiles = np.lib.stride_tricks.sliding_window_view(shown, (20, 20, 3)).reshape(-1, 20, 20, 3)
    assert (tiles == corner).all(axis=(1, 2, 3)).any()


def test_transparency_is_shown_on_a_chequered_ground():
    clear = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    shown = np.asarray(side_by_side(clear.resize((100, 100)), clear))[40:, 204:]
    assert {tuple(colour) for colour in shown.reshape(-1, 3).tolist()} == {(255,) * 3, (225,) * 3}


def test_grey_results_can_be_compared():
    sheet = side_by_side(picture(50, 50, "red"), Image.new("LA", (100, 100), (7, 255)))
    assert sheet.getpixel((150, 90)) == (7, 7, 7)
