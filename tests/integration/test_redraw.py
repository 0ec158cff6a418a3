"""What redraw mode promises: the picture of one tile after the other, however computed."""

import dataclasses

import numpy as np
import pytest
import torch
from support import options, photograph, refine_canvas, refine_redraw

from tegula.errors import CancelledError
from tegula.models.costs import bundle_cost, prescaler_flops
from tegula.models.prescalers.load import load_prescaler
from tegula.pipeline.refine import RefineJob
from tegula.plan import Costs, make_plan
from tegula.progress import Cancel, StageProgress
from tests.tiny.networks import tiny_bundle

SMALL = {
    "tile_width": 64,
    "tile_height": 64,
    "tile_padding": 16,
    "tile_blur": 3,
    "seam_fix_width": 24,
    "seam_fix_blur": 3,
}


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def chosen(width, height, redraw, **changes):
    changes = {"steps": 4, "creativity": 0.5, "mode": "redraw"} | changes
    return options(width=width, height=height, **redraw, **changes)


def redraw(bundle, width, height, changes=None, *, one_by_one=False, **others):
    picture = photograph(width, height)
    settings = chosen(width, height, SMALL | (changes or {}), **others)
    return refine_redraw(RefineJob(bundle, picture, picture, settings), one_by_one=one_by_one)


PADDINGS = {"none": 0, "below the blur": 2, "above half a tile": 40, "above the tile": 70}
LARGE = pytest.param(5, 4, marks=pytest.mark.slow)


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 2), LARGE])
def test_fronts_give_the_picture_of_one_tile_after_the_other(bundle, columns, rows, padding):
    width, height = columns * 64 - 5, rows * 64 - 3
    changes = {"tile_padding": padding}
    # oneDNN rounds otherwise for another batch size, and 20 tiles that read each other add it up.
    with torch.backends.mkldnn.flags(enabled=False):
        fronts = redraw(bundle, width, height, changes, steps=2)
        alone = redraw(bundle, width, height, changes, steps=2, one_by_one=True)
    np.testing.assert_allclose(fronts, alone, atol=2e-5)
    assert np.abs(fronts - photograph(width, height)).max() > 0.05


class Coder:
    """An autoencoder that notes how many tiles it decodes at once; out of memory above ``most``."""

    def __init__(self, inner, most=99, spoiled=1.0):
        self.inner, self.most, self.spoiled, self.decoded = inner, most, spoiled, []
        self.encoder, self.decoder = inner.encoder, inner.decoder
        self.encode, self.draw, self.to_dtype = inner.encode, inner.draw, lambda _: inner
        self.with_norms = inner.with_norms

    def encode_moments(self, image):
        if len(image) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner.encode_moments(image) * self.spoiled

    def decode(self, latents, control):
        self.decoded.append(len(latents))
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner.decode(latents, control) * self.spoiled


def test_the_tiles_of_a_front_go_through_the_autoencoder_together(bundle):
    changes = {"tile_padding": 0, "tile_blur": 0, "tile_order": "chess"}
    usual = redraw(bundle, 192, 128, changes, steps=1, one_by_one=True)
    half = {"dtype": torch.bfloat16}
    for limits, counts, of_bundle in (
        ({}, [6], {}),
        ({"most": 1}, [6, 3, *[1] * 6], {}),
        ({"spoiled": float("nan")}, [6], half),  # then in fp32, which is not noted
    ):
        coder = Coder(bundle.autoencoder, **limits)
        given = dataclasses.replace(bundle, autoencoder=coder, **of_bundle)
        got = redraw(given, 192, 128, changes, steps=1)
        assert coder.decoded == counts
        np.testing.assert_allclose(got, usual, atol=2e-5)


KINDS = [
    ("band", True, "ddim", "own"),
    ("band", False, "euler-ancestral", "karras"),
    ("half-tile", True, "dpm++2m-sde-karras", "own"),
    ("half-tile", False, "heun", "normal"),
    ("half-tile+intersections", True, "lcm", "own"),
    ("half-tile+intersections", False, "dpm++3m-sde", "exponential"),
]


@pytest.mark.parametrize(("seam_fix", "uniform", "scheduler", "sigmas"), KINDS)
def test_fronts_keep_the_picture_in_every_pass_with_every_kind_of_scheduler(
    bundle, seam_fix, uniform, scheduler, sigmas
):
    changes = {"seam_fix": seam_fix, "tile_uniform": uniform, "tile_order": "chess"}
    fronts, alone = (
        redraw(bundle, 180, 140, changes, scheduler=scheduler, sigmas=sigmas, one_by_one=alone)
        for alone in (False, True)
    )
    np.testing.assert_allclose(fronts, alone, atol=2e-5)


