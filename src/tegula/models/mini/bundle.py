"""mini as a bundle: the words that it understands, and its folder of weights.

The folder holds ``mini.safetensors`` (fp16), ``config.json`` (network shape, vocabulary,
presets and the SHA-256 of the weights) and the model card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tegula.errors import BrokenWeightsError
from tegula.models.bundle import Bundle, BundleFacts
from tegula.models.files import read_packaged, read_packaged_tensors
from tegula.models.mini import CONFIG_FILE, WEIGHTS, WEIGHTS_FILE
from tegula.models.mini.network import (
    BLOCK,
    CHANNELS,
    BlockAutoencoder,
    MiniDenoiser,
    MiniNetwork,
    NetworkShape,
    prepare,
)
from tegula.models.prompt import USUAL_STYLE, PromptStyle, parse_prompt
from tegula.options import PresetValues, Weighting

# Words: a fixed vocabulary of what can be read off a picture itself.
#
# mini was never shown what things are called, so a prompt steers quality, light, colour
# and texture alone. A prompt becomes one row of weights, one per known word: 1 where the
# word stands, more or less where brackets say so (``tegula.models.prompt``).

VOCABULARY = (
    # quality, learned from damaged and clean targets
    "sharp", "detailed", "blurry", "noisy", "jpeg", "oversharpened", "smooth", "grainy",
    # texture and contrast, measured
    "textured", "plain", "contrast", "flat",
    # light, measured
    "dark", "bright", "night", "highlights",
    # colour, measured
    "colourful", "grey", "warm", "cold", "red", "orange", "yellow", "green", "cyan", "blue",
    "purple", "brown",
)  # fmt: skip
VOCABULARY_SIZE = len(VOCABULARY)

SYNONYMS: Mapping[str, str] = {
    "crisp": "sharp", "sharpness": "sharp", "focused": "sharp", "focus": "sharp",
    "detail": "detailed", "details": "detailed", "intricate": "detailed", "fine": "detailed",
    "hd": "detailed", "uhd": "detailed", "4k": "detailed", "8k": "detailed",
    "blur": "blurry", "blurred": "blurry", "unsharp": "blurry", "defocused": "blurry",
    "lowres": "blurry", "soft": "smooth",
    "noise": "noisy", "jpg": "jpeg", "artifacts": "jpeg", "artefacts": "jpeg",
    "artifact": "jpeg", "artefact": "jpeg", "compression": "jpeg", "compressed": "jpeg",
    "blocky": "jpeg", "oversharp": "oversharpened", "halos": "oversharpened",
    "ringing": "oversharpened", "grain": "grainy", "film": "grainy",
    "texture": "textured", "textures": "textured", "rough": "textured",
    "empty": "plain", "contrasty": "contrast", "contrasted": "contrast",
    "darkness": "dark", "dim": "dark", "lowkey": "dark", "light": "bright",
    "highkey": "bright", "nighttime": "night", "glowing": "highlights",
    "colorful": "colourful", "vivid": "colourful", "saturated": "colourful",
    "vibrant": "colourful", "gray": "grey", "monochrome": "grey", "greyscale": "grey",
    "grayscale": "grey", "cool": "cold", "violet": "purple", "pink": "purple",
    "magenta": "purple", "teal": "cyan", "turquoise": "cyan", "golden": "yellow",
}  # fmt: skip

STOP_WORDS = frozenset(
    (
        "a", "an", "and", "are", "as", "at", "by", "for", "from", "high", "in", "is", "it",
        "its", "of", "on", "or", "over", "quality", "the", "to", "very", "with", "low", "best",
        "worst", "good", "bad", "photo", "photograph", "photography", "picture", "image",
    )
)  # fmt: skip
HEAVIEST = 2.0
"""Largest weight of a word; more of it is taken as this."""
_WORD = re.compile(r"[^\W_]+")


def weighted_words(prompt: str, weighting: Weighting = "a1111") -> list[tuple[str, float]]:
    """Return the words of a prompt in lower case, each with its weight; numbers are none."""
    return [
        (word.lower(), stretch.weight)
        for stretch in parse_prompt(prompt, weighting)
        for word in _WORD.findall(stretch.text)
        if not word.isdecimal()
    ]


def known_word(word: str) -> str | None:
    """Return the vocabulary's form of a word, or None."""
    word = SYNONYMS.get(word, word)
    return word if word in VOCABULARY else None


def encode_words(prompt: str, weighting: Weighting = "a1111") -> Tensor:
    """Return the weight of each vocabulary word, [vocabulary]; the empty prompt is all 0."""
    weights = torch.zeros(VOCABULARY_SIZE)
    for word, weight in weighted_words(prompt, weighting):
        name = known_word(word)
        if name is not None:
            index = VOCABULARY.index(name)
            weights[index] = min(HEAVIEST, max(float(weights[index]), weight))
    return weights


class WordEncoder:
    """The text encoder of mini's bundle."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def encode(self, prompts: Sequence[str], style: PromptStyle = USUAL_STYLE) -> Tensor:
        """Return [len(prompts), 1, vocabulary]."""
        rows = torch.stack([encode_words(prompt, style.weighting) for prompt in prompts])
        return rows[:, None].to(device=self._device, dtype=self._dtype)

    def ignored_words(self, prompt: str) -> tuple[str, ...]:
        """Return the words that mini does not know, each once, in the prompt's order."""
        words = dict.fromkeys(word for word, _ in weighted_words(prompt))
        return tuple(w for w in words if known_word(w) is None and w not in STOP_WORDS)

    def unused_words(
        self,
        prompts: Sequence[str],  # noqa: ARG002
        style: PromptStyle,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Return no word: nobody can bring any."""
        return ()


# Loading.

MINIMUM_WINDOW = 64
STRONGEST_GUIDANCE = 2.0
"""Few-step tuning folds the prompt in: guidance as for 20 steps tears mini's pictures."""

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
    """What ``config.json`` says.

    words: the vocabulary that the weights were trained with, in their order.
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
        reads_prompts=False,
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
        BrokenWeightsError: it is not a configuration of mini, or has other words.
    """
    try:
        content = json.loads(read_packaged(path))
        config = MiniConfig(
            shape=_parse_shape(content["network"]),
            words=tuple(content["words"]),
            window=int(content["window"]),
            presets={name: PresetValues(**values) for name, values in content["presets"].items()},
            sha256=str(content["sha256"]),
            licence=str(content["licence"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenWeightsError(
            f"{path} is not a configuration of mini; install tegula again or name another folder."
        ) from error
    if config.words != VOCABULARY:
        raise BrokenWeightsError(
            f"{path} belongs to a mini with other words than this version of tegula knows."
        )
    return config


def _parse_shape(content: Mapping[str, Any]) -> NetworkShape:
    values: dict[str, Any] = {
        f.name: tuple(v) if isinstance(v := content[f.name], list) else v
        for f in fields(NetworkShape)
    }
    return NetworkShape(**values)


def _read_network(path: Path, config: MiniConfig) -> MiniNetwork:
    tensors = read_packaged_tensors(path, config.sha256)
    try:
        with torch.device("meta"):
            network = MiniNetwork(config.shape)
        network.load_state_dict(tensors, assign=True)
    except (RuntimeError, ValueError) as error:
        raise BrokenWeightsError(
            f"{path} does not fit the network its configuration describes."
        ) from error
    return network
