"""How much fits into a device's memory: windows of a batch, sides of tiles.

The numbers are a start: a batch that does not fit after all is halved.
"""

from __future__ import annotations

import math

import torch

SHARE = 0.8
"""Of the free memory; the rest is for what kernels take besides and what is cut up."""
MOST_WINDOWS = 64
"""Larger batches only take memory: a GPU is busy long before."""
KEPT_SHARE = 0.25
"""Of the free memory, for what is only kept there between one use and the next."""


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a GPU; None where that is unknown.

    What torch holds in reserve counts as free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(reserved)


def windows_that_fit(free: int, window_bytes: int, most: int = MOST_WINDOWS) -> int:
    """Return how many windows of a batch fit: a power of two, at least 1, at most ``most``.

    Powers of two keep the number of different batches small.

    Args:
        free: bytes, as ``free_memory`` counts them.
        window_bytes: what one window takes in a forward pass, with both rows of guidance.
        most: the largest answer.
    """
    fitting = max(1, min(most, int(free * SHARE) // max(1, window_bytes)))
    return 1 << (fitting.bit_length() - 1)


def side_that_fits(free: int, pixel_bytes: int, sides: tuple[int, int], multiple: int) -> int:
    """Return the side of the largest square that fits, a multiple of ``multiple``.

    Args:
        free: bytes, as ``free_memory`` counts them.
        pixel_bytes: what one pixel of the square takes in a forward pass.
        sides: the smallest and the largest answer, multiples themselves.
        multiple: what the net takes multiples of.
    """
    fitting = math.isqrt(int(free * SHARE) // max(1, pixel_bytes)) // multiple * multiple
    return max(sides[0], min(sides[1], fitting))


def home_of(size: int, device: torch.device) -> torch.device:
    """Return where to keep so many bytes: on the device itself, or on the host.

    What is kept on the host is moved to the device piece by piece as it is used.
    """
    free = free_memory(device)
    return device if free is None or size <= free * KEPT_SHARE else torch.device("cpu")
