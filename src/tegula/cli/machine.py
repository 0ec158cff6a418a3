"""What this machine has: cores, memory, device and libraries."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "pillow")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Facts of the machine; memory in bytes, None where it cannot be told.

    memory_total, memory_free: of the device that computes.
    advice: what would make it faster.
    """

    python: str
    device: str
    precision: str
    why: str
    cores: int
    memory_total: int | None
    memory_free: int | None
    libraries: Mapping[str, str]
    advice: str | None = None


def examine() -> Machine:
    """Look at the machine; brings torch along."""
    import torch

    from tegula.models.devices import pick_device, pick_dtype

    device = pick_device()
    total, free = memory_of(device)
    dtype = pick_dtype(device)
    return Machine(
        python=".".join(str(part) for part in sys.version_info[:3]),
        device=_name_of(device),
        precision=str(dtype).removeprefix("torch."),
        why=why_precision(device.type, half=dtype is not torch.float32),
        cores=usable_cores(),
        memory_total=total,
        memory_free=free,
        libraries=versions(),
        advice=_advice(device),
    )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def why_precision(device: str, *, half: bool) -> str:
    """Return why computing is done in this data type."""
    if device == "cpu" and half:
        return "this CPU multiplies bfloat16 natively, about twice as fast as float32"
    if device == "cuda" and half:
        return "GPUs compute in it at least twice as fast and with half the memory"
    return "this device is no faster in half precision"


def memory_of(device: torch.device) -> tuple[int | None, int | None]:
    """Return the total and the free memory of a device in bytes."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return total, free
    total_here, free_here = _memory_of_system()
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or total_here is None or limit >= total_here:
        return total_here, free_here
    room = max(0, limit - (used or 0))
    return limit, room if free_here is None else min(room, free_here)


def versions() -> Mapping[str, str]:
    """Return the versions of the libraries that matter."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})"


def _advice(device: torch.device) -> str | None:
    if device.type == "cpu" and shutil.which("nvidia-smi") is not None:
        return (
            "There is an NVIDIA driver and this torch does not use it: install the CUDA build "
            "of torch, or see that `nvidia-smi` works."
        )
    return None


def _memory_of_system() -> tuple[int | None, int | None]:
    facts: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split(":")
            facts[name] = int(value.split()[0]) * 1024
    if "MemTotal" in facts:
        return facts["MemTotal"], facts.get("MemAvailable")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    return None, None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
