import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from tegula.errors import (
    BrokenWeightsError,
    MissingWeightsError,
    ModelError,
    PathError,
    UnknownModelError,
)
from tegula.models import DEFAULT_BUNDLE, BundleSettings, hub, load
from tegula.models.hub import HubRepository, RemoteFile
from tegula.models.sd15 import facts
from tests.tiny.files import save_tiny

NAME = "realistic-vision-5.1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny")).folder


@pytest.fixture(autouse=True)
def models(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "models"


class FakeHub:
    """Serves the tiny files under the ids of the real repositories."""

    def __init__(self, tiny: Path) -> None:
        part = {facts.DEFAULT_VAE: tiny / "vae", facts.DEFAULT_CONTROLNET: tiny / "controlnet"}
        self.folder = lambda repo: part.get(repo, tiny)
        self.requested: list[str] = []
        self.fail_at: str | None = None
        self.damage: str | None = None
        self.sha256: str | None = None

    def remote_files(self, repo: str) -> tuple[RemoteFile, ...]:
        folder = self.folder(repo)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return tuple(
            RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size, self.sha256)
            for path in paths
        )

    def download(self, repo: str, filename: str, *, local_dir: Path) -> str:
        if filename == self.fail_at:
            raise ConnectionError("the line went dead")
        self.requested.append(filename)
        target = local_dir / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        content = (self.folder(repo) / filename).read_bytes()
        target.write_bytes(content[:-1] if filename == self.damage else content)
        (local_dir / ".cache").mkdir(exist_ok=True)
        return str(target)


@pytest.fixture
def fake_hub(tiny, monkeypatch) -> FakeHub:
    fake = FakeHub(tiny)
    monkeypatch.setattr(hub, "remote_files", fake.remote_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def test_every_bundle_is_listed_once_with_what_it_needs():
    entries = load.list_bundles()
    assert len({entry.name for entry in entries}) == len(entries)
    assert entries[0].name == DEFAULT_BUNDLE
    assert all(entry.size > 0 and entry.licence and entry.description for entry in entries)
    assert all(entry.parts for entry in entries if entry.family == "sd15")


def test_nothing_but_the_packaged_bundle_is_installed_on_a_fresh_machine():
    installed = [e.name for e in load.list_bundles() if e.installed]
    assert set(installed) <= {"mini"}


def test_a_pulled_bundle_is_installed_and_loads_by_name(fake_hub, models):
    reports = []
    folders = load.pull(NAME, lambda done, total: reports.append((done, total)))
    assert folders == tuple(
        models / repo for repo in (facts.DEFAULT_MODEL, facts.DEFAULT_CONTROLNET, facts.DEFAULT_VAE)
    )
    assert load.BUNDLES[NAME].installed
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1][0] == reports[-1][1] > 0
    assert not list(models.rglob(".*"))
    bundle = load.load_bundle(BundleSettings(bundle=NAME), dtype=torch.bfloat16)
    assert (bundle.facts.name, bundle.dtype) == (NAME, torch.bfloat16)


def test_only_what_is_needed_is_pulled(fake_hub):
    load.pull(NAME)
    assert "model_index.json" not in fake_hub.requested
    assert "controlnet/config.json" not in fake_hub.requested


def test_a_second_pull_downloads_nothing(fake_hub):
    load.pull(NAME)
    fake_hub.requested.clear()
    assert load.pull(NAME) == ()
    assert fake_hub.requested == []


def test_a_hub_id_can_be_pulled_and_loaded(fake_hub):
    load.pull("someone/fine-tune")
    assert load.load_bundle(BundleSettings(bundle="someone/fine-tune")).facts.name == "fine-tune"


def test_an_interrupted_pull_leaves_nothing_visible_and_can_go_on(fake_hub, models):
    fake_hub.fail_at = "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(MissingWeightsError):
        load.pull(NAME)
    assert not (models / facts.DEFAULT_MODEL).exists()
    fake_hub.fail_at = None
    load.pull(NAME)
    assert load.BUNDLES[NAME].installed


def test_a_pull_adds_what_a_folder_lacks_and_touches_nothing_else(fake_hub, tiny, models):
    own = models / facts.DEFAULT_MODEL
    shutil.copytree(tiny, own)
    (own / "vae" / "config.json").unlink()
    mine = {"notes.txt": b"trained in June", "unet/config.json": b"{}"}
    for name, content in mine.items():
        (own / name).write_bytes(content)
    load.pull(NAME)
    assert (own / "vae" / "config.json").read_bytes() == (tiny / "vae/config.json").read_bytes()
    assert {name: (own / name).read_bytes() for name in mine} == mine
    assert not list(models.rglob(".*"))


def test_a_pull_that_fails_at_the_end_leaves_the_old_folder(fake_hub, tiny, models, monkeypatch):
    own = models / facts.DEFAULT_MODEL
    shutil.copytree(tiny, own)
    (own / "vae" / "config.json").unlink()
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}

    def refuse(path, target):
        raise PermissionError(13, "Permission denied")

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(PathError):
        load.pull(NAME)
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_a_linked_folder_is_filled_where_it_lies(fake_hub, tiny, models, tmp_path):
    elsewhere = Path(shutil.copytree(tiny, tmp_path / "disk" / "model"))
    (elsewhere / "vae" / "config.json").unlink()
    (models / facts.DEFAULT_MODEL).parent.mkdir(parents=True)
    (models / facts.DEFAULT_MODEL).symlink_to(elsewhere)
    load.pull(NAME)
    assert (elsewhere / "vae" / "config.json").is_file()
    assert (models / facts.DEFAULT_MODEL).is_symlink()


