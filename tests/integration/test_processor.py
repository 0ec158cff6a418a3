"""Threads and memory layout by measurement."""

import json

import pytest
import torch
from support import options, photograph, refine_canvas

from tegula.errors import OptionError
from tegula.models import device, optimise
from tegula.models.device import ProcessorChoice, choose_fastest, lay_out, processor_choice
from tegula.pipeline.refine import RefineJob
from tests.tiny.networks import tiny_bundle


@pytest.fixture(autouse=True)
def free_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path))
    for name in ("TEGULA_THREADS", "TEGULA_LAYOUT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1), raising=False)


class Probe:
    """Takes a second, but another time for some choices."""

    def __init__(self, **seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, choice):
        self.calls += 1
        name = f"{'last' if choice.channels_last else 'first'}{choice.threads}"
        return self.seconds.get(name, 1.0)


def test_the_clearly_fastest_wins():
    assert choose_fastest((4, 2), (False, True), Probe(last2=0.5)) == ProcessorChoice(2, True)


def test_a_small_gain_is_noise_and_the_usual_is_kept():
    assert choose_fastest((4, 2), (False, True), Probe(last2=0.95)) == ProcessorChoice(4, False)


def test_what_was_measured_is_remembered_on_disk():
    probe = Probe(last4=0.5)
    assert processor_choice(torch.float32, probe) == ProcessorChoice(4, True)
    measured = probe.calls
    assert processor_choice(torch.float32, probe) == ProcessorChoice(4, True)
    assert probe.calls == measured > 0
    processor_choice(torch.bfloat16, probe)
    assert probe.calls == 2 * measured


def test_a_busy_machine_is_not_measured_and_nothing_of_it_is_remembered(monkeypatch):
    probe = Probe(first2=0.5)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (2.1, 0.0, 0.0), raising=False)
    assert processor_choice(torch.float32, probe) == ProcessorChoice(4, False)
    assert probe.calls == 0
    monkeypatch.setattr("os.getloadavg", lambda: (1.9, 9.0, 9.0), raising=False)
    assert processor_choice(torch.float32, probe) == ProcessorChoice(2, False)


@pytest.mark.parametrize("form", ["{", "[1]", '{"a": 1}', '{"a": {"threads": 2}}'])
def test_a_damaged_memory_is_measured_anew(tmp_path, form):
    (tmp_path / "processor.json").write_text(form)
    assert processor_choice(torch.float32, Probe(first2=0.5)) == ProcessorChoice(2, False)


def test_what_is_fixed_is_not_measured(monkeypatch):
    monkeypatch.setenv("TEGULA_THREADS", "3")
    monkeypatch.setenv("TEGULA_LAYOUT", "channels-last")
    probe = Probe()
    assert processor_choice(torch.float32, probe) == ProcessorChoice(3, True)
    assert probe.calls == 0


@pytest.mark.parametrize(("name", "value"), [("TEGULA_THREADS", "0"), ("TEGULA_LAYOUT", "nchw")])
def test_nonsense_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=name):
        processor_choice(torch.float32, Probe())


def test_the_real_probe_takes_a_positive_time():
    assert device._probe_of(torch.float32)(ProcessorChoice(1, True)) > 0


def test_the_layout_changes_no_picture():
    picture, chosen = photograph(100, 64), options(width=100, height=64)
    bundle = tiny_bundle()
    expected = refine_canvas(RefineJob(bundle, picture, picture, chosen))
    for network in (*bundle.denoiser.networks, bundle.autoencoder.decoder):
        lay_out(network, channels_last=True)
    assert abs(refine_canvas(RefineJob(bundle, picture, picture, chosen)) - expected).max() < 1e-4


def test_on_a_gpu_each_part_is_laid_out_as_it_runs_fastest_and_that_is_remembered():
    bundle, measured = tiny_bundle(), []

    def is_last(network):
        weights = max(network.parameters(), key=torch.Tensor.numel)
        return weights.is_contiguous(memory_format=torch.channels_last)

    def seconds(run):
        run()
        layouts = [is_last(bundle.denoiser.unet), is_last(bundle.autoencoder.decoder)]
        measured.append(layouts)
        # The denoiser is measured first, and is quicker with channels last.
        return (1.0 if layouts[0] else 2.0) + (3.0 if layouts[1] else 0.0)

    with torch.inference_mode():
        for _ in range(2):
            optimise._set_layout_on_gpu(bundle, seconds)
            assert is_last(bundle.denoiser.unet)
            assert not is_last(bundle.autoencoder.decoder)
    assert len(measured) == 4


def test_a_reader_sees_the_whole_memory_before_or_after_a_change(tmp_path):
    processor_choice(torch.float32, Probe())
    before = (tmp_path / "processor.json").read_bytes()
    with (tmp_path / "processor.json").open("rb") as reader:
        processor_choice(torch.bfloat16, Probe())
        assert reader.read() == before
    assert len(json.loads((tmp_path / "processor.json").read_bytes())) == 2


def test_what_another_process_measured_meanwhile_is_kept(tmp_path):
    class Slow(Probe):
        def __call__(self, choice):
            other = {"another machine": {"threads": 1, "channels_last": False}}
            (tmp_path / "processor.json").write_text(json.dumps(other))
            return super().__call__(choice)

    processor_choice(torch.float32, Slow())
    assert len(json.loads((tmp_path / "processor.json").read_bytes())) == 2


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path / "file" / "cache"))
    assert processor_choice(torch.float32, Probe(last4=0.5)) == ProcessorChoice(4, True)
