"""LoRAs and textual inversions: small files that change a model once it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from torch import Tensor

from tegula.errors import BrokenWeightsError
from tegula.models.hub import HubRepository, find_or_fetch, formats, is_hub_id
from tegula.models.sd15.assembly import Networks
from tegula.models.sd15.files import (
    LOADING_FAILURES,
    existing_file,
    is_weights_file,
    read_pickled,
    read_weights,
    safetensors_shapes,
)

_LORA_FILE = "pytorch_lora_weights.safetensors"


class _Loader(StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):  # type: ignore[misc]
    """The part of a diffusers pipeline that its adapter loading asks for."""

    hf_device_map = None

    def __init__(self, networks: Networks) -> None:
        self.unet = networks.unet
        self.text_encoder = networks.text_model
        self.tokenizer = networks.tokenizer
        self.components: dict[str, Any] = {}


def fuse_loras(networks: Networks, loras: Sequence[tuple[str, float]]) -> None:
    """Add LoRAs, given as (file or hub id, weight), to the weights of UNet and text encoder.

    Both the kohya and the diffusers format are read.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, no LoRA, or made for another family.
    """
    for reference, weight in loras:
        path = _lora_file(reference)
        _fuse(networks, path, read_weights(path), weight)


def _lora_file(reference: str) -> Path:
    if is_weights_file(reference) or not is_hub_id(reference):
        return existing_file(reference)
    folder = find_or_fetch(HubRepository(reference, (_LORA_FILE,)))
    return next(path for name in formats(_LORA_FILE) if (path := folder / name).is_file())


def _fuse(networks: Networks, path: Path, state: dict[str, Tensor], weight: float) -> None:
    loader = _Loader(networks)
    try:
        loader.load_lora_weights(state, adapter_name="lora")
        if not _adapted(networks):
            raise ValueError("none of its layers is in this model")
        loader.fuse_lora(lora_scale=weight)
        loader.unload_lora_weights()
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(
            f"{path} is no LoRA for Stable Diffusion 1.5; give one made for that family."
        ) from error


def _adapted(networks: Networks) -> bool:
    names = (name for module in networks.modules for name, _ in module.named_parameters())
    return any(".lora_" in name for name in names)


def add_inversions(networks: Networks, embeddings: Sequence[str]) -> tuple[str, ...]:
    """Teach the text encoder the words of textual inversion files; return the words.

    A file of the diffusers format names its word, any other is used by its file name.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, no textual inversion, or of another family.
    """
    return tuple(_add_inversion(networks, existing_file(reference)) for reference in embeddings)


def _add_inversion(networks: Networks, path: Path) -> str:
    word, vectors = _inversion(path)
    try:
        _Loader(networks).load_textual_inversion({word: vectors}, token=word)
    except LOADING_FAILURES as error:
        width = networks.text_model.config.hidden_size
        raise BrokenWeightsError(
            f"{path} cannot be used as the word {word}: the word must be new and its vectors "
            f"{width} wide."
        ) from error
    return word


def _inversion(path: Path) -> tuple[str, Tensor]:
    content = _content(path)
    parameters = content.get("string_to_param")
    if isinstance(parameters, Mapping) and isinstance(parameters.get("*"), Tensor):
        return path.stem, parameters["*"].detach()
    tensors = {name: part for name, part in content.items() if isinstance(part, Tensor)}
    if len(tensors) != 1:
        raise BrokenWeightsError(
            f"{path} is no textual inversion for Stable Diffusion 1.5; give one with the vectors "
            f"of one word."
        )
    name, vectors = next(iter(tensors.items()))
    return path.stem if name == "emb_params" else name, vectors


def _content(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".safetensors":
        safetensors_shapes(path)
        return read_weights(path)
    content = read_pickled(path)
    return content if isinstance(content, Mapping) else {}
