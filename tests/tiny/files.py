"""The tiny networks written in every format that real weights come in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.networks import Networks
from tests.tiny.networks import tiny_networks, write_tokenizer


@dataclass(frozen=True)
class TinyFiles:
    """Where ``save_tiny`` put what.

    folder: the diffusers folder, with a ``controlnet`` folder inside.
    checkpoint: one file with the keys of the original Stable Diffusion.
    controlnet, vae: one file each, with the keys of the original releases.
    """

    folder: Path
    checkpoint: Path
    controlnet: Path
    vae: Path


def save_tiny(folder: Path, seed: int = 0) -> TinyFiles:
    """Write the tiny networks into ``folder`` in the real formats."""
    networks = tiny_networks(seed)
    files = TinyFiles(
        folder / "diffusers",
        folder / "checkpoint.safetensors",
        folder / "controlnet.safetensors",
        folder / "vae.safetensors",
    )
    _save_folder(networks, files.folder)
    unet = original_unet(networks.unet.state_dict())
    vae = original_autoencoder(networks.autoencoder.state_dict())
    text = original_text(networks.text_model.state_dict())
    save_file({**unet, **vae, **text, "betas": torch.linspace(0, 1, 4)}, files.checkpoint)
    save_file(original_controlnet(networks.controlnet.state_dict()), files.controlnet)
    save_file(
        {name.removeprefix("first_stage_model."): weight for name, weight in vae.items()},
        files.vae,
    )
    return files


def _save_folder(networks: Networks, folder: Path) -> None:
    networks.unet.save_pretrained(folder / "unet")
    networks.autoencoder.save_pretrained(folder / "vae")
    networks.controlnet.save_pretrained(folder / "controlnet")
    state = {name: part.contiguous() for name, part in networks.text_model.state_dict().items()}
    networks.text_model.config.save_pretrained(folder / "text_encoder")
    save_file(state, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    settings = {"scheduler/scheduler_config.json": dict(SCHEDULER), "model_index.json": _INDEX}
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


_INDEX: dict[str, object] = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def original_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the tiny UNet under the keys of the original release."""
    return _renamed(state, "model.diffusion_model.", [*_ENTRY, *_DOWN, *_MIDDLE, *_UP, *_RESNET])


def original_controlnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the tiny ControlNet under the keys of the original release."""
    return _renamed(state, "control_model.", [*_CONTROL, *_ENTRY, *_DOWN, *_MIDDLE, *_RESNET])


def original_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder's weights under the keys of the original release."""
    renamed = _renamed(state, "first_stage_model.", _AUTOENCODER)
    is_convolution = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight$")
    return {
        name: weight[:, :, None, None].contiguous() if is_convolution.search(name) else weight
        for name, weight in renamed.items()
    }


def original_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the text encoder's weights under the keys of the original release."""
    prefix = "cond_stage_model.transformer.text_model."
    renamed = {prefix + name.removeprefix("text_model."): part for name, part in state.items()}
    renamed[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    return renamed


_Rules = list[tuple[str, str]]


def _renamed(state: Mapping[str, Tensor], prefix: str, rules: _Rules) -> dict[str, Tensor]:
    return {prefix + _rename(name, rules): weight.contiguous() for name, weight in state.items()}


def _rename(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


_ENTRY: _Rules = [
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
]
_DOWN: _Rules = [
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
]
_MIDDLE: _Rules = [
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
]
_UP: _Rules = [
    (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.1.conv"),
    (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
    (r"^up_blocks\.1\.attentions\.0", "output_blocks.2.1"),
    (r"^up_blocks\.1\.attentions\.1", "output_blocks.3.1"),
]
_RESNET: _Rules = [
    (r"^(\w+put_blocks\.\d+\.0|middle_block\.[02])\.norm1", r"\1.in_layers.0"),
    (r"^(\w+put_blocks\.\d+\.0|middle_block\.[02])\.norm2", r"\1.out_layers.0"),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
_CONTROL: _Rules = [
    (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
    (r"^controlnet_cond_embedding\.conv_out", "input_hint_block.14"),
    *(
        (rf"^controlnet_cond_embedding\.blocks\.{at}\.", f"input_hint_block.{2 * at + 2}.")
        for at in range(6)
    ),
    (r"^controlnet_down_blocks\.(\d)", r"zero_convs.\1.0"),
    (r"^controlnet_mid_block", "middle_block_out.0"),
]
_AUTOENCODER: _Rules = [
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    *((rf"up_blocks\.{at}\.resnets", f"up.{3 - at}.block") for at in range(4)),
    *((rf"up_blocks\.{at}\.upsamplers\.0", f"up.{3 - at}.upsample") for at in range(4)),
    (r"conv_shortcut", "nin_shortcut"),
]
