"""LoRAs of all kinds and namings: what is merged, compared with formulas, peft and diffusers."""

import json

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.loha.layer import make_weight, make_weight_cp
from peft.tuners.lokr.layer import make_kron
from peft.tuners.lokr.layer import make_weight_cp as make_factor_cp
from safetensors.torch import save_file
from sd15_layout import checkpoint_shapes
from sd15_support import load_sd15
from torch import nn

from tegula.errors import BrokenWeightsError, OptionError
from tegula.models import BundleSettings
from tegula.models.files import read_json
from tegula.models.load import check_bundle
from tegula.models.sd15.lora import open_loras
from tegula.models.sd15.lora_names import TEXT
from tegula.models.sd15.lora_names import UNET as UNET_NAME
from tegula.models.sd15.parts import STANDARD_CONFIG, TEXT_MODEL, UNET
from tests.tiny.networks import tiny_networks

pytestmark = pytest.mark.usefixtures("offline")

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


@pytest.fixture
def opened(tmp_path):
    """Return what opens a state as a LoRA, after writing it."""

    def put(state, weight=1.0, *, name="style.safetensors", metadata=None):
        path = tmp_path / name
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


# Embeddings in the same file.


def test_the_words_in_the_file_of_a_lora_are_learned_with_it(files, tmp_path):
    vectors = {name: numbers(at, 2, 16) for at, name in enumerate(("calm", "storm", "sea"))}
    state = {
        "bundle_emb.calm.string_to_param.*": vectors["calm"],
        "bundle_emb.storm.emb_params": vectors["storm"],
        "bundle_emb.sea.clip_l": vectors["sea"],
    }
    save_file(pair(QUERY, 2) | state, tmp_path / "style.safetensors")
    loras = [(str(tmp_path / "style.safetensors"), 0.5)]
    bundle = load_sd15(str(files.folder), loras=loras)
    assert not any("not used" in warning for warning in bundle.warnings)
    for word, own in vectors.items():
        save_file({"emb_params": own}, tmp_path / f"{word}.safetensors")
    embeddings = [str(tmp_path / f"{word}.safetensors") for word in vectors]
    separate = load_sd15(str(files.folder), embeddings=embeddings)
    prompt = ["a cat, Storm and calm, sea"]
    assert torch.equal(bundle.text.encode(prompt), separate.text.encode(prompt))
    with pytest.raises(OptionError, match="Two embeddings are called calm"):
        load_sd15(str(files.folder), loras=loras, embeddings=embeddings[:1])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [(torch.ones(2, 1024), "Stable Diffusion 2"), (torch.full((1, 16), torch.nan), "not finite")],
)
def test_words_in_the_file_of_a_lora_that_do_not_fit_are_refused(files, tmp_path, vectors, message):
    state = pair(QUERY, 2) | {"bundle_emb.calm.string_to_param.*": vectors}
    save_file(state, tmp_path / "style.safetensors")
    with pytest.raises(BrokenWeightsError, match=rf"style\.safetensors .*{message}"):
        load_sd15(str(files.folder), loras=[(str(tmp_path / "style.safetensors"), 0.5)])


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


# What is not used, and what is refused.


def test_what_is_not_used_is_said(opened):
    extra = {
        "lora_unet_elsewhere.lora_down.weight": torch.ones(1, 8),
        f"{kohya(KEY)}.lora_down.weight": torch.ones(1, 16),  # without its other half
        f"{kohya(OUT)}.oft_blocks": torch.ones(2, 2),
        f"{kohya(QUERY)}.diff_b": torch.ones(8),  # of a layer without bias
    }
    loras = opened(pair(QUERY, 2) | extra)
    assert changed_layers(loras) == {f"{QUERY}.weight"}
    (warning,) = loras.warnings
    assert warning.startswith("4 of the 6 tensors in style.safetensors are not used, such as lora_")


def test_a_layer_of_another_size_is_not_used(opened):
    odd = {f"{kohya(KEY)}.lora_down.weight": torch.ones(1, 99)}
    odd |= {f"{kohya(KEY)}.lora_up.weight": torch.ones(8, 1)}
    assert "2 of the 4 tensors" in opened(pair(QUERY, 2) | odd).warnings[0]


