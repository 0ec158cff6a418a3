"""The whole way of a picture, on the tiny bundle and without a net before it."""

import dataclasses
import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from colour_profiles import wide_rgb
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from support import of_arrays, photograph

from tegula import UpscaleOptions, Upscaler
from tegula.errors import CancelledError, ImageError, OptionError, PathError, TooLargeError
from tegula.images.encode import read_settings
from tegula.images.sharpness import undo_blur
from tegula.models.prescalers import Prescaler, list_prescalers
from tegula.pipeline.choices import CLEAN_SHARE, UNSEEN_SHARE
from tegula.pipeline.pictures import enlarge_lanczos
from tegula.pipeline.prescale import prescale
from tegula.pipeline.schedulers import NoiseSchedule
from tegula.progress import STAGES
from tests.tiny.networks import tiny_bundle

GOLDEN = Path(__file__).parents[1] / "data" / "golden-tiny.png"
QUICK = {"prescaler": "lanczos", "steps": 4, "creativity": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


@pytest.fixture(scope="module")
def upscaler(bundle):
    return Upscaler(bundle)


def picture(width=40, height=30):
    return Image.fromarray((photograph(width, height) * 255).round().astype(np.uint8))


def quick_options(**changes):
    return UpscaleOptions(**(QUICK | changes))


def test_creativity_zero_is_prescale_and_finish_alone(upscaler):
    source = picture()
    result = upscaler.upscale(source, quick_options(creativity=0.0))
    expected = of_arrays(enlarge_lanczos)(np.asarray(source, np.float32) / 255, (80, 60))
    np.testing.assert_allclose(np.asarray(result.image) / 255, expected, atol=0.51 / 255)
    assert result.plan.evaluations == 0


@pytest.mark.parametrize(
    ("size", "change", "expected"),
    [
        ((40, 30), {"scale": 2}, (80, 60)),
        ((41, 29), {"scale": 1.5}, (round(41 * 1.5), round(29 * 1.5))),
        ((1, 1), {"scale": 8}, (8, 8)),
        ((3, 50), {"scale": 3}, (9, 150)),
        ((40, 30), {"resolution": 45}, (60, 45)),
        ((40, 30), {"size": (33, 77)}, (33, 77)),
        ((40, 30), {"scale": 0.5}, (20, 15)),
        ((40, 30), {"scale": 4, "crop": (10, 5, 7, 9)}, (28, 36)),
        ((40, 30), {"resolution": 60, "crop": (10, 5, 7, 9)}, (14, 18)),
    ],
)
def test_the_result_has_exactly_the_size_asked_for(upscaler, size, change, expected):
    result = upscaler.upscale(picture(*size), quick_options(**change))
    assert result.image.size == expected
    assert (result.options.width, result.options.height) == expected


def test_the_result_tells_how_to_get_it_again(upscaler):
    first = upscaler.upscale(picture(), quick_options(seed=None))
    again = upscaler.upscale(picture(), quick_options(seed=first.seed))
    assert np.array_equal(first.image, again.image)
    assert first.settings["seed"] == first.seed
    assert first.settings["bundle"] == "tiny"
    assert set(first.timings) == set(STAGES)


def test_options_left_open_are_filled_from_the_preset(upscaler):
    result = upscaler.upscale(picture(8, 8), UpscaleOptions(prescaler="lanczos", preset="fast"))
    fast = upscaler.bundle.facts.presets["fast"]
    for name, value in fast:
        if name != "prescaler":
            assert getattr(result.options, name) == value


def test_progress_walks_forward_through_the_stages_to_the_end(upscaler):
    seen = []
    upscaler.upscale(picture(), quick_options(), on_progress=seen.append)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    stages = [STAGES.index(progress.stage) for progress in seen]
    assert stages == sorted(stages)
    assert seen[-2].done == seen[-2].total
    assert all(progress.seconds_left >= 0 for progress in seen if progress.fraction > 0)


def test_the_plan_counts_the_evaluations_that_are_run(upscaler):
    rows = []

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def embed_control(self, control):
            return self.inner.embed_control(control)

        def __call__(self, batch):
            rows.append(len(batch.latents))
            return self.inner(batch)

        def to_dtype(self, dtype):
            return self.inner.to_dtype(dtype)

    for change in (
        {"guidance_scale": 1.0},
        {"guidance_scale": 5.0},
        {"guidance_scale": 5.0, "guidance_end": 0.5},
        {"scheduler": "heun"},
        {"scheduler": "lcm"},
    ):
        planned = upscaler.prepare(picture(), quick_options(**change))[2]
        rows.clear()
        counting = dataclasses.replace(upscaler.bundle, denoiser=Counting(upscaler.bundle.denoiser))
        Upscaler(counting).upscale(picture(), quick_options(**change))
        assert sum(rows) == planned.evaluations, change
        assert planned.denoise_flops > 0


@pytest.mark.parametrize("calls", [0, 1, 3, 6])
def test_cancel_stops_wherever_the_work_is(upscaler, calls):
    answers = iter([False] * calls)
    with pytest.raises(CancelledError):
        upscaler.upscale(picture(), quick_options(), cancelled=lambda: next(answers, True))


class Reddening(torch.nn.Module):
    """A prescaler's net that doubles the size and lifts red by a tenth of the range."""

    def forward(self, picture):
        larger = torch.nn.functional.interpolate(picture, scale_factor=2, mode="bilinear")
        return larger + torch.tensor([0.1, 0.0, 0.0])[None, :, None, None]


@pytest.mark.parametrize(("lock", "drift"), [("wavelet", 0.0), ("adain", 0.0), ("none", 0.1)])
def test_a_prescaler_that_drifts_in_tone_is_held_to_the_source(bundle, lock, drift):
    facts = dataclasses.replace(list_prescalers()[0], factor=2, overlap=4)
    drifting = Prescaler(
        facts=facts,
        network=Reddening(),
        full_precision=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    upscaler = Upscaler(bundle)
    upscaler.nets.prescalers["lanczos"] = drifting
    source = Image.fromarray((photograph(64, 48) * 200).astype(np.uint8))
    result = upscaler.upscale(source, quick_options(creativity=0.0, colour_lock=lock))
    red = np.asarray(result.image)[..., 0].mean() - np.asarray(source)[..., 0].mean()
    assert red / 255 == pytest.approx(drift, abs=0.01)


def test_what_an_exact_result_cannot_follow_is_said(upscaler):
    source = Image.fromarray((photograph(32, 32) * 255).astype(np.uint8))
    mask = Image.new("L", (32, 32), 255)
    warnings = upscaler.upscale(source, preset="exact", hdr=0.5, mask=mask).warnings
    assert any("hdr has no effect" in each for each in warnings)
    assert any("mask and strength_map have no effect" in each for each in warnings)


def test_alpha_is_kept_and_scaled(upscaler):
    source = picture()
    source.putalpha(Image.linear_gradient("L").resize(source.size))
    result = upscaler.upscale(source, quick_options())
    assert result.image.mode == "RGBA"
    alpha = np.asarray(result.image)[..., 3].astype(int)
    assert alpha[0].max() < 30 < 220 < alpha[-1].min()


def test_greyscale_comes_back_as_greyscale(upscaler):
    assert upscaler.upscale(picture().convert("L"), quick_options()).image.mode == "L"


def test_too_large_a_result_is_refused_before_the_work(upscaler):
    with pytest.raises(TooLargeError, match="320x240"):
        upscaler.upscale(picture(), quick_options(scale=8, max_pixels=10_000))


def test_a_crop_outside_the_picture_is_refused(upscaler):
    with pytest.raises(OptionError, match="40x30"):
        upscaler.upscale(picture(), quick_options(crop=(30, 0, 20, 20)))


def test_what_is_no_image_is_refused(upscaler):
    with pytest.raises(ImageError):
        upscaler.upscale(b"not an image", quick_options())


def test_the_pipeline_still_makes_the_stored_picture(upscaler):
    result = upscaler.upscale(picture(48, 48), quick_options(guidance_scale=3.0, prompt="red cat"))
    stored = np.asarray(Image.open(GOLDEN)).astype(int)
    made = np.asarray(result.image).astype(int)
    assert made.shape == stored.shape
    assert np.abs(made - stored).max() <= 2


def test_a_crop_has_the_noise_that_its_place_has_in_the_whole(upscaler, monkeypatch):
    noises = []
    noised = NoiseSchedule.noised

    def seen(schedule, clean, noise, step):
        noises.append(noise)
        return noised(schedule, clean, noise, step)

    monkeypatch.setattr(NoiseSchedule, "noised", seen)
    source = picture(160, 120)
    # Strength by place, which faces get, draws the noise at more than one step.
    upscaler.upscale(source, quick_options(window=64, likeness=0.0))
    trial = upscaler.upscale(source, quick_options(window=64, likeness=0.0, crop=(101, 71, 20, 16)))
    whole, crop = noises
    # 32 source pixels before the crop is 69 and 39; the nearest lines of the grid are 64 and 32.
    factor = upscaler.bundle.facts.latent_factor
    left, top = 64 * 2 // factor, 32 * 2 // factor
    there = whole[..., top : top + crop.shape[-2], left : left + crop.shape[-1]]
    assert there.shape[-1] > 100 // factor
    assert torch.equal(crop[..., : there.shape[-2], : there.shape[-1]], there)
    assert trial.image.size == (40, 32)
    assert trial.source.tobytes() == source.crop((101, 71, 121, 87)).tobytes()


def test_options_may_be_given_by_name_and_are_checked(upscaler):
    result = upscaler.upscale(picture(8, 8), quick_options(scale=3), scale=2, seed=9)
    assert (result.image.size, result.seed) == ((16, 16), 9)
    with pytest.raises(OptionError, match="scal"):
        upscaler.upscale(picture(8, 8), scal=2)
    with pytest.raises(OptionError, match="options is a dict; give UpscaleOptions"):
        upscaler.upscale(picture(8, 8), {"scale": 2})


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_a_saved_result_keeps_profile_metadata_and_settings(upscaler, tmp_path, name):
    source = picture()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x013B] = "A. Painter"
    stream = io.BytesIO()
    source.save(stream, "PNG", icc_profile=profile, exif=exif)
    result = upscaler.upscale(stream.getvalue(), quick_options())
    assert result.save(tmp_path / name) == ()
    with Image.open(tmp_path / name) as saved:
        assert saved.info["icc_profile"] == profile
        assert saved.getexif()[0x013B] == "A. Painter"
    assert read_settings(tmp_path / name)["seed"] == result.seed


def test_a_result_of_sixteen_bits_is_saved_with_them_and_shows_itself_in_a_notebook(
    upscaler, tmp_path
):
    ramp = np.linspace(0, 65535, 32 * 24, dtype=np.uint16).reshape(24, 32, 1).repeat(3, 2)
    result = upscaler.upscale(ramp, quick_options(creativity=0.0))
    result.save(str(tmp_path / "a.png"))
    assert cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert shown.size == result.image.size


def test_a_result_is_saved_to_an_open_file_and_to_nothing_else(upscaler):
    result = upscaler.upscale(picture(8, 8), quick_options(creativity=0.0))
    stream = io.BytesIO()
    result.save(stream, file_format="webp")
    assert Image.open(stream).format == "WEBP"
    result.save(stream := io.BytesIO())
    assert Image.open(stream).format == "PNG"
    for wrong in (io.StringIO(), 7):
        with pytest.raises(PathError, match="give a path"):
            result.save(wrong)


def test_a_result_is_not_saved_under_an_ending_of_no_format(upscaler, tmp_path):
    result = upscaler.upscale(picture(8, 8), quick_options(creativity=0.0))
    with pytest.raises(OptionError):
        result.save(tmp_path / "a.bmp")
    assert not list(tmp_path.iterdir())


def test_the_share_of_tuning_follows_the_damage_of_the_source_and_is_told(upscaler, monkeypatch):
    run = []

    def watched(rgb, size, prescaler, **named):
        run.append(prescaler.line.at)
        return prescale(rgb, size, prescaler, **named)

    monkeypatch.setattr("tegula.pipeline.prescale.prescale", watched)
    damaged = np.asarray(picture(96, 96)) + np.random.default_rng(2).normal(0, 9, (96, 96, 3))
    sources = {
        "clean": picture(96, 96),
        "noisy": Image.fromarray(damaged.clip(0, 255).astype(np.uint8)),
    }
    cheap = {"prescaler": "tegula-photo", "creativity": 0.0, "scale": 1}
    shares = {
        name: upscaler.upscale(source, quick_options(**cheap)).settings["tuning"]
        for name, source in sources.items()
    }
    assert shares == {"clean": CLEAN_SHARE, "noisy": 0.65}
    given = upscaler.upscale(sources["noisy"], quick_options(**cheap, tuning=0.9))
    assert given.settings["tuning"] == 0.9
    assert run == [CLEAN_SHARE, 0.65, 0.9]
    assert given.warnings == ()


def test_a_clean_photograph_is_planned_for_the_quick_net_and_its_settings_repeat_that(upscaler):
    """At up to twice its size; what is soft by 0.4 px is to be sharpened before, noise is not."""
    facts = upscaler.bundle.facts
    presets = {
        name: values.replaced(prescaler="tegula-photo") for name, values in facts.presets.items()
    }
    bundle = dataclasses.replace(upscaler.bundle, facts=dataclasses.replace(facts, presets=presets))
    planned = Upscaler(bundle)
    large = np.rint(photograph(512, 512) * 255)
    soft = cv2.GaussianBlur(large, (0, 0), 0.8)
    sharp, soft = (
        Image.fromarray(
            np.rint(cv2.resize(each, (256, 256), interpolation=cv2.INTER_AREA)).astype(np.uint8)
        )
        for each in (large, soft)
    )
    _, resolved, plan = planned.prepare(sharp, UpscaleOptions(scale=2))
    assert (resolved.prescaler, resolved.tuning) == ("tegula-swift", None)
    assert resolved.mend_blur == 0
    _, mended, _ = planned.prepare(soft, UpscaleOptions(scale=2))
    assert mended.prescaler == "tegula-swift"
    assert mended.mend_blur == pytest.approx(0.4, abs=0.15)
    noise = np.random.default_rng(3).normal(0, 5, (256, 256, 3))
    noisy = Image.fromarray(np.clip(np.asarray(soft) + noise, 0, 255).astype(np.uint8))
    for source, scale in ((sharp, 3), (noisy, 2)):
        _, other, larger = planned.prepare(source, UpscaleOptions(scale=scale))
        assert other.prescaler == "tegula-photo"
        assert other.mend_blur == 0
        assert larger.prescale_flops > 5 * plan.prescale_flops
    again = UpscaleOptions(scale=2, prescaler=resolved.prescaler, tuning=resolved.tuning)
    assert planned.prepare(noisy, again)[1].prescaler == "tegula-swift"


def test_the_net_sees_a_source_whose_blur_was_undone_and_the_result_shows_the_source(upscaler):
    soft = np.rint(cv2.GaussianBlur(photograph(48, 40), (0, 0), 0.6) * 255).astype(np.uint8)
    undone = np.clip(undo_blur(soft.astype(np.float32) / 255, 0.5), 0, 1)
    before = Image.fromarray(np.rint(undone * 255).astype(np.uint8))
    options = quick_options(prescaler="tegula-swift", creativity=0, colour_lock="none")
    mended, plain, alone = (
        upscaler.upscale(source, options.replaced(mend_blur=blur))
        for source, blur in ((Image.fromarray(soft), 0.5), (Image.fromarray(soft), 0), (before, 0))
    )
    assert np.array_equal(np.asarray(mended.source), soft)
    assert mended.settings["mend_blur"] == 0.5
    found, without, expected = (
        np.asarray(each.image, np.float32) for each in (mended, plain, alone)
    )
    assert np.abs(found - expected).mean() < 1
    assert np.abs(found - without).mean() > 3 * np.abs(found - expected).mean()
    tiny = Image.fromarray(np.zeros((3, 5, 3), np.uint8))
    assert upscaler.upscale(tiny, options.replaced(mend_blur=0.7)).image.size == (10, 6)


def test_a_share_for_a_prescaler_without_tuning_is_said_to_have_no_effect(upscaler):
    result = upscaler.upscale(picture(), quick_options(tuning=0.9))
    assert result.settings["tuning"] is None
    assert any("tuning has no effect" in warning for warning in result.warnings)
    assert upscaler.upscale(picture(), quick_options()).warnings == ()


def test_a_second_net_is_blended_in_where_a_picture_is_drawn(upscaler):
    source = np.array(picture(192, 128))
    drawn = np.full((128, 96, 3), 255, np.uint8)
    for line in range(12, 128, 14):
        cv2.putText(drawn, "some text", (4, line), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1)
    source[:, 96:] = drawn
    cheap = {"creativity": 0.0, "scale": 1.25, "colour_lock": "none"}
    plain, both = (
        upscaler.upscale(
            Image.fromarray(source),
            quick_options(**cheap, drawing_prescaler=second, hold_drawings=bool(second)),
        )
        for second in ("", "realesrgan-animevideov3")
    )
    assert both.settings["drawing_prescaler"] == "realesrgan-animevideov3"
    assert both.plan.prescale_flops > plain.plan.prescale_flops
    assert "realesrgan-animevideov3 where it is drawn" in both.found
    assert np.all(np.asarray(both.image)[:3, 160:] == 255)
    difference = np.abs(np.asarray(both.image, int) - np.asarray(plain.image, int)).mean(2)
    assert difference[:, 170:].mean() > 1
    assert difference[:, :60].mean() < 0.3


def test_what_the_net_for_drawings_made_is_neither_locked_nor_redrawn(upscaler):
    source = np.array(picture(192, 64))
    source[:, 96:] = 255
    for line in range(12, 64, 14):
        cv2.putText(source, "text", (104, line), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1)
    options = quick_options(scale=1.25, drawing_prescaler="tegula-line", hold_drawings=True)
    plain, refined, free = (
        np.asarray(upscaler.upscale(Image.fromarray(source), options.replaced(**more)).image, int)
        for more in ({"creativity": 0.0}, {}, {"hold_drawings": False})
    )
    assert np.all(plain[:, 224:] == 255)
    assert np.array_equal(refined[:, 180:], plain[:, 180:])
    assert not np.array_equal(refined[:, :80], plain[:, :80])
    assert not np.array_equal(free[:, 180:], plain[:, 180:])


def test_without_auto_nothing_is_said_and_every_picture_takes_the_same_share(upscaler):
    noise = np.random.default_rng(2).integers(0, 255, (64, 64, 3), np.uint8)
    cheap = {"prescaler": "tegula-photo", "creativity": 0.0, "scale": 1, "auto": False}
    result = upscaler.upscale(Image.fromarray(noise), quick_options(**cheap))
    assert (result.found, result.settings["tuning"]) == ("", UNSEEN_SHARE)


def shrunk_again(result, source):
    """Return levels of 255 by which a result, shrunk by averaging areas, misses its source."""
    size = source.shape[1], source.shape[0]
    pixels = np.asarray(result.image, np.float32)
    if result.deep is not None:
        pixels = result.deep.samples.astype(np.float32) / 257
    pixels, source = (
        np.dstack([p[..., :3] * (p[..., 3:] / 255), p[..., 3]]) if p.shape[-1] == 4 else p
        for p in (pixels, source.astype(np.float32))
    )
    return np.abs(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) - source)


