"""From a name or a path to a prescaler that is ready to run."""

from __future__ import annotations

import copy
import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tegula.errors import BrokenWeightsError
from tegula.images.pixels import Float
from tegula.models.files import (
    existing_file,
    read_network,
    read_packaged,
    read_packaged_tensors,
)
from tegula.models.hub import is_weights_file
from tegula.models.library import FileKind, resolve_file
from tegula.models.prescalers import (
    WEIGHTS,
    PackagedPrescaler,
    Prescaler,
    PrescalerFacts,
    TuningLine,
    find_packaged,
    list_prescalers,
    packaged_files,
)
from tegula.models.prescalers.networks import RRDBNet, SRVGGNetCompact, fill, network_of
from tegula.models.spandrel_networks import (
    SpandrelNetwork,
    attention_window,
    load_with_spandrel,
    why_no_prescaler,
)

_TWICE = "twice."

Network = TypeVar("Network", bound=nn.Module)

_CARD_STEP = 64
"""Leaves four lengths of a tile of at most 640; on average they are a twentieth longer."""
_OVERLAP = 80
"""Context for files of any network: that of the packaged network that needs the most."""


def load_prescaler(
    name_or_path: str,
    device: torch.device,
    dtype: torch.dtype,
    tuned: Path | None = None,
    *,
    int8: bool = False,
) -> Prescaler:
    """Load a prescaler by its name or from a file.

    Args:
        name_or_path: a name of ``list_prescalers``, or the path or the name of a file of the
            ESRGAN family (others through spandrel), which ``tegula.models.library`` finds.
        device: where to compute.
        dtype: what to compute in; float32 weights are kept beside it for tiles that
            overflow.
        tuned: folder of what tegula tuned; None means that of the package.
        int8: multiply 8-bit numbers where the network has ranges for them; for processors of
            which ``multiplies_int8`` is true.

    Raises:
        UnknownModelError: no prescaler has that name.
        MissingWeightsError: the file, or the package with the weights, is not there.
        BrokenWeightsError: the weights are damaged or fit no network.
        MissingExtraError: the network needs spandrel, which is not installed.
    """
    if name_or_path not in {facts.name for facts in list_prescalers()}:
        file = resolve_file(name_or_path, FileKind.PRESCALER)
        if is_weights_file(file):
            return _from_file(existing_file(file, "prescaler"), device, dtype)
    entry = find_packaged(name_or_path)
    if entry is None:
        plain = next(facts for facts in list_prescalers() if facts.factor is None)
        return Prescaler(plain, None, None, device, dtype)
    folder = tuned or WEIGHTS
    if entry.distilled is None:
        network, line = _packaged_network(entry, folder)
        ready = _ready(entry.facts, network, device, dtype, line)
        if not int8 or entry.ranges is None:
            return ready
        ranges, _ = read_own(entry.ranges, folder)
        return dataclasses.replace(ready, ranges=ranges)
    four, two = two_heads(entry, read_own(entry.distilled, folder)[0])
    for network, name in ((four, entry.four), (two, entry.twice)):
        if name is not None:
            fill(network, read_own(name, folder)[0], name)
    smaller = dataclasses.replace(entry.facts, factor=entry.facts.smaller, smaller=None)
    return dataclasses.replace(
        _ready(entry.facts, four, device, dtype), smaller=_ready(smaller, two, device, dtype)
    )


def with_share(prescaler: Prescaler, share: float | None) -> Prescaler:
    """Return a prescaler with another share of its tuning; it takes a tenth of a second.

    What tuning left alone is common to both. The one that was given stays as it is, so that
    another thread may be running it.

    Args:
        prescaler: returned as it is when it has no tuning.
        share: 0 is the net before tuning, 1 all of it; None leaves the share as it is.
    """
    line = prescaler.line
    network, full = prescaler.network, prescaler.full_precision
    if line is None or network is None or full is None or share is None:
        return prescaler
    if share == line.at:
        return prescaler
    # At the end of the line ``lerp`` gives the very numbers of that end.
    mixed = {
        name: torch.lerp(tensor, line.tuned[name], share / line.share)
        for name, tensor in line.untuned.items()
    }
    other = _with_tensors(full, mixed)
    fast = other if network is full else _with_tensors(network, mixed)
    line = dataclasses.replace(line, at=share)
    return dataclasses.replace(
        prescaler, network=fast, full_precision=other, line=line, compiled=None
    )


