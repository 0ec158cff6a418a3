import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models.bundle import ControlImage, ControlScale, WindowBatch
from tegula.models.sd15.components import STANDARD_CONFIG
from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.files import read_json
from tegula.models.sd15.load import load_sd15
from tegula.models.sd15.tiny import tiny_bundle, tiny_networks
from tegula.models.sd15.tiny_files import TinyFiles, save_tiny

UNET_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYERS = tuple(
    f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj")
)
PROJECTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> TinyFiles:
    return save_tiny(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture
def folder(files, tmp_path) -> Path:
    return Path(shutil.copytree(files.folder, tmp_path / "model"))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path / "models"))


def result(bundle):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    control = ControlImage(picture, picture)
    latents = bundle.autoencoder.encode(picture, control, torch.Generator().manual_seed(2))
    batch = WindowBatch(
        latents,
        torch.tensor(400),
        bundle.text.encode(["a red cat"]),
        bundle.denoiser.embed_control(control),
        ControlScale(0.8),
        slice(0, 1),
    )
    return bundle.autoencoder.decode(bundle.denoiser(batch), control)


def load_single_file(files: TinyFiles, **changes):
    parts = {"controlnet": str(files.controlnet), "config": str(files.folder), **changes}
    return load_sd15(str(parts.pop("model", files.checkpoint)), **parts)


