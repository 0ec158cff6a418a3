"""Reading prescalers from packages and files."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models.files import load_foreign, read_packaged, read_tensors
from tegula.models.prescalers.catalogue import (
    FILE_OVERLAP,
    WEIGHTS,
    PackagedPrescaler,
    Prescaler,
    PrescalerFacts,
    find_packaged,
    list_prescalers,
    packaged_files,
)
from tegula.models.prescalers.networks import RRDBNet, SRVGGNetCompact

# Reads the weights of ncnn models: a text file of layers and a binary file of numbers.
#
# Only what the packaged Real-ESRGAN models hold is understood: convolutions, whose
# weights are stored as float16 or float32 behind a tag and whose biases are float32, and
# PReLU slopes, float32 without a tag. Both files list their layers in the order in which
# they run. Format: ncnn's "param and model file structure" page.

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


# Prescaler files that users bring: what is in them, and which network they fit.
#
# ESRGAN-family files are recognised by their parameter names alone, in the three
# spellings that circulate: Real-ESRGAN's (``conv_first``, ``body.0.rdb1``...), that of
# ESRGAN's first repository (``RRDB_trunk.0.RDB1``...) and that of the numbered
# "old architecture" (``model.1.sub.0.RDB1``...), which most community models use. Every
# other architecture is left to spandrel.

SUFFIXES = (".safetensors", ".pth")
WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict")
PREFIXES = ("module.", "netG.")

State = dict[str, Tensor]

_FIRST_SPELLING = (
    (r"^RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"^trunk_conv\.", "conv_body."),
    (r"^upconv(\d+)\.", r"conv_up\1."),
    (r"^HRconv\.", "conv_hr."),
)
_NUMBERED_SPELLING = (
    (r"^model\.0\.", "conv_first."),
    (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"^model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1"),
)


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in float32 and what is to be known of it.

    grid: its result depends on where a tile begins, unless on multiples of this.
    half: whether it computes in float16.
    """

    network: nn.Module
    net: str
    factor: int
    grid: int = 1
    half: bool = True


def load_checkpoint(path: Path) -> LoadedNetwork:
    """Read a ``.safetensors`` or ``.pth`` file into the network it belongs to.

    Pickled files are read by torch's restricted unpickler, which runs no code.

    Raises:
        MissingWeightsError: there is no such file.
        BrokenWeightsError: the file is damaged, or holds no network that enlarges
            three colour channels.
        MissingExtraError: the network is not of the ESRGAN family, and spandrel,
            which knows the others, is not installed.
    """
    state = read_state(path)
    renamed = unify_names(state)
    if "conv_first.weight" in renamed and "conv_body.weight" in renamed:
        return _load_rrdb(renamed, path)
    if "body.0.weight" in renamed and "body.1.weight" in renamed:
        return _load_compact(renamed, path)
    return _load_foreign(state, path)


def read_state(path: Path) -> State:
    """Return the tensors of a file by name, without wrappers and common prefixes.

    Raises:
        MissingWeightsError: there is no such file.
        BrokenWeightsError: the file is damaged or holds something else.
    """
    if not path.is_file():
        raise MissingWeightsError(f"There is no prescaler file {path}; check the path.")
    content: object
    try:
        if path.suffix.lower() == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise _broken(path, "it is damaged, or no file of weights") from error
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _broken(path, "it is damaged, or no file of weights") from error
    return _unwrap(content, path)


