"""One picture spread over helpers: what comes out is what one process makes."""

import dataclasses
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from shard_support import HereHelper, shards_of
from support import options, photograph, refine_canvas, refine_redraw

from tegula.errors import CancelledError
from tegula.models import BundleSettings
from tegula.models.bundle import ControlImage
from tegula.models.load import load_bundle
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.nets import Nets
from tegula.pipeline import autoencoder, prescale, shards
from tegula.pipeline.autoencoder import AutoencoderTiling
from tegula.pipeline.refine import RefineJob
from tegula.progress import SILENT, Cancel, StageProgress
from tegula.server.upscaling import NetsOf, RunnerOptions, UpscaleRunner
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

SIZE = (150, 110)
"""Three by two windows of 64 px."""


@pytest.fixture(scope="module")
def bundles():
    """The same weights three times, as three processes have them."""
    return [tiny_bundle() for _ in range(3)]


def refine(bundle, spread=None, progress=SILENT, how=refine_canvas, **changes):
    picture = photograph(*SIZE)
    chosen = options(width=SIZE[0], height=SIZE[1], window_batch=1, **changes)
    return how(RefineJob(bundle, picture, picture, chosen, shards=spread), progress)


@pytest.fixture
def meet(monkeypatch):
    """Let this process begin only when every helper that was called has begun."""

    def together(*helpers):
        take = shards._Board.take

        def patiently(board, who):
            if who == "":
                for helper in helpers:
                    helper.began.wait(10)
            return take(board, who)

        monkeypatch.setattr(shards._Board, "take", patiently)
        return shards_of(*helpers)

    return together


STEPS = [
    {"guidance_scale": 4.0, "prompt": "a red cat", "negative_prompt": "blurry"},
    {"guidance_scale": 4.0, "guidance_end": 0.6, "guess_mode": True, "creativity": 1.0},
    {"feature_reuse": 3, "steps": 6, "creativity": 1.0, "guidance_scale": 3.0},
    {"scheduler": "euler-ancestral", "regions": ("0,0,0.5,1: a dog",), "prompt": "a cat"},
]


@pytest.mark.parametrize("changes", STEPS)
def test_windows_that_two_helpers_evaluate_are_bit_for_bit_those_of_one_process(
    bundles, meet, changes
):
    helpers = [HereHelper(str(number), bundle) for number, bundle in enumerate(bundles[1:])]
    alone = refine(bundles[0], **changes)
    spread = refine(bundles[0], meet(*helpers), **changes)
    assert np.array_equal(spread, alone)
    assert all(helper.ran["WindowTask"] for helper in helpers)


def test_the_packaged_model_too(meet):
    bundle = load_bundle(BundleSettings(precision="fp32"))
    helper = HereHelper("other", bundle)
    picture = photograph(300, 200)
    chosen = options(
        width=300, height=200, window=bundle.facts.window // 2, window_batch=1, scheduler="lcm"
    )
    alone, spread = (
        refine_canvas(RefineJob(bundle, picture, picture, chosen, shards=each))
        for each in (None, meet(helper))
    )
    assert np.array_equal(spread, alone)
    assert helper.ran["WindowTask"]


def test_batches_of_another_size_differ_by_rounding_alone(bundles, meet):
    helper = HereHelper("other", bundles[1])
    alone = refine(bundles[0], guidance_scale=4.0).copy()
    spread = refine(bundles[0], meet(helper), guidance_scale=4.0, how=larger_batches)
    np.testing.assert_allclose(spread, alone, atol=1e-5)
    assert len(helper.tasks[0].latents) == 3


def larger_batches(job, progress):
    job = job.__class__(**{**vars(job), "options": job.options.replaced(window_batch=6)})
    return refine_canvas(job, progress)