ATTN = "attentions_0_transformer_blocks_0_attn2_to_k"
INPUT = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v"
OTHERS = {
    "SDXL": {f"lora_unet_down_blocks_1_{ATTN}": 2048},
    "SDXL, LoKr": {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_ff_net_2": 8},
    "SDXL, values alone": {INPUT: 2048},
    "SDXL, second encoder": {"lora_te2_text_model_encoder_layers_3_mlp_fc1": 1280},
    "SDXL, second encoder of diffusers": {
        "text_encoder_2.text_model.encoder.layers.3.mlp.fc1": 1280
    },
    "SDXL, depth": {"lora_unet_input_blocks_7_1_transformer_blocks_2_attn1_to_q": 1280},
    "SDXL, middle": {"lora_unet_middle_block_1_transformer_blocks_3_attn1_to_q": 1280},
    "SDXL, middle of diffusers": {
        "unet.mid_block.attentions.0.transformer_blocks.3.ff.net.2": 5120
    },
    "SDXL, coarsest": {"unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 1280},
    "SDXL, coarsest of the original": {"lora_unet_output_blocks_1_1_proj_in": 1280},
    "SDXL, width of a place": {
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 640
    },
    "Stable Diffusion 2": {f"lora_unet_down_blocks_1_{ATTN}": 1024},
    "Stable Diffusion 2, text": {"lora_te_text_model_encoder_layers_17_mlp_fc1": 8},
    "Stable Diffusion 2, width of text": {"lora_te_text_model_encoder_layers_0_mlp_fc1": 1024},
    "Flux": {"lora_unet_double_blocks_0_img_attn_proj": 8},
    "Flux, peft": {"transformer.single_transformer_blocks.0.attn.to_k": 8},
    "Flux, text beside": {"transformer.transformer_blocks.0.attn.add_k_proj": 3072},
    "Flux, OneTrainer": {"lora_transformer_transformer_blocks_0_attn_to_q": 3072},
    "Stable Diffusion 3": {"transformer.transformer_blocks.0.attn.to_k": 1536},
    "Stable Diffusion 3, text beside": {"transformer.transformer_blocks.0.attn.add_k_proj": 2432},
    "Stable Diffusion 3, original": {"lora_unet_joint_blocks_0_x_block_attn_qkv": 1536},
    "Stable Diffusion 3 or Flux": {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": 4096},
    "PixArt": {"base_model.model.transformer_blocks.0.attn2.to_k": 1152},
    "PixArt, outside": {"transformer.caption_projection.linear_1": 4096},
    "Wan": {"diffusion_model.blocks.0.cross_attn.k": 5120},
    "Wan, kohya": {"lora_unet_blocks_0_self_attn_q": 1536},
    "Wan, feed-forward": {"diffusion_model.blocks.3.ffn.0": 1536},
    "Hunyuan Video": {"transformer.double_blocks.0.img_attn_qkv": 3072},
    "Hunyuan Video, kohya": {"lora_unet_double_blocks_0_img_mlp_fc1": 3072},
    "Qwen-Image": {"transformer.transformer_blocks.0.img_mlp.net.2": 12288},
    "LTX-Video": {"transformer.transformer_blocks.0.attn1.to_q": 2048},
    "a diffusion transformer": {"transformer.transformer_blocks.0.ff.net.2": 999},
    "AnimateDiff": {"down_blocks.0.motion_modules.0.to_q": 8},
}


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("fits", [False, True])
def test_other_families_are_refused_by_name_even_where_a_layer_fits(opened, family, fits):
    state = pair(QUERY, 2) if fits else {}
    for layer, width in OTHERS[family].items():
        peft_names = layer.startswith(("unet.", "transformer.", "base_model.", "text_encoder_2."))
        down, up = ("lora_A", "lora_B") if peft_names else ("lora_down", "lora_up")
        state |= {f"{layer}.{down}.weight": torch.ones(4, width)}
        state |= {f"{layer}.{up}.weight": torch.ones(8, 4)}
    name = family.partition(",")[0]
    with pytest.raises(BrokenWeightsError, match=rf"is a LoRA for {name}[;,].* LoRA for Stable"):
        opened(state)


def test_a_checkpoint_or_an_embedding_is_no_lora(opened, files):
    with pytest.raises(BrokenWeightsError, match="is a checkpoint; give a LoRA"):
        open_loras([(str(files.checkpoint), 1.0)], SHAPES)
    with pytest.raises(BrokenWeightsError, match=r"is an embedding for Stable .* 1\.5; give"):
        opened({"emb_params": torch.ones(2, 768)})


def test_a_server_does_not_start_with_a_lora_that_does_not_fit(files, tmp_path, monkeypatch):
    state = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8)}
    save_file(state, tmp_path / "odd.safetensors")
    monkeypatch.setattr("tegula.models.stored.StoredTensor.read", lambda _: pytest.fail("loaded"))
    with pytest.raises(BrokenWeightsError, match=r"odd\.safetensors is a LoRA for SDXL"):
        check_bundle(
            BundleSettings(bundle=str(files.folder), loras=(str(tmp_path / "odd.safetensors"),))
        )


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found_while_loading(files, tmp_path, part, value):
    state = pair(QUERY, 2, 1.0)
    state[f"{kohya(QUERY)}.{part}"].view(-1)[0] = value
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(BrokenWeightsError, match=r"odd\.safetensors holds numbers .* not finite"):
        load_sd15(str(files.folder), loras=[(str(tmp_path / "odd.safetensors"), 1.0)])


def test_a_weight_beyond_the_precision_is_refused(files, tmp_path):
    save_file(pair(QUERY, 2), tmp_path / "style.safetensors")
    strong = [(str(tmp_path / "style.safetensors"), 1e7)]
    assert load_sd15(str(files.folder), loras=strong)
    with pytest.raises(BrokenWeightsError, match=r"weight 1e\+07 takes .* beyond .* float16"):
        load_sd15(str(files.folder), loras=strong, dtype=torch.float16)


# Loaded.


def test_loras_are_merged_exactly_and_rounded_once(files, tmp_path):
    save_file(pair(QUERY, 2, 1.0) | pair(TEXT_QUERY, 2), tmp_path / "style.safetensors")
    loras = [(str(tmp_path / "style.safetensors"), 0.7), (str(tmp_path / "style.safetensors"), 0.2)]
    exact = load_sd15(str(files.folder), loras=loras)
    bundle = load_sd15(str(files.folder), loras=loras, dtype=torch.bfloat16)
    assert bundle.facts.fingerprint == exact.facts.fingerprint
    for own, other in (
        (bundle.denoiser.unet, exact.denoiser.unet),
        (bundle.text.model, exact.text.model),
    ):
        for (name, rounded), (_, whole) in zip(
            own.named_parameters(), other.named_parameters(), strict=True
        ):
            assert torch.equal(rounded, whole.to(torch.bfloat16)), name
    query = dict(exact.denoiser.unet.named_parameters())[f"{QUERY}.weight"]
    assert_close(query - weight_of(QUERY), 0.45 * product(QUERY, 2))


def test_no_network_is_loaded_in_another_precision_for_loras(files, tmp_path, monkeypatch):
    save_file(pair(QUERY, 2) | pair(TEXT_QUERY, 2), tmp_path / "style.safetensors")
    loras = [(str(tmp_path / "style.safetensors"), 1.0)]
    seen = []

    def stop(networks, *_, **__):
        seen.append(networks)
        raise InterruptedError

    monkeypatch.setattr("tegula.models.sd15.load.assemble", stop)
    with pytest.raises(InterruptedError):
        load_sd15(str(files.folder), loras=loras, dtype=torch.float16)
    dtypes = {each.dtype for module in seen[0].modules for each in module.parameters()}
    assert dtypes == {torch.float16}


def test_a_bundle_says_what_of_a_lora_it_does_not_use(files, tmp_path):
    extra = {"lora_unet_elsewhere.lora_down.weight": torch.ones(1, 8)}
    save_file(pair(QUERY, 2) | extra, tmp_path / "style.safetensors")
    bundle = load_sd15(str(files.folder), loras=[(str(tmp_path / "style.safetensors"), 1.0)])
    assert any("1 of the 3 tensors in style.safetensors" in each for each in bundle.warnings)
    assert isinstance(bundle.denoiser.unet, UNet2DConditionModel)