def _unwrap(content: object, path: Path) -> State:
    if isinstance(content, Mapping):
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        state = dict((inner or [content])[0])
        if state and all(_is_named_tensor(*item) for item in state.items()):
            return _without_prefix(cast("State", state))
    raise _broken(path, "it holds no network's tensors by name")


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _without_prefix(state: State) -> State:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def unify_names(state: State) -> State:
    """Rename the parameters of an ESRGAN file to those of ``RRDBNet``.

    Names of other networks come back as they are.
    """
    if "model.0.weight" not in state:
        return _rename(state, _FIRST_SPELLING)
    renamed = _rename(state, _NUMBERED_SPELLING)
    tail = sorted({int(n.split(".")[1]) for n in renamed if re.match(r"^model\.\d+\.", n)})
    if len(tail) < 2:
        return state
    ups = [f"conv_up{n + 1}" for n in range(len(tail) - 2)]
    new = dict(zip(tail, [*ups, "conv_hr", "conv_last"], strict=True))
    return _rename(renamed, [(rf"^model\.{number}\.", f"{new[number]}.") for number in tail])


def _rename(state: State, rules: Iterable[tuple[str, str]]) -> State:
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed


def _load_rrdb(state: State, path: Path) -> LoadedNetwork:
    features, channels = state["conv_first.weight"].shape[:2]
    blocks = _count(state, r"^body\.(\d+)\.")
    upsamples = _count(state, r"^conv_up(\d+)\.")
    unshuffle = {3: 1, 12: 2, 48: 4}.get(channels)
    growth = state.get("body.0.rdb1.conv1.weight")
    if unshuffle is None or growth is None or unshuffle > 2**upsamples:
        raise _broken(path, f"an ESRGAN network with {channels} input channels does not fit")
    network = RRDBNet(blocks, features, growth.shape[0], unshuffle, upsamples)
    fill(network, state, str(path))
    return LoadedNetwork(network, f"RRDBNet, {blocks} blocks", network.factor)


