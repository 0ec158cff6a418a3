"""LoRAs of all kinds: what is merged, compared with formulas, peft and diffusers."""

import json

import peft
import pytest
import torch
from lora_support import (
    BLOCK,
    CONV,
    KEY,
    OUT,
    POINT,
    QUERY,
    TEXT_QUERY,
    assert_close,
    change,
    changed_layers,
    factors,
    kohya,
    numbers,
    pair,
    product,
    weight_of,
)
from peft.tuners.loha.layer import make_weight, make_weight_cp
from peft.tuners.lokr.layer import make_kron
from peft.tuners.lokr.layer import make_weight_cp as make_factor_cp
from torch import nn

from tegula.errors import BrokenWeightsError

pytestmark = pytest.mark.usefixtures("offline")


# Plain LoRAs: every layer by its own rank and alpha.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layer_has_its_own_rank_and_alpha(opened, dtype):
    layers = {
        QUERY: (4, 4.0),
        KEY: (4, 4.0),
        OUT: (1, 4.0),  # a rank that was cut while alpha stayed
        POINT: (2, 1.0),
        CONV: (8, 1.0),
        TEXT_QUERY: (3, None),
    }
    state = {}
    for layer, (rank, alpha) in layers.items():
        state |= pair(layer, rank, alpha)
    loras = opened({name: each.to(dtype) for name, each in state.items()}, -0.7)
    assert not loras.warnings
    assert changed_layers(loras) == {f"{layer}.weight" for layer in layers}
    for layer, (rank, alpha) in layers.items():
        down, up = (each.to(dtype).float() for each in factors(layer, rank))
        expected = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        scale = 1.0 if alpha is None else alpha / rank
        assert_close(change(loras, layer), -0.7 * scale * expected)


def test_an_alpha_of_zero_switches_a_layer_off(opened):
    loras = opened(pair(QUERY, 4, 0.0) | pair(KEY, 4, 2.0))
    assert not change(loras, QUERY).any()
    assert_close(change(loras, KEY), 0.5 * product(KEY, 4))


def test_layers_beside_the_attention_are_merged(opened):
    layers = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    layers = (*layers, "up_blocks.1.resnets.0.time_emb_proj", "mid_block.resnets.0.conv2")
    state = {}
    for layer in layers:
        state |= pair(layer, 2, 1.0)
    loras = opened(state)
    assert not loras.warnings
    for layer in layers:
        assert_close(change(loras, layer), 0.5 * product(layer, 2))


# Other kinds.


def test_a_kernel_apart_from_the_channels_is_multiplied_in(opened):
    width = weight_of(CONV).shape
    mid, up, down = numbers(1, 3, 2, 3, 3), numbers(2, width[0], 3), numbers(3, 2, width[1])
    name = kohya(CONV)
    state = {
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up[:, :, None, None],
        f"{name}.lora_down.weight": down[:, :, None, None],
        f"{name}.alpha": torch.tensor(1.0),
    }
    expected = torch.zeros(width)
    for row in range(3):
        for column in range(2):
            outer = up[:, row, None] * down[None, column]
            expected += outer[:, :, None, None] * mid[row, column]
    assert_close(change(opened(state, 0.5), CONV), 0.25 * expected)


def loha(layer, *, core=False):
    shape = weight_of(layer).shape
    inputs = shape[1:].numel() if not core else shape[1]
    parts = {}
    for number in (1, 2):
        sizes = ((2, shape[0]) if core else (shape[0], 2)), (2, inputs)
        parts[f"hada_w{number}_a"] = numbers(number, *sizes[0])
        parts[f"hada_w{number}_b"] = numbers(number + 10, *sizes[1])
        if core:
            parts[f"hada_t{number}"] = numbers(number + 20, 2, 2, *shape[2:])
    return parts


