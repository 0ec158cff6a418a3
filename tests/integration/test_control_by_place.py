"""Masks, strength maps, regional prompts and flat areas: who may change where, and how much."""

import dataclasses

import numpy as np
import pytest
import torch
from cli_support import run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import of_arrays, options, photograph, refine_canvas, refine_redraw

from tegula.errors import OptionError
from tegula.images.decode import inverted
from tegula.images.pixels import margins, unwrapped, wrapped
from tegula.options import UpscaleOptions
from tegula.pipeline import adjust, prepare
from tegula.pipeline.refine import RefineJob
from tegula.pipeline.steps import blend_weights, first_steps
from tegula.pipeline.windows import Window, count_places, prompt_shares
from tegula.progress import StageProgress
from tegula.regions import PlacedRegion, Region, parse_region, place_region
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

flatness, scale_detail, sharpen, read_mask = (
    of_arrays(each)
    for each in (adjust.flatness, adjust.scale_detail, adjust.sharpen, prepare.read_mask)
)


WIDTH, HEIGHT = 192, 128
REDRAW = {"tile_width": 64, "tile_height": 64, "tile_padding": 16, "tile_blur": 3}
REFINERS = [refine_canvas, refine_redraw]


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


class Counting:
    """Counts the windows that a denoiser predicts."""

    def __init__(self, inner):
        self.inner, self.windows = inner, 0

    def embed_control(self, control):
        return self.inner.embed_control(control)

    def __call__(self, batch):
        self.windows += len(batch.latents)
        return self.inner(batch)

    def to_dtype(self, dtype):
        return self


def changed(refine, bundle, strength=None, **changes):
    picture = photograph(WIDTH, HEIGHT)
    chosen = options(width=WIDTH, height=HEIGHT, **REDRAW, **changes)
    return refine(RefineJob(bundle, picture, picture, chosen, strength=strength)) - picture


