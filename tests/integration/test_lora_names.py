"""Layers of LoRAs under the names of all trainers, and the alphas that PEFT keeps elsewhere."""

import json

import pytest
import torch
from lora_support import (
    KEY,
    OUT,
    QUERY,
    TEXT_QUERY,
    assert_close,
    change,
    changed_layers,
    factors,
    network_of,
    product,
)
from safetensors.torch import save_file
from sd15_layout import checkpoint_shapes

from tegula.errors import BrokenWeightsError
from tegula.models.files import read_json
from tegula.models.sd15.lora import open_loras
from tegula.models.sd15.lora_names import TEXT
from tegula.models.sd15.parts import STANDARD_CONFIG, TEXT_MODEL, UNET

pytestmark = pytest.mark.usefixtures("offline")


# Names.

NAMES = {
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_te_text_model_{_}.lora_down.weight"),
    "kohya, second trainer": (
        "lora_unet_{_}.lora_down.weight",
        "lora_te1_text_model_{_}.lora_down.weight",
    ),
    "peft": ("unet.{}.lora_A.weight", "text_encoder.text_model.{}.lora_A.weight"),
    "peft, named": ("unet.{}.lora_A.mine.weight", "text_encoder.{}.lora_A.mine.weight"),
    "peft, wrapped": (
        "base_model.model.{}.lora_A.weight",
        "base_model.model.text_model.{}.lora_A.weight",
    ),
    "peft, wrapped inside": (
        "unet.base_model.model.{}.lora_A.weight",
        "text_encoder.base_model.model.text_model.{}.lora_A.weight",
    ),
    "peft, bare": ("{}.lora_A.weight", "text_model.{}.lora_A.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "text_encoder.text_model.{}.lora.down.weight"),
    "diffusers, linear": (
        "unet.{}.lora_linear_layer.down.weight",
        "text_encoder.text_model.{}.lora_linear_layer.down.weight",
    ),
    "processors": (
        "unet.{processor}_lora.down.weight",
        "text_encoder.text_model.{text}_lora.down.weight",
    ),
    "processors, bare": (
        "{processor}_lora.down.weight",
        "text_encoder.text_model.{}.lora_linear_layer.down.weight",
    ),
    "ComfyUI": (
        "diffusion_model.{}.lora_down.weight",
        "text_encoders.clip_l.transformer.text_model.{}.lora_down.weight",
    ),
    "LyCORIS": ("lycoris_{_}.lora_down.weight", "lora_te_text_model_{_}.lora_down.weight"),
}


def named(pattern, layer, part):
    block, _, end = layer.rpartition(".to_")
    name = pattern.format(
        layer,
        _=layer.replace(".", "_"),
        processor=f"{block}.processor.to_{end.removesuffix('.0')}",
        text=layer.replace("q_proj", "to_q"),
    )
    if part == "up":
        name = name.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
    return name


@pytest.mark.parametrize("file", ["style.safetensors", "style.bin", "style.PT"])
@pytest.mark.parametrize("naming", NAMES)
def test_all_names_of_a_layer_are_known(opened, naming, file):
    state = {}
    for layer in (QUERY, OUT, TEXT_QUERY):
        pattern = NAMES[naming][network_of(layer) == TEXT]
        for part, tensor in zip(("down", "up"), factors(layer, 2), strict=True):
            state[named(pattern, layer, part)] = tensor
    loras = opened(state, 0.5, name=file)
    assert not loras.warnings
    assert len(changed_layers(loras)) == 3
    for layer in (QUERY, OUT, TEXT_QUERY):
        assert_close(change(loras, layer), 0.5 * product(layer, 2))


def released_shapes():
    """Return the shapes of the release's networks, by the names of diffusers."""
    shapes = checkpoint_shapes()
    found = {}
    for kind in (UNET, TEXT_MODEL):
        settings = read_json(STANDARD_CONFIG / kind.folder / "config.json")
        names = kind.names(shapes, settings)
        found[kind.folder] = {name: shapes[own] for name, own in names.items()}
    originals = {
        own.removeprefix("model.diffusion_model.").rpartition(".")[0]: name.rpartition(".")[0]
        for name, own in UNET.names(shapes, settings_of_unet()).items()
    }
    return found, originals


def settings_of_unet():
    return read_json(STANDARD_CONFIG / "unet" / "config.json")


def test_all_layers_of_the_release_are_found_by_both_of_their_names(tmp_path):
    shapes, originals = released_shapes()
    attention = [
        layer
        for layer in {name.rpartition(".")[0] for name in shapes["unet"]}
        if ".attentions." in layer and "norm" not in layer
    ]
    text = {name.removeprefix("text_model.").rpartition(".")[0] for name in shapes[TEXT]}
    text = [layer for layer in text if layer.endswith(("_proj", "fc1", "fc2"))]
    assert (len(attention), len(text)) == (192, 72)  # the 264 of kohya's trainer

    def save(prefix, layers, names):
        state = {}
        for layer in layers:
            shape = shapes["unet" if "lora_te" not in prefix else TEXT][f"{layer}.weight"]
            name = prefix + names(layer).replace(".", "_")
            state[f"{name}.lora_down.weight"] = torch.zeros(1, *shape[1:], dtype=torch.float16)
            up = torch.zeros(shape[0], 1, *[1] * (len(shape) - 2), dtype=torch.float16)
            state[f"{name}.lora_up.weight"] = up
        return state

    by_kohya = save("lora_unet_", attention, str) | save("lora_te_text_model_", text, str)
    both = set(originals.values())
    whole = [layer for layer in both if len(shapes["unet"][f"{layer}.weight"]) > 1]
    back = {name: own for own, name in originals.items()}
    by_original = save("lora_unet_", whole, back.__getitem__)
    for state, count in ((by_kohya, 264), (by_original, len(whole))):
        save_file(state, tmp_path / "all.safetensors")
        loras = open_loras([(str(tmp_path / "all.safetensors"), 1.0)], shapes)
        assert not loras.warnings
        assert len(changed_layers(loras)) == count


# What PEFT keeps beside the weights.


def test_alphas_that_peft_keeps_in_remarks_or_beside_the_file_count(opened, tmp_path):
    state = {}
    for layer in (QUERY, KEY):
        down, up = factors(layer, 4)
        state |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    own = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 2}}
    remark = json.dumps({f"unet.{name}": value for name, value in own.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({**own, "use_rslora": True}))
    for loras, root in (
        (opened(state, metadata={"lora_adapter_metadata": remark}), 1),
        (opened(state, name="adapter_model.bin"), 2),
    ):
        assert_close(change(loras, QUERY), 2 * root * product(QUERY, 4))
        assert_close(change(loras, KEY), 0.5 * root * product(KEY, 4))
    for odd in ("[", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}'):
        with pytest.raises(BrokenWeightsError, match="settings that belong to"):
            opened(state, metadata={"lora_adapter_metadata": odd})
