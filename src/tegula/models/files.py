"""Opening files of weights safely, with one set of sentences for what may be wrong with them.

Pickled files are opened through torch's allow-list of plain data alone, so that none of them
runs code. Files of the package must have the hash that their configuration names.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tegula.errors import BrokenWeightsError, MissingWeightsError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""

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

_NETWORK_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict")
_NETWORK_PREFIXES = ("module.", "netG.")
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
_DEEPEST_WRAPPER = 3
"""Wrappers inside wrappers that are opened; a pickled one may contain itself."""


# Files that users bring.


def existing_file(reference: str | Path, kind: str = "weights") -> Path:
    """Return the path of a file of this kind.

    Raises:
        MissingWeightsError: there is no such file.
    """
    path = Path(reference).expanduser()
    if not path.is_file():
        raise MissingWeightsError(f"There is no {kind} file {path}; check the path.")
    return path


def read_tensors(path: Path, wrappers: Sequence[str] = ("state_dict",)) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU; what else it holds is left out.

    Args:
        path: a safetensors file by its suffix, or else a pickled one.
        wrappers: keys under which the tensors may lie, the preferred first.

    Raises:
        BrokenWeightsError: as ``read_content`` says, or no tensor is in it.
    """
    content = read_content(path)
    for _ in range(_DEEPEST_WRAPPER):
        inner = (content[name] for name in wrappers if isinstance(content.get(name), Mapping))
        content = next(inner, content)
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise _without_weights(path)
    return tensors


def read_network(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file with one network, as programs that train them save it.

    Those of the average weights are preferred, and prefixes that all names share are left out.

    Raises:
        BrokenWeightsError: as ``read_content`` says, or no tensor is in it.
    """
    tensors = read_tensors(path, _NETWORK_WRAPPERS)
    for prefix in _NETWORK_PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def read_content(path: Path) -> Mapping[str, Any]:
    """Return all that a file of weights holds by name, on the CPU.

    Raises:
        BrokenWeightsError: damaged, no weights by name, or pickled with more than plain data.
    """
    if path.suffix.lower() == ".safetensors":
        read_shapes(path)  # for its sentences: those of safetensors do not help
        try:
            return safetensors.torch.load_file(path)
        except LOADING_FAILURES as error:
            raise _no_safetensors(path) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(
            f"{path} is damaged, or a pickled file with more than weights in it, which is not "
            f"opened because it could run code; use a .safetensors file."
        ) from error
    if not isinstance(content, Mapping):
        raise _without_weights(path)
    return content


def read_shapes(path: Path) -> Shapes:
    """Return the shapes in a file of weights, without loading it where the format allows that.

    Raises:
        BrokenWeightsError: as ``read_tensors`` says.
    """
    if path.suffix.lower() != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    header = _read_header(path)
    size = path.stat().st_size
    if size != header.file_size:
        raise BrokenWeightsError(
            f"{path} has {size:,} bytes where its header promises {header.file_size:,}; "
            f"get it again."
        )
    return header.shapes


def read_metadata(path: Path) -> Mapping[str, str]:
    """Return the remarks in the header of a safetensors file; none of other files.

    Raises:
        BrokenWeightsError: the file is no safetensors file.
    """
    return _read_header(path).metadata if path.suffix.lower() == ".safetensors" else {}


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


@dataclass(frozen=True)
class _Header:
    """What stands at the beginning of a safetensors file."""

    shapes: Shapes
    metadata: Mapping[str, str]
    file_size: int


def _read_header(path: Path) -> _Header:
    """Read the header: JSON behind its length in 8 bytes.

    The tensors follow it without gaps, so the last offset tells how long the file must be.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > _LARGEST_HEADER:
                raise ValueError("header length")
            header = json.loads(stream.read(length))
        metadata = {str(name): str(v) for name, v in header.pop("__metadata__", {}).items()}
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        return _Header(shapes, metadata, _LENGTH_BYTES + length + end)
    except LOADING_FAILURES as error:
        raise _no_safetensors(path) from error


def _no_safetensors(path: Path) -> BrokenWeightsError:
    return BrokenWeightsError(f"{path} is no safetensors file; get it again.")


def _without_weights(path: Path) -> BrokenWeightsError:
    return BrokenWeightsError(f"{path} holds no weights by name; get it again.")


# Files of the package.


def read_packaged(path: Path) -> bytes:
    """Return a file that belongs to tegula.

    Raises:
        MissingWeightsError: it is not there.
        BrokenWeightsError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MissingWeightsError(
            f"tegula's own weights are not complete: {path} is missing; install tegula again."
        ) from error
    except OSError as error:
        raise BrokenWeightsError(f"{path} cannot be read: {error.strerror}.") from error


def read_packaged_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file whose hash is known.

    Raises:
        MissingWeightsError: it is not there.
        BrokenWeightsError: it is another file, or no ``.safetensors`` file.
    """
    data = read_packaged(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BrokenWeightsError(
            f"{path} is damaged or not the file its configuration describes; install tegula again."
        )
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise BrokenWeightsError(
            f"{path} is not a file of weights; install tegula again."
        ) from error