def changed_checkpoint(files, tmp_path, change) -> Path:
    state = load_file(files.checkpoint)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def pipeline():
    networks = tiny_networks(3)
    return StableDiffusionPipeline(
        vae=networks.autoencoder,
        text_encoder=networks.text_model,
        tokenizer=networks.tokenizer,
        unet=networks.unet,
        scheduler=DDIMScheduler.from_config(dict(SCHEDULER)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_a_diffusers_folder_gives_the_same_result(files):
    bundle = load_sd15(str(files.folder))
    assert torch.equal(result(bundle), result(tiny_bundle(3)))
    assert bundle.facts.fingerprint == tiny_bundle(3).facts.fingerprint
    assert bundle.facts.name == "diffusers"
    assert bundle.scheduler == SCHEDULER


def test_a_checkpoint_with_a_separate_controlnet_gives_the_same_result(files):
    bundle = load_single_file(files)
    assert torch.equal(result(bundle), result(tiny_bundle(3)))
    assert bundle.facts.fingerprint == tiny_bundle(3).facts.fingerprint
    assert bundle.facts.name == "checkpoint"


def test_a_pickled_checkpoint_of_plain_weights_gives_the_same_result(files, tmp_path):
    torch.save({"state_dict": load_file(files.checkpoint), "epoch": 3}, tmp_path / "model.ckpt")
    bundle = load_single_file(files, model=tmp_path / "model.ckpt")
    assert torch.equal(result(bundle), result(tiny_bundle(3)))


def test_a_separate_vae_replaces_the_checkpoints_own(files, tmp_path):
    def erase(state):
        for name in state:
            if name.startswith("first_stage_model."):
                state[name] = torch.zeros_like(state[name])

    erased = changed_checkpoint(files, tmp_path, erase)
    assert not torch.equal(result(load_single_file(files, model=erased)), result(tiny_bundle(3)))
    bundle = load_single_file(files, model=erased, vae=str(files.vae))
    assert torch.equal(result(bundle), result(tiny_bundle(3)))


def test_a_checkpoint_without_vae_takes_a_folder(files, tmp_path):
    def remove(state):
        for name in [name for name in state if name.startswith("first_stage_model.")]:
            del state[name]

    bare = changed_checkpoint(files, tmp_path, remove)
    bundle = load_single_file(files, model=bare, vae=str(files.folder / "vae"))
    assert torch.equal(result(bundle), result(tiny_bundle(3)))
    with pytest.raises(MissingWeightsError, match="sd-vae-ft-mse"):
        load_single_file(files, model=bare)


@pytest.mark.parametrize("suffix", ["fp16.safetensors", "bin"])
def test_a_folder_with_other_weight_formats_loads(folder, suffix):
    for weights in folder.rglob("*.safetensors"):
        if suffix == "bin":
            stem = weights.stem if weights.stem != "model" else "pytorch_model"
            torch.save(load_file(weights), weights.with_name(f"{stem}.bin"))
            weights.unlink()
        else:
            weights.rename(weights.with_name(f"{weights.stem}.{suffix}"))
    assert torch.equal(result(load_sd15(str(folder))), result(tiny_bundle(3)))


def test_a_bundle_runs_in_the_precision_asked_for(files):
    bundle = load_sd15(str(files.folder), dtype=torch.bfloat16)
    assert result(bundle).dtype == torch.bfloat16
    assert bundle.facts.fingerprint == tiny_bundle(3).facts.fingerprint


def test_a_bundle_loads_without_controlnet_when_asked(files):
    assert load_sd15(str(files.folder), controlnet="none").denoiser.controlnet is None


def test_loading_says_nothing_on_the_screen(files, capfd):
    load_single_file(files)
    load_sd15(str(files.folder))
    assert capfd.readouterr() == ("", "")


def lora_layers():
    generator = torch.Generator().manual_seed(4)
    sizes = {UNET_LAYER: 8, **dict.fromkeys(TEXT_LAYERS, 16)}
    return {
        name: (
            torch.randn(2, size, generator=generator),
            torch.randn(size, 2, generator=generator),
        )
        for name, size in sizes.items()
    }


def kohya_lora():
    prefixes = {UNET_LAYER: "lora_unet_", **dict.fromkeys(TEXT_LAYERS, "lora_te_text_model_")}
    state = {}
    for name, (down, up) in lora_layers().items():
        key = prefixes[name] + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(1.0)
    return state


def diffusers_lora():
    prefixes = {UNET_LAYER: "unet.", **dict.fromkeys(TEXT_LAYERS, "text_encoder.text_model.")}
    state = {}
    for name, (down, up) in lora_layers().items():
        key = prefixes[name] + name
        state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return state


def weight(network, name):
    return getattr(network, "text_model", network).get_submodule(name).weight


@pytest.mark.parametrize(("state", "alpha"), [(kohya_lora(), 0.5), (diffusers_lora(), 1.0)])
def test_a_lora_adds_its_weighted_product(files, tmp_path, state, alpha):
    save_file(state, tmp_path / "style.safetensors")
    bundle = load_sd15(str(files.folder), loras=[(str(tmp_path / "style.safetensors"), 0.7)])
    plain = tiny_networks(3)
    for name, (down, up) in lora_layers().items():
        is_unet = name == UNET_LAYER
        base = weight(plain.unet if is_unet else plain.text_model, name)
        fused = weight(bundle.denoiser.unet if is_unet else bundle.text.model, name)
        assert torch.allclose(fused, base + 0.7 * alpha * up @ down, atol=1e-5)


def test_a_fused_lora_equals_diffusers_own(files, tmp_path):
    save_file(kohya_lora(), tmp_path / "style.safetensors")
    bundle = load_sd15(str(files.folder), loras=[(str(tmp_path / "style.safetensors"), 0.7)])
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    expected = pipe.unet.state_dict()
    fused = bundle.denoiser.unet.state_dict()
    assert expected.keys() == fused.keys()
    assert all(torch.equal(fused[name], part) for name, part in expected.items())
    assert torch.equal(
        bundle.text.encode(["a cat"]), pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    )


def test_a_lora_is_found_by_its_hub_id(files, tmp_path):
    folder = tmp_path / "models" / "someone" / "style"
    folder.mkdir(parents=True)
    save_file(kohya_lora(), folder / "pytorch_lora_weights.safetensors")
    bundle = load_sd15(str(files.folder), loras=[("someone/style", 1.0)])
    assert bundle.facts.fingerprint != tiny_bundle(3).facts.fingerprint
    with pytest.raises(MissingWeightsError, match=r"other/style.*pytorch_lora_weights"):
        load_sd15(str(files.folder), loras=[("other/style", 1.0)])


def test_loras_add_up_and_a_weight_of_zero_changes_nothing(files, tmp_path):
    save_file(kohya_lora(), tmp_path / "style.safetensors")
    style = str(tmp_path / "style.safetensors")
    plain = load_sd15(str(files.folder), loras=[(style, 0.0)])
    assert torch.allclose(result(plain), result(tiny_bundle(3)), atol=1e-5)
    once = load_sd15(str(files.folder), loras=[(style, 0.5)])
    twice = load_sd15(str(files.folder), loras=[(style, 0.2), (style, 0.3)])
    assert torch.allclose(result(once), result(twice), atol=1e-4)
    assert once.facts.fingerprint != plain.facts.fingerprint


@pytest.mark.parametrize("key", ["<mood>", "emb_params"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_textual_inversion_equals_diffusers_own(files, tmp_path, key, vectors):
    embedding = torch.randn(vectors, 16, generator=torch.Generator().manual_seed(6))
    path = tmp_path / "calm-mood.safetensors"
    save_file({key: embedding}, path)
    word = "calm-mood" if key == "emb_params" else key
    bundle = load_sd15(str(files.folder), embeddings=[str(path)])
    pipe = pipeline()
    pipe.load_textual_inversion({word: embedding}, token=word)
    prompt = f"a cat {word}, sharp"
    encoded = bundle.text.encode([prompt])
    assert torch.equal(encoded, pipe.encode_prompt(prompt, "cpu", 1, False)[0])
    assert not torch.equal(encoded, tiny_bundle(3).text.encode([prompt]))


def test_a_pickled_textual_inversion_is_used_by_its_file_name(files, tmp_path):
    vectors = torch.nn.Parameter(torch.ones(2, 16))
    torch.save({"string_to_param": {"*": vectors}, "name": "other"}, tmp_path / "calm.pt")
    bundle = load_sd15(str(files.folder), embeddings=[str(tmp_path / "calm.pt")])
    table = bundle.text.model.get_input_embeddings().weight
    ids = bundle.text.tokenizer("calm calm_1", add_special_tokens=False).input_ids
    assert torch.equal(table[ids], torch.ones(2, 16))


def test_a_missing_file_is_named(files, tmp_path):
    with pytest.raises(MissingWeightsError, match=r"no weights file .*gone\.safetensors"):
        load_sd15(str(tmp_path / "gone.safetensors"))
    with pytest.raises(MissingWeightsError, match="gone"):
        load_sd15(str(files.folder), loras=[(str(tmp_path / "gone.safetensors"), 1)])
    with pytest.raises(MissingWeightsError, match="gone"):
        load_sd15(str(files.folder), embeddings=[str(tmp_path / "gone.pt")])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MissingWeightsError, match=r"no folder .*gone"):
        load_sd15(str(tmp_path / "gone"))


def test_an_incomplete_folder_names_what_it_lacks(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(MissingWeightsError, match=r"unet/diffusion_\S+ tokenizer/vocab\.json"):
        load_sd15(str(folder))


def test_without_network_a_hub_id_says_which_files_go_where(tmp_path):
    with pytest.raises(MissingWeightsError) as caught:
        load_sd15("someone/some-model")
    assert "unet/diffusion_pytorch_model.safetensors" in str(caught.value)
    assert str(tmp_path / "models" / "someone" / "some-model") in str(caught.value)


def test_a_model_without_controlnet_asks_for_the_tile_controlnet(folder):
    shutil.rmtree(folder / "controlnet")
    with pytest.raises(MissingWeightsError, match="lllyasviel/control_v11f1e_sd15_tile"):
        load_sd15(str(folder))


def test_a_checkpoint_finds_the_vocabulary_beside_it_or_in_the_models_folder(files, tmp_path):
    config = tmp_path / "config"
    ignored = shutil.ignore_patterns("tokenizer", "*.safetensors")
    shutil.copytree(files.folder, config, ignore=ignored)
    with pytest.raises(MissingWeightsError, match="vocab"):
        load_single_file(files, config=str(config))
    shutil.copytree(files.folder / "tokenizer", tmp_path / "models" / "tokenizer")
    bundle = load_single_file(files, config=str(config))
    assert torch.equal(result(bundle), result(tiny_bundle(3)))


def test_a_checkpoint_asks_for_the_vocabulary(files, tmp_path):
    state = load_file(files.checkpoint)
    state[PROJECTION] = torch.zeros(8, 768)
    path = tmp_path / "alone.safetensors"
    save_file(state, path)
    with pytest.raises(MissingWeightsError, match=r"tokenizer/vocab\.json, tokenizer/merges\.txt"):
        load_sd15(str(path))


def test_a_truncated_file_is_refused(files, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(files.checkpoint.read_bytes()[:-100])
    with pytest.raises(BrokenWeightsError, match="bytes where its header promises"):
        load_single_file(files, model=path)


def test_a_truncated_file_in_a_folder_is_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenWeightsError, match="The UNet in"):
        load_sd15(str(folder))


@pytest.mark.parametrize("content", [b"", b"hello world, no weights", b"\xff" * 64])
def test_a_file_of_something_else_is_refused(files, tmp_path, content):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(BrokenWeightsError, match="no safetensors file"):
        load_single_file(files, model=path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_pickled_file_with_code_in_it_is_not_run(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(BrokenWeightsError, match="could run code"):
        load_single_file(files, model=tmp_path / "evil.ckpt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conditioner.embedders.0.x", (1,), "is SDXL, not Stable Diffusion 1.5"),
        (PROJECTION, (8, 1024), "is Stable Diffusion 2, not"),
        (PROJECTION, (8, 999), "text of width 999"),
        ("model.diffusion_model.input_blocks.0.0.weight", (8, 9, 3, 3), "9 input channels"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused(files, tmp_path, name, shape, message):
    other = changed_checkpoint(files, tmp_path, lambda s: s.update({name: torch.zeros(shape)}))
    with pytest.raises(BrokenWeightsError, match=message):
        load_single_file(files, model=other)


def test_a_lone_network_is_no_checkpoint(files):
    with pytest.raises(BrokenWeightsError, match="holds no UNet"):
        load_single_file(files, model=files.vae)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"cross_attention_dim": 2048}, "SDXL"),
        ("unet/config.json", {"cross_attention_dim": [768, 768]}, "text of width"),
        ("unet/config.json", {"in_channels": 9}, "9 input channels"),
        ("model_index.json", {"text_encoder_2": ["a", "b"], "_class_name": "XL"}, "is XL, not"),
        ("controlnet/config.json", {"cross_attention_dim": 32}, "ControlNet"),
        ("unet/config.json", {"block_out_channels": [8, 32]}, "UNet in"),
    ],
)
def test_a_folder_of_another_family_is_refused(folder, file, changes, message):
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **changes}))
    with pytest.raises(BrokenWeightsError, match=message):
        load_sd15(str(folder))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet/diffusion_pytorch_model", "UNet"),
        ("vae/diffusion_pytorch_model", "autoencoder"),
        ("controlnet/diffusion_pytorch_model", "ControlNet"),
        ("text_encoder/model", "text encoder"),
    ],
)
def test_a_folder_with_a_missing_weight_is_refused(folder, part, name):
    path = folder / f"{part}.safetensors"
    state = load_file(path)
    lost = sorted(state)[0]
    del state[lost]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(BrokenWeightsError, match=rf"The {name} in .* weights are missing \(1"):
        load_sd15(str(folder))


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.output_blocks.3.1.proj_in.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
@pytest.mark.parametrize("shape", [None, (2, 3)])
def test_a_checkpoint_with_a_damaged_weight_is_refused(files, tmp_path, lost, shape):
    def damage(state):
        del state[lost]
        if shape:
            state[lost] = torch.zeros(shape)

    with pytest.raises(BrokenWeightsError, match="cannot be used"):
        load_single_file(files, model=changed_checkpoint(files, tmp_path, damage))


