"""Loads mini from its folder of weights.

The folder holds ``mini.safetensors`` (fp16), ``config.json`` (network shape, vocabulary,
presets and the SHA-256 of the weights) and the model card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tegula.errors import BrokenWeightsError
from tegula.models.bundle import Bundle, BundleFacts
from tegula.models.mini.latents import BLOCK, CHANNELS, BlockAutoencoder
from tegula.models.mini.network import MiniDenoiser, MiniNetwork, NetworkShape, prepare
from tegula.models.mini.words import VOCABULARY, WordEncoder
from tegula.models.verified import read_packaged, read_tensors
from tegula.options import PresetValues

WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_FILE = "mini.safetensors"
CONFIG_FILE = "config.json"
MINIMUM_WINDOW = 64
STRONGEST_GUIDANCE = 2.0
"""Few-step tuning folds the prompt in; what people use for 20 steps tears mini's pictures."""

SCHEDULER: Mapping[str, object] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "clip_sample": False,
    "timestep_spacing": "linspace",
}
"""Settings for diffusers' schedulers, as mini was trained."""


@dataclass(frozen=True)
class MiniConfig:
    """What ``config.json`` holds.

    words: the vocabulary the weights were trained with, in their order.
    """

    shape: NetworkShape
    words: tuple[str, ...]
    window: int
    presets: Mapping[str, PresetValues]
    sha256: str
    licence: str


def load_mini(device: torch.device, dtype: torch.dtype, folder: Path | None = None) -> Bundle:
    """Return mini on a device in one precision.

    Args:
        device: where the network runs.
        dtype: precision of the network; latents are kept in it too.
        folder: where the weights lie; None means those of the package.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, or the two do not belong together.
    """
    folder = WEIGHTS if folder is None else folder
    config = read_config(folder / CONFIG_FILE)
    network = _read_network(folder / WEIGHTS_FILE, config)
    facts = BundleFacts(
        name="mini",
        family="mini",
        latent_factor=BLOCK,
        latent_channels=CHANNELS,
        window=config.window,
        minimum_window=MINIMUM_WINDOW,
        window_multiple=config.shape.multiple,
        presets=config.presets,
        fingerprint=config.sha256,
        licence=config.licence,
        strongest_guidance=STRONGEST_GUIDANCE,
    )
    return Bundle(
        facts=facts,
        text=WordEncoder(device, dtype),
        denoiser=MiniDenoiser(prepare(network, device, dtype), dtype),
        autoencoder=BlockAutoencoder(dtype),
        scheduler=SCHEDULER,
        device=device,
        dtype=dtype,
    )


def read_config(path: Path) -> MiniConfig:
    """Return the settings of ``config.json``.

    Raises:
        MissingWeightsError: the file is not there.
        BrokenWeightsError: it does not hold what it should.
    """
    try:
        config = _parse_config(json.loads(read_packaged(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenWeightsError(
            f"{path} is not a configuration of mini; install tegula again or name another folder."
        ) from error
    if config.words != VOCABULARY:
        raise BrokenWeightsError(
            f"{path} belongs to a mini with other words than this version of tegula knows."
        )
    return config


def _parse_config(content: Mapping[str, Any]) -> MiniConfig:
    return MiniConfig(
        shape=_parse_shape(content["network"]),
        words=tuple(content["words"]),
        window=int(content["window"]),
        presets={name: PresetValues(**values) for name, values in content["presets"].items()},
        sha256=str(content["sha256"]),
        licence=str(content["licence"]),
    )


def _parse_shape(content: Mapping[str, Any]) -> NetworkShape:
    values: dict[str, Any] = {
        f.name: tuple(v) if isinstance(v := content[f.name], list) else v
        for f in fields(NetworkShape)
    }
    return NetworkShape(**values)


def _read_network(path: Path, config: MiniConfig) -> MiniNetwork:
    tensors = read_tensors(path, config.sha256)
    try:
        with torch.device("meta"):
            network = MiniNetwork(config.shape)
        network.load_state_dict(tensors, assign=True)
    except (RuntimeError, ValueError) as error:
        raise BrokenWeightsError(
            f"{path} does not fit the network its configuration describes."
        ) from error
    return network
