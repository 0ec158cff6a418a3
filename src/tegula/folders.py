"""Where tegula keeps files on this machine, and how it writes them: whole or not at all.

Three folders and a file, each with an environment variable that moves it. The defaults are those
that the platform has for such files; on Linux they follow the XDG base directory specification.

========================  ==================  ================================================
what                      variable            default on Linux
========================  ==================  ================================================
models that were fetched  ``TEGULA_MODELS``   ``~/.local/share/tegula/models``
the server's data         ``TEGULA_FOLDER``   ``~/.local/share/tegula``
caches                    ``TEGULA_CACHE``    ``~/.cache/tegula``
defaults of the commands  ``TEGULA_CONFIG``   ``~/.config/tegula/config.toml``
========================  ==================  ================================================
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from tegula.errors import FullDiskError, PathError

log = logging.getLogger(__name__)

_OTHERS = 0o077  # what group and world may do

CACHE_VARIABLE = "TEGULA_CACHE"
CONFIG_VARIABLE = "TEGULA_CONFIG"
MODELS_VARIABLE = "TEGULA_MODELS"
SERVER_VARIABLE = "TEGULA_FOLDER"


def cache_folder() -> Path:
    """Return ``$TEGULA_CACHE``, or the platform's folder for files that can be made again."""
    # Without these two arguments Windows would add folders named after an author and `Cache`.
    return _from_environment(CACHE_VARIABLE) or _of_platform(
        lambda: platformdirs.user_cache_path("tegula", appauthor=False, opinion=False), "cache"
    )


def config_file() -> Path | None:
    """Return ``$TEGULA_CONFIG``, or ``config.toml`` in the platform's folder for settings.

    None where there is no such place: the variable is empty, or the user has no home.
    """
    if CONFIG_VARIABLE in os.environ:
        return _from_environment(CONFIG_VARIABLE)
    try:
        folder = platformdirs.user_config_path("tegula", appauthor=False)
    except RuntimeError:
        return None
    return None if str(folder).startswith("~") else folder / "config.toml"


def models_folder() -> Path:
    """Return ``$TEGULA_MODELS``, or ``models`` in the platform's folder for data."""
    return _from_environment(MODELS_VARIABLE) or _data_folder() / "models"


def server_folder() -> Path:
    """Return ``$TEGULA_FOLDER``, or the platform's folder for data."""
    return _from_environment(SERVER_VARIABLE) or _data_folder()


def _data_folder() -> Path:
    return _of_platform(lambda: platformdirs.user_data_path("tegula", appauthor=False), "data")


def _of_platform(find: Callable[[], Path], name: str) -> Path:
    """Return the platform's folder; a user without a home, as in containers, has a temporary one.

    Raises:
        PathError: the temporary folder belongs to somebody else.
    """
    try:
        folder = find()
        if not str(folder).startswith("~"):
            return folder
    except RuntimeError:
        pass
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"tegula-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise PathError(f"{folder} cannot be created: {error.strerror}; set HOME.") from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_mode & _OTHERS or facts.st_uid != user:
        raise PathError(
            f"There is no home folder, and {folder} belongs to somebody else; set HOME, or "
            f"{CACHE_VARIABLE} and {MODELS_VARIABLE}."
        )
    return folder / name


def _from_environment(variable: str) -> Path | None:
    path = os.environ.get(variable)
    return Path(path).expanduser() if path else None


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or the share of it that one may use, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that whatever interrupts leaves either the old file or the new one.

    Pipes and devices, such as /dev/stdout, are written to directly.

    Raises:
        FullDiskError: there is no room left.
        PathError: the path is a folder, or cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))  # a link stays a link; what it points to is replaced
        if path.exists() and not path.is_file():
            target = path  # the real path of a pipe names nothing that can be opened
        if target.is_dir():
            raise PathError(f"{path} is a folder; give the name of a file.")
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _replace(target, data)
    except (OSError, ValueError) as error:
        kind = FullDiskError if is_full(error) else PathError
        raise kind(_why_not_written(path, error)) from error


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, unless it is there.

    Raises:
        FullDiskError: there is no room left.
        PathError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = FullDiskError if is_full(error) else PathError
        raise kind(f"{folder} cannot be created: {error.strerror}.") from error


def _replace(target: Path, data: bytes) -> None:
    part = target.with_name(f".tegula-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:  # Ctrl-C, too, leaves no part behind
        part.unlink(missing_ok=True)
        raise


def _why_not_written(path: Path, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.ENOENT:
        return f"{path} cannot be written: its folder does not exist."
    if is_full(error):
        return f"{path} cannot be written: the disk is full."
    return f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."


def make_private(path: Path, *, inside: bool = True) -> None:
    """Let nobody but its owner read or change a file, or a folder and what is ``inside``.

    What is not there, and what belongs to another user, stays as it is; the latter is logged.
    """
    if os.name != "posix":
        return
    try:
        if not path.stat().st_mode & _OTHERS:
            return  # nobody else gets into a private folder, whatever is inside
        # The folder itself comes last, so that a walk that was interrupted is done again.
        walk = os.walk(path, topdown=False) if inside else ()
        for folder, folders, files in walk:
            for name in (*folders, *files):
                _take_from_others(Path(folder) / name)
        _take_from_others(path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s can be read by other users: %s.", path, error.strerror)


def _take_from_others(path: Path) -> None:
    mode = path.lstat().st_mode
    if mode & _OTHERS and not stat.S_ISLNK(mode):
        path.chmod(stat.S_IMODE(mode) & ~_OTHERS)
