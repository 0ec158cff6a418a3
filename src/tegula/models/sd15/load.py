"""Loading any Stable Diffusion 1.5 model as a bundle."""

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

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.folders import models_folder
from tegula.models.bundle import Bundle
from tegula.models.hub import HubRepository, find, find_or_fetch, is_hub_id, missing_files
from tegula.models.sd15 import facts
from tegula.models.sd15 import parts as components
from tegula.models.sd15.files import (
    checkpoint_shapes,
    existing_file,
    is_weights_file,
    read_json,
    read_weights,
    refuse_other_checkpoint,
    refuse_other_folder,
    refuse_other_pipeline,
)
from tegula.models.sd15.lora import add_inversions, choose, fuse_loras
from tegula.models.sd15.parts import STANDARD_CONFIG, Identity, Networks, assemble

NO_CONTROLNET = "none"
_SCHEDULER_FILE = "scheduler/scheduler_config.json"
_AUTOENCODER_KEYS = "first_stage_model."


@dataclass(frozen=True)
class _Request:
    """Where the parts come from; None lets the model or the defaults decide."""

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
        few_step: which LoRA for few steps is added to them, as ``few_step.choose`` says;
            with one among them all presets follow its recipe.
        embeddings: textual inversion files.
        device: where the bundle runs.
        dtype: the precision it runs in; loading and LoRAs use float32.
        config: a diffusers folder whose configuration and tokenizer a checkpoint of
            unusual shape needs; None stands for the common one.
        name: the name in the bundle's facts; None takes that of the file or folder.

    Raises:
        MissingWeightsError: a part is not on this machine and cannot be had.
        BrokenWeightsError: a part is damaged or of another family.
        OptionError: ``few_step`` is no LoRA that is known.
    """
    request = _Request(controlnet, vae, Path(config) if config else STANDARD_CONFIG)
    chosen = choose(loras, few_step)
    with _quiet():
        networks, scheduler = _load(model, request)
        _refuse_mixed(networks)
        add_inversions(networks, embeddings)
        fuse_loras(networks, chosen.loras)
        light = components.light_autoencoder(device, dtype)
    identity = Identity(name or _name(model), facts.LICENCE)
    bundle = assemble(networks, identity, scheduler, device=device, dtype=dtype)
    presets = chosen.presets(bundle.facts.presets)
    return dataclasses.replace(
        bundle,
        facts=dataclasses.replace(bundle.facts, presets=presets),
        warnings=(*bundle.warnings, *chosen.warnings),
        light_autoencoder=light,
    )


def _name(model: str) -> str:
    path = Path(model)
    return path.stem if is_weights_file(model) else path.name


def _load(model: str, request: _Request) -> tuple[Networks, Mapping[str, object]]:
    if is_weights_file(model):
        return _load_checkpoint(existing_file(model), request)
    return _load_folder(_model_folder(model, request), request)


def _load_folder(folder: Path, request: _Request) -> tuple[Networks, Mapping[str, object]]:
    refuse_other_folder(folder)
    networks = Networks(
        components.unet_from_folder(folder),
        _controlnet(request, folder / "controlnet"),
        _autoencoder(request, folder / "vae"),
        components.text_model_from_folder(folder),
        components.tokenizer_from_folder(folder / "tokenizer"),
    )
    return networks, read_json(folder / _SCHEDULER_FILE)


def _load_checkpoint(path: Path, request: _Request) -> tuple[Networks, Mapping[str, object]]:
    width = read_json(request.config / "unet" / "config.json")["cross_attention_dim"]
    refuse_other_checkpoint(path, checkpoint_shapes(path), width)
    tokenizer = components.tokenizer_from_folder(_tokenizer_folder(path, request.config))
    unet, text_model, own_autoencoder = _from_checkpoint(path, request)
    networks = Networks(
        unet,
        _controlnet(request, path.parent / "controlnet"),
        own_autoencoder or _autoencoder(request, path.parent / "vae"),
        text_model,
        tokenizer,
    )
    settings = request.config / _SCHEDULER_FILE
    return networks, read_json(settings) if settings.is_file() else facts.SCHEDULER


def _from_checkpoint(path: Path, request: _Request) -> tuple[Any, Any, Any | None]:
    """Return what a checkpoint holds; its own copy of the weights is freed on return."""
    state = read_weights(path)
    wants_own = request.vae is None and any(key.startswith(_AUTOENCODER_KEYS) for key in state)
    return (
        components.unet_from_weights(state, request.config, path),
        components.text_model_from_weights(state, request.config, path),
        components.autoencoder_from_weights(state, request.config, path) if wants_own else None,
    )


def _model_folder(model: str, request: _Request) -> Path:
    files = tuple(
        name for name in facts.FOLDER_FILES if request.vae is None or not name.startswith("vae/")
    )
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return find_or_fetch(_repository(model, files))
    refuse_other_pipeline(folder)
    missing = missing_files(folder, files)
    if missing:
        raise MissingWeightsError(f"{folder} lacks {', '.join(missing)}; put them there.")
    return folder


def _repository(reference: str, files: tuple[str, ...]) -> HubRepository:
    """Return the hub repository that a reference names.

    Raises:
        MissingWeightsError: the reference is no hub id, so it must be a path, and wrong.
    """
    if not is_hub_id(reference):
        raise MissingWeightsError(
            f"There is no folder {reference}; give a diffusers folder, a .safetensors file or a "
            f"hub id like {facts.DEFAULT_MODEL}."
        )
    return HubRepository(reference, files)


def _controlnet(request: _Request, own: Path) -> Any | None:
    if request.controlnet == NO_CONTROLNET:
        return None
    reference = request.controlnet or (
        str(own) if (own / "config.json").is_file() else facts.DEFAULT_CONTROLNET
    )
    if is_weights_file(reference):
        return components.controlnet_from_file(existing_file(reference), request.config)
    return components.controlnet_from_folder(_part_folder(reference))


def _autoencoder(request: _Request, own: Path) -> Any:
    reference = request.vae or (str(own) if (own / "config.json").is_file() else facts.DEFAULT_VAE)
    if is_weights_file(reference):
        return components.autoencoder_from_file(existing_file(reference), request.config)
    return components.autoencoder_from_folder(_part_folder(reference))


def _part_folder(reference: str) -> Path:
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        return find_or_fetch(_repository(reference, facts.PART_FILES))
    missing = missing_files(folder, facts.PART_FILES)
    if missing:
        raise MissingWeightsError(f"{folder} lacks {', '.join(missing)}; put them there.")
    return folder


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


def _refuse_mixed(networks: Networks) -> None:
    unet, controlnet = networks.unet.config, networks.controlnet
    if controlnet is not None and (
        controlnet.config.cross_attention_dim != unet.cross_attention_dim
        or list(controlnet.config.block_out_channels) != list(unet.block_out_channels)
    ):
        raise BrokenWeightsError(
            "The ControlNet is not made for this model; Stable Diffusion 1.5 needs "
            f"{facts.DEFAULT_CONTROLNET} or another one of that family."
        )
    channels = networks.autoencoder.config.latent_channels
    if channels != unet.in_channels:
        raise BrokenWeightsError(
            f"The autoencoder makes latents of {channels} channels where the model takes "
            f"{unet.in_channels}; give one for Stable Diffusion 1.5, like {facts.DEFAULT_VAE}."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks and bars of diffusers and transformers off the user's screen."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
