"""The layouts that files of Stable Diffusion 1.5 have in the wild, on tiny weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd15_support import expected_result, load_sd15, load_single_file, result

from tegula.errors import BrokenWeightsError

pytestmark = pytest.mark.usefixtures("offline")


def equal(bundle):
    return torch.equal(result(bundle), expected_result())


# Checkpoints.


def with_average(state):
    plain = {n: t for n, t in state.items() if n.startswith("model.diffusion_model.")}
    for name, tensor in plain.items():
        state[f"model_ema.{name.removeprefix('model.').replace('.', '')}"] = tensor + 1
    state["model_ema.decay"], state["model_ema.num_updates"] = torch.ones(()), torch.ones(())


def with_leftovers(state):
    state |= {
        "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
        "loss.logvar": torch.ones(()),
        "logvar": torch.ones(1000),
        "betas": torch.ones(1000),
        "sqrt_alphas_cumprod": torch.ones(1000),
        "cond_stage_model.vision_model.embeddings.class_embedding": torch.ones(16),
        "v_pred": torch.empty(0),
        "epoch_loss": torch.ones(3, dtype=torch.int64),
    }


def with_lcm_condition(state):
    state["model.diffusion_model.time_embed.cond_proj.weight"] = torch.ones(8, 256)


def without_positions(state):
    del state["cond_stage_model.transformer.text_model.embeddings.position_ids"]


def with_positions_as_numbers(state):
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    state[name] = state[name].float()


CHANGES = (
    with_average,
    with_leftovers,
    with_lcm_condition,
    without_positions,
    with_positions_as_numbers,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_checkpoint_holds_besides_changes_nothing(files, tmp_path, change):
    state = load_file(files.checkpoint)
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    assert equal(load_single_file(files, model=tmp_path / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_checkpoint_in_fewer_bits_has_its_rounded_weights(files, tmp_path, dtype):
    state = load_file(files.checkpoint)
    narrow = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file(
        {n: t.float() if t.is_floating_point() else t for n, t in narrow.items()},
        tmp_path / "rounded.safetensors",
    )
    bundles = [
        load_single_file(files, model=tmp_path / f"{name}.safetensors")
        for name in ("narrow", "rounded")
    ]
    assert torch.equal(*map(result, bundles))
    assert not equal(bundles[0])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "bare"])
def test_both_forms_of_pickled_checkpoints_load(files, tmp_path, zipped, wrapped):
    state = load_file(files.checkpoint)
    content = {"state_dict": state, "global_step": 840_000, "epoch": 3} if wrapped else state
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert equal(load_single_file(files, model=path))


CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ENTRY = "model.diffusion_model.input_blocks.0.0.weight"
OTHERS = {
    "inpainting": ({ENTRY: (8, 9, 3, 3)}, "a variant with 9 input channels"),
    "ip2p": ({ENTRY: (8, 8, 3, 3)}, "a variant with 8 input channels"),
    "x4-upscaler": (
        {ENTRY: (8, 7, 3, 3), CONTEXT: (8, 1024)},
        "Stable Diffusion 2, a variant with 7",
    ),
    "sd2": ({CONTEXT: (8, 1024)}, "a checkpoint for Stable Diffusion 2;"),
    "refiner": ({CONTEXT: (8, 1280)}, "a checkpoint for the SDXL refiner"),
    "sdxl": (
        {"conditioner.embedders.0.transformer.x": (1,), CONTEXT: (8, 2048)},
        "a checkpoint for SDXL",
    ),
    "flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8)}, "for Flux"),
    "sd3": ({"model.diffusion_model.joint_blocks.0.x_block.x": (8, 8)}, "for Stable Diffusion 3"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_networks_is_refused_by_its_name(files, tmp_path, name):
    shapes, sentence = OTHERS[name]
    state = load_file(files.checkpoint)
    state |= {key: torch.zeros(shape) for key, shape in shapes.items()}
    save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(BrokenWeightsError, match=rf"{name}\.safetensors is .*{sentence}"):
        load_single_file(files, model=tmp_path / f"{name}.safetensors")


PAGES = {
    "page": b"<!DOCTYPE html><html><body>Log in</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2132625894\n",
    "empty": b"",
}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("name", PAGES)
def test_what_a_failed_download_leaves_is_refused(files, tmp_path, name, suffix):
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(PAGES[name])
    with pytest.raises(BrokenWeightsError, match=rf"{name}\.{suffix} is "):
        load_single_file(files, model=path)


# ControlNets and autoencoders.


def saved(state, path, dtype=torch.float32):
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["control_model.", ""], ids=["prefix", "bare"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_controlnet_of_the_original_layout_loads(files, tmp_path, prefix, suffix):
    state = {
        name.replace("control_model.", prefix): tensor
        for name, tensor in load_file(files.controlnet).items()
    }
    path = saved(state, tmp_path / f"control_v11f1e_sd15_tile.{suffix}")
    assert equal(load_single_file(files, controlnet=path))


def test_a_controlnet_in_a_wrapper_loads(files, tmp_path):
    path = tmp_path / "tile.pth"
    torch.save({"state_dict": load_file(files.controlnet)}, path)
    assert equal(load_single_file(files, controlnet=str(path)))


@pytest.mark.parametrize("kind", ["folder", "file", "fp16"])
def test_a_controlnet_of_diffusers_layout_loads(files, tmp_path, kind):
    folder = files.folder / "controlnet"
    own = folder / "diffusion_pytorch_model.safetensors"
    if kind == "folder":
        assert equal(load_single_file(files, controlnet=str(folder)))
    elif kind == "file":
        assert equal(load_single_file(files, controlnet=str(own)))
    else:
        state = load_file(own)
        narrow = load_single_file(
            files, controlnet=saved(state, tmp_path / "narrow.safetensors", torch.float16)
        )
        rounded = {name: tensor.half().float() for name, tensor in state.items()}
        wide = load_single_file(files, controlnet=saved(rounded, tmp_path / "wide.safetensors"))
        assert torch.equal(result(narrow), result(wide))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."], ids=["bare", "prefix"])
@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_an_autoencoder_of_the_original_layout_loads(files, tmp_path, prefix, suffix):
    state = {prefix + name: tensor for name, tensor in load_file(files.vae).items()}
    state["loss.discriminator.main.0.weight"] = torch.ones(4, 3, 4, 4)
    path = saved(state, tmp_path / f"mse.{suffix}")
    assert equal(load_single_file(files, vae=path))


def test_an_autoencoder_in_a_wrapper_or_with_flat_attention_loads(files, tmp_path):
    state = load_file(files.vae)
    flat = {n: t[:, :, 0, 0] if "attn_1" in n and t.ndim == 4 else t for n, t in state.items()}
    assert any(t.ndim == 2 for t in flat.values())
    torch.save({"state_dict": flat, "global_step": 7}, tmp_path / "flat.ckpt")
    assert equal(load_single_file(files, vae=str(tmp_path / "flat.ckpt")))


def test_an_autoencoder_in_fewer_bits_has_its_rounded_weights(files, tmp_path):
    state = load_file(files.vae)
    narrow = load_single_file(
        files, vae=saved(state, tmp_path / "narrow.safetensors", torch.float16)
    )
    rounded = {name: tensor.half().float() for name, tensor in state.items()}
    wide = load_single_file(files, vae=saved(rounded, tmp_path / "wide.safetensors"))
    assert torch.equal(result(narrow), result(wide))


def test_the_autoencoder_of_a_whole_checkpoint_is_taken(files):
    assert equal(load_single_file(files, vae=str(files.checkpoint)))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_autoencoder_folder_loads(files, folder, suffix):
    vae = folder / "vae"
    own = vae / "diffusion_pytorch_model.safetensors"
    if suffix == "bin":
        torch.save(load_file(own), own.with_suffix(".bin"))
        own.unlink()
    assert equal(load_single_file(files, vae=str(vae)))


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


# Folders.


def with_old_attention(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        for new, old in OLD_ATTENTION.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor
    save_file(state, path)


def without_scaling_factor(folder):
    path = folder / "vae" / "config.json"
    settings = json.loads(path.read_text())
    del settings["scaling_factor"]
    path.write_text(json.dumps(settings))


def with_text_model_prefix(folder):
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({f"text_model.{n.removeprefix('text_model.')}": t for n, t in state.items()}, path)


def with_safety_checker(folder):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    edit_index(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])


def without_index(folder):
    (folder / "model_index.json").unlink()


def as_inpainting(folder):
    edit_index(folder, _class_name="StableDiffusionInpaintPipeline")


def as_controlnet_pipeline(folder):
    edit_index(folder, _class_name="StableDiffusionControlNetPipeline")


def as_latent_consistency(folder):
    edit_index(folder, _class_name="LatentConsistencyModelPipeline")


def edit_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_one_file_of_words(folder):
    """As transformers 5 saves a tokenizer."""
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    words.save_pretrained(folder / "tokenizer")
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


FOLDERS = (
    with_one_file_of_words,
    with_old_attention,
    without_scaling_factor,
    with_text_model_prefix,
    with_safety_checker,
    without_index,
    as_inpainting,
    as_controlnet_pipeline,
    as_latent_consistency,
)


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_released_folders_differ_in_what_does_not_matter(folder, change):
    change(folder)
    assert equal(load_sd15(str(folder)))


def test_a_folder_whose_autoencoder_is_given_needs_none(files, folder):
    shutil.rmtree(folder / "vae")
    assert equal(load_sd15(str(folder), vae=str(files.folder / "vae")))


@pytest.mark.parametrize(
    ("part", "given", "what"),
    [
        ("controlnet", "checkpoint", "a checkpoint"),
        ("controlnet", "vae", "an autoencoder"),
        ("vae", "controlnet", "a ControlNet"),
        ("model", "controlnet", "a ControlNet"),
    ],
)
def test_the_file_of_one_part_is_refused_as_another(files, part, given, what):
    path = getattr(files, given)
    with pytest.raises(BrokenWeightsError, match=rf"{path.name} is {what}.*; give a"):
        load_single_file(files, **{part: str(path)})
