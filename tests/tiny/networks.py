"""The tiny networks, built in memory."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tegula.models.bundle import Bundle
from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.networks import Networks, assemble

TEXT_WIDTH = 16
_WORDS = ("a", "the", "of", "photo", "cat", "dog", "red", "sharp", "blurry")
_NET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": TEXT_WIDTH,
}


_FLAT_NET = {
    **_NET,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
}


def tiny_networks(seed: int = 0, *, flat: bool = False) -> Networks:
    """Return seeded random networks, float32 on the CPU, in evaluation mode.

    The same seed gives the same weights; the global random state is left alone.

    Args:
        seed: same seed, same weights.
        flat: one resolution in place of two, and attention in the middle alone, for what takes
            its time by the layer.
    """
    net = _FLAT_NET if flat else _NET
    up = ("UpBlock2D",) if flat else ("UpBlock2D", "CrossAttnUpBlock2D")
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = Networks(
            UNet2DConditionModel(sample_size=8, up_block_types=up, **net),
            ControlNetModel(conditioning_embedding_out_channels=(4, 4, 8, 8), **net),
            _autoencoder(),
            _text_model(tokenizer),
            tokenizer,
        )
        _randomise_silent_layers(networks)
    for module in networks.modules:
        module.eval().requires_grad_(requires_grad=False)
    return networks


def tiny_bundle(
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    control: bool = True,
    flat: bool = False,
) -> Bundle:
    """Return a bundle of seeded random weights.

    Args:
        seed: same seed, same weights.
        device: where it runs.
        dtype: the precision it runs in.
        control: False leaves the ControlNet out.
        flat: one resolution in place of two.
    """
    networks = tiny_networks(seed, flat=flat)
    if not control:
        networks = dataclasses.replace(networks, controlnet=None)
    return assemble(
        networks, SCHEDULER, name="tiny", licence="Apache-2.0", device=device, dtype=dtype
    )


def _autoencoder() -> Any:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.18215,
        sample_size=64,
    )


def _text_model(tokenizer: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _randomise_silent_layers(networks: Networks) -> None:
    """Give weights to what starts at zero, so that every input has an effect."""
    control = networks.controlnet
    silent = [control.controlnet_cond_embedding.conv_out, control.controlnet_mid_block]
    for layer in [*silent, *control.controlnet_down_blocks]:
        nn.init.normal_(layer.weight, std=0.2)
        nn.init.normal_(layer.bias, std=0.2)
    text = networks.text_model
    nn.init.normal_(getattr(text, "text_model", text).final_layer_norm.bias, mean=0.3)
    nn.init.normal_(text.get_input_embeddings().weight)


def write_tokenizer(folder: Path) -> None:
    """Write the vocabulary files of a CLIP tokenizer that spells most words out."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*_byte_letters(), *(letter + "</w>" for letter in _byte_letters())]
    merges = [merge for word in _WORDS for merge in _merges(word)]
    merges = list(dict.fromkeys(merges))
    names = [*letters, *("".join(merge) for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


def _merges(word: str) -> list[tuple[str, str]]:
    letters = [*word[:-1], word[-1] + "</w>"]
    return [("".join(letters[:at]), letters[at]) for at in range(1, len(letters))]


def _byte_letters() -> list[str]:
    """Return the 256 letters that byte-level vocabularies write bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [code for code in range(256) if code not in printable]
    return [chr(code) for code in printable] + [chr(256 + at) for at in range(len(others))]
