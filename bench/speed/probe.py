"""How fast the device multiplies: the limit that methods are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from bench.speed.clock import seconds_of

_TRIES = 6
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """Return what a precision is called in options."""
    return next(name for name, known in _PRECISIONS.items() if known == dtype)


@torch.inference_mode()
def matrix_rates(device: torch.device, fastest: torch.dtype) -> Mapping[str, Mapping[str, float]]:
    """Return the best FLOP/s by precision, of a matrix product and of a convolution."""
    return {
        name: {kind: _rate(kind, device, dtype) for kind in ("product", "convolution")}
        for name, dtype in _PRECISIONS.items()
        if dtype in (torch.float32, fastest)
    }


def best_rates(*measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the highest rate of several measurements, one by one."""
    first = measured[0]
    return {
        name: {kind: max(rates[name][kind] for rates in measured) for kind in first[name]}
        for name in first
    }


def _rate(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    run, flops = (_product if kind == "product" else _convolution)(device, dtype)
    run()
    return flops / min(seconds_of(run, device) for _ in range(_TRIES))


def _product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right, 2 * side**3


def _convolution(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    rows, channels, side = (32, 320, 64) if device.type == "cuda" else (4, 128, 64)
    picture = torch.randn(rows, channels, side, side, device=device).to(dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    picture = picture.to(memory_format=torch.channels_last)
    kernel = kernel.to(memory_format=torch.channels_last)
    flops = 2 * rows * side**2 * channels**2 * 9
    return lambda: functional.conv2d(picture, kernel, padding=1), flops
