"""diffusers, imported without torch's compiler, and what to do where that is loaded.

diffusers asks the compiler for one decorator when it is imported, and goes without where
there is none. Importing the compiler takes longer than importing torch itself, and most
runs compile nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

_COMPILER = "torch._dynamo"


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Make importing the compiler fail inside, unless it is there already."""
    if _COMPILER in sys.modules:
        yield
        return
    sys.modules[_COMPILER] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_COMPILER]


with _without_compiler():
    import diffusers
    import diffusers.utils.torch_utils


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled networks run as they were written."""
    if _COMPILER not in sys.modules:
        return contextlib.nullcontext()
    stance: Any = torch.compiler.set_stance
    context: AbstractContextManager[object] = stance("force_eager")
    return context


__all__ = ["diffusers", "uncompiled"]
