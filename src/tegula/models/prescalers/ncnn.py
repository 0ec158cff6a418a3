"""Reads the weights of ncnn models: a text file of layers and a binary file of numbers.

Only what the packaged Real-ESRGAN models hold is understood: convolutions, whose
weights are stored as float16 or float32 behind a tag and whose biases are float32, and
PReLU slopes, float32 without a tag. Both files list their layers in the order in which
they run. Format: ncnn's "param and model file structure" page.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tegula.errors import BrokenWeightsError

MAGIC = "7767517"
FLOAT16_TAG = 0x01306B47
FLOAT32_TAG = 0
WITHOUT_WEIGHTS = frozenset(
    {"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "PixelShuffle"}
)

Array = NDArray[np.float32]


class _Numbers:
    """The binary file, read front to back."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int, dtype: str) -> Array:
        """Read ``count`` numbers and skip to the next multiple of 4 bytes."""
        size = count * np.dtype(dtype).itemsize
        if self.position + size > len(self.data):
            raise ValueError("the file ends too early")
        numbers = np.frombuffer(self.data, dtype, count, self.position)
        self.position += size + -size % 4
        return numbers.astype(np.float32)

    def take_tagged(self, count: int) -> Array:
        """Read a tag and then ``count`` numbers of the type it names."""
        if self.position + 4 > len(self.data):
            raise ValueError("the file ends too early")
        (tag,) = struct.unpack_from("<I", self.data, self.position)
        if tag not in (FLOAT16_TAG, FLOAT32_TAG):
            raise ValueError(f"weights are stored with the unknown tag {tag:#010x}")
        self.position += 4
        return self.take(count, "<f2" if tag == FLOAT16_TAG else "<f4")


def read_ncnn(param: Path, weights: Path) -> list[Array]:
    """Return every tensor of an ncnn model in the order in which the layers run.

    A convolution gives its weights [outputs, inputs, k, k] and then its biases
    [outputs]; a PReLU its slopes [channels].

    Raises:
        BrokenWeightsError: the files are no ncnn model, hold layers other than these,
            end too early, or have numbers left over.
    """
    try:
        numbers = _Numbers(weights.read_bytes())
        lines = param.read_text(encoding="ascii").split("\n")
        tensors = [tensor for line in _layers(lines) for tensor in _tensors(line, numbers)]
        if numbers.position != len(numbers.data):
            raise ValueError("numbers are left over after the last layer")
    except (OSError, ValueError, LookupError) as error:
        raise BrokenWeightsError(
            f"{weights.name} cannot be read as an ncnn model ({error}); install the package "
            "it came with again."
        ) from error
    return tensors


def _layers(lines: list[str]) -> Iterator[list[str]]:
    if lines[0].strip() != MAGIC:
        raise ValueError("the layer list does not start as one")
    expected = int(lines[1].split()[0])
    layers = [line.split() for line in lines[2:] if line.strip()]
    if len(layers) != expected:
        raise ValueError(f"{len(layers)} layers instead of {expected}")
    yield from layers


def _tensors(layer: list[str], numbers: _Numbers) -> list[Array]:
    kind, inputs, outputs = layer[0], int(layer[2]), int(layer[3])
    if kind in WITHOUT_WEIGHTS:
        return []
    values = dict(pair.split("=", 1) for pair in layer[4 + inputs + outputs :])
    if kind == "PReLU":
        return [numbers.take(int(values["0"]), "<f4")]
    if kind == "Convolution":
        return _convolution(values, numbers)
    raise ValueError(f"layer kind {kind} is not known")


def _convolution(values: dict[str, str], numbers: _Numbers) -> list[Array]:
    channels, side, count = int(values["0"]), int(values["1"]), int(values["6"])
    weights = numbers.take_tagged(count).reshape(channels, -1, side, side)
    if values.get("5", "0") != "1":
        return [weights]
    return [weights, numbers.take(channels, "<f4")]
