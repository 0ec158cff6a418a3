"""Several bundles beside each other in one engine, and what a server refuses to start with."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tegula.catalog import Catalog
from tegula.errors import BrokenWeightsError, MissingWeightsError, OptionError, UnknownModelError
from tegula.models import BundleSettings
from tegula.models.load import check_bundle
from tegula.server.engine import Job, Log, OutputFile, check_bundles
from tegula.server.settings import load_settings
from tegula.server.upscaling import RunnerOptions, UpscaleRunner
from tegula.upscaler import Upscaler

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def loads(monkeypatch):
    """What was loaded; pictures are not made."""
    found = []
    monkeypatch.setattr(Upscaler, "load", lambda bundle, **parts: found.append((bundle, parts)))
    monkeypatch.setattr(
        "tegula.server.upscaling.run", lambda *arguments, **_: [arguments[2](())][:0]
    )
    monkeypatch.setattr("tegula.server.upscaling.validate", lambda *_: None)
    return found


def test_bundles_are_loaded_as_jobs_name_them_and_unloaded_when_idle(loads, monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr("tegula.server.upscaling.time.monotonic", lambda: clock[0])
    own = BundleSettings(
        bundle="painted",
        controlnet="tile",
        vae="mse",
        loras=("detail:0.7", ("sharp", 0.3)),
        embeddings=("bad-hands",),
        precision="fp16",
    )
    options = RunnerOptions(
        BundleSettings(), "w", 10**6, bundles={"acme/portraits": own}, idle_seconds=60.0
    )
    runner = UpscaleRunner("cpu", options)
    version = Catalog("w").find().id

    def job(bundle):
        runner(Job("p", 1, "m", version, {}, tmp_path, bundle), lambda _: None, lambda: False)

    assert [bundle for bundle, _ in loads] == ["mini"]
    job("acme/portraits")
    job("")
    job("acme/portraits")
    assert [bundle for bundle, _ in loads] == ["mini", "painted"]
    assert list(runner.loaded) == ["", "acme/portraits"]
    parts = loads[1][1]
    assert parts["loras"] == (("detail", 0.7), ("sharp", 0.3))
    names = ("controlnet", "vae", "embeddings", "precision")
    assert [parts[name] for name in names] == ["tile", "mse", ("bad-hands",), "fp16"]
    clock[0] = 61.0
    job("")
    assert list(runner.loaded) == [""]
    job("acme/portraits")
    assert [bundle for bundle, _ in loads] == ["mini", "painted", "painted"]


def test_the_documented_deployment_runs_with_all_of_its_parts(files, tmp_path, monkeypatch):
    """A checkpoint, the tile ControlNet, a VAE, two LoRAs and an embedding, all found by name."""
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    example = re.search(r"## Bundles\n.*?```json\n(.*?)```", page, re.DOTALL)
    assert example is not None
    (tmp_path / "server.json").write_text(example[1])
    settings = load_settings(tmp_path / "server.json")
    own = settings.bundles["acme/portraits"]
    assert (len(own.loras), len(own.embeddings)) == (2, 1)
    assert own.controlnet
    assert own.vae
    models = tmp_path / "comfy" / "models"
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for at, (name, _) in enumerate(own.loras):
        generator = torch.Generator().manual_seed(at)
        lora = {
            f"{layer}.lora_down.weight": torch.randn(1, 8, generator=generator),
            f"{layer}.lora_up.weight": torch.randn(8, 1, generator=generator),
        }
        (models / "loras").mkdir(parents=True, exist_ok=True)
        save_file(lora, models / "loras" / f"{name}.safetensors")
    for folder, name, source in (
        ("checkpoints", own.bundle, files.checkpoint),
        ("controlnet", own.controlnet, files.controlnet),
        ("vae", own.vae, files.vae),
    ):
        (models / folder).mkdir()
        shutil.copy(source, models / folder / f"{name}.safetensors")
    (models / "embeddings").mkdir()
    word = own.embeddings[0]
    save_file({"emb_params": torch.ones(2, 16)}, models / "embeddings" / f"{word}.safetensors")
    monkeypatch.setenv("TEGULA_LIBRARY", str(tmp_path / "comfy"))
    monkeypatch.setattr("tegula.models.sd15.find.STANDARD_CONFIG", files.folder)
    check_bundle(own)

    bundles = {"acme/portraits": own, "acme/plain": own.replaced(loras=own.loras[:1])}
    options = RunnerOptions(settings.models, "w", 10**6, bundles=bundles)
    runner = UpscaleRunner("cpu", options)
    Image.effect_noise((24, 24), 64).convert("RGB").save(tmp_path / "in.png")
    given = {"image": tmp_path / "in.png", "negative_prompt": word, "scale": 2, "seed": 1}
    given |= {"steps": 4, "prescaler": "lanczos"}
    pictures, log = [], ""
    for bundle in (*bundles, "acme/portraits"):
        folder = tmp_path / f"out{len(pictures)}"
        folder.mkdir()
        events = []
        job = Job("p", 1, "m", Catalog("w").find().id, given, folder, bundle)
        runner(job, events.append, lambda: False)
        log += "".join(event.text for event in events if isinstance(event, Log))
        (output,) = (event for event in events if isinstance(event, OutputFile))
        pictures.append(np.asarray(Image.open(io.BytesIO(output.file.read_bytes()))))
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
    assert "has no effect" not in log  # of the embedding


def test_settings_name_bundles_for_deployments_versions_and_models(tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    own = {"bundle": "painted", "loras": ["a:0.5", ["b", 1]], "embeddings": ["c"]}
    bundles = {"acme/portraits": own, "acme/model:v2": {}, "acme/model": {"vae": "mse"}}
    file.write_text(json.dumps({"bundles": bundles, "loras": "x:0.5, y", "vae": "mse"}))
    monkeypatch.setenv("TEGULA_BUNDLE", "base")
    settings = load_settings(file)
    assert settings.models == BundleSettings(bundle="base", vae="mse", loras=(("x", 0.5), ("y", 1)))
    assert settings.bundles["acme/portraits"].loras == (("a", 0.5), ("b", 1.0))
    assert settings.bundle_of("acme/portraits", "acme/model:v2", "acme/model") == "acme/portraits"
    assert settings.bundle_of(None, "acme/model:v2", "acme/model") == "acme/model:v2"
    assert settings.bundle_of(None, "acme/model:v1", "acme/model") == "acme/model"
    assert settings.bundle_of(None, "tegula/upscale:1", "tegula/upscale") == ""
    monkeypatch.setenv("TEGULA_BUNDLES", '{"a/b": {"bundel": "x"}}')
    with pytest.raises(OptionError, match="bundel"):
        load_settings(file)


def test_the_environment_names_a_bundle_with_its_parts(monkeypatch):
    monkeypatch.setenv("TEGULA_BUNDLE", "painted")
    monkeypatch.setenv("TEGULA_LORAS", "a:0.5, b")
    monkeypatch.setenv("TEGULA_EMBEDDINGS", "bad-hands")
    monkeypatch.setenv("TEGULA_PRECISION", "bf16")
    assert BundleSettings.from_environment() == BundleSettings(
        bundle="painted", loras=("a:0.5", "b"), embeddings=("bad-hands",), precision="bf16"
    )


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({}, MissingWeightsError, "control_v11f1e_sd15_tile"),
        ({"bundle": "gone"}, UnknownModelError, "There is no bundle gone"),
        ({"controlnet": "none", "vae": "gone"}, UnknownModelError, "no autoencoder gone"),
        ({"controlnet": "none", "loras": ("gone.safetensors",)}, MissingWeightsError, "gone"),
        ({"controlnet": "none", "embeddings": ("gone",)}, UnknownModelError, "no embedding gone"),
        ({"controlnet": "odd.safetensors"}, BrokenWeightsError, "odd.safetensors is an embedding"),
        ({"bundle": "mini", "vae": "mse"}, Exception, "packaged model takes no .* add --model"),
    ],
)
def test_what_cannot_be_loaded_is_refused_without_loading(
    tmp_path, monkeypatch, parts, error, message
):
    monkeypatch.chdir(tmp_path)
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "odd.safetensors")
    model = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(
            320, 768
        ),
        "cond_stage_model.transformer.text_model.x": torch.ones(1),
        "first_stage_model.x": torch.ones(1),
    }
    save_file(model, tmp_path / "painted.safetensors")
    monkeypatch.setattr("tegula.models.stored.StoredTensor.read", lambda _: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        check_bundle(BundleSettings(**{"bundle": "painted.safetensors", **parts}))


def test_a_bundle_whose_parts_are_all_here_may_start(files, folder, tmp_path):
    shutil.rmtree(folder / "controlnet")
    check_bundle(BundleSettings(bundle=str(folder), controlnet=str(files.controlnet)))


@pytest.mark.slow
def test_a_start_that_cannot_work_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    with pytest.raises(UnknownModelError, match="There is no bundle gone"):
        check_bundles([BundleSettings(), BundleSettings(bundle="gone")])
