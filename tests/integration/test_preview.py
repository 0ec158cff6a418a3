"""Previews: small, early, and without any effect on the result."""

import itertools

import numpy as np
import pytest
import torch
from cli_support import put, run
from diffusers import AutoencoderTiny
from PIL import Image
from sd15_support import files, load_sd15, offline  # noqa: F401
from support import options, photograph, refine_canvas, refine_redraw

from tegula.errors import CancelledError
from tegula.models import BundleSettings
from tegula.models.load import load_bundle
from tegula.models.mini.bundle import SCHEDULER as MINI
from tegula.models.sd15.facts import LIGHT_VAE, SCHEDULER
from tegula.models.sd15.networks import SdAutoencoder
from tegula.options import SCHEDULERS, UpscaleOptions
from tegula.pipeline import preview
from tegula.pipeline.refine import RefineJob
from tegula.pipeline.schedulers import ScheduleChoice, make_schedule
from tegula.progress import StageProgress
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

REDRAW = {"tile_width": 64, "tile_height": 64, "tile_padding": 16, "tile_blur": 3}


@pytest.fixture(scope="module")
def bundles():
    return {"tiny": tiny_bundle(), "mini": load_bundle(BundleSettings())}


def refined(bundle, how=refine_canvas, size=(150, 110), show=None, **changes):
    picture = photograph(*size)
    chosen = options(width=size[0], height=size[1], **REDRAW, **changes)
    return how(RefineJob(bundle, picture, picture, chosen), StageProgress(on_picture=show))


@pytest.mark.parametrize("how", [refine_canvas, refine_redraw])
@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_previews_leave_the_result_as_it_is_bit_for_bit(bundles, name, how):
    changes = {"scheduler": "euler-ancestral", "steps": 6, "creativity": 1.0}
    seen = []
    shown = refined(bundles[name], how, show=seen.append, **changes)
    assert np.array_equal(shown, refined(bundles[name], how, **changes))
    assert len(seen) > 3
    for picture in seen:
        assert picture.dtype == np.float32
        assert 0 <= picture.min() <= picture.max() <= 1


def test_the_first_preview_is_the_prescaled_picture_and_the_last_is_near_the_result(bundles):
    seen = []
    result = refined(bundles["mini"], show=seen.append, steps=16, creativity=0.6)
    source = photograph(150, 110)
    np.testing.assert_allclose(seen[0], source, atol=1e-6)
    distances = [np.abs(each - result).mean() for each in (seen[0], seen[-1])]
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(("steps", "previews"), [(1, 1), (2, 2), (9, 9), (17, 9), (40, 8)])
def test_a_long_run_shows_no_more_previews_than_a_short_one(bundles, steps, previews):
    seen = []
    refined(bundles["tiny"], size=(64, 64), show=seen.append, steps=steps, creativity=1.0)
    assert len(seen) == previews


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_previews_are_small_whatever_the_canvas(bundles, name, monkeypatch):
    monkeypatch.setattr(preview, "SIDE", 64)
    monkeypatch.setattr(preview, "HEAVY_SIDE", 32)
    seen = []
    refined(bundles[name], size=(190, 150), show=seen.append, steps=4, creativity=1.0)
    assert seen[0].shape == (50, 64, 3)
    longest = 64 if name == "mini" else 32
    for picture in seen[1:]:
        assert longest / 2 < max(picture.shape) <= longest


def test_strips_of_a_preview_join_without_a_trace(bundles, monkeypatch):
    monkeypatch.setattr(preview, "SIDE", 32)
    whole, strips = [], []
    refined(bundles["mini"], show=whole.append, steps=4, creativity=1.0)
    monkeypatch.setattr(preview, "_STRIP", 1)
    refined(bundles["mini"], show=strips.append, steps=4, creativity=1.0)
    for one, other in zip(whole, strips, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(("name", "config"), list(itertools.product(SCHEDULERS, (SCHEDULER, MINI))))
def test_the_clean_latents_are_found_in_what_the_model_answers(name, config):
    schedule = make_schedule(ScheduleChoice(name, 8), config, 0.6)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    scaled = schedule.scale_input(schedule.noised(clean, noise, 0), 0)
    answer = schedule.exact_prediction(clean, noise, 0)
    assert (schedule.clean(answer, scaled, 0) - clean).abs().max() < 0.02


@pytest.mark.usefixtures("offline")
def test_a_light_autoencoder_makes_the_previews_where_it_is_on_this_machine(
    files,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    assert load_sd15(str(files.folder)).light_autoencoder is None
    blocks = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    AutoencoderTiny(**blocks).save_pretrained(tmp_path / "models" / LIGHT_VAE)
    bundle = load_sd15(str(files.folder))
    plain, seen, by = refined(bundle, steps=4), [], []
    decode = SdAutoencoder.decode

    def noted(self, *reported):
        by.append(self)
        return decode(self, *reported)

    monkeypatch.setattr(SdAutoencoder, "decode", noted)
    assert np.array_equal(refined(bundle, show=seen.append, steps=4), plain)
    assert [each is bundle.light_autoencoder for each in by] == [True, False]
    assert seen[1].shape == (112, 152, 3)


def test_an_upscale_shows_pictures_and_can_be_cancelled_meanwhile(bundles):
    upscaler, seen = Upscaler(bundles["tiny"]), []
    source = Image.fromarray(np.uint8(photograph(40, 32) * 255))
    chosen = UpscaleOptions(prescaler="lanczos", seed=1, steps=8, creativity=1.0, window=64)
    shown = upscaler.upscale(source, chosen, on_preview=seen.append)
    assert [each.size for each in seen][:2] == [(80, 64), (80, 64)]
    assert np.array_equal(shown.image, upscaler.upscale(source, chosen).image)
    with pytest.raises(CancelledError):
        upscaler.upscale(source, chosen, on_preview=seen.append, cancelled=lambda: len(seen) > 10)
    assert len(seen) == 11


def test_the_command_line_keeps_a_preview_in_a_file(tmp_path):
    source, file = tmp_path / "a.png", tmp_path / "now.png"
    put(source, width=32, height=24)
    words = ("upscale", source, tmp_path / "b.png", "--prescaler", "lanczos", "--steps", "4")
    done = run(*words, "--preview", file)
    assert done.exit_code == 0, done.output
    assert Image.open(file).size == (64, 48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "now.png"]
    refused = run(*words, "--overwrite", "--preview", tmp_path / "now.txt")
    assert refused.exit_code == 2
