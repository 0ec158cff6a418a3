"""Shrinking a result again, and holding it to its source."""

import numpy as np
import pytest
from support import of_arrays

from tegula.pipeline import exact
from tegula.pipeline.exact import is_enlarged

consistency, hold_to_source, shrink = (
    of_arrays(each) for each in (exact.consistency, exact.hold_to_source, exact.shrink)
)
RNG = np.random.default_rng(16)


def area_matrix(size, larger):
    """Return the share of each pixel of the larger side in each of the smaller."""
    factor, edges = larger / size, np.arange(larger)
    starts = np.arange(size)[:, None] * factor
    shared = np.minimum(starts + factor, edges + 1) - np.maximum(starts, edges)
    return shared.clip(0) / factor


@pytest.mark.parametrize(("height", "width"), [(97, 131), (80, 120), (41, 53), (40, 52)])
def test_shrinking_averages_areas_whose_edges_lie_within_pixels(height, width):
    picture = RNG.random((height, width, 3)).astype(np.float32)
    rows, columns = area_matrix(40, height), area_matrix(52, width)
    expected = np.einsum("ai,ijc,bj->abc", rows, picture, columns)
    np.testing.assert_allclose(shrink(picture, (52, 40)), expected, atol=1e-6)


def test_integers_and_alpha_count_as_their_files_show_them():
    samples = RNG.integers(0, 256, (8, 8, 4)).astype(np.uint8)
    colour, alpha = samples[..., :3] / 255, samples[..., 3:] / 255
    expected = np.dstack([colour * alpha, alpha]).reshape(4, 2, 4, 2, 4).mean((1, 3))
    np.testing.assert_allclose(
        shrink(samples[..., :3], (4, 4), samples[..., 3:]), expected, atol=1e-6
    )
    source, of = np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.float32)
    found = consistency(samples[..., :3], source, samples[..., 3:], of)
    assert found.mean == pytest.approx(255 * expected.mean(), rel=1e-5)
    assert found.worst == pytest.approx(255 * expected.max(), rel=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_any_source_can_be_held_at_whole_factors(kind, factor):
    source = RNG.random((37, 20, 3)).astype(np.float32)
    source = source if kind == "noise" else np.rint(source)
    picture = RNG.random((37 * factor, 20 * factor, 3)).astype(np.float32)
    hold_to_source(picture, source)
    found = consistency(np.rint(picture * 255).astype(np.uint8), source)
    assert found.is_exact
    assert found.worst <= 0.7
    assert 0 <= picture.min() <= picture.max() <= 1


def test_what_fits_already_is_not_touched_and_flat_places_stay_flat():
    picture = np.repeat(np.repeat(RNG.random((20, 20, 3)), 2, 0), 2, 1).astype(np.float32)
    source, before = picture[::2, ::2].copy(), picture.copy()
    hold_to_source(picture, source)
    np.testing.assert_array_equal(picture, before)
    grey = np.full((40, 40, 3), 0.4, np.float32)
    hold_to_source(grey, np.full((20, 20, 3), 0.5, np.float32))
    np.testing.assert_allclose(grey, 0.5, atol=1e-5)


def test_a_ceiling_is_never_passed():
    alpha = RNG.random((24, 24, 1)).astype(np.float32)
    alpha[:8] = 0
    picture = alpha * RNG.random((24, 24, 3)).astype(np.float32)
    source = shrink(alpha * RNG.random((24, 24, 3)).astype(np.float32), (12, 12))
    hold_to_source(picture, source, alpha)
    assert (picture <= alpha).all()
    assert np.abs(shrink(picture, (12, 12)) - source).max() < 0.5 / 255


def test_only_what_is_as_large_as_the_source_can_be_shrunk():
    assert is_enlarged((10, 10), (10, 10))
    assert not is_enlarged((20, 9), (10, 10))
