"""The work, the time and the memory of an upscale, known before it is done."""

import dataclasses
import json
import os
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_support import put, run
from PIL import Image
from support import photograph

from tegula import UpscaleOptions, Upscaler, __version__, rates
from tegula.expectation import Expectation
from tegula.models.bundle import ControlImage, ControlScale, WindowBatch
from tegula.models.costs import Counter, bundle_cost, prescaler_flops
from tegula.models.prescalers import Prescaler, PrescalerFacts
from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import RRDBNet
from tegula.pipeline.prepare import prepare
from tegula.plan import prescale_tiles
from tegula.progress import STAGES, Reporter
from tegula.rates import Conditions, Rates, expected_seconds
from tests.tiny.networks import tiny_bundle

QUICK = {"prescaler": "lanczos", "steps": 4, "creativity": 0.5, "seed": 3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def picture(width=40, height=30):
    return Image.fromarray((photograph(width, height) * 255).round().astype(np.uint8))


class Peak(Counter):
    """The most bytes that numpy's arrays and torch's tensors take together."""

    all = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.look()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.look()
        return result

    def look(self):
        self.all = max(self.all, self.now + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()


@contextmanager
def peak_within():
    tracemalloc.start()
    with Peak() as peak:
        yield peak
    peak.look()
    tracemalloc.stop()


def test_a_cost_counted_on_tiny_areas_holds_for_a_large_one(bundle):
    cost, pixels = bundle_cost(bundle), 128 * 96
    image = torch.zeros(1, 3, 128, 96)
    control = ControlImage(image, image)
    with torch.no_grad(), Counter() as encoder:
        latents = bundle.autoencoder.encode(image, control, torch.Generator())
    embedded = bundle.denoiser.embed_control(control)
    text, level = bundle.text.encode([""]), torch.tensor(1)
    batch = WindowBatch(latents, level, text, embedded, ControlScale(1.0), slice(0, 1))
    with torch.no_grad(), Counter() as denoiser:
        bundle.denoiser(batch)
    for net, counter in ((cost.encode, encoder), (cost.denoiser, denoiser)):
        assert net.flops.of(pixels) == pytest.approx(counter.flops, rel=1e-6)
    assert cost.encode.memory.of(pixels) == pytest.approx(encoder.peak, rel=0.1)


def test_attention_counts_on_the_cpu_too():
    queries = torch.zeros(1, 1, 10, 8)
    with torch.inference_mode(), Counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)
    assert counter.flops == 2 * 2 * 10 * 10 * 8


def test_real_esrgan_takes_what_its_convolutions_add_up_to():
    prescaler = load_prescaler("realesrgan-animevideov3", torch.device("cpu"), torch.float32)
    kernels = [each for each in prescaler.network.parameters() if each.ndim == 4]
    weights = sum(kernel.numel() for kernel in kernels)
    assert prescaler_flops(prescaler)[4].of(100) == pytest.approx(100 * 2 * weights)


@pytest.mark.parametrize("shape", [{}, {"unshuffle": 2}, {"upsamples": 3}])
def test_what_an_esrgan_takes_is_what_torch_counts(shape):
    network = RRDBNet(blocks=1, features=8, growth=4, **shape).eval()
    facts = PrescalerFacts(
        name="", description="", net="", factor=network.factor, overlap=0, licence=""
    )
    prescaler = Prescaler(facts, network, network, torch.device("cpu"), torch.float32)
    with torch.no_grad(), Counter() as counter:
        network(torch.zeros(1, 3, 16, 16))
    assert prescaler_flops(prescaler)[network.factor].of(256) == pytest.approx(counter.flops)


def test_a_plan_counts_the_context_of_tiles_and_nothing_without_a_net(bundle):
    upscaler = Upscaler(bundle)
    chosen = UpscaleOptions(**QUICK, scale=4)
    plan = upscaler.prepare(picture(), chosen)[2]
    assert (plan.tiles, plan.prescale_flops) == (0, 0)
    net = chosen.replaced(prescaler="realesrgan-animevideov3")
    one, many = (upscaler.prepare(picture(side, 40), net)[2] for side in (600, 1200))
    assert (one.tiles, many.tiles) == (1, 2)
    assert many.prescale_flops > 2 * one.prescale_flops


def test_a_plan_counts_the_head_that_each_pass_runs(bundle):
    prescaler = load_prescaler("tegula-swift", torch.device("cpu"), torch.float32)
    costs = prescaler_flops(prescaler)
    assert costs[4].of(100) - costs[2].of(100) == pytest.approx(100 * 2 * 9 * 64 * (48 - 12))
    tiles = prescale_tiles(prescaler.facts, (100, 80), (800, 640))
    assert [(tile.pixels, tile.factor) for tile in tiles] == [(100 * 80, 2), (200 * 160, 4)]
    upscaler = Upscaler(bundle)
    chosen = UpscaleOptions(**{**QUICK, "prescaler": "tegula-swift"})
    two, four = (upscaler.prepare(picture(), chosen.replaced(scale=s))[2] for s in (2, 4))
    assert two.prescale_flops / four.prescale_flops == pytest.approx(
        costs[2].of(1) / costs[4].of(1)
    )


def test_reused_features_are_planned_as_less_work(bundle):
    upscaler = Upscaler(bundle)
    whole = UpscaleOptions(**{**QUICK, "steps": 12, "creativity": 1.0})
    reused = whole.replaced(feature_reuse=3)
    plans = [upscaler.prepare(picture(), chosen)[2] for chosen in (whole, reused)]
    assert plans[1].evaluations == plans[0].evaluations
    assert 0.3 < plans[1].denoise_flops / plans[0].denoise_flops < 0.9


LINE = [(10.0, 3.0), (20.0, 4.0), (80.0, 10.0)]
"""Two seconds, and a tenth for each piece of work."""


def test_a_stage_takes_a_fixed_part_and_so_much_for_its_work():
    assert expected_seconds(LINE, 1000) == pytest.approx(102)
    assert expected_seconds([*LINE, (40.0, 60.0)], 1000) == pytest.approx(102, rel=0.2)


@pytest.mark.parametrize(
    "runs", [[(10.0, 5.0)], [(10.0, 5.0), (11.0, 5.5)], [(1.0, 9.0), (9.0, 1.0)]]
)
def test_runs_that_tell_no_fixed_part_are_taken_in_proportion(runs):
    ratio = np.median([seconds / work for work, seconds in runs])
    assert expected_seconds(runs, 100) == pytest.approx(100 * ratio)


def test_the_last_runs_of_each_size_are_kept(bundle):
    plans = [
        Upscaler(bundle).prepare(picture(side, side), UpscaleOptions(**QUICK))[2]
        for side in (24, 64)
    ]
    known = Rates()
    for number in range(9):
        known = known.with_run(plans[0], {"finish": float(number)})
    known = known.with_run(plans[1], {"finish": 100.0})
    assert [seconds for _, seconds in known.runs["finish"]] == [4, 5, 6, 7, 8, 100]
    assert set(known.runs) == {"finish"}


def test_a_prescaler_that_never_ran_counts_as_the_slowest_that_did(bundle):
    upscaler = Upscaler(bundle)
    chosen = UpscaleOptions(**{**QUICK, "prescaler": "realesrgan-animevideov3"})
    plan = upscaler.prepare(picture(), chosen)[2]
    known = {stage: [(1e12, 1.0)] for stage in ("prepare", "refine", "finish")}
    assert Rates(known).seconds(plan) is None
    work = plan.prescale_flops
    nets = {"prescale quick": [(work, 1.0)], "prescale slow": [(work, 3.0)]}
    assert Rates({**known, **nets}).seconds(plan)["prescale"] == pytest.approx(3)
    mine = {f"prescale {plan.prescaler}": [(work, 2.0)]}
    assert Rates({**known, **nets, **mine}).seconds(plan)["prescale"] == pytest.approx(2)


CONDITIONS = Conditions("cpu", "float32", 1, "tiny", "abc", "TinyDenoiser", "2.0", "1")
SECONDS = {"prepare": 1.0, "prescale": 2.0, "refine": 3.0, "finish": 4.0}


def test_rates_hold_under_their_conditions_alone(bundle):
    plan = Upscaler(bundle).prepare(picture(), UpscaleOptions(**QUICK))[2]
    assert rates.usual_seconds("tiny") is None
    rates.remember(CONDITIONS, plan, SECONDS, plan)
    assert rates.find(CONDITIONS).seconds(plan) == pytest.approx(SECONDS)
    assert rates.usual_seconds("tiny") == pytest.approx(10)
    assert rates.usual_seconds("other") is None
    other = dataclasses.replace(CONDITIONS, threads=2)
    assert rates.find(other).seconds(plan) is None
    rates.remember(other, plan, {**SECONDS, "refine": 5.0}, plan)
    os.utime(CONDITIONS.file, (1, 1))
    assert rates.usual_seconds("tiny") == pytest.approx(12)
    for broken in ("", "{}", "[]", '{"runs": {"refine": [1]}, "usual": 1}'):
        CONDITIONS.file.write_text(broken)
        assert rates.find(CONDITIONS) == Rates()


def test_what_is_known_of_a_usual_picture_stays_when_a_run_says_nothing_of_it(bundle):
    plan = Upscaler(bundle).prepare(picture(), UpscaleOptions(**QUICK))[2]
    rates.remember(CONDITIONS, plan, SECONDS, plan)
    rates.remember(CONDITIONS, plan, {"finish": 5.0})
    assert rates.usual_seconds("tiny") == pytest.approx(10)


def test_a_cache_folder_that_cannot_be_written_is_no_error(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path / "file" / "cache"))
    upscaler = Upscaler(bundle)
    result = upscaler.upscale(picture(), UpscaleOptions(**QUICK))
    assert upscaler.expectation.known(result.plan) is None
    assert min(upscaler.expectation.measured(result.plan).values()) > 0


