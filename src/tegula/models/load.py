"""The bundles that have a name, and loading any bundle by name, path or hub id.

Listing and pulling need no torch; ``load_bundle`` imports it, and only the family it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tegula.errors import ModelError, UnknownModelError
from tegula.models import BundleSettings
from tegula.models.headers import check_files
from tegula.models.hub import (
    HubRepository,
    OnBytes,
    fetch_all,
    find,
    is_hub_id,
    is_weights_file,
    remote_files,
)
from tegula.models.library import FileKind, find_file, list_files, refuse_link, resolve_file
from tegula.models.mini import WEIGHTS, WEIGHTS_FILE
from tegula.models.sd15.facts import (
    DEFAULT_CONTROLNET,
    DEFAULT_MODEL,
    DEFAULT_VAE,
    FOLDER_FILES,
    LICENCE,
    LIGHT_VAE,
    PART_FILES,
)

if TYPE_CHECKING:
    import torch

    from tegula.models.bundle import Bundle

_MINI = "mini"
_NAMES_SHOWN = 10
_CONTROLNET = HubRepository(DEFAULT_CONTROLNET, PART_FILES)
_VAE = HubRepository(DEFAULT_VAE, PART_FILES)


@dataclass(frozen=True)
class BundleEntry:
    """A bundle that has a name.

    description: what it is good at.
    licence: that of its base, which binds fine-tunes too; a fine-tune may add terms.
    size: about how many bytes all parts take on disk.
    parts: the hub repositories it needs, the model first; none for the packaged one.
    """

    name: str
    family: str
    description: str
    licence: str
    size: int
    parts: tuple[HubRepository, ...] = ()

    @property
    def installed(self) -> bool:
        """Return whether every part is on this machine."""
        if not self.parts:
            return (WEIGHTS / WEIGHTS_FILE).is_file()
        return all(find(part) is not None for part in self.parts)


def _fine_tune(name: str, repo: str, description: str, *, own_vae: bool = True) -> BundleEntry:
    model = HubRepository(repo, FOLDER_FILES)
    parts = (model, _CONTROLNET) if own_vae else (model, _CONTROLNET, _VAE)
    size = 5_700_000_000 if own_vae else 6_100_000_000
    return BundleEntry(name, "sd15", description, LICENCE, size, parts)


_ENTRIES = (
    BundleEntry(
        _MINI,
        "mini",
        "Packaged with the program; runs on a CPU in seconds.",
        "Apache-2.0",
        9_200_000,
    ),
    _fine_tune(
        "realistic-vision-5.1",
        DEFAULT_MODEL,
        "Photographs: skin, hair, fabrics, nature.",
        own_vae=False,
    ),
    _fine_tune(
        "stable-diffusion-1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "The base model of them all; follows any style, invents little.",
    ),
    _fine_tune("dreamshaper-8", "Lykon/dreamshaper-8", "Illustrations and painted looks."),
    _fine_tune(
        "absolute-reality-1.81",
        "Lykon/absolute-reality-1.81",
        "Photographs with studio light and crisp detail.",
    ),
    _fine_tune("epicrealism", "emilianJR/epiCRealism", "Photographs with natural light."),
)
BUNDLES = {entry.name: entry for entry in _ENTRIES}


def list_bundles() -> tuple[BundleEntry, ...]:
    """Return every bundle that has a name, the default first."""
    return _ENTRIES


def bundle_entry(name: str) -> BundleEntry:
    """Return the bundle of that name.

    Raises:
        UnknownModelError: there is none.
    """
    if name not in BUNDLES:
        own = [each.name for each in list_files(FileKind.CHECKPOINT) if each.kind is not None]
        raise UnknownModelError(
            f"There is no bundle {name}; known are {', '.join((*BUNDLES, *own[:_NAMES_SHOWN]))}, "
            f"and a folder, a .safetensors file or a hub id works too."
        )
    return BUNDLES[name]


def pull(name: str, on_progress: OnBytes | None = None) -> tuple[Path, ...]:
    """Download and verify what a bundle needs and this machine lacks.

    Args:
        name: of a bundle, or the hub id of any Stable Diffusion 1.5 diffusers folder, of a
            ControlNet or of an autoencoder.
        on_progress: called with bytes done and bytes in all after each file.

    Returns:
        The new folders; none where nothing was missing.

    Raises:
        UnknownModelError: no bundle has that name.
        MissingWeightsError: the hub does not answer; says which files to put where.
        BrokenWeightsError: what arrived is not what the hub announced.
        PathError: the models folder cannot be written.
    """
    refuse_link(name)
    parts = _parts_of_id(name) if is_hub_id(name) else bundle_entry(name).parts
    return fetch_all(_absent(parts), on_progress)


def _parts_of_id(repo: str) -> tuple[HubRepository, ...]:
    """Return what a hub id needs: itself if it is a part, or else the ControlNet with it."""
    part = HubRepository(repo, PART_FILES)
    if repo in (DEFAULT_CONTROLNET, DEFAULT_VAE, LIGHT_VAE):
        return (part,)
    try:
        files = {file.path for file in remote_files(repo)}
    except Exception:  # the hub client's errors depend on its HTTP library
        files = set()
    is_part = "config.json" in files and "unet/config.json" not in files
    return (part,) if is_part else _fine_tune(repo, repo, "").parts


def _absent(parts: Sequence[HubRepository]) -> list[HubRepository]:
    return [part for part in parts if find(part) is None]


def load_bundle(
    wanted: BundleSettings,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Bundle:
    """Load a bundle with its parts; ``load_sd15`` says what the parts may be.

    Args:
        wanted: its ``bundle`` is a name of ``list_bundles``, a folder of mini or diffusers
            weights, a checkpoint file or a hub id. Parts are for Stable Diffusion 1.5.
        device: where it runs.
        dtype: the precision it runs in; None means float32.

    Raises:
        UnknownModelError: no bundle has that name, and it is not a path or hub id.
        MissingWeightsError: a part is not on this machine and cannot be downloaded.
        BrokenWeightsError: a part is damaged or of another family.
        ModelError: parts were given to the mini bundle, which takes none.
    """
    mini = _mini_folder(wanted)
    check_files(wanted)
    import torch

    precision = torch.float32 if dtype is None else dtype
    if mini is not None:
        from tegula.models.mini.bundle import load_mini

        own = None if wanted.bundle == _MINI else mini
        return load_mini(torch.device(device), precision, own)
    _import_diffusers()
    from tegula.models.sd15.load import load_sd15

    name = wanted.bundle if wanted.bundle in BUNDLES else None
    return load_sd15(_with_named_parts(wanted), device=device, dtype=precision, name=name)


def check_bundle(wanted: BundleSettings) -> None:
    """Make sure that a bundle and its parts can be loaded, without loading them.

    What is not on this machine is downloaded.

    Raises:
        ModelError: as ``load_bundle`` does.
        OptionError: as ``load_bundle`` does.
    """
    if _mini_folder(wanted) is not None:
        return
    check_files(wanted)
    _import_diffusers()
    from tegula.models.sd15.find import find_sd15

    find_sd15(_with_named_parts(wanted))


def _import_diffusers() -> None:
    """Import diffusers before a module imports it with torch's compiler."""
    from tegula.models.diffusers_import import import_diffusers

    import_diffusers()


