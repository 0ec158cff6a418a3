"""Networks that enlarge a picture before diffusion refines it.

``list_prescalers`` needs no torch; ``load_prescaler`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tegula.models.prescalers.catalogue import (
    Prescaler,
    PrescalerFacts,
    is_installed,
    list_prescalers,
)

if TYPE_CHECKING:
    import torch

__all__ = ["Prescaler", "PrescalerFacts", "is_installed", "list_prescalers", "load_prescaler"]


def load_prescaler(
    name_or_path: str, device: torch.device, dtype: torch.dtype, tuned: Path | None = None
) -> Prescaler:
    """Load a prescaler by its name or from a file.

    Args:
        name_or_path: a name of ``list_prescalers``, or the path of a ``.safetensors`` or
            ``.pth`` file of the ESRGAN family (others through spandrel).
        device: where to compute.
        dtype: what to compute in; float32 weights are kept beside it for tiles that
            overflow.
        tuned: folder of what tegula tuned; None means that of the package.

    Raises:
        UnknownModelError: no prescaler has that name.
        MissingWeightsError: the file, or the package with the weights, is not there.
        BrokenWeightsError: the weights are damaged or fit no network.
        MissingExtraError: the network needs spandrel, which is not installed.
    """
    from tegula.models.prescalers.files import load

    return load(name_or_path, device, dtype, tuned)
