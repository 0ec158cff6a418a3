"""Tiny Stable Diffusion files on disk, for the tests of their loading."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tegula.models import BundleSettings
from tegula.models.bundle import Bundle, ControlImage, ControlScale, WindowBatch
from tegula.models.sd15 import load
from tests.tiny.files import TinyFiles, save_tiny
from tests.tiny.networks import tiny_bundle


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> TinyFiles:
    return save_tiny(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture
def folder(files, tmp_path) -> Path:
    return Path(shutil.copytree(files.folder, tmp_path / "model"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path / "models"))


def load_sd15(model, *, device="cpu", dtype=torch.float32, config=None, **parts) -> Bundle:
    wanted = BundleSettings(bundle=model, **parts)
    return load.load_sd15(wanted, device=device, dtype=dtype, config=config)


def load_single_file(files: TinyFiles, **changes):
    parts = {"controlnet": str(files.controlnet), "config": str(files.folder), **changes}
    return load_sd15(str(parts.pop("model", files.checkpoint)), **parts)


def changed_checkpoint(files, tmp_path, change) -> Path:
    state = load_file(files.checkpoint)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def result(bundle):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    control = ControlImage(picture, picture)
    latents = bundle.autoencoder.encode(picture, control, torch.Generator().manual_seed(2))
    batch = WindowBatch(
        latents,
        torch.tensor(400),
        bundle.text.encode(["a red cat"]),
        bundle.denoiser.embed_control(control),
        ControlScale(0.8),
        slice(0, 1),
    )
    return bundle.autoencoder.decode(bundle.denoiser(batch), control)


@cache
def expected_result():
    """What the networks of ``files`` give that never were on disk."""
    return result(tiny_bundle(3))


def batch_of(bundle, rows, *, guess_mode=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(rows, 3, 64, 64, generator=generator)
    return WindowBatch(
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.arange(rows) * 10 + 300,
        bundle.text.encode(["a cat"] * rows),
        bundle.denoiser.embed_control(ControlImage(pictures, pictures)),
        ControlScale(0.7, guess_mode=guess_mode),
        slice(rows // 2 if guess_mode else 0, rows),
    )
