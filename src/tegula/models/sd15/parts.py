"""The networks of Stable Diffusion 1.5, each from whatever its weights come in.

Before the large parts are loaded, files and folders of other families are refused by what
their headers and settings say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tegula.errors import BrokenWeightsError
from tegula.models.files import LOADING_FAILURES, Shapes, read_json
from tegula.models.hub import HubRepository, find, formats
from tegula.models.sd15 import facts
from tegula.models.sd15.networks import Networks, SdAutoencoder, move

# Other families, told without loading anything.

_UNET_KEYS = "model.diffusion_model."
_TEXT_PROJECTION = _UNET_KEYS + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_FAMILIES_BY_TEXT_WIDTH = {1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
_LATENT_CHANNELS = 4


def refuse_other_checkpoint(path: Path, shapes: Shapes, text_width: int) -> None:
    """Make sure that a checkpoint is a Stable Diffusion 1.5 one.

    Raises:
        BrokenWeightsError: it is of another family, or no checkpoint at all.
    """
    if any(name.startswith("conditioner.embedders.") for name in shapes):
        raise _of_other_family(path, "SDXL")
    entry = shapes.get(_UNET_KEYS + "input_blocks.0.0.weight", ())
    projection = shapes.get(_TEXT_PROJECTION, ())
    if len(entry) != 4 or len(projection) != 2:
        raise BrokenWeightsError(
            f"{path} is no Stable Diffusion 1.5 checkpoint: it holds no UNet under "
            f"{_UNET_KEYS}; give a whole checkpoint, not a LoRA or a single network."
        )
    _refuse_other_unet(path, projection[1], entry[1], text_width)


def refuse_other_folder(folder: Path) -> None:
    """Make sure that a diffusers folder holds a Stable Diffusion 1.5 model.

    The tiny networks of the tests are narrower, so the width of the text is compared with
    that of the folder's own text encoder, unless it is known from another family.

    Raises:
        BrokenWeightsError: its UNet is of another family.
    """
    unet = read_json(folder / "unet" / "config.json")
    width: Any = unet.get("cross_attention_dim")
    own = read_json(folder / "text_encoder" / "config.json").get("hidden_size")
    fits = isinstance(width, int) and width == own and width not in _FAMILIES_BY_TEXT_WIDTH
    _refuse_other_unet(folder, width, unet.get("in_channels"), width if fits else facts.TEXT_WIDTH)


def refuse_other_pipeline(folder: Path) -> None:
    """Make sure that the index of a diffusers folder, if there is one, fits the family.

    Raises:
        BrokenWeightsError: it holds a pipeline of another family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return
    parts = read_json(index)
    if "unet" not in parts or "text_encoder_2" in parts:
        raise _of_other_family(folder, str(parts.get("_class_name")))


def refuse_mixed(networks: Networks) -> None:
    """Make sure that ControlNet and autoencoder belong to the UNet.

    Raises:
        BrokenWeightsError: one of them is of another family.
    """
    unet, controlnet = networks.unet.config, networks.controlnet
    if controlnet is not None and (
        controlnet.config.cross_attention_dim != unet.cross_attention_dim
        or list(controlnet.config.block_out_channels) != list(unet.block_out_channels)
    ):
        raise BrokenWeightsError(
            "The ControlNet does not fit this model; Stable Diffusion 1.5 needs "
            f"{facts.DEFAULT_CONTROLNET} or another one of that family."
        )
    channels = networks.autoencoder.config.latent_channels
    if channels != unet.in_channels:
        raise BrokenWeightsError(
            f"The autoencoder's latents have {channels} channels where the model takes "
            f"{unet.in_channels}; give one for Stable Diffusion 1.5, like {facts.DEFAULT_VAE}."
        )


def _refuse_other_unet(path: Path, width: Any, inputs: Any, text_width: int) -> None:
    if width != text_width:
        family = _FAMILIES_BY_TEXT_WIDTH.get(width) if isinstance(width, int) else None
        raise _of_other_family(path, family or f"a model with text of width {width}")
    if inputs != _LATENT_CHANNELS:
        raise _of_other_family(path, f"a variant with {inputs} input channels")


