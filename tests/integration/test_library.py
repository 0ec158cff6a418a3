"""Files of weights by their names, where people have them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from safetensors.torch import save_file
from sd15_support import load_sd15, result

from tegula.cli.program import PROGRAM
from tegula.errors import UnknownModelError
from tegula.models import BundleSettings
from tegula.models.hub import HubRepository, find
from tegula.models.library import FileKind, find_file, list_files, search_also
from tegula.models.load import load_bundle, pull
from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import SRVGGNetCompact
from tests.tiny.networks import tiny_bundle

pytestmark = pytest.mark.usefixtures("offline")

TREES = {
    "web UI": {
        FileKind.CHECKPOINT: "models/Stable-diffusion/real/Painted_v2.SAFETENSORS",
        FileKind.CONTROLNET: "extensions/sd-webui-controlnet/models/control_v11f1e_sd15_tile.pth",
        FileKind.VAE: "models/VAE/vae-ft-mse-840000-ema-pruned.ckpt",
        FileKind.LORA: "models/Lora/add_detail.safetensors",
        FileKind.EMBEDDING: "embeddings/EasyNegative.pt",
        FileKind.PRESCALER: "models/ESRGAN/4x-UltraSharp.PTH",
    },
    "ComfyUI": {
        FileKind.CHECKPOINT: "models/checkpoints/Painted_v2.safetensors",
        FileKind.CONTROLNET: "models/controlnet/control_v11f1e_sd15_tile_fp16.safetensors",
        FileKind.VAE: "models/vae/mse.safetensors",
        FileKind.LORA: "models/loras/sub/add_detail.safetensors",
        FileKind.EMBEDDING: "models/embeddings/EasyNegative.safetensors",
        FileKind.PRESCALER: "models/upscale_models/4x-UltraSharp.pth",
    },
    "tegula": {
        FileKind.CHECKPOINT: "checkpoints/Painted_v2.ckpt",
        FileKind.CONTROLNET: "controlnet/tile.safetensors",
        FileKind.VAE: "vae/mse.safetensors",
        FileKind.LORA: "lora/add_detail.safetensors",
        FileKind.EMBEDDING: "embeddings/EasyNegative.pt",
        FileKind.PRESCALER: "prescalers/4x-UltraSharp.pth",
    },
}


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("TEGULA_LIBRARY", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("place", ["option", "home", "here", "models"])
@pytest.mark.parametrize("tree", TREES)
def test_files_of_other_programs_are_found_by_name(tmp_path, tree, place):
    folders = {
        "option": tmp_path / "elsewhere",
        "home": tmp_path / "home" / "stable-diffusion-webui",
        "here": tmp_path / "cwd" / "ComfyUI",
        "models": tmp_path / "models",
    }
    root = folders[place]
    paths = {kind: put(root / inside) for kind, inside in TREES[tree].items()}
    if place == "option":
        search_also([root])
    for kind, path in paths.items():
        for name in (path.stem, path.stem.lower(), path.name, path.name.upper()):
            assert find_file(name, kind) == path, name
        assert find_file(path.stem, FileKind.TEXT_ENCODER) is None
    assert {each.kind: each.path for each in list_files()} == paths


EXTRA = """
# comments stay
a111:
    base_path: {base}
    checkpoints: models/Stable-diffusion
    configs: models/Stable-diffusion
    loras: |
        models/Lora
        models/LyCORIS

    embeddings: embeddings
comfyui:
    is_default: true
    controlnet: {elsewhere}
    upscale_models: upscalers/
