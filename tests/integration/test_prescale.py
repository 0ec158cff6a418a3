"""The prescale stage: sizes, tiles, and what happens when a tile goes wrong."""

import dataclasses
import itertools

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage import data
from support import of_arrays, photograph, prescale_in_tiles
from torch.nn import functional

from tegula.errors import CancelledError, NumericalError, OutOfMemoryError
from tegula.images.pixels import fill_hidden
from tegula.models.prescalers import Prescaler, PrescalerFacts, list_prescalers
from tegula.models.prescalers.load import load_prescaler
from tegula.pipeline import pictures
from tegula.pipeline import prescale as stage
from tegula.pipeline.prescale_plan import SMALLEST_CORE, plan_sizes, plan_spans
from tegula.progress import Cancel, Reporter, StageProgress

prescale, prescale_alpha, prescale_mixed = (
    of_arrays(each) for each in (stage.prescale, stage.prescale_alpha, stage.prescale_mixed)
)
enlarge_alpha = of_arrays(pictures.enlarge_alpha)
enlarge_lanczos = of_arrays(pictures.enlarge_lanczos)


CPU = torch.device("cpu")
NETS = [facts for facts in list_prescalers() if facts.factor]
LANCZOS = load_prescaler("lanczos", CPU, torch.float32)
SIDE = st.integers(1, 3000)


class Nearest(torch.nn.Module):
    """Enlarges by repetition; ``before`` may do whatever a real net might do wrong."""

    def __init__(self, factor=4, before=lambda x: x):
        super().__init__()
        self.factor, self.before, self.shapes = factor, before, []

    def forward(self, x):
        self.shapes.append((x.shape[-1], x.shape[-2]))
        return functional.interpolate(self.before(x), scale_factor=self.factor, mode="nearest")


def fake(network, full_precision=None, overlap=4):
    facts = PrescalerFacts(
        name="fake", description="", net="", factor=network.factor, overlap=overlap, licence=""
    )
    return Prescaler(facts, network, full_precision or network, CPU, torch.float32)


def out_of_memory_above(pixels):
    def before(x):
        if x[0, 0].numel() > pixels:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return x

    return before


def to_nan(x):
    return x * torch.nan


@pytest.mark.parametrize("facts", NETS, ids=lambda facts: facts.name)
def test_tiling_changes_no_pixel_visibly(facts):
    prescaler = load_prescaler(facts.name, CPU, torch.float32)
    tile = 2 * facts.overlap + SMALLEST_CORE + 8
    picture = data.chelsea()[120:136, 100 : 108 + tile].astype(np.float32) / 255
    size = (picture.shape[1] * 4, picture.shape[0] * 4)
    units = []
    tiled = prescale_in_tiles(
        tile,
        picture,
        size,
        prescaler,
        progress=StageProgress(on_unit=lambda *u: units.append(u)),
    )
    assert units == [(1, 2), (2, 2)]
    assert np.abs(tiled - prescale(picture, size, prescaler)).max() <= 1 / 255


@pytest.mark.parametrize("target", [(300, 200), (199, 133), (520, 400), (101, 390), (60, 250)])
def test_resampling_tile_by_tile_equals_resampling_at_once(target):
    picture = photograph(100, 67)
    prescaler = fake(Nearest())
    tiled = prescale_in_tiles(40 + 16, picture, target, prescaler)
    assert tiled.shape == (target[1], target[0], 3)
    assert np.abs(tiled - prescale(picture, target, prescaler)).max() < 1e-4


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 40)] * 2, *[st.integers(1, 300)] * 2, st.sampled_from([1, 2, 4]))
def test_the_result_has_exactly_the_size_asked_for(width, height, out_width, out_height, factor):
    picture = np.full((height, width, 3), 0.25, np.float32)
    for prescaler in (LANCZOS, fake(Nearest(factor))):
        result = prescale_in_tiles(56, picture, (out_width, out_height), prescaler)
        assert result.shape == (out_height, out_width, 3)
        assert result.dtype == np.float32
        assert np.abs(result - 0.25).max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 9), (5, 3)])
def test_a_real_net_takes_the_smallest_pictures(size):
    net = load_prescaler("realesrgan-animevideov3", CPU, torch.float32)
    grey = np.full((size[1], size[0], 3), 0.5, np.float32)
    result = prescale(grey, (size[0] * 4, size[1] * 4), net)
    assert result.shape == (size[1] * 4, size[0] * 4, 3)
    assert np.abs(result - 0.5).max() < 0.05


