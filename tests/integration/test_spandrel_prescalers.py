"""Files of other architectures than ours, which spandrel reads."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import of_arrays

from tegula.errors import BrokenWeightsError, MissingExtraError
from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import RRDBNet
from tegula.models.spandrel_networks import RESTORERS, torchvision_replaced
from tegula.pipeline import prescale

run_network = of_arrays(prescale.run_network)


def load(path, dtype=torch.float32):
    return load_prescaler(str(path), torch.device("cpu"), dtype)


def save(state, path):
    safetensors.torch.save_file(dict(state), path)
    return path


def foreign_file(tmp_path):
    return save({"layers.0.norm1.weight": torch.ones(3)}, tmp_path / "swinir.safetensors")


def test_other_networks_ask_for_spandrel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tegula\[formats\]"'):
        load(foreign_file(tmp_path))


class FakeDescriptor:
    """Stands in for spandrel's: callable, in the precision of its model, which it clamps."""

    input_channels = output_channels = 3
    scale = 2
    purpose = "SR"
    architecture = types.SimpleNamespace(id="SwinIR", name="SwinIR")

    def __init__(self):
        self.model = torch.nn.Conv2d(3, 3, 1)

    def __call__(self, x):
        assert x.dtype == self.model.weight.dtype
        return torch.nn.functional.interpolate(self.model(x), scale_factor=2).clamp(0, 1)


def fake_spandrel(monkeypatch, load_from_state_dict):
    loader = types.SimpleNamespace(load_from_state_dict=load_from_state_dict)
    module = types.ModuleType("spandrel")
    module.ModelLoader = lambda: loader
    monkeypatch.setitem(sys.modules, "spandrel", module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_networks_run_through_spandrel(tmp_path, monkeypatch, dtype):
    seen = []
    fake_spandrel(monkeypatch, lambda state: seen.append(state) or FakeDescriptor())
    loaded = load(foreign_file(tmp_path), dtype)
    assert list(seen[0]) == ["layers.0.norm1.weight"]
    assert (loaded.facts.factor, loaded.facts.net) == (2, "SwinIR")
    assert run_network(np.zeros((8, 8, 3), np.float32), loaded).shape == (16, 16, 3)


def test_a_network_that_spandrel_does_not_know_is_refused(tmp_path, monkeypatch):
    def unknown(state):
        raise ValueError("unsupported")

    fake_spandrel(monkeypatch, unknown)
    with pytest.raises(BrokenWeightsError, match="spandrel does not know"):
        load(foreign_file(tmp_path))


def test_esrgan_plus_runs_through_spandrel(tmp_path):
    with torchvision_replaced():
        esrgan = pytest.importorskip("spandrel.architectures.ESRGAN").ESRGAN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = esrgan(num_filters=64, num_blocks=2, scale=2, plus=True).eval()
    torch.save({"net_g": network.state_dict()}, tmp_path / "plus.pth")
    prescaler = load_prescaler(str(tmp_path / "plus.pth"), torch.device("cpu"), torch.float32)
    picture = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(picture).clamp(0, 1)
        assert prescaler.network is not None
        assert torch.allclose(prescaler.network(picture), expected, atol=1e-5)
    assert prescaler.facts.factor == 2


_BLOCKS = {"depths": (2,), "num_heads": (2,), "embed_dim": 24, "upscale": 2}
FOREIGN = {
    "ESRGAN.ESRGAN": {"num_filters": 16, "num_blocks": 1, "scale": 2},
    "Compact.Compact": {"num_feat": 16, "num_conv": 2, "upscale": 2},
    "SPAN.SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16, "upscale": 2},
    "OmniSR.OmniSR": {"num_feat": 16, "up_scale": 2},
    "PLKSR.PLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "PLKSR.RealPLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2, "dysample": True},
    "SAFMN.SAFMN": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "DITN.DITN": {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 1, "upscale": 2},
    "MoSR.MoSR": {"upscale": 2, "n_block": 2, "dim": 16},
    "SwiftSRGAN.SwiftSRGAN": {"num_channels": 16, "num_blocks": 2, "upscale_factor": 2},
    "Swin2SR.Swin2SR": {**_BLOCKS, "window_size": 8, "upsampler": "pixelshuffledirect"},
    "SeemoRe.SeemoRe": {"scale": 2, "num_experts": 3, "num_layers": 2, "embedding_dim": 16},
    "HAT.HAT": {
        **_BLOCKS,
        "embed_dim": 48,
        "window_size": 8,
        "upsampler": "pixelshuffle",
        "squeeze_factor": 12,
    },
    "DAT.DAT": {
        "embed_dim": 24,
        "depth": [2],
        "num_heads": [2],
        "split_size": [8, 8],
        "upscale": 2,
        "upsampler": "pixelshuffledirect",
    },
    "RGT.RGT": {"embed_dim": 24, "depth": [2], "num_heads": [2], "upscale": 2},
    "DRCT.DRCT": {**_BLOCKS, "upsampler": "pixelshuffle", "gc": 8},
    "CRAFT.CRAFT": {"upscale": 2, "depths": [2], "num_heads": [6]},
    "RealCUGAN.UpCunet2x": {},
    "RCAN.RCAN": {"scale": 2, "n_resgroups": 1, "n_resblocks": 2, "n_feats": 32},
    "ATD.ATD": {**_BLOCKS, "window_size": 8, "upsampler": "pixelshuffle", "num_tokens": 16},
    "FDAT.FDAT": {
        "scale": 2,
        "embed_dim": 24,
        "num_groups": 1,
        "depth_per_group": 1,
        "num_heads": 2,
        "upsampler_type": "pixelshuffledirect",
    },
    "MoESR.MoESR": {"scale": 2, "dim": 16, "n_blocks": 1, "n_block": 1},
    "GRL.GRL": {
        "embed_dim": 24,
        "upscale": 2,
        "upsampler": "pixelshuffle",
        "depths": [2],
        "num_heads_window": [2],
        "num_heads_stripe": [2],
        "stripe_shift": True,
        "anchor_window_down_factor": 2,
        "mlp_ratio": 2.0,
    },
    "DCTLSA.DCTLSA": {"nf": 20, "upscale": 2},
    "MMRealSR.MMRealSR": {
        "num_in_ch": 3,
        "num_out_ch": 3,
        "num_feat": 16,
        "num_block": 1,
        "num_grow_ch": 8,
        "num_feats": [8, 16, 16, 16],
        "num_blocks": [1, 1, 1, 1],
    },
    "IPT.IPT": {"n_feats": 8, "scale": [2], "num_heads": 2, "num_layers": 1, "patch_size": 24},
    "AuraSR.AuraSR": {
        "dim": 8,
        "image_size": None,
        "input_image_size": None,
        "init_dim": 8,
        "style_network": {"dim_in": 8, "dim_out": 32, "depth": 2},
        "up_dim_mults": (1, 1, 1, 1, 1),
        "down_dim_mults": (1, 1, 1),
        "full_attn": (False,) * 5,
        "mid_attn_depth": 1,
        "num_conv_kernels": 2,
        "skip_connect_scale": 0.4,
    },
}
_FACTORS = {"MMRealSR.MMRealSR": 4, "AuraSR.AuraSR": 4}
_GRIDS = {"FDAT.FDAT": 8, "DAT.DAT": 8, "GRL.GRL": 8, "DCTLSA.DCTLSA": 16, "RCAN.RCAN": 1}
_DIFFERENT_WHEN_BARE = {
    "IPT.IPT": "takes patches of one size in 0..255, which spandrel cuts, scales and joins",
    "MMRealSR.MMRealSR": "returns the degradation that it found beside the picture",
}
"""Networks that spandrel's descriptor calls in a way of its own, and why."""


