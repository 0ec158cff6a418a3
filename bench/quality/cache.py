"""What an earlier run measured, kept on disk by what it was made of.

Two things are kept: what a net made of a picture, under the net's weights and the picture, and
the scores of a result, under its pixels and those of its truth. Everything between the two (colour,
refine, finish) runs each time, so a change of tegula's code is always seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Arrays = Mapping[str, NDArray[Any]]


def digest(*parts: str | NDArray[Any] | Tensor) -> str:
    """Return a name for texts, arrays and tensors: the same for the same values and shapes."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode())
            continue
        if isinstance(part, Tensor):
            # numpy has no bfloat16; the bytes are as good.
            part = part.detach().cpu().contiguous().view(torch.uint8).numpy()
        found.update(str((part.dtype, part.shape)).encode())
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


class Cache:
    """A folder of arrays; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        """Make the folder."""
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def arrays(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """Return what is kept under a key, or make and keep it."""
        path = self._path(key, ".npz")
        if path is not None and path.exists():
            with np.load(path) as file:
                return dict(file)
        made = make()
        if path is not None:
            beside = path.with_name(f"{path.name}.{os.getpid()}.npz")
            np.savez(beside, allow_pickle=False, **made)
            beside.replace(path)
        return made

    def picture(self, key: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return a picture [h, w, 3] in 0..1 to 16 bits, kept or made; what leaves 0..1 is cut."""
        path = self._path(key, ".png")
        if path is not None and path.exists():
            levels = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        else:
            levels = np.rint(np.clip(make(), 0, 1) * 65535).astype(np.uint16)
            if path is not None:
                beside = path.with_name(f"{path.name}.{os.getpid()}.png")
                cv2.imwrite(str(beside), levels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
                beside.replace(path)
        return np.asarray(levels / np.float32(65535), np.float32)

    def _path(self, key: str, ending: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}{ending}"


def remember_results(
    network: nn.Module, weights: Callable[[], Iterable[Tensor]], cache: Cache
) -> None:
    """Have a net that enlarges [1, 3, h, w] look into the cache before it computes.

    weights: all that decide on what it makes.
    """
    compute = network.forward

    def forward(x: Tensor) -> Tensor:
        # A blank picture, or one of shapes alone, is how the work of a net is counted.
        if x.is_meta or not x.any():
            return compute(x)  # type: ignore[no-any-return]
        # The weights are read each time: what loaded them may have changed them since.
        key = digest("net", *weights(), x)
        found = cache.picture(key, lambda: compute(x)[0].permute(1, 2, 0).cpu().numpy())
        return torch.from_numpy(found).permute(2, 0, 1)[None].to(x.device)

    network.forward = forward
