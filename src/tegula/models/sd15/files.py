"""Weights files: opening them safely, and telling what they are without loading them."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models.sd15 import facts

Shapes = Mapping[str, tuple[int, ...]]

LOADING_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What torch, diffusers and transformers raise on weights that they cannot use."""

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
_UNET = "model.diffusion_model."
_TEXT_PROJECTION = _UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_OTHER_FAMILIES = {1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
_PLAIN_INPUTS = 4


def is_weights_file(reference: str) -> bool:
    """Return whether a reference names one file, rather than a folder or hub id."""
    return Path(reference).suffix.lower() in facts.WEIGHTS_SUFFIXES


def existing_file(reference: str) -> Path:
    """Return the path of a weights file.

    Raises:
        MissingWeightsError: there is no such file.
    """
    path = Path(reference).expanduser()
    if not path.is_file():
        raise MissingWeightsError(f"There is no weights file {path}; check the path.")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, on the CPU.

    Pickled files are opened by torch's allow-list of plain data alone.

    Raises:
        BrokenWeightsError: damaged, or pickled with more than plain data in it.
    """
    state = _read_any(path)
    while isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _read_any(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".safetensors":
        safetensors_shapes(path)
        return load_file(path)
    content = read_pickled(path)
    if not isinstance(content, Mapping):
        raise BrokenWeightsError(f"{path} holds no weights by name.")
    return content


def read_pickled(path: Path) -> Any:
    """Return what a pickled file holds, if that is plain data.

    Raises:
        BrokenWeightsError: damaged, or more than plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(
            f"{path} is damaged, or a pickled file with more than weights in it, which is not "
            f"opened because it could run code; use a .safetensors file."
        ) from error


def safetensors_shapes(path: Path) -> Shapes:
    """Return the shape of each tensor, read from the header of a safetensors file.

    Raises:
        BrokenWeightsError: the file is truncated or no safetensors file.
    """
    try:
        header, size = _header(path)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(f"{path} is no safetensors file; get it again.") from error
    if size + end != path.stat().st_size:
        raise BrokenWeightsError(
            f"{path} has {path.stat().st_size:,} bytes where its header promises {size + end:,}; "
            f"get it again."
        )
    return shapes


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the remarks in the header of a safetensors file; none of other files.

    Raises:
        BrokenWeightsError: the file is no safetensors file.
    """
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        remarks = _header(path)[0].get("__metadata__", {})
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(f"{path} is no safetensors file; get it again.") from error
    return {str(name): str(text) for name, text in remarks.items()}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > _LARGEST_HEADER:
            raise ValueError("header length")
        return json.loads(stream.read(length)), _LENGTH_BYTES + length


def checkpoint_shapes(path: Path) -> Shapes:
    """Return the shapes in a checkpoint, without loading it where the format allows that."""
    if path.suffix.lower() == ".safetensors":
        return safetensors_shapes(path)
    return {name: tuple(tensor.shape) for name, tensor in read_weights(path).items()}


def refuse_other_checkpoint(path: Path, shapes: Shapes, text_width: int) -> None:
    """Make sure that a checkpoint is a Stable Diffusion 1.5 one.

    Raises:
        BrokenWeightsError: it is of another family, or no checkpoint at all.
    """
    if any(name.startswith("conditioner.embedders.") for name in shapes):
        raise BrokenWeightsError(_wrong(path, "SDXL"))
    entry = shapes.get(_UNET + "input_blocks.0.0.weight")
    context = shapes.get(_TEXT_PROJECTION)
    if entry is None or context is None:
        raise BrokenWeightsError(
            f"{path} is no Stable Diffusion 1.5 checkpoint: it holds no UNet under "
            f"{_UNET}; give a whole checkpoint, not a LoRA or a single network."
        )
    refuse_other_unet(path, context[1], entry[1], text_width)


def refuse_other_unet(path: Path, width: Any, inputs: Any, text_width: int) -> None:
    """Make sure that a UNet takes the text and the latents of Stable Diffusion 1.5.

    Raises:
        BrokenWeightsError: its text width or number of input channels says otherwise.
    """
    if width != text_width:
        other = _OTHER_FAMILIES.get(width) if isinstance(width, int) else None
        raise BrokenWeightsError(_wrong(path, other or f"a model with text of width {width}"))
    if inputs != _PLAIN_INPUTS:
        raise BrokenWeightsError(_wrong(path, f"a variant with {inputs} input channels"))


def refuse_other_pipeline(folder: Path) -> None:
    """Make sure that a diffusers folder, if it tells what it holds, names one UNet and text.

    Raises:
        BrokenWeightsError: it holds a pipeline of another family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return
    parts = read_json(index)
    if "unet" not in parts or "text_encoder_2" in parts:
        raise BrokenWeightsError(_wrong(folder, str(parts.get("_class_name"))))


def refuse_other_folder(folder: Path) -> None:
    """Make sure that a diffusers folder holds a Stable Diffusion 1.5 model.

    Raises:
        BrokenWeightsError: its UNet is of another family.
    """
    unet = read_json(folder / "unet" / "config.json")
    width: Any = unet.get("cross_attention_dim")
    text = read_json(folder / "text_encoder" / "config.json").get("hidden_size")
    is_foreign = width != text or width in _OTHER_FAMILIES
    refuse_other_unet(
        folder, width, unet.get("in_channels"), facts.TEXT_WIDTH if is_foreign else width
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        BrokenWeightsError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenWeightsError(f"{path} cannot be read as JSON; get it again.") from error
    if not isinstance(content, dict):
        raise BrokenWeightsError(f"{path} holds no settings; get it again.")
    return content


def _wrong(path: Path, what: str) -> str:
    return f"{path} is {what}, not Stable Diffusion 1.5; give a checkpoint of that family."
