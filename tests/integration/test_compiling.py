"""Static batches, and the networks that are compiled for them."""

import dataclasses
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sd15_support import batch_of
from support import options, photograph, refine_canvas

from tegula.errors import OptionError, OutOfMemoryError
from tegula.models import compiled as compiling
from tegula.models.compiled import compile_bundle
from tegula.models.static_batches import StaticDenoiser, static_runs
from tegula.pipeline.refine import RefineJob
from tegula.regions import PlacedRegion
from tests.tiny.networks import tiny_bundle

SIZES = st.lists(st.integers(1, 32), min_size=1, max_size=3)


@given(st.integers(1, 200), SIZES)
def test_runs_cover_every_row_once_and_only_the_last_is_filled_up(count, sizes):
    runs = static_runs(count, sizes)
    rows = [row for run in runs for row in range(run.first, run.first + run.count)]
    assert rows == list(range(count))
    assert all(run.size in sizes for run in runs)
    assert all(run.count == run.size for run in runs[:-1])


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
        StaticDenoiser(spy, spy, (8, 4, 2))(batch), bundle.denoiser(batch), atol=1e-5, rtol=0
    )
    assert set(spy.rows) <= {8, 4, 2}
    assert {n * (2 if guess_mode else 1) for n in spy.controlled} == set(spy.rows)


def test_a_size_that_does_not_fit_is_given_up(bundle):
    spy = Spy(bundle.denoiser, most=4)
    denoiser = StaticDenoiser(spy, spy, (8, 4, 2))
    assert len(denoiser(batch_of(bundle, 8))) == 8
    assert denoiser.sizes == (4, 2)
    nothing = Spy(bundle.denoiser, most=0)
    with pytest.raises(OutOfMemoryError, match="smaller window"):
        StaticDenoiser(nothing, nothing, (8, 4, 2))(batch_of(bundle, 8))


def test_batches_that_come_become_sizes_where_others_would_waste(bundle):
    spy = Spy(bundle.denoiser)
    denoiser = StaticDenoiser(spy, spy, grows_to=3)
    for rows in (72, 36, 70, 30, 12, 100):
        assert len(denoiser(batch_of(bundle, rows))) == rows
    # 72 rows are one batch of 72; 70 are filled up; 30 would be by a fifth; then three are enough.
    assert spy.rows == [72, 36, 72, 30, 30, 72, 30]
    assert denoiser.sizes == (72, 36, 30)


def test_no_size_is_added_that_memory_has_no_room_for(bundle):
    spy = Spy(bundle.denoiser, most=20)
    denoiser = StaticDenoiser(spy, spy, grows_to=3)
    for _ in range(2):
        assert len(denoiser(batch_of(bundle, 36))) == 36
    assert spy.rows == [36, 18, 18, 18, 18]


def test_only_a_few_shapes_of_windows_are_compiled_for(bundle):
    spy, plain = Spy(bundle.denoiser), Spy(bundle.denoiser)
    denoiser = StaticDenoiser(spy, plain, (4,))
    batch = batch_of(bundle, 1)
    for tokens in (1, 2, 3, 4, 1):
        denoiser(dataclasses.replace(batch, text=batch.text[:, :tokens]))
    assert spy.rows == [4, 4, 4, 4]
    assert plain.rows == [1]


def test_without_a_compiler_one_sentence_says_so(bundle, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OptionError, match="C\\+\\+ compiler"):
        compile_bundle(bundle)


def test_mini_is_left_as_it_is():
    mini = dataclasses.replace(
        tiny_bundle(), facts=dataclasses.replace(tiny_bundle().facts, family="mini")
    )
    assert compile_bundle(mini) is mini


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


QUICK = {"cpp.simdlen": 1, "aot_inductor.debug_compile": True}
"""Without vectors and optimisation g++ takes a fraction of the time."""


class OverwritingCompiler:
    """Stands for replayed CUDA graphs: what one graph returned is lost when the next one runs."""

    def __init__(self):
        self.returned, self.graphs = [], 0

    def __call__(self, graph, examples):
        self.graphs += 1

        def run(*given):
            with torch.inference_mode():
                for tensor in self.returned:
                    tensor.fill_(torch.nan)
            self.returned = [part for part in graph(*given) if isinstance(part, torch.Tensor)]
            # Without a copy they might be tensors that were given.
            self.returned = [part.clone() for part in self.returned]
            return self.returned

        return run


@pytest.fixture
def overwriting(monkeypatch):
    torch._dynamo.reset()
    compiler = OverwritingCompiler()
    monkeypatch.setattr(compiling, "COMPILER", compiler)
    monkeypatch.setattr(compiling, "MOST_SIZES", 1)  # each is traced, which takes a second
    monkeypatch.setattr(shutil, "which", lambda name: name)
    yield compiler
    torch._dynamo.reset()


def pictures_of(bundle, width, height, **knobs):
    picture = photograph(width, height)
    chosen = options(width=width, height=height, window_batch=1, steps=2, **knobs)
    return refine_canvas(RefineJob(bundle, picture, picture, chosen))


@pytest.mark.slow
def test_every_option_gives_the_same_picture_where_graphs_share_their_memory(overwriting):
    plain, compiled = tiny_bundle(flat=True), compile_bundle(tiny_bundle(flat=True))
    guided: dict[str, Any] = {"guidance_scale": 2.0}
    region = PlacedRegion(0, 0, 50, 64, 4, "a dog")
    runs: list[dict[str, Any]] = [
        {"resemblance": 0.4, **guided},
        {},
        {"guess_mode": True, **guided},
        {"feature_reuse": 2, **guided},
        {"guidance_end": 0.5, **guided},
        {"placed_regions": (region,), **guided},
        {"width": 130, "height": 100},
        {"window": 32},
        {"resemblance": 0.0},
    ]
    for run in ({"width": 100, "height": 64, **run} for run in runs):
        np.testing.assert_allclose(
            pictures_of(compiled, **run), pictures_of(plain, **run), atol=1e-4, err_msg=str(run)
        )
    # A second bundle in the process, with weights of its own, and the first one after it.
    others = tiny_bundle(seed=1, flat=True), compile_bundle(tiny_bundle(seed=1, flat=True))
    first, second = (pictures_of(bundle, 64, 64) for bundle in others)
    np.testing.assert_allclose(second, first, atol=1e-4)
    before = overwriting.graphs
    np.testing.assert_allclose(pictures_of(compiled, 64, 64), pictures_of(plain, 64, 64), atol=1e-4)
    assert overwriting.graphs == before


def test_where_the_compiler_fails_in_the_middle_the_picture_is_made_without(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(compiling, "COMPILER", "eager")
    plain, compiled = tiny_bundle(flat=True), compile_bundle(tiny_bundle(flat=True))

    def fails(*_):
        raise torch._dynamo.exc.Unsupported("no such instruction")

    monkeypatch.setattr(compiling, "_compile", lambda function: fails)
    np.testing.assert_allclose(pictures_of(compiled, 64, 64), pictures_of(plain, 64, 64), atol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_compiled_pictures_are_the_same_and_no_canvas_compiles_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TEGULA_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    plain = tiny_bundle(flat=True)
    monkeypatch.setattr(compiling, "MOST_SIZES", 1)
    for found in (0, 2):  # the second time, everything that was compiled is found again
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch._inductor.config.patch(QUICK):
            compiled = compile_bundle(tiny_bundle(flat=True))
            compiled.denoiser(batch_of(plain, 4))
        assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == found
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