@pytest.mark.parametrize("kind", ["photograph", "noise", "alpha", "grey", "deep", "profile"])
def test_exact_shrinks_to_its_source(upscaler, kind):
    rng, profile = np.random.default_rng(5), None
    source = (photograph(48, 36) * 255).round().astype(np.uint8)
    if kind == "noise":
        source = rng.integers(0, 256, source.shape).astype(np.uint8)
    elif kind == "alpha":
        alpha = np.clip(rng.normal(128, 200, (36, 48, 1)), 0, 255).astype(np.uint8)
        source = np.dstack([rng.integers(0, 256, source.shape).astype(np.uint8), alpha])
    elif kind == "grey":
        source = source[..., 1]
    given, file = source, io.BytesIO()
    if kind == "deep":
        given = (photograph(48, 36) * 65535).round().astype(np.uint16)
        source = given.astype(np.float32) / 257
    elif kind == "profile":
        profile = wide_rgb()
        Image.fromarray(source).save(file, "PNG", icc_profile=profile)
        given = file.getvalue()
    change = {"preset": "exact", "sharpen": 1.0, "scale": 4, "prescaler": "lanczos", "seed": 1}
    result = upscaler.upscale(given, UpscaleOptions(**change))
    off = shrunk_again(result, source)
    assert off.mean() <= 1
    assert off.max() <= 4
    assert result.consistency.is_exact
    assert result.consistency.mean == pytest.approx(off.mean(), abs=0.1)
    assert (result.options.creativity, result.options.exact, result.warnings) == (0, True, ())