@example(1, 1, 1, 17, 2)
@given(SIDE, SIDE, SIDE, SIDE, st.sampled_from([1, 2, 4, 8]))
def test_the_last_pass_ends_at_the_target_and_no_pass_stretches(w, h, out_w, out_h, factor):
    sizes = plan_sizes((w, h), (out_w, out_h), factor)
    assert bool(sizes) == (out_w > w or out_h > h)
    if not sizes:
        return
    assert sizes[-1] == (out_w, out_h)
    for before, after in zip([(w, h), *sizes], sizes, strict=False):
        assert factor == 1 or all(
            b < a * factor * 1.25 + 1 for a, b in zip(before, after, strict=True)
        )
    assert all(side >= 1 for size in sizes for side in size)


def two_heads():
    four, two = fake(Nearest(4)), fake(Nearest(2))
    facts = dataclasses.replace(four.facts, smaller=2)
    return dataclasses.replace(four, facts=facts, smaller=two)


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ((41, 61), {2: 1}),
        ((50, 75), {2: 1}),
        ((80, 120), {2: 1}),
        ((81, 121), {4: 1}),
        ((160, 240), {4: 1}),
        ((320, 480), {2: 1, 4: 1}),
    ],
)
def test_each_pass_runs_the_smallest_head_that_reaches_its_target(target, runs):
    picture, net = photograph(40, 60), two_heads()
    result = prescale(picture, target, net)
    assert result.shape == (target[1], target[0], 3)
    seen = {4: len(net.network.shapes), 2: len(net.smaller.network.shapes)}
    assert {factor: count for factor, count in seen.items() if count} == runs
    if target <= (80, 120):
        alone = prescale(picture, target, dataclasses.replace(net.smaller))
        assert np.array_equal(result, alone)


def test_eight_times_goes_over_two_times():
    assert plan_sizes((100, 50), (800, 400), 4) == [(200, 100), (800, 400)]
    assert plan_sizes((100, 50), (450, 225), 4) == [(450, 225)]


@given(SIDE, SIDE, st.integers(1, 400), st.integers(0, 80), st.sampled_from([1, 64]))
def test_tiles_are_equal_and_every_pixel_has_its_context(source, target, tile, context, step):
    spans = plan_spans(source, target, tile, context, step=step)
    assert len({span.stop - span.start for span in spans}) == 1
    assert spans[0].start == 0
    assert spans[-1].stop == source
    assert spans[0].stop <= max(tile, 2 * context + SMALLEST_CORE)
    assert (spans[0].first, spans[-1].last) == (0, target)
    half_a_pixel = 0.5 * source / target + 0.5
    for left, right in itertools.pairwise(spans):
        assert left.last == right.first
        cut = left.last * source / target
        assert left.stop - cut >= context - half_a_pixel
        assert cut - right.start >= context - half_a_pixel


def test_tiles_of_a_pass_have_one_shape():
    net = Nearest()
    prescale_in_tiles(64, photograph(150, 110), (600, 440), fake(net))
    assert len(set(net.shapes)) == 1
    assert len(net.shapes) > 4


def test_a_device_that_plans_for_every_shape_sees_few_of_them():
    def lengths(step):
        sides = range(641, 4000, 7)
        spans = (plan_spans(side, 4 * side, 640, 80, step=step)[0] for side in sides)
        return {span.stop - span.start for span in spans}

    assert lengths(64) == {448, 512, 576, 640}
    assert len(lengths(1)) > 90
    net, stepped = fake(Nearest()), fake(Nearest())
    stepped = dataclasses.replace(stepped, facts=dataclasses.replace(stepped.facts, step=16))
    picture = photograph(150, 110)
    whole, tiled = prescale(picture, (600, 440), net), []
    for width, height in ((150, 110), (141, 97), (133, 88)):
        part = picture[:height, :width]
        tiled.append(prescale_in_tiles(64, part, (4 * width, 4 * height), stepped))
    assert np.abs(tiled[0] - whole).max() < 1e-4
    sides = {side for shape in stepped.network.shapes for side in shape}
    assert sides == {64}


def test_values_stay_in_range():
    net = Nearest(before=lambda x: x * 3 - 1)
    result = prescale(photograph(40, 40), (90, 90), fake(net))
    assert result.min() >= 0
    assert result.max() <= 1


def test_a_tile_that_overflows_is_run_again_in_full_precision():
    picture = photograph(50, 40)
    healthy = Nearest()
    result = prescale(picture, (200, 160), fake(Nearest(before=to_nan), healthy))
    assert np.array_equal(result, prescale(picture, (200, 160), fake(healthy)))