def _with_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a network with some tensors replaced, which shares all others with the first."""
    replaced = {}
    for name, own in network.named_parameters():
        if name in tensors:
            format_ = torch.channels_last if own.dim() == 4 else torch.preserve_format
            new = tensors[name].to(own, memory_format=format_)
            replaced[id(own)] = nn.Parameter(new, requires_grad=False)
    return _twin(network, replaced)


def _twin(network: Network, replaced: Mapping[int, nn.Parameter]) -> Network:
    """Return a copy of a network's layers, with hooks of its own and the same weights.

    ``copy.deepcopy`` looks at every setting of every layer, and takes longer than all the weights
    take to be rounded.

    Args:
        network: is left as it is.
        replaced: weights to put in the place of others, by the identity of those.
    """
    twin = copy.copy(network)
    for name, value in network.__dict__.items():
        if isinstance(value, dict):  # of weights, layers and hooks
            twin.__dict__[name] = value.copy()
    twin._parameters = {
        name: own if own is None else replaced.get(id(own), own)
        for name, own in network._parameters.items()
    }
    twin._modules = {
        name: layer if layer is None else _twin(layer, replaced)
        for name, layer in network._modules.items()
    }
    return twin


def _ready(
    facts: PrescalerFacts,
    network: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    line: TuningLine | None = None,
) -> Prescaler:
    full = _for_inference(network, device)
    if device.type == "cuda":
        facts = dataclasses.replace(facts, step=_CARD_STEP)
    if line is not None:
        untuned, tuned = (
            {name: tensor.to(device) for name, tensor in end.items()}
            for end in (line.untuned, line.tuned)
        )
        line = TuningLine(untuned, tuned, line.share, line.at)
    if dtype == torch.float32:
        return Prescaler(facts, full, full, device, dtype, line)
    narrow = {
        id(each): nn.Parameter(each.to(dtype), requires_grad=False) for each in full.parameters()
    }
    return Prescaler(facts, _twin(full, narrow), full, device, dtype, line)


def _for_inference(
    network: Network, device: torch.device, layout: torch.memory_format = torch.channels_last
) -> Network:
    network = network.eval().requires_grad_(requires_grad=False).to(device=device)
    return network.to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


# Files that users bring.


def _from_file(path: Path, device: torch.device, dtype: torch.dtype) -> Prescaler:
    tensors = read_network(path)
    network = network_of(tensors, str(path))
    if network is None:
        return _through_spandrel(tensors, path, device, dtype)
    return _ready(_file_facts(path, network.description, network.factor), network, device, dtype)


def _file_facts(path: Path, net: str, factor: int, grid: int = 1) -> PrescalerFacts:
    return PrescalerFacts(
        name=str(path),
        description="A file of your own.",
        net=net,
        factor=factor,
        overlap=_OVERLAP,
        licence="as its author says",
        grid=grid,
    )


def _through_spandrel(
    tensors: Mapping[str, Tensor], path: Path, device: torch.device, dtype: torch.dtype
) -> Prescaler:
    descriptor = load_with_spandrel(tensors, f"{path} is not of the ESRGAN family, and its network")
    fault = why_no_prescaler(descriptor)
    if fault is not None:
        raise BrokenWeightsError(
            f"{path} cannot be used as a prescaler: {fault}; give an ESRGAN-family or SwinIR "
            f"file (.safetensors or .pth)."
        )
    net, factor = str(descriptor.architecture.name), int(descriptor.scale)
    facts = _file_facts(path, net, factor, attention_window(descriptor.model))
    if dtype == torch.float16 and not getattr(descriptor, "supports_half", True):
        dtype = torch.float32
    network = SpandrelNetwork(descriptor)
    full = _for_inference(network, device, network.layout)
    fast = full if dtype == torch.float32 else SpandrelNetwork(descriptor, dtype)
    return Prescaler(facts, fast.eval(), full, device, dtype)


# Packaged weights: those of Real-ESRGAN, as ncnn models, and what tegula tuned or distilled.


def _packaged_network(entry: PackagedPrescaler, tuned: Path) -> tuple[nn.Module, TuningLine | None]:
    with torch.device("meta"):  # every weight is filled in, so none is drawn first
        network = SRVGGNetCompact() if entry.blocks is None else RRDBNet(entry.blocks)
    param, numbers = packaged_files(entry)
    arrays = read_ncnn(param, numbers)
    # Both sides list their tensors in the order in which the layers run; a surplus on
    # either side leaves a name that ``fill`` reports.
    names = [*network.state_dict(), *(f"surplus.{n}" for n in range(len(arrays)))]
    tensors = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=False)}
    fill(network, tensors, f"{entry.file}.bin")
    if entry.tuned is None:
        return network, None
    own, share = _read_tuned(entry.tuned, tuned)
    untuned = {name: tensor.clone() for name, tensor in network.state_dict().items() if name in own}
    fill(network, {**network.state_dict(), **own}, entry.tuned)
    own = {name: tensor.float() for name, tensor in own.items()}
    return network, TuningLine(untuned, own, share, share)


def _read_tuned(name: str, folder: Path) -> tuple[dict[str, Tensor], float]:
    """Return the tensors that were tuned, and what share of the tuning they are."""
    tensors, training = read_own(name, folder)
    share = training.get("share")
    if not isinstance(share, float | int) or not 0 < share <= 1:
        raise BrokenWeightsError(f"{folder / name}.json is damaged; install tegula again.")
    return tensors, float(share)


def read_own(name: str, folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the tensors of a file of tegula's own, and what is known of its training."""
    config = folder / f"{name}.json"
    try:
        content = json.loads(read_packaged(config))
        sha256, training = str(content["sha256"]), dict(content["training"])
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenWeightsError(f"{config} is damaged; install tegula again.") from error
    return read_packaged_tensors(folder / f"{name}.safetensors", sha256), training


