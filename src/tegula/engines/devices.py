"""The devices of this machine, asked for in a process of its own: torch stays out of ours."""

from __future__ import annotations

import platform
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context


@dataclass(frozen=True)
class Device:
    """A device: its name for torch, a short one for addresses, one for people."""

    name: str
    sku: str
    title: str


def discover_devices() -> tuple[Device, ...]:
    """Return what predictions would run on: every GPU, or else the processor."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_devices).result()


def device_of(name: str, title: str) -> Device:
    """Return a device of this name; the words of its title make its short name."""
    if name == "cpu":
        return Device(name, "cpu", title)
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Device(name, f"gpu-{words.removeprefix('nvidia-')}", title)


def _devices() -> tuple[Device, ...]:
    import torch

    if torch.cuda.is_available():
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        return tuple(device_of(name, torch.cuda.get_device_name(name)) for name in names)
    if torch.backends.mps.is_available():
        return (device_of("mps", "Apple GPU"),)
    return (device_of("cpu", f"CPU ({platform.machine()})"),)
