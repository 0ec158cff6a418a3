"""Files of weights: where they lie, and how they are opened safely."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tegula.errors import BrokenWeightsError, MissingExtraError, MissingWeightsError

# Reads packaged weights, whose hash is known.


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


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file whose hash is known.

    Raises:
        MissingWeightsError: it is not there.
        BrokenWeightsError: it is another file, or no ``.safetensors`` file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_packaged(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BrokenWeightsError(
            f"{path} is damaged or not the file its configuration describes; install tegula again."
        )
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise BrokenWeightsError(
            f"{path} is not a file of weights; install tegula again."
        ) from error


# Networks that only spandrel knows, loaded with it but without torchvision.
#
# spandrel 0.4 asks for torchvision when it is installed and when it is imported, for two
# functions of which one network here uses one. A torchvision that does not fit the installed
# torch breaks diffusers, so tegula asks to install spandrel alone, and lends it these
# functions while it is imported.

EXTRA_COMMAND = 'pip install "tegula[formats]" && pip install --no-deps spandrel'
CODEFORMER_COMMAND = "pip install --no-deps spandrel_extra_arches"
_CODEFORMER_KEY = "idx_pred_layer.1.weight"


def load_foreign(state: Mapping[str, Tensor], what: str) -> Any:
    """Return spandrel's descriptor of the network that these tensors belong to.

    None means that spandrel knows no such network, or none that turns one picture into
    another.

    Args:
        state: tensors by name, without wrappers.
        what: subject of the sentence when something is not installed.

    Raises:
        MissingExtraError: spandrel is not installed, or the package of CodeFormer, whose
            licence is for non-commercial use and which is never installed along.
    """
    spandrel = _spandrel(what)
    if _CODEFORMER_KEY in state:
        _add_codeformer(what)
    try:
        descriptor = spandrel.ModelLoader().load_from_state_dict(dict(state))
    except Exception:  # whatever a foreign loader raises, the tensors are at fault
        return None
    return descriptor if isinstance(descriptor, spandrel.ImageModelDescriptor) else None


def _spandrel(what: str) -> Any:
    try:
        with _torchvision_lent():
            import spandrel
    except ImportError as error:
        raise MissingExtraError(f"{what} needs spandrel; run: {EXTRA_COMMAND}") from error
    return spandrel


def _add_codeformer(what: str) -> None:
    try:
        with _torchvision_lent():
            import spandrel_extra_arches
    except ImportError as error:
        raise MissingExtraError(
            f"{what} is a CodeFormer, whose network may be used for non-commercial purposes "
            f"only; if yours are, run: {CODEFORMER_COMMAND}"
        ) from error
    spandrel_extra_arches.install(ignore_duplicates=True)


@contextlib.contextmanager
def _torchvision_lent() -> Iterator[None]:
    """Stand in for torchvision during an import, where it is not installed."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    if names[0] in sys.modules or importlib.util.find_spec(names[0]) is not None:
        yield
        return
    lent = [ModuleType(name) for name in names]
    lent[-1].__dict__.update(
        InterpolationMode=_InterpolationMode, rotate=_rotate, normalize=_normalize
    )
    sys.modules.update(zip(names, lent, strict=True))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"


def _rotate(*_: object, **__: object) -> Tensor:
    raise NotImplementedError("LaMa turns pictures with torchvision, which is not installed.")


def _normalize(picture: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    middle, spread = (torch.tensor(list(v)).to(picture).view(-1, 1, 1) for v in (mean, std))
    return (picture - middle) / spread
