"""Stable Diffusion 1.5 at its full size: where every weight belongs, and the memory it loads in."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel
from diffusers import UNet2DConditionModel as UNet
from sd15_layout import checkpoint_shapes, controlnet_shapes
from transformers import CLIPTextConfig, CLIPTextModel

from tegula.models.files import read_json
from tegula.models.identify import identify
from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.parts import (
    AUTOENCODER,
    CONTROLNET,
    STANDARD_CONFIG,
    TEXT_MODEL,
    UNET,
)

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize(
    ("kind", "part", "weights"),
    [
        (UNet, "unet", 859_520_964),
        (ControlNetModel, "controlnet", 361_279_120),
        (AutoencoderKL, "vae", 83_653_863),
        (CLIPTextModel, "text_encoder", 123_060_480),
    ],
)
def test_the_standard_configuration_has_the_size_of_the_release(kind, part, weights):
    settings = read_json(STANDARD_CONFIG / part / "config.json")
    with torch.device("meta"):
        if kind is CLIPTextModel:
            model = CLIPTextModel(CLIPTextConfig(**settings))
        else:
            model = kind.from_config(settings)
    assert sum(part.numel() for part in model.parameters()) == weights


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (UNET, checkpoint_shapes()),
        (AUTOENCODER, checkpoint_shapes()),
        (TEXT_MODEL, checkpoint_shapes()),
        (CONTROLNET, controlnet_shapes()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_weight_of_the_release_has_its_place(kind, shapes):
    settings = read_json(STANDARD_CONFIG / kind.folder / "config.json")
    with torch.device("meta"):
        model = kind.build(settings)
    names = kind.names(shapes, settings)
    for name, parameter in model.named_parameters():
        found = [side for side in shapes[names[name]] if side != 1]
        assert found == [side for side in parameter.shape if side != 1], name
    assert str(identify(shapes)).endswith("for Stable Diffusion 1.5")


_MEASURED = """
import json, os, re, sys, torch
from pathlib import Path
from tegula.models import BundleSettings
from tegula.models.load import load_bundle
from tegula.models.sd15.load import load_sd15
for line in sys.stdin:
    given = json.loads(line)
    if os.fork() == 0:
        given["loras"] = [(file, 0.7) for file in given["loras"]]
        load_bundle(BundleSettings(**given), dtype=torch.bfloat16)
        # Not getrusage: a new process begins with the peak of the one that started it.
        status = Path("/proc/self/status").read_text()
        print(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1], flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
full_size = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="measures by /proc")


def write_zeros(path, shapes):
    """Write a safetensors file of half-precision zeros, of which the disk holds the names alone."""
    places, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        places[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(places).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


@pytest.fixture(scope="module")
def peak_of_loading():
    """Return what loads a model in a process of its own, and gives the most memory it took.

    The process is forked from one that has imported everything, which takes longer than loading.
    """
    # glibc gives large blocks back at once, and raises what it calls large as such are freed, up
    # to 32 MB; the holes that smaller ones then leave came to 0.8 to 1.4 GB, as chance had it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    program = [sys.executable, "-c", _MEASURED]
    with subprocess.Popen(
        program, stdin=-1, stdout=-1, text=True, bufsize=1, env=environment
    ) as process:

        def peak(model, controlnet="none", loras=()):
            given = {"bundle": model, "controlnet": controlnet, "loras": loras}
            print(json.dumps(given, default=str), file=process.stdin)
            return int(process.stdout.readline()) * 1024

        yield peak
        process.stdin.close()


@pytest.mark.slow
@full_size
def test_a_checkpoint_of_full_size_loads_with_its_controlnet_in_little_memory(
    tmp_path, peak_of_loading
):
    model, control = tmp_path / "full.safetensors", tmp_path / "control_sd15_tile.safetensors"
    write_zeros(model, checkpoint_shapes())
    write_zeros(control, controlnet_shapes())
    assert control.stat().st_size > 722_000_000
    assert peak_of_loading(model, control) < 4_000_000_000


@pytest.mark.slow
@full_size
def test_a_pickled_checkpoint_and_loras_of_full_size_load_in_little_memory(
    tmp_path, peak_of_loading
):
    shapes = checkpoint_shapes()
    assert len(shapes) == 1130
    model, loras = tmp_path / "full.ckpt", [tmp_path / f"{at}.safetensors" for at in range(2)]
    with torch.serialization.skip_data():  # leaves holes, which are read as zeros
        torch.save({"state_dict": {name: torch.empty(shapes[name]) for name in shapes}}, model)
    assert model.stat().st_size > 2_130_000_000
    for lora, layers in zip(loras, halves_of_a_lora(shapes), strict=True):
        write_zeros(lora, layers)
        assert lora.stat().st_size > 270_000_000
    assert peak_of_loading(model, loras=loras) < 3_500_000_000


def halves_of_a_lora(shapes):
    """Return the shapes in two LoRAs, which share the layers of the UNet between them.

    Each has its largest layer. The convolutions that are most of its weights come as differences,
    which make the files as large as those of rank 128 for every layer and take no product.
    """
    settings = read_json(STANDARD_CONFIG / UNET.folder / "config.json")
    own = {name: shapes[stored] for name, stored in UNET.names(shapes, settings).items()}
    weights = [name for name, shape in own.items() if name.endswith(".weight") and shape[1:]]
    whole = [name for name in weights if tuple(own[name])[1:] == (1280, 3, 3)]
    others = [name for name in weights if name not in whole]
    largest = max(weights, key=lambda name: math.prod(own[name]))
    for at in range(2):
        layers = {}
        for name in {*whole[at::2], *others[at::2], largest}:
            outputs, *inputs = own[name]
            key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            if name in whole:
                layers[f"{key}.diff"] = (outputs, *inputs)
            else:
                layers[f"{key}.lora_down.weight"] = (32, *inputs)
                layers[f"{key}.lora_up.weight"] = (outputs, 32, *[1] * (len(inputs) - 1))
        yield layers


@pytest.mark.slow
@full_size
def test_a_folder_of_full_size_loads_with_its_controlnet_in_little_memory(
    tmp_path, peak_of_loading
):
    folder = Path(shutil.copytree(STANDARD_CONFIG, tmp_path / "model"))
    size = 0
    for kind in (UNET, AUTOENCODER, TEXT_MODEL, CONTROLNET):
        with torch.device("meta"):
            model = kind.build(read_json(folder / kind.folder / "config.json"))
        stem = "model" if kind is TEXT_MODEL else "diffusion_pytorch_model"
        path = folder / kind.folder / f"{stem}.fp16.safetensors"
        write_zeros(path, {name: tuple(part.shape) for name, part in model.named_parameters()})
        size += path.stat().st_size
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    assert size > 2_850_000_000
    assert peak_of_loading(folder, folder / "controlnet") < 4_000_000_000
