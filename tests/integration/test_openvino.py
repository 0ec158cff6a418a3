"""Denoisers on OpenVINO."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import options, photograph, refine_canvas

from tegula.errors import MissingExtraError, OptionError
from tegula.models.mini.bundle import load_mini
from tegula.models.optimise import optimise_bundle
from tegula.pipeline.refine import RefineJob
from tests.tiny.networks import tiny_bundle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path))
    return tmp_path


def refine(bundle, **changes):
    picture = photograph(100, 64)
    chosen = options(width=100, height=64, window=64, **changes)
    return refine_canvas(RefineJob(bundle, picture, picture, chosen))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"resemblance": 0.7}, {"guidance_scale": 2.0, "guess_mode": True}, {"resemblance": 0.0}],
    ids=["controlled", "guess mode", "uncontrolled"],
)
def test_stable_diffusion_gives_the_same_picture(changes):
    pytest.importorskip("openvino")
    converted = optimise_bundle(tiny_bundle(), "openvino", compiled=False)
    np.testing.assert_allclose(
        refine(converted, **changes), refine(tiny_bundle(), **changes), atol=2e-3
    )


@pytest.mark.slow
def test_mini_gives_the_same_picture_and_what_was_converted_is_kept(cache, monkeypatch):
    openvino = pytest.importorskip("openvino")
    plain = load_mini(CPU, torch.float32)
    expected = refine(plain)
    np.testing.assert_allclose(
        refine(optimise_bundle(plain, "openvino", compiled=False)), expected, atol=2e-3
    )
    assert list((cache / "openvino").glob("*.xml"))
    monkeypatch.setattr(openvino, "convert_model", None)
    again = refine(optimise_bundle(plain, "openvino", compiled=False))
    np.testing.assert_allclose(again, expected, atol=2e-3)


def test_without_the_extra_one_sentence_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"tegula\[openvino\]"):
        optimise_bundle(tiny_bundle(), "openvino", compiled=False)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_what_does_not_go_together_is_refused(backend):
    with pytest.raises(OptionError):
        optimise_bundle(tiny_bundle(), backend, compiled=True)


def test_a_conversion_that_was_interrupted_is_not_taken_for_a_whole_one(cache, monkeypatch):
    def interrupted(model, path, **_):
        Path(path).write_text("<half")
        raise KeyboardInterrupt

    fake = SimpleNamespace(convert_model=lambda *_, **__: None, save_model=interrupted)
    monkeypatch.setitem(sys.modules, "openvino", fake)
    monkeypatch.setattr("tegula.models.openvino.metadata.version", lambda _: "1")
    with pytest.raises(KeyboardInterrupt):
        refine(optimise_bundle(load_mini(CPU, torch.float32), "openvino", compiled=False))
    assert list((cache / "openvino").iterdir()) == []
