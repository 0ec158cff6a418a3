"""Every model of the catalogue, from its inputs to the bytes of its output."""

import gc
import io
import json
import weakref

import cli_support
import numpy as np
import pytest
import torch
from colour_profiles import grey, wide_rgb
from PIL import Image
from support import photograph

from tegula.catalog import InvalidInputsError, find, run, validate
from tegula.errors import CancelledError, ImageError, TooLargeError
from tegula.expectation import Expectation
from tegula.images.decode import decode, reopened
from tegula.images.encode import encode, read_settings
from tegula.images.open import opened_file
from tegula.models.prescalers import Prescaler, list_prescalers
from tegula.options import UpscaleOptions
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

QUICK = {
    "tegula/upscale": (2, "png"),
    "fewjative/ultimate-sd-upscale": (2, "png"),
    "juergengunz/ultimate-portrait-upscale": (2, "png"),
    "philz1337x/clarity-upscaler": (2, "png"),
    "nightmareai/real-esrgan": (4, "png"),
}
TILE = "batouresearch/high-resolution-controlnet-tile"


@pytest.fixture(scope="module")
def tiny():
    """Random networks; of the prescalers the two large ones repeat pixels.

    Tests with the packaged bundle run the same models with the prescalers themselves.
    """
    upscaler = Upscaler(tiny_bundle())
    repeat = torch.nn.Upsample(scale_factor=4)
    for facts in list_prescalers():
        if facts.name in ("tegula-photo", "realesrgan-x4plus"):
            upscaler.nets.prescalers[facts.name] = Prescaler(
                facts, repeat, repeat, torch.device("cpu"), torch.float32
            )
    return upscaler