def half(left, right):
    strength = np.full((HEIGHT, WIDTH), np.float32(left))
    strength[:, WIDTH // 2 :] = right
    return strength


@pytest.mark.parametrize("refine", REFINERS)
@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral", "dpm++2m", "heun", "lcm"])
def test_nothing_changes_where_the_strength_is_nothing(bundle, refine, scheduler):
    change = np.abs(changed(refine, bundle, half(0, 1), scheduler=scheduler))
    assert change[:, : WIDTH // 2].max() < 1e-6
    assert change[:, WIDTH // 2 + 16 :].max() > 0.05


@pytest.mark.parametrize("refine", REFINERS)
def test_full_strength_everywhere_is_no_map_at_all(bundle, refine):
    np.testing.assert_allclose(
        changed(refine, bundle, half(1, 1)), changed(refine, bundle), atol=1e-5
    )


@pytest.mark.parametrize("refine", REFINERS)
def test_windows_that_hold_still_are_not_evaluated(bundle, refine):
    counts = []
    for strength in (None, half(1, 1), half(0.5, 1), half(0, 1), half(0, 0)):
        counting = Counting(bundle.denoiser)
        changed(refine, dataclasses.replace(bundle, denoiser=counting), strength, steps=8)
        counts.append(counting.windows)
    assert counts[0] == counts[1] > counts[2] > counts[3] > counts[4] == 0


def test_progress_reaches_the_end_when_windows_are_skipped(bundle):
    seen = []
    picture = photograph(WIDTH, HEIGHT)
    for refine in REFINERS:
        chosen = options(width=WIDTH, height=HEIGHT, **REDRAW)
        refine(
            RefineJob(bundle, picture, picture, chosen, strength=half(0, 1)),
            StageProgress(lambda *u: seen.append(u)),
        )
        assert seen[-1][0] == seen[-1][1]


def test_latent_pixels_begin_to_change_when_their_share_of_the_steps_is_left():
    strength = torch.tensor([[[[0.0, 0.04, 0.25, 0.5, 1.0]]]])
    assert first_steps(strength, 8, 1).flatten().tolist() == [8, 7, 6, 4, 0]
    torch.testing.assert_close(
        blend_weights(strength, 8).flatten(), torch.tensor([0, 0.32, 1, 1, 1])
    )


def test_the_strongest_pixel_of_a_latent_pixel_counts():
    strength = torch.zeros(1, 1, 8, 16)
    strength[..., 3, 9] = 1
    assert first_steps(strength, 4, 8).tolist() == [[[[4, 0]]]]


SHARES = st.tuples(*[st.floats(0, 0.9)] * 2, *[st.floats(0.05, 1)] * 2)


@settings(deadline=None)
@given(st.lists(SHARES, max_size=3), st.integers(0, 8), st.integers(0, 8))
def test_the_shares_of_all_prompts_sum_to_one(boxes, x, y):
    regions = [place_region(Region(*box, "a"), (160, 120), (0, 0, 1, 1)) for box in boxes]
    shares = prompt_shares(regions, Window(x * 8, y * 8, 64, 48), 8)
    assert len(shares) == len(boxes) + 1
    np.testing.assert_allclose(sum(shares), np.ones((6, 8)), atol=1e-6)
    assert min(share.min() for share in shares) >= 0


def test_a_region_over_the_whole_picture_is_its_prompt_alone(bundle):
    whole = PlacedRegion(0, 0, 1e9, 1e9, 1, "cat")
    regional = changed(refine_canvas, bundle, placed_regions=(whole,))
    np.testing.assert_allclose(regional, changed(refine_canvas, bundle, prompt="cat"), atol=1e-5)


@pytest.mark.parametrize("refine", REFINERS)
def test_a_region_changes_its_own_part(bundle, refine):
    placed = place_region(Region(0, 0, 0.3, 1, "dog"), (WIDTH, HEIGHT), (0, 0, 1, 1))
    both = [
        changed(refine, bundle, prompt="red", placed_regions=regions, overlap=0.0)
        for regions in ((), (placed,))
    ]
    difference = np.abs(both[1] - both[0])
    assert difference[:, :40].max() > 1e-3
    assert difference[:, :40].mean() > 3 * difference[:, 130:].mean()


def test_windows_count_once_for_each_prompt_in_them():
    left = PlacedRegion(0, 0, 60, 64, 8, "a")
    windows = [Window(0, 0, 64, 64), Window(64, 0, 64, 64)]
    assert count_places((), windows, 8) == 2
    assert count_places((left,), windows, 8) == 3


def test_a_region_is_read_in_pixels_or_in_shares():
    assert parse_region("10,20,30,40:a cat: grey", (100, 80)) == Region(
        0.1, 0.25, 0.3, 0.5, "a cat: grey"
    )
    assert parse_region("0.5,0,.5,1:sky", (100, 80)) == Region(0.5, 0, 0.5, 1, "sky")
    assert parse_region("90,0,30,40:edge", (100, 80)).width == pytest.approx(0.1)


@pytest.mark.parametrize(
    "text",
    ["cat", "1,2,3:cat", "1,2,3,4:", "1,2,3,4:  ", "0,0,0,5:cat", "-1,0,5,5:cat", "a,b,c,d:x"],
)
def test_what_is_no_region_is_refused(text):
    with pytest.raises(OptionError, match="region"):
        UpscaleOptions(regions=(text,))


def test_a_region_outside_the_picture_is_refused():
    with pytest.raises(OptionError, match="outside"):
        parse_region("200,0,10,10:cat", (100, 80))


def test_a_region_moves_with_the_crop():
    placed = place_region(Region(0.5, 0.5, 0.25, 0.25, "a"), (100, 100), (0.5, 0.5, 0.5, 0.5))
    assert (placed.left, placed.top, placed.right, placed.bottom) == (0, 0, 50, 50)


def test_masks_of_any_size_and_mode_lie_over_the_whole_picture():
    mask = Image.new("L", (10, 4), 0)
    mask.paste(255, (5, 0, 10, 4))
    for each in (mask, mask.convert("RGB"), mask.convert("1"), mask.resize((300, 200))):
        read = read_mask(each, (60, 40), 10**6)
        assert read.shape == (40, 60)
        assert read[:, :25].max() < 0.1
        assert read[:, 35:].min() > 0.9
    right = read_mask(mask, (20, 20), 10**6, (0.5, 0, 0.5, 1))
    assert right[:, 4:].min() > 0.9
    assert np.asarray(inverted(mask, 10**6))[0, 0, 0] == 255


def test_transparent_places_of_a_mask_count_as_black():
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert read_mask(mask, (8, 8), 10**6).max() == 0


@pytest.mark.parametrize("mode", ["canvas", "redraw"])
def test_the_mask_restricts_the_change_at_full_size(bundle, mode):
    picture = Image.fromarray(np.uint8(photograph(96, 64) * 255))
    mask = Image.new("L", (6, 4), 0)
    mask.paste(255, (3, 0, 6, 4))
    upscaler = Upscaler(bundle)
    chosen = UpscaleOptions(prescaler="lanczos", creativity=0.6, seed=1, mode=mode, tile_width=64,
                           tile_height=64, window=64, steps=4)  # fmt: skip
    plain = upscaler.upscale(picture, chosen.replaced(creativity=0.0, sharpen=0.0))
    masked = upscaler.upscale(picture, chosen, mask=mask)
    assert masked.image.size == (192, 128)
    difference = np.abs(np.asarray(masked.image, float) - np.asarray(plain.image, float))
    assert difference[:, :80].max() == 0
    assert difference[:, 112:].max() > 20


def test_flat_areas_are_those_without_structure_whatever_their_grain():
    rng = np.random.default_rng(0)
    picture = np.full((300, 400, 3), 0.6, np.float32)
    picture += np.linspace(0, 0.2, 300, dtype=np.float32)[:, None, None]
    picture += rng.normal(0, 0.02, (300, 400, 1)).astype(np.float32)
    picture[100:200, 250:] = photograph(150, 100)
    flat = flatness(picture)
    assert flat[:, :150].min() > 0.8
    assert flat[110:190, 260:].max() < 0.1


def test_flat_areas_skip_steps(bundle):
    counting = Counting(bundle.denoiser)
    upscaler = Upscaler(dataclasses.replace(bundle, denoiser=counting))
    sky = np.full((128, 256, 3), 0.7, np.float32)
    sky[:, 192:] = photograph(64, 128)
    picture = Image.fromarray(np.uint8(sky * 255))
    counts = []
    for skip in (0.0, 0.5, 1.0):
        before = counting.windows
        chosen = UpscaleOptions(scale=1, prescaler="lanczos", flat_skip=skip, steps=8, window=64,
                               guidance_scale=1.0, creativity=0.5, seed=1)  # fmt: skip
        upscaler.upscale(picture, chosen)
        counts.append(counting.windows - before)
    assert counts[0] > counts[1] > counts[2] > 0


def test_detail_scales_what_refine_changed():
    prescaled, refined = np.zeros((4, 4, 3), np.float32), np.full((4, 4, 3), 0.2, np.float32)
    assert scale_detail(refined, prescaled, 0) is refined
    np.testing.assert_allclose(scale_detail(refined, prescaled, 1), 0.4, atol=1e-6)
    np.testing.assert_allclose(scale_detail(refined, prescaled, -1), 0, atol=1e-6)


def test_sharpening_keeps_flat_areas_and_steepens_edges():
    step = np.zeros((9, 9, 3), np.float32) + 0.4
    step[:, 5:] = 0.6
    assert sharpen(step, 0) is step
    sharp = sharpen(step, 1)
    np.testing.assert_allclose(sharp[:, :3], 0.4, atol=1e-6)
    assert sharp[4, 5, 0] - sharp[4, 4, 0] > 0.2


def test_the_edges_of_a_joined_pattern_meet():
    rng = np.random.default_rng(1)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(96, 96, 3)), 0), 1)
    ramp = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
    image = Image.fromarray(ramp)
    across, down = margins(*image.size)
    tile = np.asarray(unwrapped(wrapped(image, across, down), across, down), float)
    assert tile.shape == ramp.shape
    np.testing.assert_allclose(tile, ramp, atol=1)
    shaded = np.asarray(wrapped(image, across, down), float)
    shaded += np.linspace(0, 60, shaded.shape[1])[None, :, None] - 30
    tile = np.asarray(
        unwrapped(Image.fromarray(np.uint8(np.clip(shaded, 0, 255))), across, down), float
    )
    own_step = np.abs(ramp[:, 0].astype(float) - ramp[:, -1]).mean()
    assert np.abs(tile[:, 0] - tile[:, -1]).mean() < own_step + 3


def test_the_command_line_takes_a_mask_a_strength_map_and_regions(tmp_path):
    source, mask, out = tmp_path / "a.png", tmp_path / "mask.png", tmp_path / "out.png"
    Image.fromarray(np.uint8(photograph(48, 32) * 255)).save(source)
    Image.new("L", (3, 2), 0).save(mask)
    words = ["upscale", source, out, "--prescaler", "lanczos", "--region", "0,0,.5,1:sharp"]
    done = run(*words, "--mask", mask, "--strength-map", mask)
    assert done.exit_code == 0, done.output
    plain = Upscaler(tiny_bundle()).upscale(
        source, UpscaleOptions(prescaler="lanczos", creativity=0.0)
    )
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(plain.image))
    missing = run("upscale", source, "--mask", "no.png")
    assert missing.exit_code == 5