def _mini_folder(wanted: BundleSettings) -> Path | None:
    """Return the folder of a bundle of the mini family, None for others.

    Raises:
        ModelError: it is one, and parts of other families were given.
    """
    path = Path(wanted.bundle).expanduser()
    if wanted.bundle != _MINI and not (path / WEIGHTS_FILE).is_file():
        return None
    few_step = wanted.few_step not in (None, "auto", "none")
    if any((wanted.controlnet, wanted.vae, wanted.loras, wanted.embeddings, few_step)):
        name = "packaged model" if wanted.bundle == _MINI else f"model {wanted.bundle}"
        raise ModelError(
            f"The {name} takes no ControlNet, VAE, LoRA or embedding of Stable Diffusion; add "
            "--model (bundle= in Python) with a Stable Diffusion 1.5 model, such as one that "
            "`tegula models` lists."
        )
    return path


def _with_named_parts(wanted: BundleSettings) -> BundleSettings:
    """Put the model and the autoencoder of a bundle with a name in the place of its name.

    What it lacks is downloaded, unless a file of the user's has that name.
    """
    model = wanted.bundle
    if model in BUNDLES and _absent(BUNDLES[model].parts[:1]):
        own = find_file(model, FileKind.CHECKPOINT)
        if own is not None:
            return wanted.replaced(bundle=str(own))
    if model not in BUNDLES:
        model = resolve_file(model, FileKind.CHECKPOINT)
        if Path(model).expanduser().exists() or is_weights_file(model) or is_hub_id(model):
            return wanted.replaced(bundle=model)
    entry = bundle_entry(model)
    given = ((_CONTROLNET, wanted.controlnet), (_VAE, wanted.vae))
    replaced = [part for part, own in given if own]
    fetch_all(_absent([part for part in entry.parts if part not in replaced]))
    vae = wanted.vae or (DEFAULT_VAE if _VAE in entry.parts else None)
    return wanted.replaced(bundle=entry.parts[0].repo, vae=vae)
