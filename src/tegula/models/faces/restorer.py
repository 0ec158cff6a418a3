"""A net that restores an aligned face: GFPGAN, RestoreFormer or CodeFormer.

All three take and return a face of 512 x 512 pixels in -1..1. The networks are spandrel's,
called as their authors call them: spandrel's own call leaves the range to the caller, adds
fresh noise each time, and knows no fidelity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.errors import BrokenWeightsError, NumericalError
from tegula.models.foreign import load_foreign
from tegula.models.prescalers.checkpoints import read_state

Array = NDArray[np.float32]
SIDE = 512
Call = Callable[[Any, Tensor, float], Tensor]


def _gfpgan(network: Any, face: Tensor, _fidelity: float) -> Tensor:
    # The noise of the file instead of fresh noise: the same face comes out each time.
    picture: Tensor = network(face, return_rgb=False, randomize_noise=False)[0]
    return picture


def _restoreformer(network: Any, face: Tensor, _fidelity: float) -> Tensor:
    picture: Tensor = network(face)[0]
    return picture


def _codeformer(network: Any, face: Tensor, fidelity: float) -> Tensor:
    picture: Tensor = network(face, weight=fidelity)[0]
    return picture


_CALLS: Mapping[str, Call] = {
    "GFPGAN": _gfpgan,
    "RestoreFormer": _restoreformer,
    "CodeFormer": _codeformer,
}


@dataclass(frozen=True)
class FaceRestorer:
    """A network ready to run."""

    name: str
    network: Any
    call: Call
    device: torch.device

    def restore(self, face: Array, fidelity: float) -> Array:
        """Restore one aligned face.

        Args:
            face: float32 [512, 512, 3] in 0..1.
            fidelity: 0 restores most, 1 keeps most; CodeFormer alone listens to it.

        Returns:
            float32 [512, 512, 3] in 0..1.

        Raises:
            NumericalError: the network returned NaN or infinity.
        """
        x = torch.from_numpy(np.ascontiguousarray(face)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            y = self.call(self.network, x.to(self.device) * 2 - 1, fidelity)
        if not bool(torch.isfinite(y).all()):
            raise NumericalError(f"The face model {self.name} returned values that are no numbers.")
        restored: Array = ((y[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        return restored


def load(path: Path, device: torch.device) -> FaceRestorer:
    """Do the work of ``tegula.models.faces.load_restorer`` for a file that is there."""
    descriptor = _descriptor(path)
    kind = str(descriptor.architecture.id)
    network = descriptor.model.eval().requires_grad_(requires_grad=False).to(device)
    return FaceRestorer(path.name, network, _CALLS[kind], device)


def _descriptor(path: Path) -> Any:
    try:
        state = read_state(path)
    except BrokenWeightsError as error:
        raise BrokenWeightsError(
            f"{path} is damaged, or no file of weights; get the file again."
        ) from error
    descriptor = load_foreign(state, str(path))
    if descriptor is None or str(descriptor.architecture.id) not in _CALLS:
        raise BrokenWeightsError(
            f"{path} holds no network that restores faces; GFPGAN, RestoreFormer and CodeFormer do."
        )
    return descriptor
