"""The folders of this platform, and writing files whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from tegula.errors import PathError

# The folders of this platform: for models, and for what can be made again.

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


# Writing a file whole or not at all.


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever interrupts.

    Pipes and devices, such as /dev/stdout, are written to directly.

    Raises:
        PathError: the path is a folder, or cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise PathError(f"{path} is a folder; give the name of a file.")
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _replace(target, data)
    except (OSError, ValueError) as error:
        raise PathError(_why_not_written(path, error)) from error


def _replace(target: Path, data: bytes) -> None:
    part = target.with_name(f".tegula-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _why_not_written(path: Path, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.ENOENT:
        return f"{path} cannot be written: its folder does not exist."
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written: the disk is full."
    return f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."