def test_a_damaged_download_is_refused_and_removed(fake_hub, models):
    fake_hub.damage = "vae/diffusion_pytorch_model.safetensors"
    with pytest.raises(BrokenWeightsError, match="arrived damaged"):
        load.pull(NAME)
    assert not (models / facts.DEFAULT_MODEL).exists()
    assert not list(models.rglob("vae/*.safetensors"))


def test_a_wrong_hash_is_refused(fake_hub):
    fake_hub.sha256 = "0" * 64
    with pytest.raises(BrokenWeightsError, match="arrived damaged"):
        load.pull(NAME)


def test_a_repository_without_a_file_is_named(fake_hub, tiny, monkeypatch):
    listed = fake_hub.remote_files("any")
    short = tuple(file for file in listed if not file.path.startswith("unet/"))
    monkeypatch.setattr(hub, "remote_files", lambda repo: short)
    with pytest.raises(MissingWeightsError, match=r"holds no unet/config\.json"):
        load.pull(NAME)


def test_without_network_pull_says_which_files_go_where(models):
    with pytest.raises(MissingWeightsError) as caught:
        load.pull(NAME)
    message = str(caught.value)
    assert all(name in message for name in facts.FOLDER_FILES)
    for repo in (facts.DEFAULT_MODEL, facts.DEFAULT_CONTROLNET, facts.DEFAULT_VAE):
        assert str(models / repo) in message


def test_files_put_by_hand_where_the_message_says_are_found(tiny, models):
    shutil.copytree(tiny, models / facts.DEFAULT_MODEL)
    shutil.copytree(tiny / "controlnet", models / facts.DEFAULT_CONTROLNET)
    with pytest.raises(MissingWeightsError, match=facts.DEFAULT_VAE):
        load.pull(NAME)
    shutil.copytree(tiny / "vae", models / facts.DEFAULT_VAE)
    assert load.BUNDLES[NAME].installed
    assert load.load_bundle(BundleSettings(bundle=NAME)).facts.family == "sd15"


def test_a_part_given_by_the_user_need_not_be_there(tiny, models):
    shutil.copytree(tiny, models / facts.DEFAULT_MODEL)
    with pytest.raises(MissingWeightsError) as caught:
        load.load_bundle(BundleSettings(bundle=NAME, controlnet="none"))
    assert facts.DEFAULT_VAE in str(caught.value)
    assert facts.DEFAULT_CONTROLNET not in str(caught.value)
    bundle = load.load_bundle(BundleSettings(bundle=NAME, controlnet="none", vae=str(tiny / "vae")))
    assert bundle.denoiser.controlnet is None


def test_the_cache_of_the_hub_client_is_used(tiny, tmp_path):
    snapshots = tmp_path / "cache" / "models--someone--fine-tune" / "snapshots"
    shutil.copytree(tiny, snapshots / "abc")
    assert hub.find(HubRepository("someone/fine-tune", facts.FOLDER_FILES)) == snapshots / "abc"
    assert load.load_bundle(BundleSettings(bundle="someone/fine-tune")).facts.family == "sd15"


def test_an_unwritable_models_folder_is_named(fake_hub, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path / "file"))
    with pytest.raises(PathError, match="TEGULA_MODELS"):
        load.pull(NAME)


def test_the_best_format_on_the_hub_is_chosen():
    repository = HubRepository("a/b", ("unet/model.safetensors", "tokenizer/vocab.json"))
    half = RemoteFile("unet/model.fp16.safetensors", 1, None)
    pickled = RemoteFile("unet/pytorch_model.bin", 2, None)
    words = RemoteFile("tokenizer/tokenizer.json", 3, None)
    assert hub.choose_files([pickled, half, words], repository) == (half, words)
    assert hub.choose_files([pickled, words], repository) == (pickled, words)


def test_an_unknown_name_is_answered_with_the_known_ones():
    for call in (lambda name: load.load_bundle(BundleSettings(bundle=name)), load.pull):
        with pytest.raises(UnknownModelError, match=r"no bundle nonsense; known are mini, .*5\.1"):
            call("nonsense")


def test_a_missing_checkpoint_is_not_taken_for_a_name():
    with pytest.raises(MissingWeightsError, match=r"gone\.safetensors"):
        load.load_bundle(BundleSettings(bundle="gone.safetensors"))


def test_a_path_loads_like_a_name(tiny):
    assert load.load_bundle(BundleSettings(bundle=str(tiny))).facts.name == "diffusers"


def test_mini_takes_no_parts_of_stable_diffusion():
    says = "packaged model takes no .*; add --model .* Stable Diffusion 1.5 model"
    with pytest.raises(ModelError, match=says):
        load.load_bundle(BundleSettings(bundle="mini", vae="x/y"))


def test_a_folder_of_mini_is_recognised(tmp_path):
    (tmp_path / "mini.safetensors").touch()
    with pytest.raises(ModelError, match=f"model {tmp_path} takes no .*; add --model"):
        load.load_bundle(BundleSettings(bundle=str(tmp_path), loras=[("x.safetensors", 1.0)]))
