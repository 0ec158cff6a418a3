import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd15_support import changed_checkpoint, expected_result, load_sd15, load_single_file, result

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models import BundleSettings
from tegula.models.load import load_bundle
from tegula.models.sd15.find import _vocabulary
from tegula.models.sd15.parts import STANDARD_CONFIG, tokenizer_from_folder

pytestmark = pytest.mark.usefixtures("offline")

UNET_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PROJECTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


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


def test_what_is_there_and_is_no_model_is_not_said_to_be_missing(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.png", "plain"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(BrokenWeightsError, match=r"^photos/a\.png is a file ending in \.png, not"):
        load_bundle(BundleSettings(bundle="photos/a.png"))  # not a hub id either
    with pytest.raises(BrokenWeightsError, match=r"photos is a folder, not a model; give a diff"):
        load_bundle(BundleSettings(bundle="photos"))
    with pytest.raises(BrokenWeightsError, match=r"plain is a file without an ending, not a model"):
        load_sd15(str(files.folder), controlnet=str(tmp_path / "plain"))
    with pytest.raises(MissingWeightsError, match=r"photos is a folder, not a weights file"):
        load_sd15(str(files.folder), embeddings=[str(tmp_path / "photos")])


def test_an_incomplete_folder_names_what_it_lacks(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "text_encoder" / "config.json").unlink()
    with pytest.raises(MissingWeightsError, match=r"unet/diffusion_\S+ text_encoder/config\.json"):
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
    shutil.copytree(files.folder / "tokenizer", tmp_path / "models" / "tokenizer")
    bundle = load_single_file(files, config=str(config))
    assert torch.equal(result(bundle), expected_result())


def test_clips_vocabulary_comes_with_the_package():
    tokenizer = tokenizer_from_folder(_vocabulary(Path("nowhere"), STANDARD_CONFIG))
    words = tokenizer("a photo of a cat", add_special_tokens=False).input_ids
    assert words == [320, 1125, 539, 320, 2368]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        49406,
        49407,
        49407,
    )


def test_all_that_is_missing_is_said_at_once_and_before_anything_is_loaded(
    files, tmp_path, monkeypatch
):
    def remove(state):
        for name in [name for name in state if name.startswith("first_stage_model.")]:
            del state[name]

    monkeypatch.setattr("tegula.models.stored.StoredTensor.read", lambda _: pytest.fail("loaded"))
    bare = changed_checkpoint(files, tmp_path, remove)
    shutil.move(bare, tmp_path / "bare.safetensors")
    with pytest.raises(MissingWeightsError, match=r"control_v11f1e_sd15_tile and .*sd-vae-ft-mse"):
        load_single_file(files, model=tmp_path / "bare.safetensors", controlnet=None)


def test_a_truncated_file_is_refused(files, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(files.checkpoint.read_bytes()[:-100])
    with pytest.raises(BrokenWeightsError, match="bytes where its header promises"):
        load_single_file(files, model=path)


def test_a_truncated_file_in_a_folder_is_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenWeightsError, match=r"unet/diffusion_pytorch_model\.safetensors has"):
        load_sd15(str(folder))