@pytest.mark.parametrize("file_format", ["jpeg", "webp", "avif", "png", "tiff"])
def test_a_file_that_loses_pixels_says_that_it_is_not_exact(upscaler, file_format):
    source = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8))
    result = upscaler.upscale(source, preset="exact", prescaler="lanczos", scale=2)
    written = result.encoded(file_format)
    read = Image.open(io.BytesIO(written.data)).convert("RGB")
    again = dataclasses.replace(result, image=read)
    is_exact = shrunk_again(again, np.asarray(source)).max() <= 4
    assert any("is not exact" in each for each in written.warnings) is not is_exact
    free = dataclasses.replace(result, options=result.options.model_copy(update={"exact": False}))
    assert free.encoded(file_format).warnings == ()


def test_exact_holds_after_diffusion_a_crop_and_a_mask(upscaler):
    source = picture(48, 36)
    mask = Image.fromarray(np.linspace(0, 255, 48).astype(np.uint8)[None])
    refined = quick_options(creativity=0.9, exact=True, scale=2, colour_lock="none", window=64)
    whole = upscaler.upscale(source, refined, mask=mask)
    assert shrunk_again(whole, np.asarray(source)).max() <= 4
    crop = upscaler.upscale(source, refined, crop=(8, 4, 20, 16))
    assert shrunk_again(crop, np.asarray(source)[4:20, 8:28]).max() <= 4
    free = upscaler.upscale(source, refined.replaced(exact=False))
    assert free.consistency.worst > 4
    assert not free.consistency.is_exact


