"""Static batches, and the networks that are compiled for them."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sd15_support import batch_of
from support import options, photograph

from tegula.errors import OptionError, OutOfMemoryError
from tegula.models import compiled as compiling
from tegula.models.compiled import StaticDenoiser, compile_bundle, static_runs, static_sizes
from tegula.pipeline.refine import RefineJob, refine_canvas
from tests.tiny.networks import tiny_bundle

SIZES = st.lists(st.integers(1, 32), min_size=1, max_size=3)


@given(st.integers(1, 200), SIZES)
def test_runs_cover_every_row_once_and_only_the_last_is_filled_up(count, sizes):
    runs = static_runs(count, sizes)
    rows = [row for run in runs for row in range(run.first, run.first + run.count)]
    assert rows == list(range(count))
    assert all(run.size in sizes for run in runs)
    assert all(run.count == run.size for run in runs[:-1])


@given(st.integers(1, 60), st.integers(1, 16))
def test_what_is_filled_up_stays_below_a_quarter_of_a_window_batch(count, window_batch):
    runs = static_runs(count, static_sizes(window_batch))
    assert sum(run.size for run in runs) - count < max(1, window_batch // 4)


class Spy:
    """Notes the shapes that a denoiser is given; out of memory above ``most`` rows."""

    def __init__(self, denoiser, most=99):
        self.denoiser, self.most, self.rows, self.controlled = denoiser, most, [], []

    def __call__(self, batch):
        self.rows.append(len(batch.latents))
        self.controlled.append(len(batch.latents[batch.controlled]))
        if len(batch.latents) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.denoiser(batch)


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


@pytest.mark.parametrize("rows", [1, 2, 5, 14])
@pytest.mark.parametrize("guess_mode", [False, True])
def test_static_batches_change_nothing(bundle, rows, guess_mode):
    rows *= 2 if guess_mode else 1
    batch = batch_of(bundle, rows, guess_mode=guess_mode)
    spy = Spy(bundle.denoiser)
    torch.testing.assert_close(
        StaticDenoiser(spy, (8, 4, 2))(batch), bundle.denoiser(batch), atol=1e-5, rtol=0
    )
    assert set(spy.rows) <= {8, 4, 2}
    assert {n * (2 if guess_mode else 1) for n in spy.controlled} == set(spy.rows)


def test_a_size_that_does_not_fit_is_given_up(bundle):
    denoiser = StaticDenoiser(Spy(bundle.denoiser, most=4), (8, 4, 2))
    assert len(denoiser(batch_of(bundle, 8))) == 8
    assert denoiser.sizes == (4, 2)
    with pytest.raises(OutOfMemoryError, match="smaller window"):
        StaticDenoiser(Spy(bundle.denoiser, most=0), (8, 4, 2))(batch_of(bundle, 8))


def test_only_a_few_shapes_of_windows_are_compiled_for(bundle):
    spy, bypassed = Spy(bundle.denoiser), []

    class Bypass:
        def __enter__(self):
            bypassed.append(True)

        def __exit__(self, *_):
            pass

    denoiser = StaticDenoiser(spy, (4,), Bypass)
    batch = batch_of(bundle, 1)
    for tokens in (1, 2, 3, 4, 1):
        denoiser(dataclasses.replace(batch, text=batch.text[:, :tokens]))
    assert spy.rows == [4, 4, 4, 1, 4]
    assert len(bypassed) == 1


def test_without_a_compiler_one_sentence_says_so(bundle, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OptionError, match="C\\+\\+ compiler"):
        compile_bundle(bundle, (2,))


def test_attention_is_fused():
    bundle = tiny_bundle()
    names = {
        type(processor).__name__
        for network in bundle.denoiser.networks
        for processor in network.attn_processors.values()
    }
    assert names == {"AttnProcessor2_0"}


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.mark.slow
@needs_compiler
def test_compiled_pictures_are_the_same_and_no_canvas_compiles_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    plain = tiny_bundle(flat=True)
    with torch._inductor.config.patch({"cpp.simdlen": 1}):  # g++ is quicker without vectors
        compiled = compile_bundle(tiny_bundle(flat=True), (4,))
    sizes = [(100, 64), (150, 130), (64, 180)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for (width, height), scale in zip(sizes, (1.0, 0.6, 1.3), strict=True):
            picture = photograph(width, height)
            knobs = options(
                width=width, height=height, guidance_scale=2.0, window_batch=2, resemblance=scale
            )
            expected = refine_canvas(RefineJob(plain, picture, picture, knobs))
            got = refine_canvas(RefineJob(compiled, picture, picture, knobs))
            np.testing.assert_allclose(got, expected, atol=1e-4)
        # LoRAs of a single run are merged into the weights that compiled networks read.
        lora = {
            f"lora_unet_mid_block_resnets_0_conv1.lora_{name}.weight": torch.ones(*shape) / 4
            for name, shape in (("down", (1, 8, 3, 3)), ("up", (8, 1, 1, 1)))
        }
        save_file(lora, tmp_path / "lora.safetensors")
        loras = [(str(tmp_path / "lora.safetensors"), 1.0)]
        jobs = [RefineJob(each, picture, picture, knobs) for each in (plain, compiled)]
        assert plain.with_loras is not None
        assert compiled.with_loras is not None
        with plain.with_loras(loras), compiled.with_loras(loras):
            changed, got = map(refine_canvas, jobs)
        np.testing.assert_allclose(got, changed, atol=1e-4)
        assert np.abs(changed - expected).max() > 1e-3
        np.testing.assert_allclose(refine_canvas(jobs[1]), expected, atol=1e-4)
    assert any((tmp_path / "inductor").rglob("*.so"))
    assert compiling.cache_folder() == tmp_path
