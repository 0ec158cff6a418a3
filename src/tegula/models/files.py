"""Opening files of weights safely, with one set of sentences for what may be wrong with them.

Tensors are found first and read when they are wanted (``stored.py`` says how). Files of the
package must have the hash that their configuration names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models.stored import DEEPEST_WRAPPER, StoredTensor, open_pickled, open_safetensors

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""

_NETWORK_WRAPPERS = (
    "params_ema",
    "params",
    "state_dict",
    "model_state_dict",
    "net_g",
    "generator",
    "model",
)
_NETWORK_PREFIXES = ("module.", "netG.")

# Files that users bring.


def existing_file(reference: str | Path, kind: str = "weights") -> Path:
    """Return the path of a file of this kind.

    Raises:
        MissingWeightsError: there is no such file, or it is a folder.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        raise MissingWeightsError(f"{path} is a folder, not a {kind} file; give the file in it.")
    if not path.is_file():
        raise MissingWeightsError(f"There is no {kind} file {path}; check the path.")
    return path


def open_tensors(path: Path, wrappers: Sequence[str] = ("state_dict",)) -> dict[str, StoredTensor]:
    """Return where the tensors of a file lie, by name; what else it holds is left out.

    Args:
        path: a safetensors file by its suffix, or else a pickled one.
        wrappers: keys under which the tensors may lie, the preferred first.

    Raises:
        BrokenWeightsError: damaged, or no tensor is in it.
    """
    content = _open_content(path)
    for _ in range(DEEPEST_WRAPPER):
        inner = (content[name] for name in wrappers if isinstance(content.get(name), Mapping))
        content = next(inner, content)
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }
    if not tensors:
        raise _without_weights(path)
    return tensors


def read_tensors(path: Path, wrappers: Sequence[str] = ("state_dict",)) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU; ``open_tensors`` says which.

    Raises:
        BrokenWeightsError: as ``open_tensors`` says.
    """
    return {name: stored.read() for name, stored in open_tensors(path, wrappers).items()}


def read_network(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file with one network, as programs that train them save it.

    Those of the average weights are preferred, and prefixes that all names share are left out.

    Raises:
        BrokenWeightsError: as ``open_tensors`` says.
    """
    tensors = read_tensors(path, _NETWORK_WRAPPERS)
    for prefix in _NETWORK_PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def read_content(path: Path) -> Mapping[str, Any]:
    """Return all that a file of weights holds by name, on the CPU.

    Objects other than tensors, plain data and modules of torch have become empty.

    Raises:
        BrokenWeightsError: damaged, or no weights by name.
    """
    read: dict[int, Any] = {}  # by identity: a pickled mapping may contain itself

    def value_of(stored: Any) -> Any:
        if isinstance(stored, StoredTensor):
            return stored.read()
        if not isinstance(stored, Mapping):
            return stored
        if id(stored) not in read:
            read[id(stored)] = copy = {}
            copy.update({name: value_of(value) for name, value in stored.items()})
        return read[id(stored)]

    content: Mapping[str, Any] = value_of(_open_content(path))
    return content


def read_shapes(path: Path) -> Shapes:
    """Return the shapes in a file of weights, without reading them.

    Raises:
        BrokenWeightsError: as ``open_tensors`` says.
    """
    return {name: stored.shape for name, stored in open_tensors(path).items()}


def read_metadata(path: Path) -> Mapping[str, str]:
    """Return the remarks in the header of a safetensors file; none of other files.

    Raises:
        BrokenWeightsError: the file is not a safetensors file.
    """
    return open_safetensors(path)[1] if path.suffix.lower() == ".safetensors" else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        BrokenWeightsError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenWeightsError(f"{path} cannot be read as JSON; get it again.") from error
    if not isinstance(content, dict):
        raise BrokenWeightsError(f"{path} holds no settings; get it again.")
    return content


def _open_content(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".safetensors":
        return open_safetensors(path)[0]
    content = open_pickled(path)
    if not isinstance(content, Mapping):
        raise _without_weights(path)
    return content


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
