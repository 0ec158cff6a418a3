"""Writes the bundle's folder: fp16 safetensors, configuration with hash, and the card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tegula.models.mini import CONFIG_FILE, WEIGHTS_FILE
from tegula.models.mini.bundle import VOCABULARY
from tegula.models.mini.network import MiniNetwork, NetworkShape
from tegula.options import PresetValues

LICENCE = "Apache-2.0"
WINDOW = 512


def export(
    tensors: Mapping[str, Tensor],
    shape: NetworkShape,
    presets: Mapping[str, PresetValues],
    training: Mapping[str, Any],
    folder: Path,
) -> str:
    """Write weights and configuration; returns the SHA-256 of the weights.

    Each file replaces the one before at once, so that a reader never sees half of one.
    """
    MiniNetwork(shape).load_state_dict(tensors)
    data = save({name: t.to(torch.float16).contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    config = {
        "network": dataclasses.asdict(shape),
        "words": VOCABULARY,
        "window": WINDOW,
        "presets": {name: p.model_dump() for name, p in presets.items()},
        "sha256": digest,
        "licence": LICENCE,
        "training": dict(training),
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / WEIGHTS_FILE, data)
    replace(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    return digest


def export_tensors(
    tensors: Mapping[str, Tensor], training: Mapping[str, Any], folder: Path, name: str
) -> str:
    """Write tensors and a configuration with their hash; returns the SHA-256 of the file."""
    data = save({key: t.to(torch.float16).contiguous() for key, t in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    config = {"sha256": digest, "training": dict(training)}
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / f"{name}.safetensors", data)
    replace(folder / f"{name}.json", (json.dumps(config, indent=2) + "\n").encode())
    return digest


def replace(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)  # noqa: PTH105