def test_values_that_stay_no_numbers_are_reported():
    with pytest.raises(NumericalError, match="fake"):
        prescale(photograph(40, 40), (80, 80), fake(Nearest(before=to_nan)))


def test_cancelling_stops_between_tiles():
    net, calls = Nearest(), iter([False, False, False, True])
    with pytest.raises(CancelledError):
        prescale_in_tiles(
            64,
            photograph(150, 110),
            (600, 440),
            fake(net),
            progress=StageProgress(cancel=Cancel(lambda: next(calls))),
        )
    assert len(net.shapes) == 2


def test_cancelling_stops_inside_a_tile_and_leaves_the_net_usable():
    net = load_prescaler("realesrgan-animevideov3", CPU, torch.float32)
    picture, calls = photograph(32, 32), []
    with pytest.raises(CancelledError):
        prescale(
            picture,
            (128, 128),
            net,
            progress=StageProgress(cancel=Cancel(lambda: calls.append(0) or len(calls) == 9)),
        )
    assert len(calls) == 9
    prescale(picture, (128, 128), net)
    assert len(calls) == 9


@pytest.mark.parametrize(
    "name",
    [
        "tegula-photo",
        "tegula-swift",
        "tegula-line",
        "realesrgan-animevideov3",
        "realesrgan-x4plus-anime",
    ],
)
def test_the_bar_moves_within_a_single_tile_as_its_layers_take(name):
    net, seen = load_prescaler(name, CPU, torch.float32), []
    stage = Reporter(seen.append, {"prescale": 1.0}).stage("prescale")
    prescale(photograph(16, 12), (64, 48), net, progress=stage)
    fractions = sorted({report.fraction for report in seen})
    assert len(fractions) > 20
    assert max(b - a for a, b in itertools.pairwise(fractions)) < 0.25
    assert fractions[-1] == pytest.approx(1)
    assert (seen[-1].done, seen[-1].total) == (1, 1)


def test_work_counts_by_its_size_over_passes_and_nets():
    """Ten times the pixels move the bar by more than as many tiles of a smaller pass do."""
    shares, net = [], load_prescaler("realesrgan-animevideov3", CPU, torch.float32)
    report = StageProgress(on_share=shares.append, on_unit=lambda *_: shares.append(None))
    prescale(photograph(40, 40), (640, 640), net, progress=report)
    first = shares[shares.index(None) - 1]
    assert first == pytest.approx(1 / 17, rel=0.01)
    assert shares[-2] == pytest.approx(1)
    mixed = []
    nets = (net, load_prescaler("tegula-swift", CPU, torch.float32))
    second = np.zeros((64, 64), np.float32)
    report = StageProgress(on_share=mixed.append, on_unit=lambda *_: mixed.append(None))
    prescale_mixed(photograph(32, 32), (64, 64), nets, second, report)
    assert 0.2 < mixed[mixed.index(None) - 1] < 0.45
    assert mixed[-2] == pytest.approx(1)
    assert [each for each in mixed if each] == sorted(each for each in mixed if each)


def test_tiles_that_are_ready_are_pasted_over_the_enlarged_source():
    picture, seen = photograph(150, 110), []
    report = StageProgress(on_picture=seen.append)
    result = prescale_in_tiles(64, picture, (1050, 770), fake(Nearest(8)), progress=report)
    assert np.array_equal(result, prescale_in_tiles(64, picture, (1050, 770), fake(Nearest(8))))
    assert {shown.shape for shown in seen} == {(257, 350, 3)}
    assert 4 < len(seen) < 12
    small = functional.avg_pool2d(torch.from_numpy(result).permute(2, 0, 1), 3, ceil_mode=True)
    wrong = [np.abs(shown - small.permute(1, 2, 0).numpy()).max(2) > 1e-5 for shown in seen]
    amounts = [each.mean() for each in wrong]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] > 0.5 > amounts[-1]
    assert not wrong[-1][:80].any()


def test_tiles_are_halved_until_they_fit_and_the_result_stays():
    picture, units = photograph(150, 110), []
    net = Nearest(before=out_of_memory_above(64 * 64))
    result = prescale(
        picture, (300, 220), fake(net), progress=StageProgress(on_unit=lambda *u: units.append(u))
    )
    assert np.abs(result - prescale(picture, (300, 220), fake(Nearest()))).max() < 1e-4
    assert units[-1][0] == units[-1][1] > 1