empty:
odd: [1, 2]
"""


def test_folders_that_comfyui_is_told_of_are_searched(tmp_path, monkeypatch):
    root, base, elsewhere = (tmp_path / name for name in ("comfy", "webui", "elsewhere"))
    monkeypatch.setenv("TEGULA_WEBUI", str(base))
    list_of_folders = put(root / "extra_model_paths.yaml")
    list_of_folders.write_text(EXTRA.format(base="${TEGULA_WEBUI}", elsewhere=elsewhere))
    paths = {
        FileKind.CHECKPOINT: put(base / "models/Stable-diffusion/sub/Painted.safetensors"),
        FileKind.LORA: put(base / "models/LyCORIS/add_detail.safetensors"),
        FileKind.EMBEDDING: put(base / "embeddings/EasyNegative.pt"),
        FileKind.CONTROLNET: put(elsewhere / "tile.safetensors"),
        FileKind.PRESCALER: put(root / "upscalers/4x-UltraSharp.pth"),
    }
    search_also([root])
    assert {each.kind: each.path for each in list_files()} == paths
    assert find_file("sub/painted", FileKind.CHECKPOINT) == paths[FileKind.CHECKPOINT]


@pytest.mark.parametrize(
    "content",
    ["", "- a", "a: [", "a: {loras: 3, base_path: 4}", "a: !!python/name:os.system x", "\0"],
)
def test_a_list_that_comfyui_could_not_read_either_is_left_out(tmp_path, content):
    put(tmp_path / "comfy" / "extra_model_paths.yaml").write_text(content)
    lora = put(tmp_path / "comfy" / "models" / "loras" / "style.safetensors")
    search_also([tmp_path / "comfy"])
    assert [each.path for each in list_files()] == [lora]


def test_a_file_is_found_by_its_folder_where_two_have_one_name(tmp_path):
    first = put(tmp_path / "models" / "lora" / "a" / "style.safetensors")
    second = put(tmp_path / "models" / "lora" / "b" / "style.safetensors")
    assert find_file("style", FileKind.LORA) == first
    assert find_file("b/style", FileKind.LORA) == second


def cached(tmp_path, repo: str, commit: str, file: str, *, main: bool = False) -> Path:
    folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
    if main:
        put(folder / "refs" / "main").write_text(commit)
    return put(folder / "snapshots" / commit / file)


def test_the_commit_of_main_is_taken_from_the_hubs_cache(tmp_path):
    cached(tmp_path, "someone/tile", "aaa", "config.json")
    main = cached(tmp_path, "someone/tile", "bbb", "config.json", main=True)
    cached(tmp_path, "someone/tile", "ccc", "config.json")
    assert find(HubRepository("someone/tile", ("config.json",))) == main.parent


def test_single_files_of_the_hubs_cache_are_found_by_name(tmp_path):
    cached(tmp_path, "someone/tile", "aaa", "control_tile.pth")
    main = cached(tmp_path, "someone/tile", "bbb", "control_tile.pth", main=True)
    cached(tmp_path, "someone/tile", "bbb", "diffusion_pytorch_model.safetensors")
    assert find_file("control_tile", FileKind.CONTROLNET) == main
    assert find_file("diffusion_pytorch_model", FileKind.CONTROLNET) is None


def test_everything_is_given_by_name(files, tmp_path):
    root = tmp_path / "webui" / "models"
    places = {
        "Stable-diffusion/painted.safetensors": files.checkpoint,
        "ControlNet/control_v11f1e_sd15_tile_fp16.safetensors": files.controlnet,
        "VAE/mse.safetensors": files.vae,
    }
    for inside, file in places.items():
        (root / inside).parent.mkdir(parents=True)
        shutil.copy(file, root / inside)
    (root / "embeddings").mkdir()
    save_file({"emb_params": torch.ones(1, 16)}, root / "embeddings" / "calm.safetensors")
    search_also([tmp_path / "webui"])
    bundle = load_sd15("Painted", vae="mse", config=str(files.folder))
    assert torch.equal(result(bundle), result(tiny_bundle(3)))  # with the tile ControlNet
    taught = load_sd15("painted", embeddings=["calm"], config=str(files.folder))
    assert taught.facts.fingerprint != bundle.facts.fingerprint
    with pytest.raises(UnknownModelError, match="There is no autoencoder other; known are mse,"):
        load_sd15("painted", vae="other", config=str(files.folder))
    with pytest.raises(UnknownModelError, match=r"no bundle other; known are .*painted, and"):
        load_bundle(BundleSettings(bundle="other"))


def test_a_folder_of_the_hubs_cache_is_its_main_commit(files, tmp_path):
    repo = tmp_path / "models--someone--painted"
    shutil.copytree(files.folder, repo / "snapshots" / "abc")
    put(repo / "refs" / "main").write_text("abc")
    assert torch.equal(result(load_sd15(str(repo))), result(tiny_bundle(3)))


def test_a_folder_without_vocabulary_takes_that_of_the_models_folder(folder, tmp_path):
    (tmp_path / "models").mkdir()
    shutil.move(folder / "tokenizer", tmp_path / "models" / "tokenizer")
    assert torch.equal(result(load_sd15(str(folder))), result(tiny_bundle(3)))


def test_a_prescaler_is_found_by_name(tmp_path):
    network = SRVGGNetCompact()
    path = put(tmp_path / "models" / "prescalers" / "4x-Sharp.PTH")
    torch.save({"params": network.state_dict()}, path)
    prescaler = load_prescaler("4x-sharp", torch.device("cpu"), torch.float32)
    assert prescaler.facts.name == str(path)


@pytest.mark.parametrize("repo", ["lllyasviel/control_v11f1e_sd15_tile", "someone/control"])
def test_a_lone_controlnet_is_pulled(monkeypatch, repo):
    from tegula.models import hub, load

    part = tuple(hub.RemoteFile(n, 0, None) for n in ("config.json", "x.safetensors"))
    monkeypatch.setattr(load, "remote_files", lambda _: part)
    wanted = []
    monkeypatch.setattr(load, "fetch_all", lambda parts, _: wanted.extend(parts) or ())
    pull(repo)
    assert [(each.repo, each.files[0]) for each in wanted] == [(repo, "config.json")]


def invoke(*arguments):
    outcome = CliRunner().invoke(PROGRAM, arguments)
    return json.loads(outcome.stdout)


def test_files_are_listed_and_doctor_says_what_each_is(files, tmp_path):
    lora = tmp_path / "webui" / "models" / "Lora" / "odd.safetensors"
    lora.parent.mkdir(parents=True)
    shutil.copy(files.checkpoint, lora)
    put(tmp_path / "webui" / "models" / "VAE" / "empty.safetensors")
    library = ("--library", str(tmp_path / "webui"))
    rows = invoke("models", *library, "--json")["files"]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("odd", "LoRA"),
        ("empty", "autoencoder"),
    ]
    found = {row["name"]: row["what"] for row in invoke("doctor", *library, "--json")["files"]}
    assert found["odd"] == "a checkpoint"
    assert found["empty"].startswith("not usable: ")


def test_names_are_completed_in_the_shell(tmp_path):
    put(tmp_path / "models" / "checkpoints" / "Painted_v2.safetensors")
    put(tmp_path / "models" / "lora" / "add_detail.safetensors")
    shell = ShellComplete(PROGRAM, {}, "tegula", "_TEGULA_COMPLETE")

    def completed(option, start):
        return [each.value for each in shell.get_completions(["upscale", option], start)]

    assert completed("--model", "pain") == ["Painted_v2"]
    assert completed("--model", "min") == ["mini"]
    assert completed("--lora", "") == ["add_detail"]
    assert completed("--prescaler", "real")[0] == "realesrgan-x4plus"