@pytest.mark.parametrize("content", [b"", b"hello world, no weights", b"\xff" * 64])
def test_a_file_of_something_else_is_refused(files, tmp_path, content):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(BrokenWeightsError, match="not a safetensors file"):
        load_single_file(files, model=path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_pickled_file_with_code_in_it_is_not_run(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = load_file(files.checkpoint)
    torch.save({"state_dict": state, "extra": Evil()}, tmp_path / "evil.ckpt")
    bundle = load_single_file(files, model=tmp_path / "evil.ckpt")
    assert torch.equal(result(bundle), expected_result())
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conditioner.embedders.0.x", (1,), "a checkpoint for SDXL; give a checkpoint"),
        (PROJECTION, (8, 1024), "a checkpoint for Stable Diffusion 2;"),
        (PROJECTION, (8, 999), "text of width 999"),
        ("model.diffusion_model.input_blocks.0.0.weight", (8, 9, 3, 3), "9 input channels"),
        ("model.diffusion_model.input_blocks.0.0.weight", (8,), "unknown weights"),
        (PROJECTION, (8,), "has the shape"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused(files, tmp_path, name, shape, message):
    other = changed_checkpoint(files, tmp_path, lambda s: s.update({name: torch.zeros(shape)}))
    with pytest.raises(BrokenWeightsError, match=message):
        load_single_file(files, model=other)


def test_a_lone_network_is_no_checkpoint(files):
    with pytest.raises(BrokenWeightsError, match=r"vae\.safetensors is an autoencoder; give a che"):
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
    with pytest.raises(BrokenWeightsError, match=r"odd\.safetensors is (not a LoRA|an emb)"):
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


def saved(path, shapes):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return str(path)


ATTENTION = "1.transformer_blocks.0.attn2.to_k"
OTHERS = {
    "taesd": ({"decoder.layers.0.weight": (4, 4)}, "a light autoencoder"),
    "taesd-original": ({"3.conv.0.weight": (4, 4), "1.weight": (4, 4)}, "a light autoencoder"),
    "lora": ({f"lora_unet_{ATTENTION.replace('.', '_')}.lora_down.weight": (4, 768)}, "a LoRA for"),
    "lora-xl": (
        {f"lora_unet_{ATTENTION.replace('.', '_')}.lora_down.weight": (4, 2048)},
        "a LoRA for SDXL",
    ),
    "lora-flux": (
        {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 4)},
        "a LoRA for Flux",
    ),
    "sd3": (
        {"model.diffusion_model.joint_blocks.0.x": (2, 2)},
        "a checkpoint for Stable Diffusion 3",
    ),
    "flux": ({"double_blocks.0.img_attn.proj.weight": (2, 2)}, "a transformer for Flux"),
    "unet-xl": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            f"model.diffusion_model.input_blocks.4.{ATTENTION}.weight": (8, 2048),
        },
        "a UNet for SDXL",
    ),
    "control-xl": (
        {
            "controlnet_cond_embedding.conv_in.weight": (2, 2),
            f"down_blocks.1.attentions.{ATTENTION}.weight": (8, 2048),
        },
        "a ControlNet for SDXL",
    ),
    "union": ({"task_embedding": (2, 2), "controlnet_down_blocks.0.weight": (2, 2)}, "a union Con"),
    "t2i": ({"adapter.body.0.resnets.0.block1.weight": (2, 2)}, "a T2I adapter"),
    "ip": ({"ip_adapter.1.to_k_ip.weight": (2, 2)}, "an IP adapter"),
    "vae-16": (
        {"decoder.conv_in.weight": (8, 16, 3, 3), "decoder.mid.block_1.x": (1,)},
        "an autoencoder for latents of 16 channels",
    ),
    "sdxl_vae": (
        {"decoder.conv_in.weight": (8, 4, 3, 3), "decoder.mid.block_1.x": (1,)},
        "an autoencoder for SDXL",
    ),
    "esrgan": ({"conv_first.weight": (8, 3, 3, 3)}, "a prescaler"),
    "embedding-xl": ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "an embedding for SDXL"),
}


@pytest.mark.parametrize("part", ["vae", "controlnet", "model"])
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_file_is_refused_by_what_it_is(files, tmp_path, part, name):
    shapes, what = OTHERS[name]
    with pytest.raises(BrokenWeightsError, match=rf"{name}\.safetensors is {what}.*; give a"):
        load_single_file(files, **{part: saved(tmp_path / f"{name}.safetensors", shapes)})


def test_the_autoencoder_of_sdxl_is_told_by_its_settings(files, folder, tmp_path):
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.13025}))
    for vae in (folder / "vae", folder / "vae" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(BrokenWeightsError, match="an autoencoder for SDXL"):
            load_single_file(files, vae=str(vae))


@pytest.mark.parametrize("part", ["vae", "controlnet", "model"])
def test_gguf_is_refused_by_its_name(files, tmp_path, part):
    path = tmp_path / "flux1-dev-Q4.gguf"
    path.write_bytes(b"GGUF\x03" + bytes(32))
    with pytest.raises(BrokenWeightsError, match="is a GGUF file"):
        load_single_file(files, **{part: str(path)})


def test_weights_that_are_not_finite_are_found_while_loading(files, tmp_path):
    def spoil(state):
        state["model.diffusion_model.out.2.weight"][0, 0] = torch.nan

    with pytest.raises(
        BrokenWeightsError, match=r"out\.2\.weight holds numbers that are not finite"
    ):
        load_single_file(files, model=changed_checkpoint(files, tmp_path, spoil))


def test_a_folder_of_checkpoints_is_told_from_a_model(files, tmp_path):
    shutil.copy(files.checkpoint, tmp_path / "painted.safetensors")
    with pytest.raises(MissingWeightsError, match=r"folder of files \(painted\.safetensors\)"):
        load_sd15(str(tmp_path))


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (
            "https://huggingface.co/a/b/resolve/main/x/c.safetensors?download=true",
            r"hf download a/b x/c\.safetensors",
        ),
        ("https://huggingface.co/a/b", "give the hub id a/b"),
        ("https://civitai.com/api/download/models/1", "download it"),
    ],
)
def test_a_link_is_told_how_to_be_had(files, link, message):
    for part in ("model", "vae", "controlnet"):
        with pytest.raises(MissingWeightsError, match=message):
            load_sd15(**{"model": str(files.folder), part: link})