def test_redrawn_tiles_are_spread_as_well(bundles, meet):
    tiles = {"tile_width": 64, "tile_height": 64, "tile_padding": 16, "tile_blur": 3}
    helper = HereHelper("other", bundles[1])
    alone = refine(bundles[0], how=refine_redraw, **tiles)
    assert np.array_equal(refine(bundles[0], meet(helper), how=refine_redraw, **tiles), alone)
    assert helper.ran["WindowTask"]


def test_constants_travel_once_and_then_windows_alone(bundles, meet):
    helper = HereHelper("other", bundles[1])
    refine(bundles[0], meet(helper), steps=4, creativity=1.0)
    first, *later = helper.tasks
    assert first.constants is not None
    assert all(task.constants is None for task in later)
    rows = [row for task in helper.tasks for row in task.control]
    assert len(rows) == len(set(rows)) <= 6


def test_what_a_helper_refuses_or_fails_at_is_done_here(bundles, meet):
    def refuse(helper):
        if helper.ran["WindowTask"] in (1, 3):
            helper.ran["refused"] += 1
            helper.ran["WindowTask"] += 1
            helper.nets.kept.clear()  # as a process that began anew would have nothing
            raise RuntimeError("The helper is gone.")

    helper = HereHelper("other", bundles[1], refuse)
    changes = {"guidance_scale": 4.0, "steps": 6, "creativity": 1.0}
    alone = refine(bundles[0], **changes)
    assert np.array_equal(refine(bundles[0], meet(helper), **changes), alone)
    assert helper.ran["refused"] == 2
    assert helper.ran["WindowTask"] > 4  # it comes back at later steps, and gets constants again


def test_a_helper_that_is_silent_is_not_waited_for(bundles, monkeypatch, meet):
    monkeypatch.setattr(shards, "_PATIENCE_S", 0.05)
    ended = threading.Event()

    class Silent(HereHelper):
        def run(self, task, given_up):
            self.began.set()
            while not given_up():
                ended.wait(0.01)
            raise RuntimeError("Nobody waits any more.")

    alone = refine(bundles[0])
    assert np.array_equal(refine(bundles[0], meet(Silent("other", bundles[1]))), alone)


def test_a_cancelled_picture_ends_at_once_and_helpers_are_given_up(bundles, meet):
    cancelled, stopped = threading.Event(), threading.Event()

    class Slow(HereHelper):
        def run(self, task, given_up):
            self.began.set()
            cancelled.set()
            while not given_up():
                stopped.wait(0.01)
            stopped.set()
            raise RuntimeError("Nobody waits any more.")

    progress = StageProgress(cancel=Cancel(cancelled.is_set))
    with pytest.raises(CancelledError):
        refine(bundles[0], meet(Slow("other", bundles[1])), progress)
    assert stopped.is_set()


def test_windows_are_counted_as_they_are_without_helpers(bundles, meet):
    def counted(spread):
        units = []
        refine(bundles[0], spread, StageProgress(lambda done, total: units.append((done, total))))
        return units

    assert counted(meet(HereHelper("other", bundles[1]))) == counted(None)


# Tiles of the prescaler and of the autoencoder.