def test_the_second_pass_alone_is_repeated_when_it_does_not_fit():
    net, units = Nearest(before=out_of_memory_above(120 * 120)), []
    prescale(
        photograph(100, 90),
        (800, 720),
        fake(net),
        progress=StageProgress(on_unit=lambda *u: units.append(u)),
    )
    assert [done for done, _ in units] == list(range(1, units[-1][1] + 1))


def test_running_out_of_memory_with_the_smallest_tile_is_reported():
    with pytest.raises(OutOfMemoryError, match="40 px"):
        prescale(photograph(90, 90), (180, 180), fake(Nearest(before=out_of_memory_above(0))))


def test_other_failures_of_a_net_are_not_taken_for_lack_of_memory():
    def fail(x):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        prescale(photograph(40, 40), (80, 80), fake(Nearest(before=fail)))


def test_lanczos_keeps_a_picture_of_the_right_size():
    picture = photograph(30, 20)
    assert np.array_equal(enlarge_lanczos(picture, (30, 20)), picture)


def test_lanczos_follows_a_slope():
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32)[None, :, None], (8, 1, 3))
    larger = enlarge_lanczos(ramp, (64, 16))
    expected = np.clip((np.arange(64) + 0.5) / 2 - 0.5, 0, 31) / 31
    assert np.abs(larger[8, 8:-8, 0] - expected[8:-8]).max() < 0.01


def drawn_icon(side, finer=8):
    """Return a badge with a glyph, whose outline is drawn ``finer`` times finer and averaged."""
    y, x = (np.mgrid[: side * finer, : side * finer] + 0.5) / (side * finer)
    ring, dot = np.hypot(x - 0.5, y - 0.5), np.hypot(x - 0.62, y - 0.4)
    shape = (ring < 0.42) & ((ring > 0.3) | (dot < 0.12)) | (np.abs(x - y) < 0.04) & (ring < 0.42)
    red = np.where(dot < 0.12, 1.0, 0.1)
    weighted = np.stack([red * shape, 0.3 * shape, 0.8 * shape, shape], 2)
    mean = weighted.reshape(side, finer, side, finer, 4).mean((1, 3)).astype(np.float32)
    return mean[..., :3] / np.maximum(mean[..., 3:], 1e-6), mean[..., 3]


@pytest.fixture(scope="module")
def icon_net():
    return load_prescaler("tegula-swift", CPU, torch.float32)


def test_the_rim_of_an_icon_is_as_wide_as_a_drawn_one(icon_net):
    _, small = drawn_icon(32)
    _, truth = drawn_icon(64)
    large, resampled = prescale_alpha(small, (64, 64), icon_net), enlarge_alpha(small, 64, 64)
    rim, drawn, wide = (((a > 0.05) & (a < 0.95)).sum() for a in (large, truth, resampled))
    assert rim < 1.5 * drawn < wide
    outside = cv2.dilate(truth, np.ones((7, 7))) == 0
    assert large[outside].max() < 2 / 255
    assert large[cv2.erode(truth, np.ones((7, 7))) == 1].min() > 253 / 255


@pytest.mark.parametrize("ground", [(0, 0, 0), (1, 1, 1), (1, 0, 1)], ids=["k", "w", "m"])
def test_an_icon_has_no_halo_on_any_ground(icon_net, ground):
    colour, small = drawn_icon(32)
    truth, drawn = drawn_icon(64)
    colour = prescale(fill_hidden(colour, small), (64, 64), icon_net)
    on, errors = drawn[..., None] * truth + (1 - drawn[..., None]) * np.float32(ground), []
    for alpha in (prescale_alpha(small, (64, 64), icon_net), enlarge_alpha(small, 64, 64)):
        seen = alpha[..., None] * colour + (1 - alpha[..., None]) * np.float32(ground)
        errors.append(np.abs(seen - on)[cv2.dilate(drawn, np.ones((7, 7))) == 0].max(initial=0))
        errors.append(np.abs(seen - on).mean())
    assert errors[0] < 2.5 / 255
    assert errors[1] < 0.75 * errors[3]


def test_a_shadow_a_cut_out_and_a_net_of_none_leave_alpha_to_resampling(icon_net):
    _, crisp = drawn_icon(32)
    soft = cv2.GaussianBlur(crisp, (0, 0), 4)
    for alpha, net in ((soft, icon_net), (np.rint(crisp), icon_net), (crisp, LANCZOS)):
        np.testing.assert_array_equal(
            prescale_alpha(alpha, (64, 64), net), enlarge_alpha(alpha, 64, 64)
        )