def two_heads(
    entry: PackagedPrescaler, tensors: Mapping[str, Tensor]
) -> tuple[SRVGGNetCompact, SRVGGNetCompact]:
    """Return two networks of one body; the head of the smaller one is stored as ``twice``."""
    with torch.device("meta"):
        four, two = (SRVGGNetCompact(entry.convolutions, factor=factor) for factor in (4, 2))
    head = f"body.{len(two.body) - 1}."
    twice = {head + n.removeprefix(_TWICE): t for n, t in tensors.items() if n.startswith(_TWICE)}
    body = {n: t for n, t in tensors.items() if not n.startswith(_TWICE)}
    fill(four, body, entry.facts.name)
    fill(two, {**body, **twice}, entry.facts.name)
    return four, two


# ncnn models: a text file of layers and a binary file of numbers.
#
# Only what the packaged Real-ESRGAN models hold is understood: convolutions, whose
# weights are stored as float16 or float32 behind a tag and whose biases are float32, and
# PReLU slopes, float32 without a tag. Both files list their layers in the order in which
# they run. Format: ncnn's "param and model file structure" page.

_MAGIC = "7767517"
_FLOAT16_TAG = 0x01306B47
_FLOAT32_TAG = 0
_WITHOUT_WEIGHTS = frozenset(
    {"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "PixelShuffle"}
)


class _Numbers:
    """Reads the binary file front to back."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int, dtype: str) -> Float:
        """Read ``count`` numbers and skip to the next multiple of 4 bytes."""
        size = count * np.dtype(dtype).itemsize
        if self.position + size > len(self.data):
            raise ValueError("the file ends too early")
        numbers = np.frombuffer(self.data, dtype, count, self.position)
        self.position += size + -size % 4
        return numbers.astype(np.float32)

    def take_tagged(self, count: int) -> Float:
        """Read a tag and then ``count`` numbers of the type it names."""
        if self.position + 4 > len(self.data):
            raise ValueError("the file ends too early")
        (tag,) = struct.unpack_from("<I", self.data, self.position)
        if tag not in (_FLOAT16_TAG, _FLOAT32_TAG):
            raise ValueError(f"weights are stored with the unknown tag {tag:#010x}")
        self.position += 4
        return self.take(count, "<f2" if tag == _FLOAT16_TAG else "<f4")


def read_ncnn(param: Path, weights: Path) -> list[Float]:
    """Return every array of an ncnn model in the order in which the layers run.

    A convolution gives its weights [outputs, inputs, k, k] and then its biases
    [outputs]; a PReLU its slopes [channels].

    Raises:
        BrokenWeightsError: the files are not an ncnn model, hold layers other than these,
            end too early, or have numbers left over.
    """
    try:
        numbers = _Numbers(weights.read_bytes())
        magic, counts, *lines = param.read_text(encoding="ascii").split("\n")
        layers = [line.split() for line in lines if line.strip()]
        if magic.strip() != _MAGIC or len(layers) != int(counts.split()[0]):
            raise ValueError("the list of layers is damaged or cut off")
        arrays = [array for layer in layers for array in _arrays(layer, numbers)]
        if numbers.position != len(numbers.data):
            raise ValueError("numbers are left over after the last layer")
    except (OSError, ValueError, LookupError) as error:
        raise BrokenWeightsError(
            f"{weights.name} cannot be read as an ncnn model ({error}); install the package "
            "it came with again."
        ) from error
    return arrays


def _arrays(layer: list[str], numbers: _Numbers) -> list[Float]:
    """Return the numbers of one layer: its kind, name, inputs, outputs, and ``key=value``s."""
    kind, inputs, outputs = layer[0], int(layer[2]), int(layer[3])
    if kind in _WITHOUT_WEIGHTS:
        return []
    values = dict(pair.split("=", 1) for pair in layer[4 + inputs + outputs :])
    if kind == "PReLU":
        return [numbers.take(int(values["0"]), "<f4")]
    if kind != "Convolution":
        raise ValueError(f"layer kind {kind} is not known")
    channels, side, count = int(values["0"]), int(values["1"]), int(values["6"])
    kernels = numbers.take_tagged(count).reshape(channels, -1, side, side)
    has_bias = values.get("5", "0") == "1"
    return [kernels, numbers.take(channels, "<f4")] if has_bias else [kernels]