@pytest.mark.parametrize(("layer", "core"), [(QUERY, False), (CONV, False), (CONV, True)])
def test_a_loha_is_the_product_of_two_products(opened, layer, core):
    parts = loha(layer, core=core)
    named = {f"{kohya(layer)}.{name}": part for name, part in parts.items()}
    loras = opened({**named, f"{kohya(layer)}.alpha": torch.tensor(1.0)}, 0.8)
    scale = torch.tensor(0.5)
    matrices = [parts[f"hada_w{n}_{half}"] for n in (1, 2) for half in "ab"]
    if core:
        first, second, third, fourth = matrices
        expected = make_weight_cp(
            parts["hada_t1"], first, second, parts["hada_t2"], third, fourth, scale
        )
    else:
        expected = make_weight(*matrices, scale).reshape(weight_of(layer).shape)
    assert_close(change(loras, layer), 0.8 * expected)


LOKR = {
    "whole": {"lokr_w1": (2, 2), "lokr_w2": (4, 4)},
    "second-factored": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
    "both-factored": {
        "lokr_w1_a": (2, 3),
        "lokr_w1_b": (3, 2),
        "lokr_w2_a": (4, 1),
        "lokr_w2_b": (1, 4),
    },
    "kernels": {"lokr_w1": (2, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 6 * 9)},
    "whole-kernels": {"lokr_w1": (2, 4), "lokr_w2": (4, 6, 3, 3)},
    "core": {
        "lokr_w1": (2, 4),
        "lokr_t2": (2, 2, 3, 3),
        "lokr_w2_a": (2, 4),
        "lokr_w2_b": (2, 6),
    },
}


@pytest.mark.parametrize("kind", LOKR)
def test_a_lokr_is_a_kronecker_product(opened, kind):
    parts = {name: numbers(at, *shape) for at, (name, shape) in enumerate(LOKR[kind].items())}
    layer = QUERY if "kernels" not in kind and kind != "core" else CONV
    shape = weight_of(layer).shape
    named = {f"{kohya(layer)}.{name}": part for name, part in parts.items()}
    loras = opened({**named, f"{kohya(layer)}.alpha": torch.tensor(3.0)})
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    rank = len(parts["lokr_w2_b"]) if "lokr_w2_b" in parts else 3.0
    if kind == "core":
        second = make_factor_cp(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    elif "lokr_w2" in parts:
        second = parts["lokr_w2"]
    else:
        second = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(4, -1, *shape[2:])
    assert_close(change(loras, layer), make_kron(first, second, torch.tensor(3.0 / rank)))


def test_a_full_difference_is_added_to_weights_and_biases(opened):
    weight, bias = numbers(1, *weight_of(CONV).shape), numbers(2, *weight_of(CONV, "bias").shape)
    norm = numbers(3, *weight_of(f"{BLOCK}.norm").shape)
    loras = opened(
        {
            f"{kohya(CONV)}.diff": weight,
            f"{kohya(CONV)}.diff_b": bias,
            f"{kohya(CONV)}.alpha": torch.tensor(0.1),  # scales products only
            f"{kohya(f'{BLOCK}.norm')}.w_norm": norm,
            **pair(QUERY, 2),
            f"{kohya(KEY)}.hada_w1_a": numbers(4, 8, 2),  # and a LoHa in the same file
            f"{kohya(KEY)}.hada_w1_b": numbers(5, 2, 16),
            f"{kohya(KEY)}.hada_w2_a": numbers(6, 8, 2),
            f"{kohya(KEY)}.hada_w2_b": numbers(7, 2, 16),
        },
        0.5,
    )
    assert not loras.warnings
    assert_close(change(loras, CONV), 0.5 * weight)
    assert_close(change(loras, CONV, "bias"), 0.5 * bias)
    assert_close(change(loras, f"{BLOCK}.norm"), 0.5 * norm)
    assert_close(change(loras, QUERY), 0.5 * product(QUERY, 2))
    assert change(loras, KEY).any()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8, bias=False), nn.Conv2d(24, 8, 3)


