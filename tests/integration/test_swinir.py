"""SwinIR files: the real architecture in the real format, through our loader and our tiles."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from support import of_arrays, photograph, prescale_in_tiles

from tegula.models.prescalers.load import load_prescaler
from tegula.pipeline import prescale
from tegula.pipeline.prescale_plan import plan_spans

run_network = of_arrays(prescale.run_network)


pytest.importorskip("einops")
CPU = torch.device("cpu")
WINDOW = 8
SMALL = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 3], "mlp_ratio": 2.0}
LARGE = {"embed_dim": 240, "depths": [6] * 9, "num_heads": [8] * 9, "mlp_ratio": 2.0}
"""Of the file for real-world pictures, 4 times."""


def swinir(shape, **words):
    from tegula.models.spandrel_networks import torchvision_replaced

    with torchvision_replaced():
        pytest.importorskip("spandrel")
        from spandrel.architectures.SwinIR import SwinIR
    torch.manual_seed(0)
    words = {"resi_connection": "3conv", "upscale": 4, **words}
    network = SwinIR(
        img_size=64, window_size=WINDOW, img_range=1.0, upsampler="nearest+conv", **shape, **words
    )
    with torch.no_grad():  # as loud as trained weights: fresh ones hardly see their surroundings
        for name, parameter in network.named_parameters():
            if parameter.dim() == 2 and "relative" not in name:
                parameter.mul_(6)
        probe = network.eval()(torch.from_numpy(photograph(32, 32).copy()).permute(2, 0, 1)[None])
        louder = 0.15 / probe.std()
        network.conv_last.weight.mul_(louder)
        drift = probe.mean((0, 2, 3)) - network.mean.view(3) - network.conv_last.bias
        network.conv_last.bias.copy_(-drift * louder)
    return network


def saved(tmp_path, network, wrapper="params_ema"):
    path = tmp_path / "003_realSR_SwinIR.pth"
    torch.save({wrapper: network.state_dict()}, path)
    return str(path)


def bare(network, picture):
    with torch.inference_mode():
        y = network(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None])
    return y[0].clamp(0, 1).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("wrapper", ["params_ema", "params"])
@pytest.mark.parametrize(("upscale", "connection"), [(4, "3conv"), (2, "1conv")])
def test_a_file_gives_what_the_bare_network_gives(tmp_path, wrapper, upscale, connection):
    network = swinir(SMALL, upscale=upscale, resi_connection=connection)
    loaded = load_prescaler(saved(tmp_path, network, wrapper), CPU, torch.float32)
    assert (loaded.facts.factor, loaded.facts.net, loaded.facts.grid) == (upscale, "SwinIR", WINDOW)
    picture = photograph(48, 40)
    result = run_network(picture, loaded)
    assert result.std() > 0.02
    assert np.abs(result - bare(network, picture)).max() < 1e-5


@pytest.mark.parametrize("size", [(33, 32), (41, 50), (7, 5), (1, 1)])
def test_sizes_that_no_window_divides_come_out_exact(tmp_path, size):
    network = swinir(SMALL)
    loaded = load_prescaler(saved(tmp_path, network), CPU, torch.float32)
    picture = photograph(64, 64)[: size[1], : size[0]]
    result = run_network(picture, loaded)
    assert result.shape == (4 * size[1], 4 * size[0], 3)
    if min(size) >= 32:
        assert np.abs(result - bare(network, picture)).max() < 1e-5


def test_tiles_equal_the_whole_and_would_not_off_the_grid_of_windows(tmp_path):
    network = swinir(SMALL)
    loaded = load_prescaler(saved(tmp_path, network), CPU, torch.float32)
    picture = photograph(302, 35)
    target = (1208, 140)
    whole = prescale_in_tiles(300, picture, target, loaded)
    assert np.abs(prescale_in_tiles(221, picture, target, loaded) - whole).max() < 1 / 255
    off = dataclasses.replace(loaded, facts=dataclasses.replace(loaded.facts, grid=1))
    assert np.abs(prescale_in_tiles(221, picture, target, off) - whole).max() > 2 / 255


@pytest.mark.parametrize(("source", "tile"), [(150, 110), (1000, 224), (333, 200)])
def test_tiles_on_a_grid_keep_their_context_and_cover_everything(source, tile):
    spans = plan_spans(source, 4 * source, tile, 40, WINDOW)
    assert all(span.start % WINDOW == 0 for span in spans)
    assert all(span.stop - span.start < tile + WINDOW for span in spans)
    assert spans[0].start == spans[0].first == 0
    assert (spans[-1].stop, spans[-1].last) == (source, 4 * source)
    for left, right in itertools.pairwise(spans):
        assert left.last == right.first
        assert left.stop - left.last / 4 >= 40
        assert right.first / 4 - right.start >= 40


def test_half_precision_is_used_only_where_the_network_takes_it(tmp_path):
    path = saved(tmp_path, swinir(SMALL))
    assert load_prescaler(path, CPU, torch.float16).dtype == torch.float32
    half = load_prescaler(path, CPU, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    picture = photograph(48, 40)
    full = run_network(picture, load_prescaler(path, CPU, torch.float32))
    assert np.abs(run_network(picture, half) - full).mean() < 0.02


@pytest.mark.slow
def test_a_file_of_the_full_size_gives_what_the_bare_network_gives(tmp_path):
    network = swinir(LARGE)
    loaded = load_prescaler(saved(tmp_path, network), CPU, torch.float32)
    picture = photograph(40, 32)
    assert np.abs(run_network(picture, loaded) - bare(network, picture)).max() < 1e-4
