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
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

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


# Those of them that enlarge pictures.

RESTORERS = frozenset(
    {
        *("DRUNet", "DnCNN", "FBCNN", "FFTformer", "HVICIDNet", "KBNet", "MixDehazeNet"),
        *("NAFNet", "RetinexFormer", "SAFMNBCIE", "SCUNet", "Uformer"),
    }
)
"""Architectures, by spandrel's ids, that take noise, blur or haze away and never enlarge."""
_FACE_RESTORERS = frozenset({"GFPGAN", "RestoreFormer", "CodeFormer"})
_PLAIN_LAYOUT = frozenset({"IPT", "AuraSR"})
"""Architectures that reshape their features as they lie in memory, channels first."""
_DRAWING = frozenset({"AuraSR"})
"""Architectures that draw noise from torch's own source while they run."""
_WINDOW_NAMES = ("window_size", "split_size", "pad_size", "ws")
"""What architectures call the sides of their attention windows."""
_LARGEST_GRID = 64


class SpandrelNetwork(nn.Module):
    """A network that spandrel loaded, behind the calling convention of ours.

    Its weights stay float32, and torch chooses what to compute in ``dtype``: transformers
    such as SwinIR make masks in float32 on the way and break when all else is narrower.
    """

    def __init__(self, descriptor: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = descriptor.model
        self.descriptor = descriptor
        self.dtype = dtype
        self.draws = str(descriptor.architecture.id) in _DRAWING

    @property
    def layout(self) -> torch.memory_format:
        """How features lie in memory: channels last, unless its code counts on the other way."""
        is_plain = str(self.descriptor.architecture.id) in _PLAIN_LAYOUT
        # Weights of convolutions in three dimensions have no such layout.
        is_plain = is_plain or any(each.ndim == 5 for each in self.parameters())
        return torch.contiguous_format if is_plain else torch.channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge [n, 3, h, w] to [n, 3, h * factor, w * factor], float32."""
        narrow = self.dtype != torch.float32
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(x.device.type, dtype=self.dtype, enabled=narrow))
            if self.draws:  # the same in every tile and every run
                devices = [x.device] if x.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(0)
            # RCAN multiplies what it is given in place, and a tile may be run twice.
            picture: Tensor = self.descriptor(x.clone())
        return picture.float()


def why_no_prescaler(descriptor: Any) -> str | None:
    """Return why a network that spandrel loaded is no prescaler; None for one that is."""
    if descriptor is None:
        return "spandrel does not know its network"
    kind, name = str(descriptor.architecture.id), str(descriptor.architecture.name)
    if kind in _FACE_RESTORERS:
        return f"its network, {name}, restores faces and belongs to --faces"
    if kind in RESTORERS:
        return f"its network, {name}, restores pictures and does not enlarge them"
    if descriptor.purpose == "Inpainting":
        return f"its network, {name}, fills holes in pictures"
    if (descriptor.input_channels, descriptor.output_channels) != (3, 3):
        return f"its network, {name}, does not turn one colour picture into another"
    return None


def attention_window(network: nn.Module) -> int:
    """Return the side of a transformer's attention windows, which must not move with a tile."""
    sides = {1}
    for module in network.modules():
        for name in _WINDOW_NAMES:
            value = getattr(module, name, None)
            values = value if isinstance(value, Sequence) else (value,)
            sides |= {each for each in values if isinstance(each, int) and each > 0}
    grid = math.lcm(*sides)
    return grid if grid <= _LARGEST_GRID else max(each for each in sides if each <= _LARGEST_GRID)