def test_later_tiles_see_what_earlier_ones_painted(bundle):
    linear = redraw(bundle, 128, 128)
    chess = redraw(bundle, 128, 128, {"tile_order": "chess"})
    assert np.abs(linear - chess)[80:, 80:].max() > 1e-3
    np.testing.assert_allclose(linear[:40, :40], chess[:40, :40], atol=1e-5)


def test_one_tile_over_the_picture_is_canvas_mode(bundle):
    picture = photograph(64, 64)
    settings = chosen(64, 64, SMALL, guidance_scale=4.0, prompt="cat")
    np.testing.assert_allclose(
        refine_redraw(RefineJob(bundle, picture, picture, settings)),
        refine_canvas(RefineJob(bundle, picture, picture, settings)),
        atol=1e-5,
    )


def test_every_tile_starts_from_the_same_noise(bundle):
    flat = np.full((64, 192, 3), 0.5, np.float32)
    settings = chosen(192, 64, SMALL | {"tile_padding": 0, "tile_blur": 0})
    result = refine_redraw(RefineJob(bundle, flat, flat, settings))
    np.testing.assert_allclose(result[:, :64], result[:, 64:128], atol=1e-5)
    np.testing.assert_allclose(result[:, :64], result[:, 128:], atol=1e-5)


def test_order_none_runs_the_seam_fix_alone(bundle):
    changes = {"tile_order": "none", "seam_fix": "band"}
    change = np.abs(redraw(bundle, 128, 128, changes) - photograph(128, 128)).max(2)
    assert change[:, 52:76].max() > 0.01
    assert change[:50, :50].max() < 1e-6


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (64, 64), (65, 40), (129, 131)])
def test_any_size_comes_back_at_its_own_size(bundle, size):
    changes = {"seam_fix": "half-tile+intersections"}
    result = redraw(bundle, *size, changes)
    assert result.shape == photograph(*size).shape
    assert np.isfinite(result).all()


def test_a_mild_bundle_leaves_what_is_under_no_mask_alone(bundle):
    changes = {"seam_fix": "band", "seam_fix_denoise": 0.5}
    without = redraw(bundle, 128, 64)
    fixed = redraw(bundle, 128, 64, changes)
    np.testing.assert_allclose(fixed[:, :50], without[:, :50], atol=1e-6)
    assert np.abs(fixed - without)[:, 60:68].max() > 1e-3


def test_progress_and_plan_count_the_same_windows(bundle):
    settings = chosen(
        180,
        140,
        SMALL | {"seam_fix": "band", "seam_fix_denoise": 0.5},
        guidance_scale=4.0,
    )
    seen = []
    picture = photograph(180, 140)
    refine_redraw(
        RefineJob(bundle, picture, picture, settings),
        StageProgress(lambda *units: seen.append(units)),
    )
    total = seen[-1][1]
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    lanczos = load_prescaler("lanczos", bundle.device, bundle.dtype)
    plan = make_plan(
        bundle,
        lanczos.facts,
        Costs(bundle_cost(bundle), prescaler_flops(lanczos)),
        (90, 70),
        settings,
    )
    assert plan.evaluations == 2 * total
    assert plan.windows * plan.steps == total
    assert plan.denoise_flops > 0


def test_cancel_stops_between_batches(bundle):
    stops = iter([False] * 5 + [True])
    picture = photograph(128, 128)
    with pytest.raises(CancelledError):
        refine_redraw(
            RefineJob(bundle, picture, picture, chosen(128, 128, SMALL)),
            StageProgress(cancel=Cancel(lambda: next(stops))),
        )


def test_the_same_seed_repeats_bit_for_bit(bundle):
    first, again, other = (redraw(bundle, 128, 128, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


SEAM_FIX = {"seam_fix": "band", "seam_fix_denoise": 0.5}


@pytest.mark.parametrize("exact_steps", [True, False])
def test_without_creativity_the_seam_fix_alone_paints(bundle, exact_steps):
    result = redraw(bundle, 128, 128, SEAM_FIX, exact_steps=exact_steps, creativity=0.0)
    change = np.abs(result - photograph(128, 128)).max(axis=2)
    assert change[52:76, 52:76].max() > 0.01
    # Beyond half of the band's width from every border nothing is painted.
    assert change[:52, :52].max() < 1e-6


def test_progress_reaches_the_end_where_tiles_change_only_from_a_later_step_on(bundle):
    seen, picture = [], photograph(128, 128)
    strength = np.full((128, 128), 0.5, np.float32)
    refine_redraw(
        RefineJob(bundle, picture, picture, chosen(128, 128, SMALL), strength),
        StageProgress(lambda *units: seen.append(units)),
    )
    assert seen[-1][0] == seen[-1][1]
