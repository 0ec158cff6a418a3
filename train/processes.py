"""Work that other processes do beforehand, so that a card never waits for it.

Everything that is drawn at random is drawn for a number: a step, or a shard. So it does
not matter which process draws it, nor when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

R = TypeVar("R")

_AHEAD = 3
"""Results that each process may have ready."""


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Any:
        return self._make(number)


def made_ahead(make: Callable[[int], R], numbers: Sequence[int], workers: int) -> Iterator[R]:
    """Yield ``make`` of every number, in order.

    Args:
        make: pure but for its number, and free of the graphics card.
        numbers: what to make.
        workers: processes, forked from this one; 0 makes each when it is wanted.
    """
    if not workers:
        return map(make, numbers)
    loader: DataLoader[R] = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=numbers,
        num_workers=min(workers, max(1, len(numbers))),
        collate_fn=_as_it_is,
        multiprocessing_context="fork",
        prefetch_factor=_AHEAD,
        worker_init_fn=_alone,
        generator=torch.Generator(),
    )
    return iter(loader)


def _as_it_is(result: R) -> R:
    return result


def _alone(_worker: int) -> None:
    cv2.setNumThreads(0)
