"""The networks of Stable Diffusion 1.5, each from whatever its weights come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tegula.errors import BrokenWeightsError
from tegula.models.files import Shapes, open_tensors, read_json
from tegula.models.hub import HubRepository, find, formats
from tegula.models.identify import (
    CONTROL_LORA_MARK,
    DIFFERENCE_MARK,
    SD15,
)
from tegula.models.retry import is_finite
from tegula.models.sd15 import facts
from tegula.models.sd15.networks import SdAutoencoder, move, sample_of
from tegula.models.stored import LOADING_FAILURES, StoredTensor

STANDARD_CONFIG = Path(__file__).parent / "config"
"""The configuration and the vocabulary that all Stable Diffusion 1.5 checkpoints share."""

Names = Mapping[str, str]
"""Names of tensors in a file, by the names that diffusers has for them."""


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    name: for sentences.
    build: makes the network from its settings, without weights.
    names: finds its weights among the tensors of a file, in the original's layout, or that of
        diffusers, given the settings.
    folder: where its configuration lies in a diffusers folder.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Any]
    names: Callable[[Shapes, Mapping[str, Any]], Names]
    folder: str


def _converted(
    convert: Callable[..., Mapping[str, Tensor | None]], shapes: Shapes, settings: Mapping[str, Any]
) -> Names:
    """Let a conversion of diffusers tell which tensor goes where.

    Conversions move tensors about and take views of some, so empty ones without memory stand in
    for those of the file.
    """
    stand_ins = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    moved = convert(dict(stand_ins), settings)
    return {
        target: names[id(tensor if tensor._base is None else tensor._base)]
        for target, tensor in moved.items()
        if tensor is not None
    }


_UNET_KEYS = "model.diffusion_model."


def _unet_names(shapes: Shapes, settings: Mapping[str, Any]) -> Names:
    if "time_embedding.linear_1.weight" in shapes:
        return {name: name for name in shapes}
    bare = {name: _UNET_KEYS + name for name in shapes if name.startswith("input_blocks.")}
    prefix = _UNET_KEYS if bare else ""
    names = {prefix + name: name for name in shapes}
    found = _converted(
        convert_ldm_unet_checkpoint, {name: shapes[own] for name, own in names.items()}, settings
    )
    return {target: names[name] for target, name in found.items()}


_CONTROL_LORA_UP = ".up"


def _controlnet_names(shapes: Shapes, settings: Mapping[str, Any]) -> Names:
    # A control-LoRA has the two factors of a weight where others have the weight.
    names = {
        f"{name.removesuffix(_CONTROL_LORA_UP)}.weight"
        if name.endswith(_CONTROL_LORA_UP)
        else name: name
        for name in shapes
    }
    found = _converted(
        convert_controlnet_checkpoint, {name: shapes[own] for name, own in names.items()}, settings
    )
    return {target: names[name] for target, name in found.items()}


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _autoencoder_names(shapes: Shapes, settings: Mapping[str, Any]) -> Names:
    if not any(".down_blocks." in name for name in shapes):
        return _converted(convert_ldm_vae_checkpoint, shapes, settings)
    names = {}
    for name in shapes:
        layer, _, kind = name.rpartition(".")
        block, _, last = layer.rpartition(".")
        target = f"{block}.{_OLD_ATTENTION[last]}.{kind}" if last in _OLD_ATTENTION else name
        names[target.removeprefix("first_stage_model.").removeprefix("vae.")] = name
    return names


_TEXT_PREFIXES = ("cond_stage_model.transformer.", "text_encoder.", "clip_l.transformer.", "")
_TEXT_MODEL = "text_model."
"""Stands before the names in some files, and in some versions of transformers."""


def _text_names(shapes: Shapes, _: Mapping[str, Any]) -> Names:
    embedding = "embeddings.token_embedding.weight"
    for prefix in (before + inner for before in _TEXT_PREFIXES for inner in (_TEXT_MODEL, "")):
        if prefix + embedding in shapes:
            names = [name for name in shapes if name.startswith(prefix)]
            targets = {name.removeprefix(prefix): name for name in names}
            return targets | {_TEXT_MODEL + target: name for target, name in targets.items()}
    return {}


def _same_names(shapes: Shapes, _: Mapping[str, Any]) -> Names:
    return {name: name for name in shapes}


UNET = Kind("UNet", UNet2DConditionModel.from_config, _unet_names, "unet")
CONTROLNET = Kind("ControlNet", ControlNetModel.from_config, _controlnet_names, "controlnet")
AUTOENCODER = Kind("autoencoder", AutoencoderKL.from_config, _autoencoder_names, "vae")
TEXT_MODEL = Kind(
    "text encoder",
    lambda settings: CLIPTextModel(CLIPTextConfig.from_dict(dict(settings))),
    _text_names,
    "text_encoder",
)
_LIGHT_AUTOENCODER = Kind("light autoencoder", AutoencoderTiny.from_config, _same_names, "")


@dataclass(frozen=True)
class Part:
    """Where a network lies, before it is loaded.

    source: file or folder, for sentences.
    tensors: of the file; those of other networks are left alone.
    config: the folder with its config.json.
    """

    kind: Kind
    source: Path
    tensors: Mapping[str, StoredTensor]
    config: Path

    @property
    def shapes(self) -> Shapes:
        """Return the shapes of the file's tensors."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    @property
    def parameters(self) -> Shapes:
        """Return the shapes of those that are the network's, by its own names."""
        shapes = self.shapes
        with _clear_errors(self.kind.name, self.source):
            names = self.kind.names(shapes, read_json(self.config / "config.json"))
        return {name: shapes[own] for name, own in names.items()}


