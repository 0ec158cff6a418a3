"""What files of LoRAs call the layers of a model, and the parts of their changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

UNET, TEXT = "unet", "text_encoder"
"""The networks that LoRAs change, by their folders."""

# What the tensors of a layer are called: the part that each is, by a pattern of its name's end.
#
# kohya's trainer writes ``X.lora_down.weight``, PEFT ``X.lora_A.weight`` or
# ``X.lora_A.ADAPTER.weight``, diffusers ``X.lora.down.weight``, ``X.lora_linear_layer.down.weight``
# or ``processor.X_lora.down.weight``.

_PARTS = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"\.lora_(?:down|A(?:\.[^.]+)?)\.weight$", "down"),
        (r"\.lora_(?:up|B(?:\.[^.]+)?)\.weight$", "up"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight$", "down"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight$", "up"),
        (r"\.lora_mid\.weight$", "mid"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)?(?:\.(?:lora_)?down\.weight)?\.alpha$", "alpha"),
        (r"\.dora_scale$", "dora_scale"),
        (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$", "magnitude"),
        (r"\.(?:diff|w_norm)$", "diff"),
        (r"\.(?:diff_b|b_norm)$", "diff_b"),
        (r"\.ia3_l(?:\.[^.]+)?$", "ia3_l"),
        (r"\.on_input$", "on_input"),
        (r"\.a1\.weight$", "glora_a1"),
        (r"\.a2\.weight$", "glora_a2"),
        (r"\.b1\.weight$", "glora_b1"),
        (r"\.b2\.weight$", "glora_b2"),
        (r"\.oft_blocks$", "oft_blocks"),
        (r"\.rescale$", "rescale"),
        # Last, since it fits what no other does: (IA)3, beside its ``on_input``.
        (r"\.weight$", "ia3"),
    )
)
_LYCORIS_PART = re.compile(r"\.((?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))$")

_PREFIX = re.compile(
    r"(?:base_model_model_)?"
    r"(?:(?P<unet>(?:lora_|lycoris_)?unet_|(?:model_)?diffusion_model_)"
    r"|(?P<text_encoder>lora_te1?_|(?:text_encoders_)?clip_l_|text_encoder_|cond_stage_model_)"
    r"|lycoris_)?"
    r"(?:base_model_model_)?(?:transformer_)?(?:text_model_)?"
)
"""What stands before the name of a layer, its dots as underscores; without it both nets fit."""


def split_name(name: str) -> tuple[str, str]:
    """Return the layer and the part that a tensor of a file belongs to; "" for unknown parts."""
    lycoris = _LYCORIS_PART.search(name)
    if lycoris is not None:
        return name[: lycoris.start()], lycoris[1]
    for pattern, part in _PARTS:
        found = pattern.search(name)
        if found is not None:
            return name[: found.start()], part
    return name, ""


def find_layer_name(name: str) -> tuple[set[str], str]:
    """Return the networks that a layer of a file may belong to, and its name without them."""
    plain = name.replace(".", "_").replace("_processor_", "_")
    prefix = next(_PREFIX.finditer(plain))  # it fits the start of every name, if only as ""
    networks = {network for network in (UNET, TEXT) if prefix[network]}
    return networks or {UNET, TEXT}, plain[prefix.end() :]


def layers_by_name(network: str, parameters: Iterable[str]) -> Mapping[str, str]:
    """Return the layers of a network by all names that files have for them."""
    layers = {name.removeprefix("text_model.").rpartition(".")[0] for name in parameters}
    names: dict[str, str] = {}
    for layer in layers:
        own = layer.replace(".", "_")
        if network == UNET:
            others = [own.removesuffix("_0")] if own.endswith("_to_out_0") else []
            others.append(_original_name(layer).replace(".", "_"))
        else:  # the oldest scripts of diffusers
            others = [re.sub(r"_(q|k|v|out)_proj$", r"_to_\1", own)]
        names |= dict.fromkeys(others, layer) | {own: layer}
    return names


_ORIGINAL_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ORIGINAL_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _original_name(layer: str) -> str:
    """Return what the original code calls a layer of the UNet, which diffusers renumbered."""
    if layer in _ORIGINAL_ENDS:
        return _ORIGINAL_ENDS[layer]
    found = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.+)", layer)
    if found is None:
        return layer
    side, kind, inner, rest = found[1], found[3], int(found[4]), found[5]
    block = int(found[2] or 0)
    rest = _ORIGINAL_PARTS.get(rest, rest)
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * inner}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":  # behind the attention, which the first block does not have
        return f"output_blocks.{3 * block + 2}.{2 if block else 1}.conv"
    first = f"input_blocks.{3 * block + inner + 1}"
    place = first if side == "down" else f"output_blocks.{3 * block + inner}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{rest}"