def _of_other_family(path: Path, what: str) -> BrokenWeightsError:
    return BrokenWeightsError(
        f"{path} is {what}, not Stable Diffusion 1.5; give a checkpoint of that family."
    )


# Networks from folders and from files.

STANDARD_CONFIG = Path(__file__).parent / "config"
"""The configuration that all Stable Diffusion 1.5 checkpoints share."""


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    name: for sentences.
    network: the class of diffusers or transformers.
    folder: where its configuration lies in a diffusers folder.
    """

    name: str
    network: Any
    folder: str


UNET = Kind("UNet", UNet2DConditionModel, "unet")
CONTROLNET = Kind("ControlNet", ControlNetModel, "controlnet")
AUTOENCODER = Kind("autoencoder", AutoencoderKL, "vae")
TEXT_MODEL = Kind("text encoder", CLIPTextModel, "text_encoder")
_LIGHT_AUTOENCODER = Kind("light autoencoder", AutoencoderTiny, "")


def network_from_folder(kind: Kind, folder: Path) -> Any:
    """Load a network from the folder that holds its config.json.

    Raises:
        BrokenWeightsError: weights are missing, damaged or of another shape.
    """

    def load() -> Any:
        model, report = kind.network.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **_variant(folder)
        )
        return model, list(report["missing_keys"])

    return _load_whole(kind, folder, load)


def network_from_weights(
    kind: Kind, weights: Mapping[str, Tensor], config: Path, source: Path
) -> Any:
    """Load a network out of a checkpoint or a file of its own, original or diffusers keys.

    Args:
        kind: what to load.
        weights: of the file; those of other networks are left alone.
        config: the diffusers folder that holds the configuration.
        source: the file, for sentences.

    Raises:
        BrokenWeightsError: weights are missing or of another shape.
    """
    folder = str(config / kind.folder)

    def load() -> Any:
        if kind is TEXT_MODEL:
            model = create_diffusers_clip_model_from_ldm(
                CLIPTextModel,
                checkpoint=dict(weights),
                config=folder,
                torch_dtype=torch.float32,
                local_files_only=True,
            )
        else:
            model = kind.network.from_single_file(
                dict(weights), config=folder, torch_dtype=torch.float32, local_files_only=True
            )
        return model, []

    return _load_whole(kind, source, load)


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
    network = network_from_folder(_LIGHT_AUTOENCODER, folder)
    return SdAutoencoder(move(network, device=device, dtype=dtype))


def _load_whole(kind: Kind, source: Path, load: Callable[[], tuple[Any, list[str]]]) -> Any:
    """Return a loaded network, float32 and frozen, once it has all of its weights."""
    with _clear_errors(kind.name, source):
        model, reported = load()
        # diffusers leaves what a single file lacks on the meta device, without a word.
        empty = [name for name, weight in model.named_parameters() if weight.is_meta]
        missing = sorted({*reported, *empty})
        if missing:
            raise ValueError(f"weights are missing ({len(missing)} of them, like {missing[0]})")
        return model.float().eval().requires_grad_(requires_grad=False)


def _variant(folder: Path) -> dict[str, str]:
    """Return the argument for diffusers that takes half precision where there is nothing else."""
    stems = ("diffusion_pytorch_model", "model")
    plain, half, _pickled = zip(*(formats(f"{stem}.safetensors") for stem in stems), strict=True)
    has = [any((folder / name).is_file() for name in names) for names in (plain, half)]
    return {"variant": "fp16"} if has == [False, True] else {}


@contextmanager
def _clear_errors(name: str, source: Path) -> Iterator[None]:
    try:
        yield
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(
            f"The {name} in {source} cannot be used: {_reason(error)}; get it again, or give "
            f"one of Stable Diffusion 1.5."
        ) from error


def _reason(error: Exception) -> str:
    # diffusers stumbles with these where a checkpoint lacks weights.
    if isinstance(error, NotImplementedError | AttributeError | TypeError):
        return "weights are missing"
    first = str(error).strip().split("\n")[0].split(". ")[0].removesuffix(".").strip()
    return first.removeprefix("Cannot load  because ")[:300]
