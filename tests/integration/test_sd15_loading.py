import json
import re
import shutil
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from sd15_support import changed_checkpoint, expected_result, load_sd15, load_single_file, result

from tegula.errors import MissingWeightsError
from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.networks import sample_of
from tegula.models.stored import StoredTensor
from tests.tiny.networks import tiny_bundle, tiny_networks

pytestmark = pytest.mark.usefixtures("offline")

UNET_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYERS = tuple(
    f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj")
)


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
    assert torch.equal(result(bundle), expected_result())
    assert bundle.facts.fingerprint == tiny_bundle(3).facts.fingerprint
    assert bundle.facts.name == "diffusers"
    assert bundle.scheduler == SCHEDULER


def test_of_a_folders_scheduler_settings_only_the_noise_is_taken(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    solver = {"algorithm_type": "deis", "final_sigmas_type": "zero", "use_karras_sigmas": True}
    path.write_text(json.dumps({**SCHEDULER, **solver, "prediction_type": "v_prediction"}))
    assert load_sd15(str(folder)).scheduler == {**SCHEDULER, "prediction_type": "v_prediction"}


def test_a_checkpoint_with_a_separate_controlnet_gives_the_same_result(files):
    bundle = load_single_file(files)
    assert torch.equal(result(bundle), expected_result())
    assert bundle.facts.fingerprint == tiny_bundle(3).facts.fingerprint
    assert bundle.facts.name == "checkpoint"


def test_a_pickled_checkpoint_of_plain_weights_gives_the_same_result(files, tmp_path):
    torch.save({"state_dict": load_file(files.checkpoint), "epoch": 3}, tmp_path / "model.ckpt")
    bundle = load_single_file(files, model=tmp_path / "model.ckpt")
    assert torch.equal(result(bundle), expected_result())


def test_a_separate_vae_replaces_the_checkpoints_own(files, tmp_path):
    def erase(state):
        for name in state:
            if name.startswith("first_stage_model."):
                state[name] = torch.zeros_like(state[name])

    erased = changed_checkpoint(files, tmp_path, erase)
    assert not torch.equal(result(load_single_file(files, model=erased)), expected_result())
    bundle = load_single_file(files, model=erased, vae=str(files.vae))
    assert torch.equal(result(bundle), expected_result())


def test_a_checkpoint_without_vae_takes_a_folder(files, tmp_path):
    def remove(state):
        for name in [name for name in state if name.startswith("first_stage_model.")]:
            del state[name]

    bare = changed_checkpoint(files, tmp_path, remove)
    bundle = load_single_file(files, model=bare, vae=str(files.folder / "vae"))
    assert torch.equal(result(bundle), expected_result())
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
    assert torch.equal(result(load_sd15(str(folder))), expected_result())


def test_a_bundle_runs_in_the_precision_asked_for(files):
    bundle = load_sd15(str(files.folder), dtype=torch.bfloat16)
    assert result(bundle).dtype == torch.bfloat16
    assert bundle.facts.fingerprint == tiny_bundle(3).facts.fingerprint


def test_a_bundle_loads_without_controlnet_when_asked(files):
    assert load_sd15(str(files.folder), controlnet="none").denoiser.controlnet is None


def test_a_file_of_training_is_model_and_controlnet_in_one(files, tmp_path):
    path = str(tmp_path / "control_ldm.safetensors")
    save_file({**load_file(files.checkpoint), **load_file(files.controlnet)}, path)
    bundle = load_single_file(files, model=path, controlnet=path)
    assert torch.equal(result(bundle), expected_result())


def test_a_controlnet_for_something_else_is_told_by_its_name(files, tmp_path):
    for name, count in (("control_v11p_sd15_canny", 1), ("control_v11f1e_sd15_tile", 0)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(files.controlnet.read_bytes())
        warnings = load_single_file(files, controlnet=str(path)).warnings
        assert [name in warning for warning in warnings] == [True] * count


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
    assert torch.allclose(result(plain), expected_result(), atol=1e-5)
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
    save_file({"emb_params": torch.ones(2, 16)}, tmp_path / "mild.safetensors")
    embeddings = [str(tmp_path / name) for name in ("calm.pt", "mild.safetensors")]
    bundle = load_sd15(str(files.folder), embeddings=embeddings)
    calm, mild, other = bundle.text.encode(["a calm cat", "a mild cat", "a other cat"])
    assert torch.equal(calm, mild)
    assert torch.equal(other, tiny_bundle(3).text.encode(["a other cat"])[0])


def test_loading_leaves_the_bars_of_the_libraries_as_they_were(files):
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        load_sd15(str(files.folder))
        assert not any(library.is_progress_bar_enabled() for library in libraries)
    finally:
        for library in libraries:
            library.enable_progress_bar()


def renamed(files, tmp_path, rename):
    def change(state):
        for name in list(state):
            state[rename(name)] = state.pop(name)

    return changed_checkpoint(files, tmp_path, change)


def test_the_keys_that_text_encoders_had_before_are_read(files, tmp_path):
    old = "cond_stage_model.transformer."
    path = renamed(files, tmp_path, lambda name: name.replace(f"{old}text_model.", old))
    assert torch.equal(result(load_single_file(files, model=path)), expected_result())


def test_a_checkpoint_without_text_encoder_takes_the_releases(files, tmp_path):
    def remove(state):
        for name in [name for name in state if name.startswith("cond_stage_model.")]:
            del state[name]

    bare = changed_checkpoint(files, tmp_path, remove)
    with pytest.raises(MissingWeightsError, match=r"holds no text encoder.*clip_l\.safetensors"):
        load_single_file(files, model=bare)
    place = tmp_path / "models" / "text_encoder" / "clip_l.safetensors"
    place.parent.mkdir(parents=True)
    save_file(load_file(files.folder / "text_encoder" / "model.safetensors"), place)
    assert torch.equal(result(load_single_file(files, model=bare)), expected_result())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""], ids=["prefix", "bare"])