def known_stages(upscaler):
    return set(rates.find(rates.conditions_of(upscaler.bundle, __version__)).runs)


def test_an_icon_tells_nothing_of_a_picture_many_times_its_size():
    icon = Rates({"prepare": [(16.0, 1.0)], "prescale": [(64.0, 1.0)], "finish": [(64.0, 1.0)]})
    plan = Upscaler(tiny_bundle()).prepare(picture(), UpscaleOptions(**{**QUICK, "creativity": 0}))[
        2
    ]
    assert icon.seconds(plan) is None


def test_every_upscale_leaves_how_long_it_took(bundle, monkeypatch):
    monkeypatch.setattr("tegula.expectation._USUAL_SIDE", 64)
    upscaler, reported = Upscaler(bundle_without_nets_before(bundle)), []
    options = UpscaleOptions(**QUICK)
    result = upscaler.upscale(picture(), options, on_progress=reported.append)
    assert reported[0].seconds_left is None
    assert upscaler.expectation.known(result.plan) == pytest.approx(result.timings)
    assert rates.usual_seconds("tiny") > sum(result.timings.values())
    reported.clear()
    monkeypatch.setattr("tegula.progress.time", SimpleNamespace(perf_counter=lambda: 0.0))
    Upscaler(bundle).upscale(picture(), options, on_progress=reported.append)
    assert reported[0].fraction == 0
    expected = sum(result.timings.values()) - result.timings["prepare"]
    assert reported[0].seconds_left == pytest.approx(expected, rel=0.05)


