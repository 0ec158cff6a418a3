"""Pictures as tensors: what numpy made of them, also where Pillow and OpenCV do not reach."""

import contextlib
import gc
import types
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from fake_card import CARD, OnCard, card
from support import finish_arrays, of_arrays

from tegula import upscaler as whole
from tegula.models.device import constant
from tegula.models.prescalers import WEIGHTS, Prescaler, PrescalerFacts, find_packaged
from tegula.models.prescalers.load import load_prescaler, read_own, two_heads
from tegula.options import UpscaleOptions
from tegula.pipeline import adjust, exact, pictures, prepare, prescale
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

HOST = torch.device("cpu")


@contextlib.contextmanager
def fused_at(pixels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adjust, "_LARGEST_FUSED", pixels)
        yield


def as_taught():
    """tegula-swift with the heads that its file holds: what it runs was trained on."""
    swift = load_prescaler("tegula-swift", HOST, torch.float32)
    entry, (tensors, _) = find_packaged("tegula-swift"), read_own("tegula-swift", WEIGHTS)
    assert entry is not None
    assert swift.smaller is not None
    four, two = (
        head.eval().requires_grad_(requires_grad=False) for head in two_heads(entry, tensors)
    )
    smaller = replace(swift.smaller, network=two, full_precision=two)
    return replace(swift, network=four, full_precision=four, smaller=smaller)


@pytest.fixture(params=["on the host", "by torch"])
def functions(request, monkeypatch):
    if request.param == "by torch":
        for module in (pictures, adjust):
            monkeypatch.setattr(module, "lies_on_host", lambda _: False)
    found = types.SimpleNamespace(
        prepare=lambda source: prepare.prepare(source, UpscaleOptions()),
        finish=finish_arrays,
        net=as_taught(),
        fused_at=fused_at,
    )
    for module in (pictures, adjust, exact, prescale):
        for name, each in vars(module).items():
            if isinstance(each, types.FunctionType) and not name.startswith("_"):
                setattr(found, name, of_arrays(each))
    found.read_mask = of_arrays(prepare.read_mask)
    return found


def test_pictures_become_what_numpy_and_opencv_made_of_them(functions):
    seen, every = set(), golden.EVERY
    with np.load(golden.GOLDEN) as kept:
        for name, result in golden.results(functions):
            expected = kept[name]
            assert result.dtype == expected.dtype
            found = result[::every, ::every] if result.ndim > 1 else result
            off = np.abs(found.astype(np.float64) - expected).max()
            # Weights of fused exposures are near zero in places, where rounding decides.
            near = {"fused": 1e-3, "consistency": 1e-4}.get(name.split(",")[0].split()[0], 1e-5)
            assert off <= (near if expected.dtype == np.float32 else 1), name
            seen.add(name)
        assert seen == set(kept.files)


class Nearest(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")


def darken(job, _):
    return 0.9 * job.prescaled


@cache
def tiny_upscaler():
    return Upscaler(tiny_bundle())


def upscaled(device, monkeypatch, source, changes, mask=None, refine=None):
    """Upscale where refine only darkens; it has tests of its own."""
    facts = PrescalerFacts(name="nearest", description="", net="", factor=2, overlap=4, licence="")
    net = Prescaler(facts, Nearest(), Nearest(), device, torch.float32)
    upscaler = tiny_upscaler()
    monkeypatch.setattr(upscaler.nets, "prescaler", lambda *_: net)
    monkeypatch.setitem(vars(whole)["_REFINE"], "canvas", refine or darken)
    monkeypatch.setattr(whole, "home_of", lambda *_: device)
    options = UpscaleOptions(scale=3, seed=1, auto=False, likeness=0.0, sharpen=0.2, **changes)
    return upscaler.upscale(source, options, mask=mask)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("plain", {"colour_lock": "wavelet", "detail": 0.3, "hold_drawings": True}),
        ("plain", {"colour_lock": "adain", "keep_grey": True, "flat_skip": 0.5}),
        ("alpha", {"exact": True, "creativity": 0.0}),
        ("deep", {"colour_lock": "wavelet"}),
    ],
)
@torch.inference_mode()
def test_a_picture_goes_to_the_card_once_and_comes_back_as_its_samples(monkeypatch, kind, changes):
    levels = np.rint(golden.picture(96, 80) * 255).astype(np.uint8)
    source = {
        "plain": levels,
        "alpha": np.dstack([levels, np.rint(golden.disc(96, 80, 1.5) * 255).astype(np.uint8)]),
        "deep": levels.astype(np.uint16) * 257,
    }[kind]
    expected = upscaled(HOST, monkeypatch, source, changes)
    with card() as traffic:
        found = upscaled(CARD, monkeypatch, source, changes)
    off = np.asarray(found.image).astype(int) - np.asarray(expected.image)
    assert np.abs(off).max() <= 1
    sides, alpha = ((96, 80), (288, 240)), kind == "alpha"
    there, back = (
        [shape for shape in shapes if shape[:2] in sides]
        for shapes in (traffic.there, traffic.back)
    )
    assert there == [(96, 80, 3)] + [(96, 80)] * alpha
    assert back == [(288, 240, 3)] + [(288, 240, 1)] * alpha


@pytest.mark.parametrize("stage", ["canvas", "finish"])
def test_an_upscale_that_fails_half_way_leaves_nothing_on_the_card(monkeypatch, stage):
    on_card, create = [], OnCard.__init__

    def counted(tensor, host):
        create(tensor, host)
        on_card.append(weakref.ref(tensor))

    def fail(*_):
        assert any(each() is not None for each in on_card)
        raise ValueError("broken")

    monkeypatch.setattr(OnCard, "__init__", counted)
    levels = np.rint(golden.picture(96, 80) * 255).astype(np.uint8)
    if stage == "finish":
        monkeypatch.setattr(whole, "finish", fail)
    refine = fail if stage == "canvas" else None
    with torch.inference_mode(), card(), pytest.raises(ValueError, match="broken") as broken:
        upscaled(CARD, monkeypatch, levels, {"colour_lock": "adain"}, refine=refine)
    del broken  # its traceback has the frames
    constant.cache_clear()
    gc.collect()
    assert not [each for each in on_card if each() is not None]


def test_pictures_leave_the_device_by_one_function():
    """Of what prescale, finish and what they use do; nets have ways of their own."""
    folder = Path(pictures.__file__).parent
    for name in ("prescale", "finish", "adjust", "exact", "prepare", "preview", "likeness"):
        assert ".cpu()" not in (folder / f"{name}.py").read_text(encoding="utf-8"), name
