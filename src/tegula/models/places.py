"""The folders of this platform: for models, and for what can be made again."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "TEGULA_CACHE"
MODELS_VARIABLE = "TEGULA_MODELS"


@dataclass(frozen=True)
class _Kind:
    """A kind of folder: its variable in the XDG specification, its default there and on macOS."""

    xdg_variable: str
    linux: str
    macos: str


_CACHE = _Kind("XDG_CACHE_HOME", ".cache", "Library/Caches")
_DATA = _Kind("XDG_DATA_HOME", ".local/share", "Library/Application Support")


def cache_folder() -> Path:
    """Return ``$TEGULA_CACHE``, or the folder for caches of this platform."""
    return _named(CACHE_VARIABLE) or _platform_folder(_CACHE)


def models_folder() -> Path:
    """Return ``$TEGULA_MODELS``, or the folder for data of this platform."""
    return _named(MODELS_VARIABLE) or _platform_folder(_DATA) / "models"


def _named(variable: str) -> Path | None:
    path = os.environ.get(variable)
    return Path(path).expanduser() if path else None


def _platform_folder(kind: _Kind) -> Path:
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / kind.macos
    else:
        base = Path(os.environ.get(kind.xdg_variable, home / kind.linux))
    return base / "tegula"
