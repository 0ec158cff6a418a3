"""Networks that only spandrel knows, loaded with it but without torchvision.

spandrel 0.4 asks for torchvision when it is installed and when it is imported, for two
functions of which one network here uses one. A torchvision that does not fit the installed
torch breaks diffusers, so tegula asks to install spandrel alone, and stands in for these
functions while it is imported.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tegula.errors import MissingExtraError

_SPANDREL_COMMAND = 'pip install "tegula[formats]" && pip install --no-deps spandrel'
_FURTHER_COMMAND = "pip install --no-deps spandrel_extra_arches"
_CODEFORMER_KEY = "idx_pred_layer.1.weight"


def load_with_spandrel(state: Mapping[str, Tensor], what: str) -> Any:
    """Return spandrel's descriptor of the network that these tensors belong to.

    None means that spandrel knows no such network.

    Args:
        state: tensors by name, without wrappers.
        what: subject of the sentence when something is not installed.

    Raises:
        MissingExtraError: spandrel is not installed, or the package of CodeFormer, whose
            licence is for non-commercial use and which tegula never installs by itself.
    """
    try:
        with torchvision_replaced():
            import spandrel
    except ImportError as error:
        raise MissingExtraError(f"{what} needs spandrel; run: {_SPANDREL_COMMAND}") from error
    if _CODEFORMER_KEY in state and not _add_further_networks():
        raise MissingExtraError(
            f"{what} is a CodeFormer, whose network may be used for non-commercial purposes "
            f"only; if yours are, run: {_FURTHER_COMMAND}"
        )
    descriptor = _descriptor(spandrel, state)
    if descriptor is None and _add_further_networks():  # SRFormer or FeMaSR
        descriptor = _descriptor(spandrel, state)
    return descriptor


def _descriptor(spandrel: Any, state: Mapping[str, Tensor]) -> Any:
    try:
        return spandrel.ModelLoader().load_from_state_dict(dict(state))
    except Exception:  # each architecture raises its own on tensors that do not fit it
        return None


def _add_further_networks() -> bool:
    """Let spandrel know the networks of its second package; False where that is not installed."""
    try:
        with torchvision_replaced():
            import spandrel_extra_arches
    except ImportError:
        return False
    spandrel_extra_arches.install(ignore_duplicates=True)
    return True


@contextlib.contextmanager
def torchvision_replaced() -> Iterator[None]:
    """Stand in for torchvision during an import, where it is not installed."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    if names[0] in sys.modules or importlib.util.find_spec(names[0]) is not None:
        yield
        return
    modules = [ModuleType(name) for name in names]
    modules[-1].__dict__.update(
        InterpolationMode=_InterpolationMode, rotate=_rotate, normalize=_normalize
    )
    sys.modules.update(zip(names, modules, strict=True))
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
    means, deviations = (torch.tensor(list(v)).to(picture).view(-1, 1, 1) for v in (mean, std))
    return (picture - means) / deviations