def test_what_a_short_measure_found_stands_in_until_the_runs_tell(bundle):
    plan = Upscaler(bundle).prepare(picture(), UpscaleOptions(**QUICK))[2]
    works = rates.work_of(plan)
    rates.remember_measure(CONDITIONS, {name: 2.0 / work for name, work in works.values()})
    assert rates.find(CONDITIONS).seconds(plan) == pytest.approx(dict.fromkeys(STAGES, 2.0))
    rates.remember(CONDITIONS, plan, {"refine": 7.0})
    assert rates.find(CONDITIONS).seconds(plan) == pytest.approx(
        {**dict.fromkeys(STAGES, 2.0), "refine": 7.0}
    )
    assert rates.find(dataclasses.replace(CONDITIONS, version="0")).seconds(plan) is None


def test_long_work_begins_with_a_measure_that_is_made_once(bundle, monkeypatch):
    monkeypatch.setattr("tegula.expectation._LONG_WORK", (0, 0))
    monkeypatch.setattr("tegula.expectation._MEASURED_WORK", (1e8, 1e8))
    upscaler, seen, planned = Upscaler(bundle), [], []
    options = UpscaleOptions(**{**QUICK, "prescaler": "realesrgan-animevideov3"})
    measured = []
    measure = Expectation._measure
    monkeypatch.setattr(
        Expectation, "_measure", lambda *given: measured.append(given[2]) or measure(*given)
    )
    upscaler.upscale(
        picture(), options, on_progress=seen.append, on_plan=lambda *each: planned.append(each)
    )
    names = {"prepare", "prescale realesrgan-animevideov3", "refine", "finish"}
    assert measured == [names]
    assert set(rates.find(rates.conditions_of(bundle, __version__)).measured) >= names
    ((plan, seconds),) = planned
    assert plan.tiles == 1
    assert min(seconds.values()) > 0
    expected = sum(seconds.values()) - seconds["prepare"]
    assert seen[0].seconds_left >= 0.95 * expected  # and what has gone since
    Upscaler(bundle).upscale(picture(), options, on_progress=seen.append)
    assert len(measured) == 1


def test_what_is_no_measure_of_the_machine_is_not_remembered(bundle):
    upscaler, options = Upscaler(bundle), UpscaleOptions(**QUICK)
    list(upscaler.upscale_many([picture()], options))
    assert known_stages(upscaler) == set()
    upscaler.upscale(prepare(picture(), options), options, mask=picture())
    assert known_stages(upscaler) == {"prescale", "finish"}


def bundle_without_nets_before(bundle):
    presets = {
        name: values.replaced(prescaler="lanczos") for name, values in bundle.facts.presets.items()
    }
    return dataclasses.replace(bundle, facts=dataclasses.replace(bundle.facts, presets=presets))