def test_exact_at_a_factor_that_is_not_whole_and_what_it_cannot_hold(upscaler):
    soft = Image.fromarray((photograph(40, 30) * 127 + 64).round().astype(np.uint8))
    result = upscaler.upscale(soft, preset="exact", prescaler="lanczos", scale=2.4)
    off = shrunk_again(result, np.asarray(soft))
    assert (off.mean() <= 1, off.max() <= 4, result.warnings) == (True, True, ())
    hard = Image.fromarray(np.random.default_rng(2).integers(0, 2, (30, 40)).astype(np.uint8) * 255)
    result = upscaler.upscale(hard, preset="exact", prescaler="lanczos", scale=1.5)
    assert "a factor that is not whole" in result.warnings[-1]
    smaller = upscaler.upscale(hard, preset="exact", prescaler="lanczos", scale=0.5)
    assert (smaller.consistency, "smaller" in smaller.warnings[-1]) == (None, True)


def made_with(prompt, file_format):
    """A picture as AUTOMATIC1111's web UI saves it."""
    text, buffer = f"{prompt}\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a", io.BytesIO()
    if file_format == "PNG":
        info = PngInfo()
        info.add_text("parameters", text)
        picture(16, 12).save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode(
            "utf-16-be"
        )
        picture(16, 12).save(buffer, file_format, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_the_prompt_of_the_source_is_taken_where_the_model_reads_prompts(bundle, file_format):
    source, upscaler = made_with("a stone bridge", file_format), Upscaler(bundle)
    result = upscaler.upscale(source, quick_options())
    assert result.options.prompt == "a stone bridge"
    assert result.found.endswith("; prompt taken from the picture: a stone bridge")
    if file_format != "PNG":
        return
    assert upscaler.upscale(source, quick_options(prompt="a dog")).options.prompt == "a dog"
    for changes in ({"source_prompt": False}, {"auto": False}):
        result = upscaler.upscale(source, quick_options(**changes))
        assert result.options.prompt == ""
        assert "prompt" not in result.found
    blind = dataclasses.replace(bundle.facts, reads_prompts=False)
    result = Upscaler(dataclasses.replace(bundle, facts=blind)).upscale(source, quick_options())
    assert result.options.prompt == ""


def test_a_result_of_ours_hands_its_prompt_on(upscaler):
    first = upscaler.upscale(picture(16, 12), quick_options(prompt="a stone bridge"))
    assert (
        upscaler.upscale(first.encoded("jpeg").data, quick_options()).options.prompt
        == "a stone bridge"
    )
