"""Which rectangles redraw mode paints, what it reads for them, and in which order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import options

from tegula.pipeline.redraw_plan import CropRule, blur_reach, grow, lay_out_tiles, overlap
from tegula.pipeline.windows import Window

RULE = CropRule(64, 8)


def plan(width, height, rule=RULE, **changes):
    return lay_out_tiles(width, height, options(**changes), rule)


def boxes(windows):
    return [(w.x, w.y, w.width, w.height) for w in windows]


def areas(tiles):
    return boxes(tile.area for tile in tiles.tiles)


def crops(tiles):
    return boxes(tile.crop for tile in tiles.tiles)


GRIDS = [
    # picture, order, corners of the tiles of 512x512 in their order
    ((512, 512), "linear", [(0, 0)]),
    ((513, 512), "linear", [(0, 0), (512, 0)]),
    ((1024, 1024), "linear", [(0, 0), (512, 0), (0, 512), (512, 512)]),
    ((1024, 1024), "chess", [(0, 0), (512, 512), (512, 0), (0, 512)]),
    (
        (1100, 600),
        "linear",
        [(0, 0), (512, 0), (1024, 0), (0, 512), (512, 512), (1024, 512)],
    ),
    (
        (1100, 600),
        "chess",
        [(0, 0), (1024, 0), (512, 512), (512, 0), (0, 512), (1024, 512)],
    ),
]


@pytest.mark.parametrize(("size", "order", "corners"), GRIDS)
def test_tiles_lie_on_an_absolute_grid_in_the_order_asked_for(size, order, corners):
    (tiles,) = plan(*size, tile_order=order).passes
    assert areas(tiles) == [(x, y, 512, 512) for x, y in corners]
    assert not tiles.seam_fix


CROPS = [
    # picture, options, crops of the first row
    (
        (2048, 512),
        {},
        [(0, 0, 576, 512), (480, 0, 576, 512), (992, 0, 576, 512), (1472, 0, 576, 512)],
    ),
    ((1200, 512), {}, [(0, 0, 576, 512), (480, 0, 576, 512), (624, 0, 576, 512)]),
    (
        (1200, 512),
        {"tile_uniform": False},
        [(0, 0, 544, 512), (480, 0, 576, 512), (992, 0, 208, 512)],
    ),
    (
        (1200, 512),
        {"tile_padding": 0, "tile_blur": 0},
        [(0, 0, 512, 512), (512, 0, 512, 512), (688, 0, 512, 512)],
    ),
    # a padding smaller than the blur grows to hold it
    (
        (1200, 512),
        {"tile_padding": 0, "tile_blur": 8},
        [(0, 0, 552, 512), (492, 0, 552, 512), (648, 0, 552, 512)],
    ),
    # a padding larger than the tile
    ((1200, 100), {"tile_padding": 600}, [(0, 0, 1200, 104), (0, 0, 1200, 104), (0, 0, 1200, 104)]),
    # a picture smaller than what the model takes
    ((40, 30), {}, [(0, 0, 64, 64)]),
]


@pytest.mark.parametrize(("size", "changes", "expected"), CROPS)
def test_crops_hold_tile_and_padding_inside_the_canvas(size, changes, expected):
    assert crops(plan(*size, **changes).passes[0]) == expected


def test_crops_are_multiples_of_what_the_model_takes():
    tiles = plan(1200, 900, CropRule(256, 64), tile_width=200, tile_height=100, tile_padding=10)
    assert {(w, h) for _, _, w, h in crops(tiles.passes[0])} == {(256, 256)}


SEAM_FIXES = [
    ((1000, 600), "none", []),
    ((512, 512), "band", []),
    (
        (1100, 600),
        "band",
        [("x", [(480, 0, 64, 600), (992, 0, 64, 600)]), ("y", [(0, 480, 1100, 64)])],
    ),
    (
        (1024, 1024),
        "half-tile",
        [
            ("y", [(0, 256, 512, 512), (512, 256, 512, 512)]),
            ("x", [(256, 0, 512, 512), (256, 512, 512, 512)]),
        ],
    ),
    (
        (1024, 1024),
        "half-tile+intersections",
        [
            ("y", [(0, 256, 512, 512), (512, 256, 512, 512)]),
            ("x", [(256, 0, 512, 512), (256, 512, 512, 512)]),
            ("radial", [(256, 256, 512, 512)]),
        ],
    ),
]


@pytest.mark.parametrize(("size", "seam_fix", "expected"), SEAM_FIXES)
def test_the_seam_fix_paints_over_the_borders_of_the_grid(size, seam_fix, expected):
    passes = plan(*size, seam_fix=seam_fix, tile_order="none").passes
    assert [(p.shape, areas(p)) for p in passes] == expected
    assert all(p.seam_fix for p in passes)


def test_half_tiles_are_as_many_as_the_algorithm_says():
    rows, columns = 3, 4
    options = {"tile_width": 64, "tile_height": 64, "seam_fix": "half-tile+intersections"}
    passes = plan(columns * 64, rows * 64, **options).passes
    assert [len(p.tiles) for p in passes] == [
        rows * columns,
        (rows - 1) * columns,
        rows * (columns - 1),
        (rows - 1) * (columns - 1),
    ]


def test_bands_are_not_blurred_and_half_tiles_are():
    blur = {"seam_fix_blur": 5, "tile_order": "none"}
    assert [p.blur for p in plan(1100, 600, seam_fix="band", **blur).passes] == [0, 0]
    assert [p.blur for p in plan(1100, 600, seam_fix="half-tile", **blur).passes] == [5, 5]


def test_no_seam_fix_runs_at_denoise_0():
    assert len(plan(1100, 600, seam_fix="band", seam_fix_denoise=0).passes) == 1


def test_growing_goes_right_by_half_then_left_then_right():
    assert grow(100, 200, 140, 1000) == (80, 220)
    assert grow(0, 100, 140, 1000) == (0, 140)
    assert grow(900, 1000, 140, 1000) == (860, 1000)
    assert grow(10, 110, 160, 1000) == (0, 160)
    assert grow(0, 50, 80, 80) == (0, 80)


def test_a_mask_without_blur_is_its_rectangle():
    tiles = plan(256, 128, tile_width=128, tile_height=128, tile_padding=16, tile_blur=0).passes[0]
    mask = tiles.mask(tiles.tiles[1])
    crop = tiles.tiles[1].crop
    expected = np.zeros((crop.height, crop.width))
    expected[:, 128 - crop.x :] = 1
    np.testing.assert_array_equal(mask, expected)


def test_a_blurred_mask_is_a_half_on_the_border_and_full_at_the_edge_of_the_picture():
    tiles = plan(256, 128, tile_width=128, tile_height=128, tile_padding=32, tile_blur=8).passes[0]
    left, right = tiles.tiles
    row = tiles.mask(left)[64]
    assert row[0] == pytest.approx(1)
    assert (row[127] + row[128]) / 2 == pytest.approx(0.5)
    assert (np.diff(row) <= 1e-6).all()
    assert row[128 + blur_reach(8)] == 0
    joined = tiles.mask(right)[64]
    shared = slice(right.crop.x, left.crop.width)
    np.testing.assert_allclose(row[shared] + joined[: left.crop.width - right.crop.x], 1, atol=1e-6)


def test_ramps_are_full_on_the_border_and_nothing_at_their_own_edges():
    band = plan(1024, 512, seam_fix="band", tile_order="none").passes[0]
    tile = band.tiles[0]
    row = band.mask(tile)[0]
    at = tile.area.x - tile.crop.x
    assert row[at + 31 : at + 33] == pytest.approx(1, abs=0.02)
    assert row[at] == row[at + 63] == pytest.approx(0.5 / 32)
    assert row[at - 1] == row[at + 64] == 0


def test_the_radial_mask_falls_from_its_centre_to_nothing():
    fix = plan(
        128, 128, tile_width=64, tile_height=64, seam_fix="half-tile+intersections", seam_fix_blur=0
    ).passes[-1]
    tile = fix.tiles[0]
    mask = fix.mask(tile)[tile.area.y - tile.crop.y :, tile.area.x - tile.crop.x :][:64, :64]
    assert mask[32, 32] > 0.95
    assert mask[0, 0] == mask[0, 63] == 0
    assert mask[32, 0] == pytest.approx(0, abs=0.02)


@st.composite
def layouts(draw):
    """Grids of up to 7x9 tiles with paddings from none to more than a tile."""
    tile = draw(st.sampled_from([64, 72, 100])), draw(st.sampled_from([64, 80]))
    columns, rows = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    settings = options(
        tile_width=tile[0],
        tile_height=tile[1],
        tile_padding=draw(st.sampled_from([0, 4, 16, 48, 70, 130])),
        tile_blur=draw(st.sampled_from([0, 3, 8, 30])),
        tile_order=draw(st.sampled_from(["linear", "chess"])),
        tile_uniform=draw(st.booleans()),
        seam_fix=draw(st.sampled_from(["none", "band", "half-tile", "half-tile+intersections"])),
        seam_fix_padding=draw(st.sampled_from([0, 16, 90])),
        seam_fix_blur=draw(st.sampled_from([0, 8])),
    )
    width = columns * tile[0] - draw(st.integers(0, tile[0] - 1))
    height = rows * tile[1] - draw(st.integers(0, tile[1] - 1))
    return lay_out_tiles(width, height, settings, draw(st.sampled_from([RULE, CropRule(32, 16)])))


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_every_crop_lies_on_the_canvas_and_holds_what_is_painted(layout):
    for tiles in layout.passes:
        for tile in tiles.tiles:
            assert 0 <= tile.crop.x <= tile.painted.x
            assert 0 <= tile.crop.y <= tile.painted.y
            assert tile.painted.x + tile.painted.width <= tile.crop.x + tile.crop.width
            assert tile.painted.y + tile.painted.height <= tile.crop.y + tile.crop.height
            assert tile.crop.x + tile.crop.width <= layout.width
            assert tile.crop.y + tile.crop.height <= layout.height


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_a_mask_is_nothing_outside_what_is_painted(layout):
    tiles = layout.passes[-1]
    tile = tiles.tiles[-1]
    mask = tiles.mask(tile).copy()
    assert mask.shape == (tile.crop.height, tile.crop.width)
    assert mask.min() >= 0
    assert mask.max() <= 1 + 1e-6
    top, left = tile.painted.y - tile.crop.y, tile.painted.x - tile.crop.x
    mask[top : top + tile.painted.height, left : left + tile.painted.width] = 0
    assert not mask.any()


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_no_front_changes_what_a_tile_reads(layout):
    for tiles in layout.passes:
        run_of = {index: run for run, front in enumerate(tiles.fronts()) for index in front}
        assert sorted(run_of) == list(range(len(tiles.tiles)))
        for later, tile in enumerate(tiles.tiles):
            for earlier in range(later):
                other = tiles.tiles[earlier]
                if overlap(tile.crop, other.painted):
                    assert run_of[earlier] < run_of[later]
                if overlap(tile.painted, other.crop):
                    assert run_of[earlier] <= run_of[later]


def test_a_front_is_a_diagonal_of_the_grid():
    tiles = plan(9 * 64, 7 * 64, tile_width=64, tile_height=64, tile_padding=16, tile_blur=2)
    sizes = [len(front) for front in tiles.passes[0].fronts()]
    assert sum(sizes) == 63
    assert len(sizes) == 9 + 2 * 6
    assert max(sizes) == 5


def test_chess_needs_two_fronts_when_colours_do_not_touch():
    options = {"tile_width": 64, "tile_height": 64, "tile_padding": 0, "tile_blur": 0}
    tiles = plan(256, 256, tile_order="chess", **options).passes[0]
    assert len(tiles.fronts()) <= 2


def test_rectangles_that_only_touch_share_nothing():
    assert not overlap(Window(0, 0, 8, 8), Window(8, 0, 8, 8))
    assert overlap(Window(0, 0, 9, 8), Window(8, 7, 8, 8))
