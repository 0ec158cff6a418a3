"""The work, the time and the memory of an upscale, told before it is done."""

import dataclasses
import json
import sys
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from cli_support import put, run
from PIL import Image
from support import options, photograph

from tegula import UpscaleOptions, Upscaler, calibration
from tegula.calibrating import calibrate, started
from tegula.calibration import Calibration, Setting
from tegula.models.bundle import ControlImage, ControlScale, WindowBatch
from tegula.models.costs import Counter, bundle_cost, prescaler_flops
from tegula.models.prescalers.load import load_prescaler
from tegula.pipeline.refine import RefineJob, refine_canvas
from tegula.progress import Reporter
from tests.tiny.networks import tiny_bundle

MEASURED = Calibration(
    prescalers={"lanczos": 1e9, "slow": 1e8},
    denoiser=1e9,
    autoencoder=2e9,
    prepare=1.0,
    prescale=2.0,
    refine=3.0,
    level=0.5,
    finish=4.0,
    write=5.0,
    start=6.0,
    usual=7.0,
)
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
    for net, counter in ((cost.encoder, encoder), (cost.denoiser, denoiser)):
        assert net.flops.of(pixels) == pytest.approx(counter.flops, rel=1e-6)
    assert cost.encoder.memory.of(pixels) == pytest.approx(encoder.peak, rel=0.1)


def test_attention_counts_on_the_cpu_too():
    queries = torch.zeros(1, 1, 10, 8)
    with torch.inference_mode(), Counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)
    assert counter.flops == 2 * 2 * 10 * 10 * 8


def test_real_esrgan_takes_what_its_convolutions_add_up_to():
    prescaler = load_prescaler("realesrgan-animevideov3", torch.device("cpu"), torch.float32)
    kernels = [each for each in prescaler.network.parameters() if each.ndim == 4]
    weights = sum(kernel.numel() for kernel in kernels)
    assert prescaler_flops(prescaler).of(100) == pytest.approx(100 * 2 * weights)


def test_a_plan_counts_the_context_of_tiles_and_nothing_without_a_net(bundle):
    upscaler = Upscaler(bundle)
    asked = UpscaleOptions(**QUICK, scale=4)
    plan = upscaler.prepare(picture(), asked)[2]
    assert (plan.tiles, plan.prescale_flops) == (0, 0)
    net = asked.replaced(prescaler="realesrgan-animevideov3")
    one, many = (upscaler.prepare(picture(side, 40), net)[2] for side in (600, 1200))
    assert (one.tiles, many.tiles) == (1, 2)
    assert many.prescale_flops > 2 * one.prescale_flops


def test_reused_features_are_planned_as_less_work(bundle):
    upscaler = Upscaler(bundle)
    whole = UpscaleOptions(**{**QUICK, "steps": 12, "creativity": 1.0})
    reused = whole.replaced(feature_reuse=3)
    plans = [upscaler.prepare(picture(), asked)[2] for asked in (whole, reused)]
    assert plans[1].evaluations == plans[0].evaluations
    assert 0.3 < plans[1].denoise_flops / plans[0].denoise_flops < 0.9


def test_seconds_follow_from_what_was_measured(bundle):
    plan = Upscaler(bundle).prepare(picture(), UpscaleOptions(**QUICK, scale=2))[2]
    seconds = MEASURED.seconds(plan)
    result = plan.width * plan.height / 1e6
    assert seconds["prepare"] == pytest.approx(40 * 30 / 1e6)
    assert seconds["prescale"] == pytest.approx(2 * result)
    nets = plan.denoise_flops / 1e9 + plan.autoencoder_flops / 2e9
    assert seconds["refine"] == pytest.approx(nets + (3 + plan.steps * 0.5) * result)
    unknown = dataclasses.replace(plan, prescaler="mine.pth", prescale_flops=10**8)
    assert MEASURED.seconds(unknown)["prescale"] == pytest.approx(1 + 2 * result)


def test_a_calibration_holds_for_its_setting_alone(tmp_path):
    setting = Setting("cpu", "float32", 1, "tiny", "abc", "2.0")
    assert calibration.find(setting) is None
    assert calibration.usual_seconds("tiny") is None
    path = calibration.keep(setting, MEASURED)
    assert calibration.find(setting) == MEASURED
    assert calibration.usual_seconds("tiny") == MEASURED.usual
    assert calibration.usual_seconds("other") is None
    assert calibration.find(dataclasses.replace(setting, threads=2)) is None
    path.write_text("{}")
    assert calibration.find(setting) is None