def foreign_network(name):
    """Return a small network of another architecture, with what its file holds."""
    module, kind = name.split(".")
    with torchvision_replaced():
        architecture = pytest.importorskip(f"spandrel.architectures.{module}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(architecture, kind)(**FOREIGN[name]).eval()
        if name in ("FDAT.FDAT", "MMRealSR.MMRealSR", "AuraSR.AuraSR"):  # fresh ones are silent
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if name == "AuraSR.AuraSR":
                    network.final_to_rgb.bias.fill_(0.5)
    state = network.state_dict()
    if name == "GRL.GRL":  # released files hold its tables, which alone tell its windows
        state |= {each: getattr(network, each) for each in ("table_w", "table_sh", "index_sh_a2w")}
    return network, state


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_architecture_gives_what_the_bare_network_gives(tmp_path, name):
    network, state = foreign_network(name)
    torch.save({"params": state}, tmp_path / "own.pth")
    prescaler = load(tmp_path / "own.pth")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = picture.clone()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        assert prescaler.network is not None
        result = prescaler.network(picture)
        assert torch.equal(picture, before)  # RCAN's code scales what it is given in place
        with torchvision_replaced():
            import spandrel
        descriptor = spandrel.ModelLoader().load_from_state_dict(dict(state))
        for each in (descriptor, *([network] if name not in _DIFFERENT_WHEN_BARE else [])):
            torch.manual_seed(0)  # AuraSR draws noise, which is the same in every tile here
            expected = each(before.clone()).clamp(0, 1)
            assert torch.allclose(result.clamp(0, 1), expected, atol=1e-4)
    assert result.std() > 0.01
    assert prescaler.facts.factor == _FACTORS.get(name, 2)
    assert prescaler.facts.grid == _GRIDS.get(name, prescaler.facts.grid)


def test_a_folded_picture_of_odd_size_differs_from_spandrels_at_the_border_alone(tmp_path):
    """What is missing is repeated here, and mirrored there."""
    with torchvision_replaced():
        spandrel = pytest.importorskip("spandrel")
    torch.manual_seed(0)
    network = RRDBNet(blocks=1, features=16, unshuffle=2).eval()
    descriptor = spandrel.ModelLoader().load_from_state_dict(network.state_dict())
    loaded = load(save(network.state_dict(), tmp_path / "own.safetensors"))
    picture = torch.rand(1, 3, 109, 111, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = loaded.network(picture).clamp(0, 1), descriptor(picture)
        even = picture[..., :60, :64]
        assert torch.allclose(loaded.network(even).clamp(0, 1), descriptor(even), atol=1e-5)
    assert ours.shape == theirs.shape == (1, 3, 218, 222)
    assert torch.allclose(ours[..., :110, :110], theirs[..., :110, :110], atol=1e-5)


@pytest.mark.parametrize("is_installed", [True, False])
def test_networks_of_the_package_beside_spandrel_are_read_where_it_is_installed(
    tmp_path, monkeypatch, is_installed
):
    """SRFormer and FeMaSR, which may be used for non-commercial purposes only."""
    installed = []

    def known_then(state):
        if not installed:
            raise ValueError("unsupported")
        return FakeDescriptor()

    fake_spandrel(monkeypatch, known_then)
    extra = types.ModuleType("spandrel_extra_arches")
    extra.install = lambda *, ignore_duplicates: installed.append(ignore_duplicates)
    monkeypatch.setitem(sys.modules, "spandrel_extra_arches", extra if is_installed else None)
    if is_installed:
        assert load(foreign_file(tmp_path)).facts.factor == 2
        assert installed == [True]
        return
    with pytest.raises(BrokenWeightsError, match="spandrel does not know"):
        load(foreign_file(tmp_path))


WITHOUT_ENLARGING = {
    "NAFNet.NAFNet": ({"width": 8, "enc_blk_nums": [1], "dec_blk_nums": [1]}, "restores pictures"),
    "DnCNN.DnCNN": ({"in_nc": 3, "out_nc": 3, "nc": 8, "nb": 4}, "restores pictures"),
    "SCUNet.SCUNet": ({"config": [1] * 7, "dim": 64}, "restores pictures"),
    "Uformer.Uformer": (
        {"embed_dim": 8, "depths": [1] * 9, "num_heads": [1] * 9},
        "restores pictures",
    ),
    "SAFMNBCIE.SAFMNBCIE": ({"dim": 8, "n_blocks": 1, "num_layers": 1}, "restores pictures"),
    "SPAN.SPAN": (
        {"num_in_ch": 1, "num_out_ch": 1, "feature_channels": 16, "upscale": 2},
        "does not turn one colour picture",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", WITHOUT_ENLARGING)
def test_a_network_that_enlarges_no_colour_picture_is_refused_by_name(tmp_path, name):
    module, kind = name.split(".")
    words, reason = WITHOUT_ENLARGING[name]
    with torchvision_replaced():
        architecture = pytest.importorskip(f"spandrel.architectures.{module}")
    torch.save(getattr(architecture, kind)(**words).state_dict(), tmp_path / "own.pth")
    with pytest.raises(BrokenWeightsError, match=f"its network, {module[:4]}.*{reason}"):
        load(tmp_path / "own.pth")


def test_a_network_that_fills_holes_is_refused_by_name(tmp_path, monkeypatch):
    lama = FakeDescriptor()
    lama.purpose, lama.architecture = "Inpainting", types.SimpleNamespace(id="LaMa", name="LaMa")
    fake_spandrel(monkeypatch, lambda state: lama)
    with pytest.raises(BrokenWeightsError, match="its network, LaMa, fills holes"):
        load(foreign_file(tmp_path))


def test_every_architecture_of_spandrel_is_in_the_table_of_the_documents():
    with torchvision_replaced():
        spandrel = pytest.importorskip("spandrel")
    page = (Path(__file__).parents[2] / "docs" / "stable-diffusion.md").read_text()
    table = page.partition("| network of a prescaler file |")[2].partition("\n\n")[0]
    read, refused, faces = (row.split("|")[1] for row in table.split("\n")[2:5])
    listed = {
        kind: {name.strip().replace("-", "").replace(" ", "") for name in text.split(",")}
        for kind, text in (("read", read), ("refused", refused), ("faces", faces))
    }
    known = {each.architecture.id.replace(" ", "") for each in spandrel.MAIN_REGISTRY}
    assert set().union(*listed.values()) == known
    assert {name.replace("-", "") for name in RESTORERS} | {"LaMa"} == listed["refused"]
    tested = {name.partition(".")[0] for name in FOREIGN}
    assert listed["read"] - tested == {"SwinIR"}  # has tests of its own
