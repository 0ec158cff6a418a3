"""Products of 8 bits in the large prescaler: as good as its own, and only where they are right."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import of_arrays

from tegula import Upscaler
from tegula import upscaler as upscaling
from tegula.errors import CancelledError
from tegula.models.prescalers import int8
from tegula.models.prescalers.int8 import Int8DenseBlock, multiplies_int8
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.models.prescalers.networks import ResidualDenseBlock, RRDBNet
from tegula.nets import Nets
from tegula.pipeline import prescale
from tegula.pipeline.shards import kind_of
from tegula.progress import Cancel, StageProgress
from train.ranges import measure_ranges

run_network = of_arrays(prescale.run_network)
CPU = torch.device("cpu")
PHOTO = "tegula-photo"

only_where_it_is_fast = pytest.mark.skipif(
    not multiplies_int8(), reason="this processor has no fast products of 8 bits"
)


@pytest.fixture(scope="module")
def photo():
    return load_prescaler(PHOTO, CPU, torch.float32, int8=True)


@pytest.fixture(scope="module")
def picture():
    """A photograph, [32, 32, 3]. What is drawn by sines makes this net invent, in any precision."""
    path = Path(__file__).parents[1] / "data" / "prescaler_reference.npz"
    return np.load(path)["input"].astype(np.float32) / 255


def dense_block():
    torch.manual_seed(1)
    return ResidualDenseBlock(16, 8).eval()


def ranges_of(block, x):
    seen = []
    with torch.inference_mode():
        hook = block.conv5.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        block(x)
        hook.remove()
    return seen[0].abs().amax((0, 2, 3))


@only_where_it_is_fast
def test_a_block_gives_what_it_gives_in_full_precision_up_to_its_edges():
    block, x = dense_block(), torch.randn(1, 16, 20, 24).to(memory_format=torch.channels_last)
    rounded = Int8DenseBlock(block, ranges_of(block, x), torch.float32)
    with torch.inference_mode():
        added, wanted = rounded(x) - x, block(x) - x
    off = (added - wanted).abs()
    assert off.mean() < 0.02 * wanted.abs().mean()
    assert off[..., 0, :].mean() < 0.03 * wanted[..., 0, :].abs().mean()


@only_where_it_is_fast
def test_a_block_in_strips_gives_what_it_gives_whole(monkeypatch):
    block, x = dense_block(), torch.randn(1, 16, 33, 12).to(memory_format=torch.channels_last)
    rounded = Int8DenseBlock(block, ranges_of(block, x), torch.float32)
    with torch.inference_mode():
        whole = rounded(x)
        monkeypatch.setattr("tegula.models.prescalers.networks.CACHED_PIXELS", 12 * 7)
        assert torch.equal(rounded(x), whole)


@only_where_it_is_fast
def test_what_goes_beyond_its_range_is_cut_and_stays_finite():
    block, x = dense_block(), torch.randn(1, 16, 8, 8).to(memory_format=torch.channels_last)
    rounded = Int8DenseBlock(block, ranges_of(block, x), torch.float32)
    with torch.inference_mode():
        assert rounded(x * 1000).isfinite().all()


@only_where_it_is_fast
@pytest.mark.parametrize("share", [0.35, 0.8])
def test_pictures_are_those_of_the_net_within_a_level(photo, picture, share):
    rounded = with_share(photo, share)
    plain = dataclasses.replace(rounded, ranges=None)
    off = np.abs(run_network(picture, rounded) - run_network(picture, plain)) * 255
    assert 0 < off.mean() < 1.5
    assert np.quantile(off, 0.99) < 8


@only_where_it_is_fast
def test_another_share_rounds_other_weights_and_leaves_the_first_alone(photo, picture):
    before = run_network(picture, photo)
    other = run_network(picture, with_share(photo, 0.2))
    assert np.abs(other - before).max() > 0.02
    np.testing.assert_array_equal(run_network(picture, photo), before)


@only_where_it_is_fast
def test_last_blocks_and_what_follows_keep_their_precision(photo):
    rounded = {n.split(".")[1] for n, m in photo.int8.named_modules() if type(m) is Int8DenseBlock}
    assert rounded == {str(block) for block in range(20)}
    assert photo.int8.conv_hr.weight is photo.network.conv_hr.weight


@only_where_it_is_fast
def test_progress_reaches_its_end_and_cancel_stops_within_the_net(photo, picture):
    shares = []
    run_network(picture, photo, StageProgress(on_share=shares.append))
    assert len(shares) > 200
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=1e-6)
    asked = iter([False] * 50)
    with pytest.raises(CancelledError):
        run_network(picture, photo, StageProgress(cancel=Cancel(lambda: next(asked, True))))


def test_a_net_without_ranges_stays_as_it_is():
    assert load_prescaler("tegula-swift", CPU, torch.float32, int8=True).int8 is None
    assert load_prescaler("realesrgan-x4plus", CPU, torch.float32, int8=True).int8 is None


# When it is used.


def test_auto_takes_it_where_the_processor_is_fast_at_it_and_a_named_precision_never(monkeypatch):
    for is_fast in (True, False):
        monkeypatch.setattr(upscaling, "multiplies_int8", lambda is_fast=is_fast: is_fast)
        assert Upscaler.load("mini", device="cpu").bundle.int8 is is_fast
        assert not Upscaler.load("mini", device="cpu", precision="fp32").bundle.int8


@only_where_it_is_fast
def test_the_nets_of_a_bundle_load_it_and_keep_it_with_other_shares(monkeypatch):
    bundle = Upscaler.load("mini", device="cpu").bundle
    nets = Nets(dataclasses.replace(bundle, compiles=True))
    assert nets.prescaler(PHOTO, 0.5).int8 is not None
    assert nets.prescaler(PHOTO, 0.5).compiled is None
    plain = dataclasses.replace(bundle, int8=False)
    assert Nets(plain).prescaler(PHOTO, 0.5).int8 is None
    assert kind_of(plain) != kind_of(bundle)


@pytest.mark.parametrize("missing", ["machine", "operator", "another signature"])
def test_what_is_not_there_is_a_no(monkeypatch, missing):
    if missing == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
    elif missing == "operator":
        monkeypatch.setattr(torch.ops, "onednn", object())
    else:
        monkeypatch.setattr(torch.ops.onednn, "qconv_prepack", lambda: None)
    multiplies_int8.cache_clear()
    try:
        assert not int8.multiplies_int8()
    finally:
        multiplies_int8.cache_clear()


@only_where_it_is_fast
def test_a_processor_whose_sums_overflow_is_found_out():
    script = "from tegula.models.prescalers.int8 import multiplies_int8 as m; print(m())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "False"


# How ranges are measured.


def test_ranges_cover_so_many_of_the_pictures_in_the_first_blocks(tiny_rrdb):
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    all_of_them = measure_ranges(tiny_rrdb, pictures, 1, 1.0)
    assert set(all_of_them) == {f"body.0.rdb{n}" for n in (1, 2, 3)}
    assert {tuple(each.shape) for each in all_of_them.values()} == {(8 + 4 * 4,)}
    most = [measure_ranges(tiny_rrdb, each[None], 1, 1.0)["body.0.rdb2"] for each in pictures]
    torch.testing.assert_close(all_of_them["body.0.rdb2"], torch.stack(most).amax(0))
    half = measure_ranges(tiny_rrdb, pictures, 1, 0.5)["body.0.rdb2"]
    torch.testing.assert_close(half, torch.stack(most).quantile(0.5, dim=0))


@pytest.fixture
def tiny_rrdb():
    torch.manual_seed(0)
    return RRDBNet(blocks=2, features=8, growth=4).eval()