def test_calibrating_measures_every_part(bundle):
    upscaler = Upscaler(bundle_without_nets_before(bundle))
    measured = calibrate(upscaler)
    assert measured.denoiser > 0
    assert measured.autoencoder > 0
    pause = [sys.executable, "-c", "import time; time.sleep(1)"]
    quick = dataclasses.replace(measured, denoiser=1e18, autoencoder=1e18, refine=0, level=0)
    assert started(upscaler, quick, lambda source, target: pause).start > 0.5
    for stage in ("prepare", "prescale", "finish", "write", "usual"):
        assert getattr(measured, stage) > 0


def bundle_without_nets_before(bundle):
    presets = {
        name: values.replaced(prescaler="lanczos") for name, values in bundle.facts.presets.items()
    }
    return dataclasses.replace(bundle, facts=dataclasses.replace(bundle.facts, presets=presets))


def test_time_left_starts_at_what_is_expected_and_learns():
    told = []
    reporter = Reporter(told.append, {"prescale": 0.5, "refine": 0.5}, expected=100.0)
    report = reporter.units("prescale")
    assert told[0].seconds_left == pytest.approx(100, abs=1)
    report(1, 2)
    assert told[-1].seconds_left == pytest.approx(75 * 0.75, abs=1)
    reporter.finished()
    assert told[-1].seconds_left == 0


def test_plan_tells_work_and_memory_and_where_times_come_from(tmp_path):
    source = put(tmp_path / "a.png", width=24, height=16)
    words = ("plan", source, "--scale", 3, "--prescaler", "lanczos", "--seed", 1)
    plain = run(*words)
    assert plain.exit_code == 0
    assert "24x16 to 72x48" in plain.stdout
    assert "window" in plain.stdout
    assert "TFLOP" in plain.stdout
    assert "tegula doctor --calibrate" in plain.stdout
    told = json.loads(run(*words, "--json").stdout)
    assert told["seconds"] is None
    assert told["flops"] == told["denoise_flops"] + told["autoencoder_flops"]
    assert told["memory"]["host"]["refine"] > 0
    assert sorted(tmp_path.iterdir()) == [source]


def test_plan_tells_seconds_where_the_machine_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "find", lambda setting: MEASURED)
    source = put(tmp_path / "a.png", width=24, height=16)
    words = ("plan", source, "--prescaler", "lanczos")
    seconds = json.loads(run(*words, "--json").stdout)["seconds"]
    assert seconds["total"] == pytest.approx(sum(list(seconds.values())[:-1]))
    assert seconds["start"] == MEASURED.start
    plain = run(*words)
    assert "calibrate" not in plain.stdout
    assert f"{seconds['total']:.1f} s" in plain.stdout


def test_a_tall_picture_takes_a_few_times_its_own_memory():
    upscaler = Upscaler.load(device="cpu", precision="fp32")
    source = Image.fromarray((photograph(32, 1024) * 255).astype(np.uint8))
    asked = UpscaleOptions(
        scale=4, prescaler="lanczos", window=128, window_batch=1, steps=1, seed=0
    )
    upscaler.upscale(source.crop((0, 0, 16, 16)), asked)
    expected = upscaler.forecast(source, asked)[1]
    with peak_within() as peak:
        result = upscaler.upscale(source, asked).image
    own = result.width * result.height * 12
    assert peak.all < 5.5 * own
    assert max(expected.host.values()) == pytest.approx(peak.all, rel=0.25)


def test_canvases_that_do_not_fit_the_device_are_kept_apart_with_the_same_result(
    bundle, monkeypatch
):
    settings = options(width=90, height=70, steps=4)
    source = photograph(90, 70)
    usual = refine_canvas(RefineJob(bundle, source, source, settings))
    asked = []

    def home_of(size, device):
        asked.append(size)
        return torch.device("cpu")

    monkeypatch.setattr("tegula.pipeline.refine.home_of", home_of)
    np.testing.assert_array_equal(refine_canvas(RefineJob(bundle, source, source, settings)), usual)
    assert len(asked) == 2
    assert asked[0] >= 3 * 12 * 90 * 70
