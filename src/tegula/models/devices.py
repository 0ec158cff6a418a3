"""Which device to compute on, and in which precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tegula.errors import OptionError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BF16_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")
_AMPERE = (8, 0)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this name; ``auto`` takes CUDA, then MPS, then the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        OptionError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device(next((n for n in ("cuda", "mps") if _is_here(n)), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device is auto, cpu, cuda, cuda:N or mps, not {name!r}.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not _is_here(device.type) or (device.index or 0) >= count:
        raise OptionError(f"This machine has no device {name!r}; device auto takes what is there.")
    return device


def _is_here(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind == "cpu"


def pick_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Return the data type to compute in.

    ``auto`` is bfloat16 on CPUs that multiply it natively (AVX512-BF16 or AMX; about
    twice as fast as float32) and on CUDA devices from Ampere on, float16 on older CUDA
    devices, and float32 elsewhere.

    Raises:
        OptionError: ``precision`` is none of ``PRECISIONS``.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}.")
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device) >= _AMPERE
        return torch.bfloat16 if recent else torch.float16
    fast_cpu = device.type == "cpu" and _cpu_multiplies_bf16()
    return torch.bfloat16 if fast_cpu else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Ask torch; its probes are private, so an absent one counts as no."""
    probes: list[Callable[[], Any] | None] = [getattr(torch.cpu, n, None) for n in _BF16_PROBES]
    return any(probe is not None and bool(probe()) for probe in probes)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on any device.

    CUDA has a class for it; the CPU allocator and oneDNN raise a plain RuntimeError.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(w in text for w in _OUT_OF_MEMORY_WORDS)
