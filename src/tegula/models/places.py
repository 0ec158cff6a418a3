"""Where what can be made again is kept: compiled networks and what was measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "TEGULA_CACHE"


def cache_folder() -> Path:
    """Return ``$TEGULA_CACHE``, or the folder for caches of this platform."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "tegula"
