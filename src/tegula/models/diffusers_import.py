"""torch's compiler, left out of every run that compiles nothing.

Importing it takes longer than importing torch itself. When diffusers is imported, it asks the
compiler for one decorator, and goes without where there is none. So diffusers is first imported
here, with the compiler hidden from it, and only where a bundle or a solver needs it: the packaged
bundle does not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

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


def import_diffusers() -> Any:
    """Return diffusers, imported without torch's compiler."""
    with _without_compiler():
        import diffusers
        import diffusers.utils.torch_utils
    return diffusers
