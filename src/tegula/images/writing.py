"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from tegula.errors import PathError


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
