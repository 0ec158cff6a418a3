"""Two threads for one batch on the CPU.

Torch's own threads wait for each other in every layer, which costs more than it gains on
two busy cores: a step took 2.8 s with two of them and 0.5 s with one. Halves of a batch
on a Python thread each meet once a step. Gradients add up in the parameters; with at most
two halves the sum does not depend on which came first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

MOST_PARTS = 2
_pool = ThreadPoolExecutor(MOST_PARTS)


def split(count: int, parts: int) -> list[slice]:
    """Return ``parts`` equal slices of so many rows."""
    size = -(-count // parts)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def map_parts(run: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """Return ``run`` of every part; more than one run at the same time."""
    if len(parts) == 1:
        return [run(parts[0])]
    return list(_pool.map(run, parts))


def mean_logs(logs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of the parts' losses, by name."""
    names = dict.fromkeys(name for log in logs for name in log)
    return {n: torch.stack([log[n].detach() for log in logs if n in log]).mean() for n in names}