def _load_compact(state: State, path: Path) -> LoadedNetwork:
    last = max((int(name.split(".")[1]) for name in state if name.startswith("body.")), default=0)
    first, final = state["body.0.weight"], state.get(f"body.{last}.weight")
    factor = 0 if final is None else math.isqrt(final.shape[0] // 3)
    if factor < 1 or last % 2 or first.dim() != 4:
        raise _broken(path, "its layers are not those of a SRVGGNetCompact")
    network = SRVGGNetCompact(last // 2 - 1, first.shape[0], factor)
    fill(network, state, str(path))
    return LoadedNetwork(network, f"SRVGGNetCompact, {last // 2 - 1} convolutions", factor)


def _count(state: State, pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def fill(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load tensors into a network; every one is used, and every parameter gets one.

    Raises:
        BrokenWeightsError: a name is missing or left over, a shape differs, or a number
            is not finite.
    """
    own = network.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong = wrong or [name for name, tensor in own.items() if tensor.shape != state[name].shape]
    wrong = wrong or [name for name in own if not bool(state[name].isfinite().all())]
    if wrong:
        raise BrokenWeightsError(
            f"{where} does not fit its network: {len(wrong)} tensors are missing, left over, "
            f"of another shape or not finite ({wrong[0]}); get the file again."
        )
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})


class ForeignNetwork(nn.Module):
    """A network that spandrel loaded, behind the calling convention of ours.

    Its weights stay float32, and torch chooses what to compute in ``dtype``: transformers
    such as SwinIR make masks in float32 on the way and break when all else is narrower.
    """

    def __init__(self, descriptor: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = descriptor.model
        self.descriptor = descriptor
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge [n, 3, h, w] to [n, 3, h * factor, w * factor], float32."""
        narrow = self.dtype != torch.float32
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=narrow):
            picture: Tensor = self.descriptor(x)
        return picture.float()


def _load_foreign(state: State, path: Path) -> LoadedNetwork:
    descriptor = load_foreign(state, f"{path} is not of the ESRGAN family, and its network")
    if descriptor is None:
        raise _broken(path, "spandrel does not know its network")
    channels = (descriptor.input_channels, descriptor.output_channels)
    if channels != (3, 3):
        raise _broken(path, "its network does not turn one colour picture into another")
    name = str(descriptor.architecture.name)
    return LoadedNetwork(
        ForeignNetwork(descriptor),
        name,
        int(descriptor.scale),
        grid=_window(descriptor.model),
        half=bool(getattr(descriptor, "supports_half", True)),
    )


def _window(network: nn.Module) -> int:
    """Return the side of the windows that a transformer of the Swin family attends in."""
    side = getattr(network, "window_size", 1)
    return side if isinstance(side, int) else 1


def _broken(path: Path, why: str) -> BrokenWeightsError:
    return BrokenWeightsError(
        f"{path} cannot be used as a prescaler: {why}; it takes an ESRGAN-family or SwinIR "
        "file (.safetensors or .pth)."
    )


# From a name or a path to a prescaler that is ready to run.

Network = TypeVar("Network", bound=nn.Module)


def load(
    name_or_path: str, device: torch.device, dtype: torch.dtype, tuned: Path | None = None
) -> Prescaler:
    """Do the work of ``tegula.models.prescalers.load_prescaler``."""
    if Path(name_or_path).suffix.lower() in SUFFIXES:
        return _from_file(Path(name_or_path), device, dtype)
    entry = find_packaged(name_or_path)
    if entry is None:
        plain = next(facts for facts in list_prescalers() if facts.factor is None)
        return Prescaler(plain, None, None, device, dtype)
    return _ready(entry.facts, _packaged_network(entry, tuned or WEIGHTS), device, dtype)


def _from_file(path: Path, device: torch.device, dtype: torch.dtype) -> Prescaler:
    loaded = load_checkpoint(path)
    facts = PrescalerFacts(
        name=str(path),
        description="A file of your own.",
        net=loaded.net,
        factor=loaded.factor,
        overlap=FILE_OVERLAP,
        licence="as its author says",
        grid=loaded.grid,
    )
    if dtype == torch.float16 and not loaded.half:
        dtype = torch.float32
    if isinstance(loaded.network, ForeignNetwork):
        full = _on(loaded.network, device)
        fast = full if dtype == torch.float32 else ForeignNetwork(full.descriptor, dtype)
        return Prescaler(facts, fast.eval(), full, device, dtype)
    return _ready(facts, loaded.network, device, dtype)


def _packaged_network(entry: PackagedPrescaler, tuned: Path) -> nn.Module:
    network = SRVGGNetCompact() if entry.blocks is None else RRDBNet(entry.blocks)
    tensors = read_ncnn(*packaged_files(entry))
    # Both sides list their tensors in the order in which the layers run; a surplus on
    # either side leaves a name that ``fill`` reports.
    names = [*network.state_dict(), *(f"surplus.{n}" for n in range(len(tensors)))]
    state = {name: torch.from_numpy(t) for name, t in zip(names, tensors, strict=False)}
    fill(network, state, f"{entry.file}.bin")
    if entry.tuned is not None:
        fill(network, {**network.state_dict(), **read_tuned(entry.tuned, tuned)}, entry.tuned)
    return network


def read_tuned(name: str, folder: Path) -> dict[str, Tensor]:
    """Return tensors that tegula tuned, by the names of the network they belong to.

    Raises:
        MissingWeightsError: the file or its configuration is not there.
        BrokenWeightsError: one of them is damaged.
    """
    config = folder / f"{name}.json"
    try:
        sha256 = str(json.loads(read_packaged(config))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenWeightsError(f"{config} is damaged; install tegula again.") from error
    return read_tensors(folder / f"{name}.safetensors", sha256)


def _ready(
    facts: PrescalerFacts, network: nn.Module, device: torch.device, dtype: torch.dtype
) -> Prescaler:
    full = _on(network, device)
    fast = full if dtype == torch.float32 else copy.deepcopy(full).to(dtype)
    return Prescaler(facts, fast, full, device, dtype)


def _on(network: Network, device: torch.device) -> Network:
    network = network.eval().requires_grad_(requires_grad=False).to(device=device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