def test_a_unet_alone_takes_the_other_parts_from_elsewhere(files, tmp_path, prefix):
    own = "model.diffusion_model."
    state = {
        prefix + name.removeprefix(own): tensor
        for name, tensor in load_file(files.checkpoint).items()
        if name.startswith(own)
    }
    save_file(state, tmp_path / "unet.safetensors")
    shutil.copytree(files.folder / "text_encoder", tmp_path / "text_encoder")
    bundle = load_single_file(
        files, model=tmp_path / "unet.safetensors", vae=str(files.folder / "vae")
    )
    assert torch.equal(result(bundle), expected_result())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_file_with_the_old_names_of_its_attention_loads(files, tmp_path, prefix):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(files.folder / "vae/diffusion_pytorch_model.safetensors").items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        state[prefix + name] = tensor
    assert any(".query." in name for name in state)
    save_file(state, tmp_path / "mse.safetensors")
    bundle = load_single_file(files, vae=str(tmp_path / "mse.safetensors"))
    assert torch.equal(result(bundle), expected_result())


def shared_layers(state):
    """The layers of a ControlNet file that the UNet has too, by the UNet's names."""
    return {
        name: name.replace("control_model.", "model.diffusion_model.")
        for name in state
        if re.search(r"control_model\.(time_embed|input_blocks|middle_block)\.", name)
    }


def test_a_difference_is_added_to_the_unet(files, tmp_path):
    state, unet = load_file(files.controlnet), load_file(files.checkpoint)
    for name, base in shared_layers(state).items():
        state[name] = state[name] - unet[base]
    save_file({**state, "difference": torch.zeros(())}, tmp_path / "diff.safetensors")
    bundle = load_single_file(files, controlnet=str(tmp_path / "diff.safetensors"))
    assert torch.allclose(result(bundle), expected_result(), atol=1e-4)


def test_a_control_lora_is_joined_with_the_unet(files, tmp_path):
    state, unet = load_file(files.controlnet), load_file(files.checkpoint)
    shared, expected, lora = shared_layers(state), dict(state), {"lora_controlnet": torch.zeros(())}
    generator = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        bare, base = name.removeprefix("control_model."), unet.get(shared.get(name, ""))
        if base is None:
            lora[bare] = tensor
        elif base.ndim >= 2:
            up = torch.randn(base.shape[0], 2, generator=generator)
            down = torch.randn(2, base[0].numel(), generator=generator)
            stem = bare.removesuffix(".weight")
            lora |= {f"{stem}.up": up, f"{stem}.down": down}
            expected[name] = base + (up @ down).reshape(base.shape)
        else:
            expected[name] = base  # left to the UNet
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(expected, tmp_path / "whole.safetensors")
    joined, whole = (
        result(load_single_file(files, controlnet=str(tmp_path / f"{name}.safetensors")))
        for name in ("lora", "whole")
    )
    assert torch.allclose(joined, whole, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_become_what_a_rounding_of_the_whole_network_gives(files, dtype):
    narrow, whole = load_single_file(files, dtype=dtype), tiny_bundle(3).denoiser.unet
    for name, weight in narrow.denoiser.unet.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name).to(dtype))
    assert narrow.facts.fingerprint == tiny_bundle(3).facts.fingerprint


def test_no_weight_is_held_twice_while_loading(files, monkeypatch):
    alive, most = weakref.WeakSet(), []
    read = StoredTensor.read

    def counted(stored):
        tensor = read(stored)
        alive.add(Holder(tensor))
        most.append(len(alive))
        return tensor

    class Holder:
        def __init__(self, tensor):
            tensor.holder = self

    monkeypatch.setattr(StoredTensor, "read", counted)
    load_single_file(files, dtype=torch.bfloat16)
    assert len(most) > 100
    assert max(most) <= 2


def test_samples_of_weights_keep_no_weight_in_memory():
    weight = torch.rand(100_000)
    sample = sample_of(weight)
    assert sample.untyped_storage().nbytes() == 4 * len(sample) < 1000
    assert torch.equal(sample, weight[:: 100_000 // 64])
