"""torch's compiler, left out of every run that compiles nothing.

Importing it takes longer than importing torch itself. When diffusers is imported, it asks the
compiler for one decorator, and goes without where there is none. So diffusers is first imported
here, with the compiler hidden from it; whoever needs it before a bundle is loaded takes it from
here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["diffusers", "uncompiled"]
_COMPILER = "torch._dynamo"


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Make importing the compiler fail inside, unless it is loaded already."""
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
