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
from tegula.models.bundle import ControlImage
from tegula.models.compiled import (
    CompiledAutoencoder,
    CompiledPart,
    compile_bundle,
    compile_prescaler,
)
from tegula.models.prescalers import Prescaler, PrescalerFacts
from tegula.models.prescalers.networks import RRDBNet, SRVGGNetCompact
from tegula.models.sd15.networks import SdAutoencoder
from tegula.models.static_batches import StaticDenoiser, static_runs
from tegula.pipeline import autoencoder as tiled_autoencoder
from tegula.pipeline.autoencoder import AutoencoderTiling
from tegula.pipeline.prescale import run_network
from tegula.pipeline.refine import RefineJob
from tegula.progress import SILENT
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


@pytest.fixture
def tracing(monkeypatch):
    """torch traces and keeps what it would compile, which takes a fraction of the time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(compiling, "COMPILER", "eager")
    compiling._set_up_compiler()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("tracing")
def test_of_mini_the_prescalers_alone_are_compiled():
    facts = dataclasses.replace(tiny_bundle().facts, family="mini")
    mini = dataclasses.replace(tiny_bundle(), facts=facts)
    compiled = compile_bundle(mini)
    assert compiled.compiles
    assert (compiled.denoiser, compiled.autoencoder) == (mini.denoiser, mini.autoencoder)


class Coder(torch.nn.Module):
    """The layers of an autoencoder by which sizes and norms matter, and no more."""

    dtype, config = torch.float32, {"scaling_factor": 0.5}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        conv, norm = torch.nn.Conv2d, torch.nn.GroupNorm
        first, last = conv(3, 4, 3, 2, 1), conv(4, 8, 3, 4, 1)
        self.encoder = torch.nn.Sequential(first, norm(2, 4), torch.nn.SiLU(), last)
        self.quant_conv, self.post_quant_conv = None, None
        larger = torch.nn.Upsample(scale_factor=8.0, mode="nearest")
        self.decoder = torch.nn.Sequential(conv(4, 4, 1), norm(2, 4), larger, conv(4, 3, 3, 1, 1))
        self.eval().requires_grad_(requires_grad=False)


@pytest.mark.usefixtures("tracing")
def test_an_autoencoder_is_compiled_once_for_canvases_and_tiles_of_all_sizes(bundle, monkeypatch):
    plain = dataclasses.replace(bundle, autoencoder=SdAutoencoder(Coder()))
    part = CompiledPart("the autoencoder")
    compiled = dataclasses.replace(bundle, autoencoder=CompiledAutoencoder(plain.autoencoder, part))
    monkeypatch.setattr(tiled_autoencoder, "tiling_of", lambda _: AutoencoderTiling(96, 64))
    seen = []
    # Two that go through whole, and three in tiles. A processor takes another kernel for fewer
    # numbers than 20480, which is compiled for too; none of them goes from one side to the other.
    for width, height in ((80, 96), (112, 80), (160, 96), (104, 208), (56, 200)):
        image = torch.tensor(photograph(width, height).transpose(2, 0, 1)[None])
        control = ControlImage(image, image)
        latents, pictures = [], []
        for each in (plain, compiled):
            generator = torch.Generator().manual_seed(0)
            latents.append(tiled_autoencoder.encode(each, image, control, generator))
            pictures.append(tiled_autoencoder.decode(each, latents[-1], control))
        torch.testing.assert_close(latents[1], latents[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(pictures[1], pictures[0], atol=1e-5, rtol=0)
        seen.append(graphs())
    # Two halves: whole, while their norms are measured, and with those fixed.
    assert not part.failed
    assert seen == [2, 2, 6, 6, 6]


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("network", [RRDBNet(2, 8, 4), SRVGGNetCompact(3, 8)])
def test_a_prescaler_is_compiled_once_for_tiles_of_all_sizes(network):
    facts = PrescalerFacts(
        name="tiny", description="", net="", factor=4, overlap=4, licence="Apache-2.0"
    )
    network = network.eval().requires_grad_(requires_grad=False)
    plain = Prescaler(facts, network, network, torch.device("cpu"), torch.float32)
    compiled = compile_prescaler(plain)
    assert compiled.compiled is not None
    assert not {*compiled.compiled.parameters()} - {*network.parameters()}
    for width, height in ((64, 48), (50, 72), (80, 48)):
        picture, shares = torch.tensor(photograph(width, height)), []
        watch = dataclasses.replace(SILENT, on_share=shares.append)
        expected = run_network(picture, plain)
        torch.testing.assert_close(run_network(picture, compiled, watch), expected)
        assert graphs() == 1
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)


@pytest.mark.usefixtures("tracing")
def test_blocks_alone_are_compiled_once_for_all_that_differ_in_weights_alone():
    plain = tiny_bundle(flat=True)
    compiled = compile_bundle(plain, blocks=True)
    batches = [batch_of(plain, 4, seed=seed) for seed in (0, 1)]
    for batch in batches:
        torch.testing.assert_close(compiled.denoiser(batch), plain.denoiser(batch))
    names = [type(each).__name__ for n in plain.denoiser.networks for each in n.modules()]
    blocks = names.count("ResnetBlock2D") + names.count("BasicTransformerBlock")
    compiled_blocks = graphs()
    assert 0 < compiled_blocks < 0.6 * blocks
    # The plain denoiser, which takes what is not compiled for, has layers of its own.
    plain.denoiser(batch_of(plain, 3))
    assert graphs() == compiled_blocks
    weight = plain.denoiser.unet.conv_in.weight
    with torch.no_grad():
        weight.mul_(1.5)  # as a LoRA is merged
    torch.testing.assert_close(compiled.denoiser(batches[0]), plain.denoiser(batches[0]))


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


QUICK = {"cpp.vec_isa_ok": False, "aot_inductor.debug_compile": True}
"""Without vectors and optimisation g++ takes a fraction of the time, and none to try them out."""


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


def compiled_denoiser_of(bundle, **how):
    """Compile a bundle and leave its autoencoder, which is shown by itself, as it is."""
    compiled = compile_bundle(bundle, **how)
    return dataclasses.replace(compiled, autoencoder=bundle.autoencoder)


def pictures_of(bundle, width, height, **changes):
    picture = photograph(width, height)
    chosen = options(width=width, height=height, window_batch=1, steps=2, **changes)
    return refine_canvas(RefineJob(bundle, picture, picture, chosen))


@pytest.mark.slow
def test_every_option_gives_the_same_picture_where_graphs_share_their_memory(overwriting):
    plain, compiled = tiny_bundle(flat=True), compiled_denoiser_of(tiny_bundle(flat=True))
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
    others = tiny_bundle(seed=1, flat=True), compiled_denoiser_of(tiny_bundle(seed=1, flat=True))
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
    monkeypatch.setattr(compiling, "_compile_for_all_sizes", lambda function: fails)
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
            compiled = compiled_denoiser_of(tiny_bundle(flat=True), blocks=False)
            compiled.denoiser(batch_of(plain, 4))
        assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == found
    sizes = [(100, 64), (150, 130), (64, 180)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for (width, height), scale in zip(sizes, (1.0, 0.6, 1.3), strict=True):
            picture = photograph(width, height)
            chosen = options(
                width=width, height=height, guidance_scale=2.0, window_batch=2, resemblance=scale
            )
            expected = refine_canvas(RefineJob(plain, picture, picture, chosen))
            got = refine_canvas(RefineJob(compiled, picture, picture, chosen))
            np.testing.assert_allclose(got, expected, atol=1e-4)
        # LoRAs of a single run are merged into the weights that compiled networks read.
        lora = {
            f"lora_unet_mid_block_resnets_0_conv1.lora_{name}.weight": torch.ones(*shape) / 4
            for name, shape in (("down", (1, 8, 3, 3)), ("up", (8, 1, 1, 1)))
        }
        save_file(lora, tmp_path / "lora.safetensors")
        loras = [(str(tmp_path / "lora.safetensors"), 1.0)]
        jobs = [RefineJob(each, picture, picture, chosen) for each in (plain, compiled)]
        assert plain.with_loras is not None
        assert compiled.with_loras is not None
        with plain.with_loras(loras), compiled.with_loras(loras):
            changed, got = map(refine_canvas, jobs)
        np.testing.assert_allclose(got, changed, atol=1e-4)
        assert np.abs(changed - expected).max() > 1e-3
        np.testing.assert_allclose(refine_canvas(jobs[1]), expected, atol=1e-4)
    assert any((tmp_path / "inductor").rglob("*.so"))
    assert compiling.cache_folder() == tmp_path
