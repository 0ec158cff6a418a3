import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support import of_arrays

from tegula.pipeline.pictures import extend
from tegula.pipeline.windows import (
    balanced_batch,
    feather,
    fit_canvas,
    grid_windows,
    spread,
)

sides = st.integers(1, 700)
overlaps = st.floats(0, 0.75)


@settings(max_examples=2000, deadline=None)
@given(length=sides, window=sides, overlap=overlaps)
def test_windows_cover_the_axis_at_full_size_and_never_leave_it(length, window, overlap):
    window = min(window, length)
    starts = spread(length, window, int(window * overlap))
    covered = np.zeros(length, bool)
    for start in starts:
        assert 0 <= start <= length - window
        covered[start : start + window] = True
    assert covered.all()


@settings(max_examples=2000, deadline=None)
@given(length=sides, window=sides, overlap=overlaps)
def test_weights_along_an_axis_sum_to_one_everywhere(length, window, overlap):
    window = min(window, length)
    starts = spread(length, window, int(window * overlap))
    total = np.zeros(length)
    for start, weights in zip(starts, feather(starts, window, length), strict=True):
        assert (weights > 0).all()
        total[start : start + window] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    window_width=st.integers(1, 90),
    window_height=st.integers(1, 90),
    overlap=overlaps,
)
def test_window_weights_sum_to_one_everywhere_on_the_canvas(
    width, height, window_width, window_height, overlap
):
    grid = grid_windows(width, height, window_width, window_height, overlap)
    total = np.zeros((height, width))
    for index, window in enumerate(grid.windows):
        assert (window.width, window.height) == (grid.window_width, grid.window_height)
        total[window.index] += grid.weights(index)
    np.testing.assert_allclose(total, 1, atol=1e-6)


@given(length=st.integers(100, 5000), overlap=st.integers(0, 48))
def test_neighbours_share_at_least_the_overlap_and_no_window_is_wasted(length, overlap):
    starts = spread(length, 64, overlap)
    shared = [left + 64 - right for left, right in itertools.pairwise(starts)]
    assert min(shared) >= overlap
    assert (len(starts) - 1) * (64 - overlap) < length - overlap
    assert max(shared) - min(shared) <= 1


def test_a_canvas_smaller_than_the_window_is_one_window():
    grid = grid_windows(40, 30, 64, 64, 0.125)
    assert [(w.x, w.y, w.width, w.height) for w in grid.windows] == [(0, 0, 40, 30)]


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_the_canvas_holds_the_picture_and_suits_the_net(width, height):
    canvas = fit_canvas(width, height, 512, minimum_window=256, window_multiple=64, factor=8)
    for side, canvas_side, window in (
        (width, canvas.width, canvas.window_width),
        (height, canvas.height, canvas.window_height),
    ):
        assert canvas_side >= side
        assert canvas_side % 8 == 0
        assert window % 64 == 0
        assert 256 <= window <= min(512, canvas_side)
        assert canvas_side < max(side + 64, 257)


def test_padding_keeps_the_picture_and_mirrors_its_edge():
    picture = np.random.default_rng(0).random((5, 3, 3), np.float32)
    canvas = fit_canvas(3, 5, 64, minimum_window=64, window_multiple=64, factor=8)
    beyond = (0, canvas.height - 5), (0, canvas.width - 3)
    padded = of_arrays(extend)(picture, *beyond, "mirrored")
    assert padded.shape == (64, 64, 3)
    np.testing.assert_array_equal(padded[:5, :3], picture)
    np.testing.assert_array_equal(padded[5], padded[4])


@given(count=st.integers(1, 500), largest=st.integers(1, 40))
def test_batches_differ_by_one_window_at_most_and_are_as_few_as_can_be(count, largest):
    sizes = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(balanced_batch(left, largest))
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= largest
    assert len(sizes) == -(-count // largest)
