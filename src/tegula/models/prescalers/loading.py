"""From a name or a path to a prescaler that is ready to run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tegula.errors import BrokenWeightsError
from tegula.models.prescalers.catalogue import (
    FILE_OVERLAP,
    WEIGHTS,
    PackagedPrescaler,
    find_packaged,
    list_prescalers,
    packaged_files,
)
from tegula.models.prescalers.checkpoints import SUFFIXES, ForeignNetwork, fill, load_checkpoint
from tegula.models.prescalers.ncnn import read_ncnn
from tegula.models.prescalers.networks import RRDBNet, SRVGGNetCompact
from tegula.models.prescalers.prescaler import Prescaler, PrescalerFacts
from tegula.models.verified import read_packaged, read_tensors

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
