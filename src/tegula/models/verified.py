"""Reads packaged weights, whose hash is known."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from tegula.errors import BrokenWeightsError, MissingWeightsError


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