def test_calibrating_runs_two_small_upscales(bundle, monkeypatch):
    upscaler = Upscaler(bundle_without_nets_before(bundle))
    monkeypatch.setattr("tegula.expectation._USUAL_SIDE", 96)
    monkeypatch.setattr(Upscaler, "load", lambda *_, **__: upscaler)
    reported = json.loads(run("doctor", "--calibrate", "--json").stdout)
    assert reported["bundle"] == bundle.facts.name
    assert reported["usual"] == rates.usual_seconds(bundle.facts.name) > 0
    assert {
        len(runs) for runs in rates.find(rates.conditions_of(bundle, __version__)).runs.values()
    } == {2}


def test_time_left_starts_at_what_is_expected_and_learns(monkeypatch):
    monkeypatch.setattr("tegula.progress.time", SimpleNamespace(perf_counter=lambda: 0.0))
    reported = []
    reporter = Reporter(reported.append, {"prescale": 0.5, "refine": 0.5}, expected=100.0)
    report = reporter.stage("prescale").on_unit
    assert reported[0].seconds_left == pytest.approx(100)
    report(1, 2)
    assert reported[-1].seconds_left == pytest.approx(75 * 0.75)
    reporter.finished()
    assert reported[-1].seconds_left == 0


def test_plan_tells_work_and_memory_and_where_times_come_from(tmp_path):
    source = put(tmp_path / "a.png", width=24, height=16)
    words = ("plan", source, "--scale", 3, "--prescaler", "lanczos", "--seed", 1)
    plain = run(*words)
    assert plain.exit_code == 0
    assert "24x16 to 72x48" in plain.stdout
    assert "window" in plain.stdout
    assert "TFLOP" in plain.stdout
    reported = json.loads(run(*words, "--json").stdout)
    assert set(reported["seconds"]) == {*STAGES, "total"}
    assert reported["seconds"]["total"] == pytest.approx(
        sum(reported["seconds"][stage] for stage in STAGES)
    )
    assert f"{reported['seconds']['refine']:.1f} s" in plain.stdout
    assert reported["flops"] == reported["denoise_flops"] + reported["autoencoder_flops"]
    assert reported["memory"]["host"]["refine"] > 0
    assert sorted(tmp_path.iterdir()) == [source, tmp_path / "cache"]


def test_plan_tells_seconds_where_the_model_has_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Rates, "seconds", lambda self, plan: SECONDS)
    source = put(tmp_path / "a.png", width=24, height=16)
    words = ("plan", source, "--prescaler", "lanczos")
    assert json.loads(run(*words, "--json").stdout)["seconds"] == {**SECONDS, "total": 10.0}
    plain = run(*words)
    assert "calibrate" not in plain.stdout
    assert "10.0 s" in plain.stdout
    assert "pictures" not in plain.stdout
    both = run("plan", source, put(tmp_path / "b.png"), "--prescaler", "lanczos", "-o", "out/")
    assert both.stdout.splitlines()[-1] == "2 pictures: about 20 s"


def test_a_tall_picture_takes_a_few_times_its_own_memory():
    upscaler = Upscaler.load(device="cpu", precision="fp32")
    source = Image.fromarray((photograph(32, 1024) * 255).astype(np.uint8))
    chosen = UpscaleOptions(
        scale=4, prescaler="lanczos", window=128, window_batch=1, steps=1, seed=0
    )
    upscaler.upscale(source.crop((0, 0, 16, 16)), chosen)
    expected = upscaler.forecast(source, chosen)[1]
    with peak_within() as peak:
        result = upscaler.upscale(source, chosen).image
    own = result.width * result.height * 12
    assert peak.all < 5.5 * own
    assert max(expected.host.values()) == pytest.approx(peak.all, rel=0.25)


def test_canvases_that_do_not_fit_the_device_are_kept_apart_with_the_same_result(
    bundle, monkeypatch
):
    upscaler, source = Upscaler(bundle), Image.fromarray(np.uint8(photograph(45, 35) * 255))
    chosen = UpscaleOptions(
        scale=2, prescaler="lanczos", window=64, steps=4, seed=0, creativity=0.5, auto=False
    )
    usual = upscaler.upscale(source, chosen).image
    pixels = []

    def home_of(size, device):
        pixels.append(size)
        return torch.device("cpu")

    for module in ("upscaler", "pipeline.sampler"):
        monkeypatch.setattr(f"tegula.{module}.home_of", home_of)
    np.testing.assert_array_equal(upscaler.upscale(source, chosen).image, usual)
    assert len(pixels) == 2
    assert pixels[0] == 3 * 12 * 90 * 70
