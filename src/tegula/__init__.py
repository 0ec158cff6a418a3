"""tegula: makes pictures larger and better on one's own machine.

Example:
    >>> from tegula import Upscaler
    >>> Upscaler.load().upscale("photo.jpg", scale=4).save("large.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tegula.errors import TegulaError

if TYPE_CHECKING:
    from tegula.options import UpscaleOptions
    from tegula.result import UpscaleResult
    from tegula.upscaler import Upscaler

__version__ = "0.2.0"
__all__ = ["TegulaError", "UpscaleOptions", "UpscaleResult", "Upscaler", "__version__"]


def __getattr__(name: str) -> Any:
    # The upscaler imports torch, which takes seconds that `tegula --help` must not; options import
    # pydantic, for which no process of an engine waits before it says that it lives.
    if name == "UpscaleOptions":
        from tegula.options import UpscaleOptions

        return UpscaleOptions
    if name in ("Upscaler", "UpscaleResult"):
        from tegula import upscaler

        return getattr(upscaler, name)
    raise AttributeError(f"module 'tegula' has no attribute {name!r}")