def test_a_controlnet_file_with_a_missing_weight_is_refused(files, tmp_path):
    state = load_file(files.controlnet)
    del state["control_model.zero_convs.1.0.weight"]
    save_file(state, tmp_path / "control.safetensors")
    with pytest.raises(BrokenWeightsError, match="ControlNet"):
        load_single_file(files, controlnet=str(tmp_path / "control.safetensors"))


@pytest.mark.parametrize(
    "state",
    [
        {"nothing.like.a.lora": torch.ones(2)},
        {"lora_unet_elsewhere.lora_down.weight": torch.ones(2, 8)},
        {
            f"unet.{UNET_LAYER}.lora_A.weight": torch.ones(2, 99),
            f"unet.{UNET_LAYER}.lora_B.weight": torch.ones(99, 2),
        },
        {
            "unet.no_such_block.to_q.lora_A.weight": torch.ones(2, 8),
            "unet.no_such_block.to_q.lora_B.weight": torch.ones(8, 2),
        },
    ],
)
def test_a_lora_for_something_else_is_refused(files, tmp_path, state, capfd):
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(BrokenWeightsError, match=r"odd\.safetensors is no LoRA"):
        load_sd15(str(files.folder), loras=[(str(tmp_path / "odd.safetensors"), 1.0)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "state",
    [
        {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 32)},
        {"<wide>": torch.ones(1, 99)},
    ],
)
def test_a_textual_inversion_for_something_else_is_refused(files, tmp_path, state):
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(BrokenWeightsError, match=r"odd\.safetensors"):
        load_sd15(str(files.folder), embeddings=[str(tmp_path / "odd.safetensors")])


@pytest.mark.parametrize(
    ("kind", "part", "weights"),
    [
        (UNet, "unet", 859_520_964),
        (ControlNetModel, "controlnet", 361_279_120),
        (AutoencoderKL, "vae", 83_653_863),
        (CLIPTextModel, "text_encoder", 123_060_480),
    ],
)
def test_the_standard_configuration_has_the_size_of_the_release(kind, part, weights):
    settings = read_json(STANDARD_CONFIG / part / "config.json")
    with torch.device("meta"):
        if kind is CLIPTextModel:
            model = CLIPTextModel(CLIPTextConfig(**settings))
        else:
            model = kind.from_config(settings)
    assert sum(part.numel() for part in model.parameters()) == weights