@pytest.mark.parametrize("scale", [2, 3])
def test_tiles_of_the_prescaler_are_spread(bundles, meet, monkeypatch, scale):
    monkeypatch.setattr(prescale, "DEFAULT_TILE", 1)
    picture = torch.tensor(photograph(110, 24))
    helper = HereHelper("other", bundles[1])
    net = Nets(bundles[0]).prescaler("tegula-swift")
    shares, tiles = [], []
    alone, spread = (
        prescale.prescale(
            picture,
            (110 * scale, 24 * scale),
            net,
            progress=StageProgress(
                lambda done, total: tiles.append((done, total)), on_share=shares.append
            ),
            shards=each,
        )
        for each in (None, meet(helper))
    )
    assert torch.equal(spread, alone)
    assert helper.ran["TileTask"]
    assert tiles[: len(tiles) // 2] == tiles[len(tiles) // 2 :]
    assert shares[-1] == 1


def test_a_helper_runs_the_share_of_tuning_that_was_chosen(bundles, meet, monkeypatch):
    tuned = load_prescaler("tegula-photo", bundles[0].device, bundles[0].dtype)
    seen = []

    class Looking(HereHelper):
        def run(self, task, given_up):
            self.began.set()
            seen.append((task.prescaler, task.tuning))
            raise RuntimeError("It has seen enough.")

    monkeypatch.setattr(prescale, "run_network", lambda rgb, *_: rgb.repeat(4, 4, 1))
    prescale.prescale(
        torch.zeros(8, 8, 3), (32, 32), with_share(tuned, 0.25), shards=meet(Looking("x", None))
    )
    assert seen == [("tegula-photo", 0.25)]


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_tiles_of_the_autoencoder_are_spread_with_the_statistics_of_the_whole(
    bundles, meet, monkeypatch, stage
):
    monkeypatch.setattr(autoencoder, "tiling_of", lambda _: AutoencoderTiling(32, 64))
    image = torch.tensor(photograph(*SIZE).transpose(2, 0, 1)[None, :, :104, :144]).contiguous()
    control, latents = ControlImage(image, image), torch.randn(1, 4, 13, 18)
    helper = HereHelper("other", bundles[1])

    def run(spread):
        if stage == "decode":
            return autoencoder.decode(bundles[0], latents, control, shards=spread)
        generator = torch.Generator().manual_seed(0)
        return autoencoder.encode(bundles[0], image, control, generator, shards=spread)

    alone = run(None)
    assert torch.equal(run(meet(helper)), alone)
    measured = [task.moments is None for task in helper.tasks]
    assert set(measured) == {True, False}


def test_pictures_above_a_size_are_spread_with_the_loras_of_their_prompts():
    seen = []
    spread = shards.Spread(0.01, lambda loras: seen.append(loras) or [])
    assert spread.shards(10_000) is None
    assert spread.shards(10_001, [("a", 0.5)]).width == 1
    assert seen == [(("a", 0.5),)]


def test_an_upscale_spreads_all_of_its_stages(bundles, meet):
    helper = HereHelper("other", bundles[1])
    helper_of = meet(helper)._helpers
    source = np.zeros((40, 90, 3), np.uint8)
    changes = {
        "size": (135, 60),
        "prescaler": "realesrgan-animevideov3",
        "seed": 1,
        "window_batch": 1,
    }
    changes |= {"creativity": 0.3, "window": 64, "auto": False}
    upscaler = Upscaler(bundles[0])
    upscaler.spread = shards.Spread(0.008, lambda _: helper_of())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prescale, "DEFAULT_TILE", 1)
        patch.setattr(autoencoder, "tiling_of", lambda _: AutoencoderTiling(32, 64))
        spread = upscaler.upscale(source, **changes)
        upscaler.spread = None
        alone = upscaler.upscale(source, **changes)
    assert np.array_equal(np.asarray(spread.image), np.asarray(alone.image))
    assert set(helper.ran) == {"TileTask", "WindowTask", "CodingTask"}


def test_a_helper_merges_the_loras_of_prompts_once_and_takes_them_out_again(bundles):
    merged = []

    @contextmanager
    def with_loras(loras):
        merged.append(loras)
        yield ()
        merged.append("out")

    bundle = dataclasses.replace(bundles[0], with_loras=with_loras)

    class Runner(UpscaleRunner):
        def _load(self, name, loras):
            return Upscaler(bundle)

    runner = Runner("cpu", RunnerOptions(BundleSettings(), "", 1 << 20))
    for _ in range(2):
        assert runner.kind(NetsOf("", (), (("a", 0.5),))) == shards.kind_of(bundle)
    assert merged == [(("a", 0.5),)]
    runner.kind(NetsOf("", (), ()))
    assert merged[1:] == ["out"]
