"""LoRA files for the tiny networks, and what they change."""

import torch
from safetensors.torch import save_file

from tegula.models.sd15.lora import open_loras
from tegula.models.sd15.lora_names import TEXT
from tegula.models.sd15.lora_names import UNET as UNET_NAME
from tests.tiny.networks import tiny_networks

BLOCK = "down_blocks.0.attentions.0"
QUERY = f"{BLOCK}.transformer_blocks.0.attn1.to_q"
KEY = f"{BLOCK}.transformer_blocks.0.attn2.to_k"
OUT = f"{BLOCK}.transformer_blocks.0.attn1.to_out.0"
POINT, CONV = f"{BLOCK}.proj_in", "up_blocks.1.resnets.0.conv1"
TEXT_QUERY = "encoder.layers.0.self_attn.q_proj"
NETWORKS = tiny_networks(3)
PARAMETERS = {
    UNET_NAME: dict(NETWORKS.unet.named_parameters()),
    TEXT: {
        name.removeprefix("text_model."): parameter
        for name, parameter in NETWORKS.text_model.named_parameters()
    },
}
SHAPES = {
    network: {name: tuple(each.shape) for name, each in parameters.items()}
    for network, parameters in PARAMETERS.items()
}


def network_of(layer):
    return TEXT if layer.startswith("encoder.") else UNET_NAME


def weight_of(layer, kind="weight"):
    return PARAMETERS[network_of(layer)][f"{layer}.{kind}"]


def numbers(seed, *shape):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kohya(layer):
    prefix = "lora_te_text_model_" if network_of(layer) == TEXT else "lora_unet_"
    return prefix + layer.replace(".", "_")


def factors(layer, rank, seed=0):
    """Return down and up as trainers have them for linear layers and convolutions."""
    shape = weight_of(layer).shape
    down = numbers(seed, rank, *shape[1:])
    return down, numbers(seed + 100, shape[0], rank, *[1] * (len(shape) - 2))


def pair(layer, rank, alpha=None, seed=0):
    down, up = factors(layer, rank, seed)
    name = kohya(layer)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return state if alpha is None else {**state, f"{name}.alpha": torch.tensor(float(alpha))}


def product(layer, rank, seed=0):
    down, up = factors(layer, rank, seed)
    return torch.einsum("or,ri...->oi...", up.flatten(1), down)


def opener(folder):
    """Return what opens a state as a LoRA, after writing it into a folder."""

    def put(state, weight=1.0, *, name="style.safetensors", metadata=None):
        path = folder / name
        if path.suffix == ".safetensors":
            save_file({key: each.contiguous() for key, each in state.items()}, path, metadata)
        else:
            torch.save(state, path)
        return open_loras([(str(path), weight)], SHAPES)

    return put


def change(loras, layer, kind="weight"):
    base = weight_of(layer, kind)
    name = f"{layer}.{kind}"
    return loras.merge(network_of(layer), name, base.detach(), torch.float32) - base


def changed_layers(loras):
    return {name for changes in loras.changes.values() for name in changes}


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
