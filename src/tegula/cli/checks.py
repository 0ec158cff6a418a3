"""What can be found wrong before the long work, and before a model is loaded."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from tegula.cli.targets import Job
from tegula.errors import OptionError, PathError, TegulaError
from tegula.images.formats import check_sides
from tegula.options import UpscaleOptions, target_size


def read_source(job: Job, max_pixels: int) -> Path | bytes:
    """Return the path of a file, or the bytes of what can be read only once.

    Raises:
        OptionError: standard input is a terminal.
        TooLargeError: there is more to read than any picture within the limit has.
        PathError: it cannot be read.
    """
    from tegula.images.opening import opened_file

    path = job.source
    if path is not None and (path.is_file() or path.is_dir() or not path.exists()):
        return path
    stream: Path | BinaryIO = sys.stdin.buffer if path is None else path
    if not isinstance(stream, Path) and stream.isatty():
        raise OptionError("Standard input is a terminal; pipe a picture into it.")
    with opened_file(stream, max_pixels) as file:
        file.seek(0)
        return file.read()


def is_result(path: Path) -> bool:
    """Tell whether a file is a picture that tegula made."""
    from tegula.images.encode import read_settings

    try:
        return read_settings(path) is not None
    except TegulaError:
        return False


def check_job(
    job: Job, source: Path | bytes, options: UpscaleOptions, *, makes_folder: bool
) -> None:
    """Refuse a source that is no picture, a result too large, and a place not writable.

    Raises:
        InputError: see its subclasses.
        PathError: the source cannot be read or the target not written.
    """
    from tegula.images.decode import upright_size

    if job.target is None:
        _check_standard_output()
    else:
        check_place(job.target, makes_folder=makes_folder)
    width, height = upright_size(source, max_pixels=options.max_pixels)
    check_sides(*target_size(options, width, height), job.format)


def check_place(target: Path, *, makes_folder: bool) -> None:
    """Refuse a place where no file can be written, by writing a nameless one there.

    Args:
        target: the file to be.
        makes_folder: whether its folder is made when it is not there yet.

    Raises:
        PathError: says why.
    """
    if target.is_dir():
        raise PathError(f"{target} is a folder; give the name of a file.")
    if target.exists() and not target.is_file():
        return
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    if folder != target.absolute().parent and not makes_folder:
        raise PathError(f"{target} cannot be written: its folder does not exist.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PathError(f"{target} cannot be written: {reason}.") from error


def _check_standard_output() -> None:
    if sys.stdout.isatty():
        raise OptionError(
            "Standard output is a terminal, which shows no picture; send it to a file or a pipe."
        )