def test_a_dora_equals_pefts_own(opened):
    """Lengths by output, which is how PEFT trains; both names of them are read."""
    network = Two()
    with torch.no_grad():
        network.linear.weight.copy_(weight_of(QUERY))
        network.conv.weight.copy_(weight_of(CONV))
    config = peft.LoraConfig(
        r=2, lora_alpha=1, use_dora=True, target_modules=["linear", "conv"], init_lora_weights=False
    )
    taught = peft.get_peft_model(network, config)
    state, kohyas = {}, {}
    for own, layer in (("linear", QUERY), ("conv", CONV)):
        module = taught.get_submodule(f"base_model.model.{own}")
        length = module.lora_magnitude_vector["default"].weight
        length.data *= 1.1
        down, up = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
        state |= {
            f"unet.{layer}.lora_A.weight": down,
            f"unet.{layer}.lora_B.weight": up,
            f"unet.{layer}.lora_magnitude_vector": length.data,
        }
        kohyas |= {
            f"{kohya(layer)}.lora_down.weight": down,
            f"{kohya(layer)}.lora_up.weight": up,
            f"{kohya(layer)}.alpha": torch.tensor(1.0),
            f"{kohya(layer)}.dora_scale": length.data.reshape(-1, *[1] * (down.ndim - 1)),
        }
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})}
    merged = taught.merge_and_unload()
    for loras in (opened(state, metadata=metadata), opened(kohyas, name="b.safetensors")):
        assert_close(change(loras, QUERY), merged.linear.weight - weight_of(QUERY))
        assert_close(change(loras, CONV), merged.conv.weight - weight_of(CONV))
    half = opened(kohyas, 0.5)
    assert_close(change(half, QUERY), 0.5 * (merged.linear.weight - weight_of(QUERY)))


@pytest.mark.parametrize("layer", [KEY, CONV])
def test_a_dora_may_have_lengths_by_input(opened, layer):
    base = weight_of(layer).detach()
    lengths = numbers(9, base.shape[1]).abs() + 0.5
    scale = {f"{kohya(layer)}.dora_scale": lengths.reshape(1, -1, *[1] * (base.ndim - 2))}
    full = base + 0.5 * product(layer, 2)
    expected = torch.empty_like(full)
    for at in range(base.shape[1]):
        expected[:, at] = full[:, at] * lengths[at] / full[:, at].norm()
    loras = opened(pair(layer, 2, 1.0) | scale)
    assert not loras.warnings
    assert_close(change(loras, layer), expected - base)


# Changes that depend on the weight.


@pytest.mark.parametrize("layer", [KEY, CONV, TEXT_QUERY])
@pytest.mark.parametrize("of_input", [True, False])
def test_an_ia3_scales_inputs_or_outputs(opened, layer, of_input):
    base = weight_of(layer)
    scale = numbers(1, base.shape[1 if of_input else 0])
    shaped = scale.reshape(1, -1, *[1] * (base.ndim - 2)) if of_input else scale
    loras = opened(
        {f"{kohya(layer)}.weight": shaped, f"{kohya(layer)}.on_input": torch.tensor(of_input)}, 0.5
    )
    assert not loras.warnings
    axis = 1 if of_input else 0
    each = scale.reshape([-1 if at == axis else 1 for at in range(base.ndim)])
    assert_close(change(loras, layer), 0.5 * base * each)


