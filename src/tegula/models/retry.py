"""When a net fails: smaller where memory runs out, wider where half precision overflows.

Neither ever shows in a picture, so what is tried again must leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tegula.errors import NumericalError, OutOfMemoryError
from tegula.models.device import is_out_of_memory

WINDOW_DOES_NOT_FIT = (
    "A single window does not fit into memory; choose a smaller window or a machine with "
    "more memory."
)

S = TypeVar("S")
T = TypeVar("T")


def until_it_fits(
    run: Callable[[S], T], size: S, smaller: Callable[[S], S | None], refusal: str
) -> tuple[T, S]:
    """Run at a size, or at the first smaller one that memory has room for.

    Args:
        run: called with a size, once or again.
        size: the first that is tried: windows of a batch, the side of a tile.
        smaller: returns the size to try next, None after the smallest.
        refusal: the sentence of the error.

    Returns:
        What ``run`` returned, and the size.

    Raises:
        OutOfMemoryError: not even the smallest size fits.
    """
    while True:
        try:
            return run(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The traceback of the error holds every tensor of the failed run, and is let go at
        # the end of the except block: only from here on is there memory to give back.
        _empty_caches()
        next_size = smaller(size)
        if next_size is None:
            raise OutOfMemoryError(refusal)
        size = next_size


def _empty_caches() -> None:
    """Give what torch's allocators hold in reserve back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def first_finite(attempts: Iterable[Callable[[], Sequence[Tensor]]], refusal: str) -> list[Tensor]:
    """Return the result of the first attempt that is finite throughout, in fp32.

    Args:
        attempts: the same work in ever higher precision.
        refusal: the sentence of the error.

    Raises:
        NumericalError: all of them gave NaN or infinity.
    """
    for attempt in attempts:
        results = [result.float() for result in attempt()]
        if is_finite(*results):
            return results
    raise NumericalError(refusal)


def is_finite(*tensors: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Tell whether there is no NaN and no infinity, without a copy of the values.

    It waits for the device once, however many tensors there are.

    Args:
        tensors: of any shapes.
        dtype: a precision in which they must be finite, too.
    """
    ends = [torch.stack(torch.aminmax(values)) for values in tensors if values.numel()]
    if not ends:
        return True
    both = torch.cat(ends)  # rounding keeps them the ends
    return bool(torch.isfinite(both if dtype is None else both.to(dtype)).all())