@pytest.fixture(scope="module")
def packaged():
    return Upscaler.load("mini", device="cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "small.png"
    Image.fromarray(np.uint8(photograph(48, 32) * 255)).save(path)
    return path


@pytest.fixture(scope="module")
def cat(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    Image.fromarray(np.uint8(photograph(96, 64, "chelsea") * 255)).save(path)
    return path


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """As large as the result, so that no net enlarges it: that takes minutes at this size."""
    path = tmp_path_factory.mktemp("pictures") / "square.jpg"
    Image.fromarray(np.uint8(photograph(512, 512) * 255)).resize((2048, 2048)).save(path)
    return path


def ran(upscaler, reference, picture, **inputs):
    version = find(reference)
    log = []
    outputs = list(
        run(
            version,
            validate(version, {version.image: picture, **inputs}),
            lambda loras: upscaler,
            on_log=log.append,
        )
    )
    (output,) = outputs
    return Image.open(io.BytesIO(output.data)), output, log


@pytest.mark.parametrize("reference", QUICK)
def test_a_model_runs_with_its_own_defaults(tiny, picture, reference):
    scale, file_format = QUICK[reference]
    image, output, _ = ran(tiny, reference, picture)
    assert image.size == (48 * scale, 32 * scale) == (output.width, output.height)
    assert output.name == f"out-0.{file_format}"
    assert output.settings["version"]


@pytest.fixture(scope="module")
def plain(packaged, cat):
    """The picture of a cat without refinement, by the factor it is enlarged by."""
    scales = {scale for scale, _ in QUICK.values()}
    return {s: ran(packaged, "nightmareai/real-esrgan", cat, scale=s)[0] for s in scales}


@pytest.mark.slow
@pytest.mark.parametrize("reference", QUICK)
def test_a_model_runs_with_its_own_defaults_on_the_packaged_bundle(packaged, cat, plain, reference):
    image, _, _ = ran(packaged, reference, cat, seed=3)
    pictures = image, plain[QUICK[reference][0]]
    one, other = (np.asarray(each.convert("RGB"), float).ravel() for each in pictures)
    assert np.corrcoef(one, other)[0, 1] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("label", "form"), [("1", "PNG"), ("2", "JPEG")])
def test_the_tile_model_runs_at_its_smallest_size(packaged, square, label, form):
    # Guidance, which tests of smaller pictures have, would run every window twice.
    smallest = {"resolution": 2048, "steps": 2, "guidance_scale": 1}
    image, _, log = ran(packaged, f"{TILE}:{label}", square, **smallest)
    assert image.size == (2048, 2048)
    assert image.format == form
    assert any("LoRA" in sentence for sentence in log) == (label == "2")


def test_clarity_keeps_what_is_white_in_its_mask(tiny, picture, tmp_path):
    mask = Image.new("L", (48, 32), 0)
    mask.paste(255, (0, 0, 24, 32))
    mask.save(tmp_path / "mask.png")
    reference = "philz1337x/clarity-upscaler"
    plain, _, _ = ran(tiny, reference, picture, creativity=0)
    masked, _, _ = ran(tiny, reference, picture, mask=tmp_path / "mask.png", creativity=0.6)
    difference = np.abs(np.asarray(masked, float) - np.asarray(plain, float))
    assert difference[:, :40].max() == 0
    assert difference[:, 60:].max() > 10


@pytest.mark.parametrize("seamless", [False, True])
def test_a_strength_map_says_how_much_may_change_where(tiny, picture, seamless, tmp_path):
    still = Image.new("L", (48, 32), 0)
    still.paste(255, (36, 0, 48, 32))
    still.save(tmp_path / "map.png")
    inputs = {"scale": 1, "seed": 1, "seamless": seamless}
    plain, _, _ = ran(tiny, "tegula/upscale", picture, creativity=0, **inputs)
    mapped, _, _ = ran(
        tiny, "tegula/upscale", picture, strength_map=tmp_path / "map.png", creativity=0.9, **inputs
    )
    difference = np.abs(np.asarray(mapped, float) - np.asarray(plain, float)).mean(axis=(0, 2))
    assert difference[40:].mean() > 2 * difference[8:24].mean()


def test_regions_are_lines_of_text_and_are_in_the_settings(tiny, picture):
    lines = "0,0,24,32:a cat\n0.5,0,0.5,1:a dog: brown\n"
    _, output, _ = ran(tiny, "tegula/upscale", picture, scale=1, creativity=0.3, regions=lines)
    assert [region["prompt"] for region in output.settings["regions"]] == ["a cat", "a dog: brown"]
    with pytest.raises(InvalidInputsError, match="a region is x,y,width,height:prompt"):
        validate(find("tegula/upscale"), {"image": "photo.jpg", "regions": "a cat"})


def test_the_largest_seed_is_kept_exactly_in_the_file_and_runs_in_every_pass(tiny, picture):
    _, output, _ = ran(tiny, "tegula/upscale", picture, seed=2**63 - 1, creativity=0.2)
    assert output.settings["seed"] == read_settings(output.data)["seed"] == 2**63 - 1
    inputs = {"scale_factor": 4, "seed": 2**63 - 1, "creativity": 0.2, "num_inference_steps": 5}
    _, output, _ = ran(tiny, "philz1337x/clarity-upscaler", picture, **inputs)
    assert output.settings["seed"] == 0


def test_clarity_refines_in_passes_and_reports_one_progress(tiny, picture, monkeypatch):
    version = find("philz1337x/clarity-upscaler")
    reports, logged = [], []
    expected = dict.fromkeys(("prepare", "prescale", "refine", "finish"), 3.0)
    monkeypatch.setattr(Expectation, "known", lambda *_: expected)
    (output,) = run(
        version,
        validate(version, {"image": str(picture), "scale_factor": 4, "output_format": "webp"}),
        lambda loras: tiny,
        on_progress=reports.append,
        on_log=logged.append,
    )
    fractions = [progress.fraction for progress in reports]
    # The second pass is four times the first.
    (first,) = {each.fraction for each in reports if each.done and each.stage == "finish"} - {1}
    assert first == pytest.approx(0.2)
    assert 44 < reports[0].seconds_left < 90  # five times nine, and what preparing took
    assert logged.count("Expected to take about 60 s.") == 1
    assert (output.width, output.height) == (192, 128)
    assert output.media_type == "image/webp"
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_no_result_is_kept_while_the_next_pass_runs(tiny, picture):
    results, alive = [], []

    class Watched:
        bundle = tiny.bundle

        def upscale(self, *arguments, **settings):
            gc.collect()
            alive.append(sum(result() is not None for result in results))
            result = tiny.upscale(*arguments, **settings)
            results.append(weakref.ref(result))
            return result

    ran(Watched(), "philz1337x/clarity-upscaler", picture, scale_factor=4, num_inference_steps=2)
    assert alive == [0, 0]


@pytest.mark.parametrize(
    ("reference", "inputs"),
    [
        ("nightmareai/real-esrgan", {"scale": 2}),
        ("philz1337x/clarity-upscaler", {"scale_factor": 4, "creativity": 0}),
        ("tegula/upscale", {"seamless": True, "creativity": 0}),
    ],
)
def test_a_source_is_decoded_once(tiny, picture, monkeypatch, reference, inputs):
    decoded = []

    def counting(source, max_pixels):
        decoded.append(source)
        return opened_file(source, max_pixels)

    for module in ("open", "decode"):
        monkeypatch.setattr(f"tegula.images.{module}.opened_file", counting)
    ran(tiny, reference, picture, **inputs)
    assert decoded == [picture]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_a_pass_reads_what_the_file_of_the_pass_before_would_hold(tiny, tmp_path, mode):
    path = tmp_path / "source.png"
    exif = Image.Exif()
    exif[0x013B] = "Ana"
    source = Image.fromarray(np.uint8(photograph(24, 16) * 255)).convert(mode)
    profile = wide_rgb() if mode.startswith("RGB") else grey(1.8)
    source.save(path, icc_profile=profile, exif=exif)
    result = tiny.upscale(path, UpscaleOptions(prescaler="lanczos", creativity=0))
    through_file = decode(encode(result.image, metadata=result.metadata).data, max_pixels=10**6)
    handed_on = reopened(result.image, result.deep, result.metadata)
    np.testing.assert_array_equal(handed_on.rgb, through_file.rgb)
    if mode.endswith("A"):
        np.testing.assert_array_equal(handed_on.alpha, through_file.alpha)
    assert handed_on.facts.metadata == result.metadata
    assert handed_on.facts.metadata.profile == through_file.facts.metadata.profile == profile
    assert handed_on.facts.greyscale == through_file.facts.greyscale


def test_a_seamless_pattern_keeps_its_size(tiny, picture):
    image, _, _ = ran(tiny, "tegula/upscale", picture, seamless=True, scale=2)
    assert image.size == (96, 64)


def test_the_log_tells_what_was_ignored(tiny, picture):
    _, _, log = ran(tiny, "fewjative/ultimate-sd-upscale", picture, tiles=9)
    assert any("tiles" in sentence for sentence in log)
    assert any("4x-UltraSharp" in sentence for sentence in log)


def test_limits_of_the_caller_hold(tiny, picture):
    version = find("nightmareai/real-esrgan")
    inputs = validate(version, {"image": str(picture)})
    with pytest.raises(TooLargeError):
        list(run(version, inputs, lambda loras: tiny, max_pixels=2000))


def test_what_is_no_picture_is_refused(tiny):
    version = find("tegula/upscale")
    inputs = validate(version, {"image": b"no picture"})
    with pytest.raises(ImageError):
        list(run(version, inputs, lambda loras: tiny))


def test_a_cancel_stops_the_run(tiny, picture):
    version = find("tegula/upscale")
    inputs = validate(version, {"image": str(picture)})
    with pytest.raises(CancelledError):
        list(run(version, inputs, lambda loras: tiny, cancelled=lambda: True))


def invoke(*words):
    return cli_support.run("run", *words)


def test_the_command_line_writes_into_the_folder_that_it_is_given(picture, tmp_path):
    folder = tmp_path / "new"
    done = invoke("tegula/upscale", f"image=@{picture}", "preset=fast", "-o", folder, "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["output"] == str(folder / "small-upscale-0.png")
    assert Image.open(printed["output"]).size == (96, 64)


def test_the_command_line_replaces_no_picture_of_an_earlier_run(picture, tmp_path):
    kept = tmp_path / "small-upscale-0.png"
    kept.write_bytes(b"earlier")
    inputs = [f"image=@{picture}", "creativity=0", "scale=1"]
    done = invoke("tegula/upscale", *inputs, "-o", tmp_path, "--json")
    assert json.loads(done.stdout)["output"] == str(tmp_path / "small-upscale-1.png")
    assert kept.read_bytes() == b"earlier"


def test_the_command_line_lists_models_and_inputs():
    assert "philz1337x/clarity-upscaler" in invoke().output
    listed = invoke("fewjative/ultimate-sd-upscale").output
    assert "seam_fix_padding" in listed
    assert find("fewjative/ultimate-sd-upscale").id in listed
    defaults = {line.split()[0]: line for line in listed.splitlines()[2:]}
    assert defaults["negative_prompt"].endswith("[optional]")
    assert defaults["use_controlnet_tile"].endswith("[default: true]")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nobody/nothing", "image=@a.png"], "no model"),
        (["tegula/upscale", "image"], "name=value"),
        (["tegula/upscale", "image=@a.png", "image=@b.png"], "twice"),
        (["tegula/upscale", "scale=9", "creativity=2"], "input.creativity"),
        (["tegula/upscale", "image=@missing.png"], "missing.png"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(words, reason, tmp_path):
    done = invoke(*words, "-o", tmp_path)
    assert done.exit_code != 0
    assert reason in done.output
    assert not list(tmp_path.iterdir())