def part_of_folder(kind: Kind, folder: Path) -> Part:
    """Return the network in a folder with its config.json.

    Raises:
        BrokenWeightsError: the file of its weights is damaged.
    """
    stems = ("diffusion_pytorch_model", "model")
    files = [folder / name for stem in stems for name in formats(f"{stem}.safetensors")]
    file = next(file for file in files if file.is_file())
    with _clear_errors(kind.name, folder):
        return Part(kind, folder, open_tensors(file), folder)


Merge = Callable[[str, str, Tensor, torch.dtype], Tensor]
"""Changes a weight before it is rounded, given its network's folder, name, values and precision."""


def load_part(
    part: Part, dtype: torch.dtype, base: Any | None = None, merge: Merge | None = None
) -> Any:
    """Load a network, weight by weight, in the precision it will run in.

    Args:
        part: where it lies.
        dtype: the precision. Samples of the exact weights are kept for the fingerprint.
        base: the UNet that the file of a ControlNet may build upon.
        merge: adds LoRAs.

    Raises:
        BrokenWeightsError: weights are missing, not finite or of another shape.
    """
    with _clear_errors(part.kind.name, part.source):
        settings = read_json(part.config / "config.json")
        with init_empty_weights(include_buffers=False):
            model = part.kind.build(settings)
        names = part.kind.names(part.shapes, settings)
        bases = dict(base.named_parameters()) if base is not None else {}
        parameters = dict(model.named_parameters())
        missing = sorted(n for n in parameters if n not in names and not _is_shared(part, n, bases))
        if missing:
            raise ValueError(f"weights are missing ({len(missing)} of them, like {missing[0]})")
        samples = {}
        for name, empty in parameters.items():
            weight = _read_weight(part, names.get(name), tuple(empty.shape), bases.get(name))
            if merge is not None:
                weight = merge(part.kind.folder, name, weight, dtype)
            samples[name] = sample_of(weight)
            owner, _, own = name.rpartition(".")
            parameter = nn.Parameter(weight.to(dtype), requires_grad=False)
            setattr(model.get_submodule(owner), own, parameter)
        if dtype != torch.float32:
            model.exact_samples = samples
        return model.eval()


def _is_shared(part: Part, name: str, bases: Mapping[str, Tensor]) -> bool:
    """Tell whether a control-LoRA leaves a weight to the UNet."""
    return CONTROL_LORA_MARK in part.tensors and name in bases


def _read_weight(
    part: Part, name: str | None, shape: tuple[int, ...], base: Tensor | None
) -> Tensor:
    """Return a weight in the precision of the file, joined with the UNet's where it must be."""
    if name is None:
        return base if base is not None else torch.empty(0)
    weight = part.tensors[name].read()
    if weight.dtype.itemsize == 1:
        weight = weight.float()  # torch cannot compute in 8 bits
    if name.endswith(_CONTROL_LORA_UP):
        down = part.tensors[f"{name.removesuffix(_CONTROL_LORA_UP)}.down"].read()
        weight = (weight.flatten(1).float() @ down.flatten(1).float()).reshape(shape)
        weight = weight if base is None else base.float() + weight
    elif DIFFERENCE_MARK in part.tensors and base is not None:
        weight = base.float() + weight.float()
    if not is_finite(weight):
        raise ValueError(f"{name} holds numbers that are not finite")
    # Attention of old autoencoders is written as convolutions of one pixel.
    if tuple(weight.shape) != shape and _squeezed(weight.shape) == _squeezed(shape):
        weight = weight.reshape(shape)
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(weight.shape)} in place of {shape}")
    return weight


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [side for side in shape if side != 1]


def tokenizer_from_folder(folder: Path) -> Any:
    """Load a tokenizer from the folder that holds its vocabulary.

    Raises:
        BrokenWeightsError: the vocabulary is damaged.
    """
    with _clear_errors("tokenizer", folder):
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def light_autoencoder(device: torch.device | str, dtype: torch.dtype) -> SdAutoencoder | None:
    """Load TAESD if it is on this machine: it decodes roughly, in a twentieth of the time."""
    folder = find(HubRepository(facts.LIGHT_VAE, facts.PART_FILES))
    if folder is None:
        return None
    network = load_part(part_of_folder(_LIGHT_AUTOENCODER, folder), dtype)
    return SdAutoencoder(move(network, device=device))


@contextmanager
def _clear_errors(name: str, source: Path) -> Iterator[None]:
    try:
        yield
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(
            f"The {name} in {source} cannot be used: {_reason(error)}; get it again, or give "
            f"one of {SD15}."
        ) from error


def _reason(error: Exception) -> str:
    # diffusers stumbles with these where a checkpoint lacks weights.
    if isinstance(error, NotImplementedError | AttributeError | TypeError):
        return "weights are missing"
    first = str(error).strip().split("\n")[0].split(". ")[0].removesuffix(".").strip()
    return first.removeprefix("Cannot load  because ")[:300]
