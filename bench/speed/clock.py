"""Seconds and memory, on the device that computes."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def settle(device: torch.device) -> None:
    """Wait until a device has done all that was queued for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time one run to its end."""
    settle(device)
    start = time.perf_counter()
    run()
    settle(device)
    return time.perf_counter() - start


def interleaved(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    until: float,
    after_round: Callable[[dict[str, list[float]]], None],
) -> dict[str, list[float]]:
    """Time runs in turns, so that noise and drift meet all alike.

    Args:
        runs: by name.
        device: where they compute.
        repeats: rounds, if there is time.
        until: no round but the first begins later, by ``time.perf_counter``.
        after_round: given all seconds by name after every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats):
        if number > 0 and time.perf_counter() > until:
            break
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
        after_round(seconds)
    return seconds


def peak_growth(run: Callable[[], object], device: torch.device) -> float | None:
    """Return by how many MB memory grew at most while something ran; None: unknown here.

    On CUDA it is memory of the device, elsewhere resident memory of this process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not _trim_and_reset():
        run()
        return None
    start = _status_mb("VmRSS")
    run()
    return _status_mb("VmHWM") - start


def _trim_and_reset() -> bool:
    """Give freed memory back and make the kernel measure a new peak; Linux alone can."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _RESET.write_text(_RESET_PEAK)
    except (OSError, AttributeError):
        return False
    return True


def _status_mb(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
