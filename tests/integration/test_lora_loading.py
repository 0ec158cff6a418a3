"""LoRAs that are loaded with a model: their words, what is refused, and how they are merged."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_support import (
    KEY,
    OUT,
    QUERY,
    SHAPES,
    TEXT_QUERY,
    assert_close,
    changed_layers,
    kohya,
    numbers,
    pair,
    product,
    weight_of,
)
from safetensors.torch import save_file
from sd15_support import load_sd15

from tegula.errors import BrokenWeightsError, OptionError
from tegula.models import BundleSettings
from tegula.models.load import check_bundle
from tegula.models.sd15.lora import open_loras

pytestmark = pytest.mark.usefixtures("offline")


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
