"""Loading any Stable Diffusion 1.5 model as a bundle: where each part comes from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tegula.errors import MissingWeightsError
from tegula.folders import models_folder
from tegula.models.bundle import Bundle
from tegula.models.files import existing_file, read_json, read_shapes, read_tensors
from tegula.models.hub import (
    HubRepository,
    find,
    find_or_fetch,
    is_hub_id,
    is_weights_file,
    missing_files,
)
from tegula.models.sd15 import facts
from tegula.models.sd15.lora import choose_few_step, fuse_loras
from tegula.models.sd15.networks import Networks, assemble
from tegula.models.sd15.parts import (
    AUTOENCODER,
    CONTROLNET,
    STANDARD_CONFIG,
    TEXT_MODEL,
    UNET,
    Kind,
    light_autoencoder,
    network_from_folder,
    network_from_weights,
    refuse_mixed,
    refuse_other_checkpoint,
    refuse_other_folder,
    refuse_other_pipeline,
    tokenizer_from_folder,
)
from tegula.models.sd15.text import add_inversions

NO_CONTROLNET = "none"
_SCHEDULER_FILE = "scheduler/scheduler_config.json"
_AUTOENCODER_KEYS = "first_stage_model."


@dataclass(frozen=True)
class _Source:
    """Where the parts come from; None lets the model or the defaults decide."""

    model: str
    controlnet: str | None
    vae: str | None
    config: Path


def load_sd15(
    model: str,
    *,
    controlnet: str | None = None,
    vae: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    few_step: str | None = None,
    embeddings: Sequence[str] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: str | None = None,
    name: str | None = None,
) -> Bundle:
    """Load a Stable Diffusion 1.5 model.

    Args:
        model: a diffusers folder, a ``.safetensors`` or ``.ckpt`` checkpoint, or a hub id,
            which is looked for in the models folder and the hub client's cache first.
        controlnet: folder, file or hub id of the tile ControlNet. None takes the
            ``controlnet`` folder in the model's folder or beside its file, or else
            control_v11f1e_sd15_tile; "none" runs without.
        vae: folder, file or hub id of the autoencoder. None takes the model's own, or
            where a checkpoint has none, a ``vae`` folder beside it or sd-vae-ft-mse.
        loras: LoRA files or hub ids with their weights, added in this order.
        few_step: which LoRA for few steps is added to them, as ``choose_few_step`` says;
            with one among them all presets follow its recipe.
        embeddings: textual inversion files.
        device: where the bundle runs.
        dtype: the precision it runs in; loading and LoRAs use float32.
        config: a diffusers folder whose configuration and tokenizer a checkpoint of
            unusual shape needs; None stands for the common one.
        name: the name in the bundle's facts; None takes that of the file or folder.

    Raises:
        MissingWeightsError: a part is not on this machine and cannot be downloaded.
        BrokenWeightsError: a part is damaged or of another family.
        OptionError: ``few_step`` is no LoRA that tegula knows.
    """
    source = _Source(model, controlnet, vae, Path(config) if config else STANDARD_CONFIG)
    chosen = choose_few_step(loras, few_step)
    with _quiet():
        load = _load_checkpoint if is_weights_file(model) else _load_folder
        networks, scheduler = load(source)
        refuse_mixed(networks)
        add_inversions(networks.text_model, networks.tokenizer, embeddings)
        fuse_loras(networks, chosen.loras)
        light = light_autoencoder(device, dtype)
    path = Path(model)
    bundle = assemble(
        networks,
        scheduler,
        name=name or (path.stem if is_weights_file(model) else path.name),
        licence=facts.LICENCE,
        device=device,
        dtype=dtype,
    )
    presets = chosen.presets(bundle.facts.presets)
    return dataclasses.replace(
        bundle,
        facts=dataclasses.replace(bundle.facts, presets=presets),
        warnings=(*bundle.warnings, *chosen.warnings),
        light_autoencoder=light,
    )


def _load_folder(source: _Source) -> tuple[Networks, Mapping[str, object]]:
    needs_own_vae = source.vae is None
    files = tuple(n for n in facts.FOLDER_FILES if needs_own_vae or not n.startswith("vae/"))
    path = Path(source.model).expanduser()
    if path.is_dir():
        refuse_other_pipeline(path)
    folder = _whole_folder(source.model, files)
    refuse_other_folder(folder)
    networks = Networks(
        network_from_folder(UNET, folder / UNET.folder),
        _controlnet(source, folder / CONTROLNET.folder),
        _autoencoder(source, folder / AUTOENCODER.folder),
        network_from_folder(TEXT_MODEL, folder / TEXT_MODEL.folder),
        tokenizer_from_folder(folder / "tokenizer"),
    )
    return networks, read_json(folder / _SCHEDULER_FILE)


def _load_checkpoint(source: _Source) -> tuple[Networks, Mapping[str, object]]:
    path, config = existing_file(source.model), source.config
    width = read_json(config / "unet" / "config.json")["cross_attention_dim"]
    refuse_other_checkpoint(path, read_shapes(path), width)
    tokenizer = tokenizer_from_folder(_tokenizer_folder(path, config))
    unet, text_model, own_autoencoder = _networks_of_checkpoint(path, source)
    networks = Networks(
        unet,
        _controlnet(source, path.parent / CONTROLNET.folder),
        own_autoencoder or _autoencoder(source, path.parent / AUTOENCODER.folder),
        text_model,
        tokenizer,
    )
    settings = config / _SCHEDULER_FILE
    return networks, read_json(settings) if settings.is_file() else facts.SCHEDULER


def _networks_of_checkpoint(path: Path, source: _Source) -> tuple[Any, Any, Any | None]:
    """Return UNet, text encoder and, where it is there and wanted, autoencoder.

    A function of its own, so that the checkpoint's copy of the weights is freed on return.
    """
    weights = read_tensors(path)
    has_own = any(name.startswith(_AUTOENCODER_KEYS) for name in weights)

    def load(kind: Kind) -> Any:
        return network_from_weights(kind, weights, source.config, path)

    own = load(AUTOENCODER) if has_own and source.vae is None else None
    return load(UNET), load(TEXT_MODEL), own


def _controlnet(source: _Source, own: Path) -> Any | None:
    if source.controlnet == NO_CONTROLNET:
        return None
    reference = source.controlnet or _own_or(own, facts.DEFAULT_CONTROLNET)
    return _part(CONTROLNET, reference, source.config)


def _autoencoder(source: _Source, own: Path) -> Any:
    return _part(AUTOENCODER, source.vae or _own_or(own, facts.DEFAULT_VAE), source.config)


def _own_or(own: Path, default: str) -> str:
    return str(own) if (own / "config.json").is_file() else default


def _part(kind: Kind, reference: str, config: Path) -> Any:
    """Load one network from a file, a folder or the hub."""
    if is_weights_file(reference):
        path = existing_file(reference)
        return network_from_weights(kind, read_tensors(path), config, path)
    return network_from_folder(kind, _whole_folder(reference, facts.PART_FILES))


def _whole_folder(reference: str, files: tuple[str, ...]) -> Path:
    """Return the folder that a path or hub id names, with all of these files in it."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        missing = missing_files(folder, files)
        if missing:
            raise MissingWeightsError(f"{folder} lacks {', '.join(missing)}; put them there.")
        return folder
    if not is_hub_id(reference):
        raise MissingWeightsError(
            f"There is no folder {reference}; give a diffusers folder, a .safetensors file or a "
            f"hub id like {facts.DEFAULT_MODEL}."
        )
    return find_or_fetch(HubRepository(reference, files))


def _tokenizer_folder(checkpoint: Path, config: Path) -> Path:
    """Find CLIP's vocabulary, which single files do not hold."""
    folders = [checkpoint.parent / "tokenizer", config / "tokenizer", models_folder() / "tokenizer"]
    for repo in facts.TOKENIZER_REPOSITORIES:
        found = find(HubRepository(repo, facts.TOKENIZER_FILES))
        folders += [found / "tokenizer"] if found else []
    vocabulary = [Path(name).name for name in facts.TOKENIZER_FILES]
    for folder in folders:
        if not missing_files(folder, vocabulary) or (folder / "tokenizer.json").is_file():
            return folder
    repository = HubRepository(facts.TOKENIZER_REPOSITORIES[0], facts.TOKENIZER_FILES)
    return find_or_fetch(repository) / "tokenizer"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks and bars of diffusers and transformers off the user's screen."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, has_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if has_bars:
                library.enable_progress_bar()