def test_an_ia3_equals_pefts_own(opened, tmp_path):
    plain = {
        "to_k": nn.Linear(16, 8, bias=False),
        "q_proj": nn.Linear(16, 16),
        "ff": nn.Linear(8, 4),
    }
    plain["to_k"].weight.data.copy_(weight_of(KEY))
    plain["q_proj"].weight.data.copy_(weight_of(TEXT_QUERY))
    plain["q_proj"].bias.data.copy_(weight_of(TEXT_QUERY, "bias"))
    model = nn.ModuleDict(plain)
    config = peft.IA3Config(target_modules=list(plain), feedforward_modules=["ff"])
    adapted = peft.get_peft_model(model, config)
    state = {}
    for name, layer in (("to_k", KEY), ("q_proj", TEXT_QUERY)):
        scale = 1 + numbers(2, len(weight_of(layer)), 1)
        adapted.base_model.model[name].ia3_l["default"].data.copy_(scale)
        where = "text_encoder.text_model" if name == "q_proj" else "unet"
        state[f"{where}.{layer}.ia3_l"] = scale
    merged = adapted.merge_and_unload()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    loras = opened(state, name="adapter_model.safetensors")
    assert not loras.warnings
    for name, layer in (("to_k", KEY), ("q_proj", TEXT_QUERY)):
        assert_close(weight_of(layer) + change(loras, layer), merged[name].weight.detach())
    bias = weight_of(TEXT_QUERY, "bias") + change(loras, TEXT_QUERY, "bias")
    assert_close(bias, merged["q_proj"].bias.detach())


@pytest.mark.parametrize("layout", ["newer", "older"])
def test_a_glora_is_a_low_rank_function_of_the_weight(opened, layout):
    base, rank = weight_of(KEY), 2
    out, width = base.shape
    a1, a2 = numbers(1, width, rank), numbers(2, rank, width)
    b1, b2 = numbers(3, out, rank), numbers(4, rank, width)
    stored = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    if layout == "older":
        stored = {"a1": a2, "a2": a1, "b1": b2, "b2": b1}
    state = {f"{kohya(KEY)}.{name}.weight": each for name, each in stored.items()}
    loras = opened({**state, f"{kohya(KEY)}.alpha": torch.tensor(1.0)}, 0.8)
    assert not loras.warnings
    assert_close(change(loras, KEY), 0.8 * 0.5 * (base @ a1 @ a2 + b1 @ b2))


@pytest.mark.parametrize("layer", [KEY, CONV])
@pytest.mark.parametrize("constraint", [0.0, 1e-3])
def test_an_oft_turns_blocks_of_outputs(opened, layer, constraint):
    base = weight_of(layer).detach()
    blocks = numbers(1, len(base) // 4, 4, 4)
    skew = blocks - blocks.transpose(1, 2)
    longest = constraint * len(base)
    if constraint:
        assert skew.norm() > longest
        skew = skew * (longest / skew.norm())
    turns = [torch.linalg.inv(torch.eye(4) - each) for each in skew]
    turns = [(torch.eye(4) + each) @ inverse for each, inverse in zip(skew, turns, strict=True)]
    rows = zip(turns, base.flatten(1).split(4), strict=True)
    expected = torch.cat([turn.T @ own for turn, own in rows]).reshape(base.shape)
    state = {
        f"{kohya(layer)}.oft_blocks": blocks,
        f"{kohya(layer)}.alpha": torch.tensor(constraint),
    }
    loras = opened(state)
    assert not loras.warnings
    assert_close(change(loras, layer), expected - base)
    lengths = 1 + numbers(3, len(base), *[1] * (base.ndim - 1))
    loras = opened({**state, f"{kohya(layer)}.rescale": lengths}, 0.5)
    assert_close(change(loras, layer), 0.5 * (expected * lengths - base))


UNREAD = {
    "an OFT of PEFT's making": {f"unet.{KEY}.oft_R.weight": torch.ones(2, 6)},
    "an OFT of the first LyCORIS": {f"{kohya(KEY)}.oft_diag": torch.ones(2, 4, 4)},
    "a BOFT": {f"{kohya(KEY)}.oft_blocks": torch.ones(2, 2, 4, 4)},
}


@pytest.mark.parametrize("kind", UNREAD)
def test_kinds_that_are_not_read_are_refused_by_name(opened, kind):
    with pytest.raises(BrokenWeightsError, match=rf"style\.safetensors is {kind}, a kind that"):
        opened(UNREAD[kind])
