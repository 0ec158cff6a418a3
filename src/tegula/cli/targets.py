"""Which pictures a command reads, where their results go, and what is refused before the work.

Nothing here loads a model or decodes a picture: a mistake in the arguments, a file that is
not a picture or a folder that cannot be written is found in milliseconds.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tegula.cli.console import is_stdout_closed
from tegula.errors import InputError, OptionError, PathError
from tegula.images.formats import EXTENSIONS, check_sides, format_for
from tegula.options import UpscaleOptions
from tegula.resolve import target_size

STREAM = "-"
PICTURES = frozenset({*EXTENSIONS, ".apng", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif"})
_WILDCARDS = frozenset("*?[")
_STDIN = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:[a-z]+/", re.IGNORECASE)
_LONGEST_NAME = 255
"""Bytes of a file name on nearly all file systems; others are asked for theirs."""


@dataclass(frozen=True)
class Job:
    """One picture to upscale.

    source: None is standard input.
    target: None is standard output.
    format: one of ``FORMATS``.
    """

    source: Path | None
    target: Path | None
    format: str

    @property
    def name(self) -> str:
        """How messages call the source."""
        return "Standard input" if self.source is None else str(self.source)

    @property
    def input(self) -> str:
        """The source as arguments and ``--json`` write it."""
        return STREAM if self.source is None else str(self.source)

    @property
    def output(self) -> str:
        """The target as arguments and ``--json`` write it."""
        return STREAM if self.target is None else str(self.target)

    @property
    def comparison(self) -> Path | None:
        """Where ``--compare`` writes; standard output has no such place."""
        return self.target and self.target.with_name(f"{self.target.stem}.compare.png")


@dataclass(frozen=True)
class Work:
    """All pictures of one command.

    resumes: results go into a folder, where those that exist already are skipped.
    guessed: the output is a bare last argument, which could have been meant as a picture.
    left_out: files of the folders and patterns whose names are not those of pictures.
    """

    jobs: tuple[Job, ...]
    resumes: bool = False
    guessed: bool = False
    left_out: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Naming:
    """How results are named.

    format: one of ``FORMATS``; None keeps that of the source, or takes PNG.
    size: suffix of a result in the folder of its source, such as ``_x2``.
    crop: suffix of every result of a part: ``_crop`` or nothing.
    """

    format: str | None = None
    size: str = "_x2"
    crop: str = ""

    def file_name(self, source: Path, *, beside: bool) -> str:
        """Return the file name of a result; ``beside`` its source it needs another one."""
        own = EXTENSIONS.get(source.suffix.lower())
        if own is not None and self.format in (None, own):
            ending = source.suffix
        else:
            wanted = self.format or "png"
            ending = next(ending for ending, name in EXTENSIONS.items() if name == wanted)
        return source.stem + (self.size if beside else "") + self.crop + ending


@dataclass(frozen=True)
class SideFiles:
    """The files that a command reads and writes beside its sources and results.

    compare: every result has a comparison beside it.
    preview: a picture of the running work.
    mask, strength_map: pictures laid over every source.
    """

    compare: bool = False
    preview: Path | None = None
    mask: Path | None = None
    strength_map: Path | None = None


@dataclass(frozen=True)
class _Found:
    """A source; ``relative`` is the path of its result within a folder of results."""

    path: Path
    relative: Path
    listed: bool = False


def find_work(
    arguments: Sequence[str],
    output: str | None,
    naming: Naming,
    side_files: SideFiles = SideFiles(),
) -> Work:
    """Decide what the arguments of the command line mean.

    Args:
        arguments: pictures, folders and patterns; the last one of several is the output,
            unless there is ``output``.
        output: the value of ``--output``.
        naming: how results are named.
        side_files: must be neither a source nor a result.

    Raises:
        OptionError: the arguments contradict each other or could mean two things.
        InputError: a pattern or folder holds no picture, or a file would be replaced that
            the command reads or writes itself.
        PathError: a folder cannot be read.
    """
    inputs, place = list(arguments), output
    if output is None and len(inputs) > 1:
        place = inputs.pop()
    elif output is None and inputs == [STREAM]:
        place = STREAM
    inputs = [STREAM if each in _STDIN else each for each in inputs]
    place = STREAM if place in _STDOUT else place
    for argument in (*inputs, side_files.mask, side_files.strength_map):
        refuse_address(argument)
    for result in (place, side_files.preview):
        refuse_address(result, is_output=True)
    many = len(inputs) > 1 or Path(inputs[0]).is_dir() or _is_pattern(inputs[0])
    if STREAM in inputs:
        work = _stream_work(inputs, place, naming)
    elif place == STREAM and not many:
        work = Work((Job(Path(inputs[0]), None, naming.format or "png"),))
    elif many or (place is not None and is_folder(place)):
        work = _folder_work(inputs, place, naming)
    else:
        source = Path(inputs[0])
        beside = source.with_name(naming.file_name(source, beside=True))
        target = beside if place is None else Path(place)
        if naming.format is None and not target.suffix and not target.exists():
            raise OptionError(
                f"{place} has no ending that tells the format; write {place}.png, say, or {place}/ "
                "for a folder."
            )
        job = Job(source, target, format_of_target(target, naming.format))
        work = Work((job,), guessed=place is not None and output is None)
    _check_distinct(work.jobs, side_files)
    return work


def refuse_address(argument: str | Path | None, *, is_output: bool = False) -> None:
    """Refuse an address where a file is taken, or written if ``is_output``.

    Raises:
        InputError: says what to do with it.
    """
    # A path has lost one of the two slashes.
    text = re.sub(r"^([A-Za-z][\w+.-]+):/(?!/)", r"\1://", str(argument))
    if _ADDRESS.match(text):
        if is_output:
            raise InputError(
                f"{text} is an address, and results go into files: name a file or folder, or - for "
                "a pipe."
            )
        raise InputError(
            f"{text} is an address, and tegula takes files: download it first, or pipe it in, as "
            "in curl ADDRESS | tegula upscale - large.png."
        )


def is_folder(argument: str) -> bool:
    """Tell whether an argument means a folder: it ends in a slash, or the folder exists."""
    return argument.endswith(("/", os.sep)) or Path(argument).is_dir()


def format_of_target(target: Path, wanted: str | None) -> str:
    """Return the format of a file.

    Raises:
        OptionError: the ending stands for no format, or for another than the wanted one.
    """
    own = EXTENSIONS.get(target.suffix.lower())
    if own is not None and wanted not in (None, own):
        raise OptionError(f"{target.name} says {own} and --format says {wanted}; give one of them.")
    if wanted is None and not target.suffix and _is_stream(target):
        return "png"  # a pipe needs no ending
    return format_for(target, wanted)


def _is_pattern(argument: str) -> bool:
    return not _WILDCARDS.isdisjoint(argument) and not Path(argument).exists()


def _stream_work(inputs: Sequence[str], place: str | None, naming: Naming) -> Work:
    if len(inputs) > 1:
        raise OptionError("Standard input is one picture; give no other pictures with it.")
    if place is None or place == STREAM:
        return Work((Job(None, None, naming.format or "png"),))
    if is_folder(place):
        raise OptionError(
            f"A picture from standard input has no name; name the file of its result in {place}."
        )
    target = Path(place)
    return Work((Job(None, target, format_of_target(target, naming.format)),))


def _folder_work(inputs: Sequence[str], place: str | None, naming: Naming) -> Work:
    if place is None or place == STREAM:
        raise OptionError(
            "Several pictures need a folder for their results: end with FOLDER/ or "
            "give --output FOLDER/."
        )
    folder = Path(place)
    # What is called like a picture was meant as one; anything else can only be the folder.
    is_like_picture = folder.suffix.lower() in PICTURES and not is_folder(place)
    if (folder.exists() and not is_folder(place)) or is_like_picture:
        state = "is a file" if folder.exists() else "does not exist"
        raise OptionError(
            f"{place} {state}, and several pictures need a folder for their results: end "
            f"its name with a slash to create it."
        )
    if folder.exists() and not folder.is_dir():
        raise PathError(f"{place} is a file, not a folder.")
    left_out: list[Path] = []
    found = [each for argument in inputs for each in _expanded(argument, left_out)]
    # A link beside its target is a picture of its own name; one name given twice is one.
    unique = {(os.path.realpath(each.path.parent), each.path.name): each for each in found}
    jobs = tuple(_folder_job(each, folder, naming) for each in unique.values())
    return Work(jobs, resumes=True, left_out=tuple(left_out))


def _folder_job(found: _Found, folder: Path, naming: Naming) -> Job:
    source, into = found.path, folder / found.relative.parent
    beside = os.path.realpath(source.parent) == os.path.realpath(into)
    if beside and found.listed:
        raise InputError(
            f"The results would lie among their sources in {source.parent}; name another folder."
        )
    target = into / naming.file_name(source, beside=beside)
    return Job(source, target, format_of_target(target, naming.format))


def _expanded(argument: str, left_out: list[Path]) -> Iterator[_Found]:
    """Yield what an argument stands for: the pictures of a folder or pattern, or itself.

    Other files of the folder or pattern, but hidden ones, are added to ``left_out``.
    """
    path = Path(argument)
    if path.is_dir():
        try:
            files, base, name = sorted(path.iterdir()), path, f"The folder {argument}"
        except OSError as error:
            raise PathError(f"{path} cannot be read: {error.strerror}.") from error
    elif _is_pattern(argument):
        files = [Path(name) for name in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207
        base, name = _fixed_part(path), f"The pattern {argument}"
    else:
        yield _Found(path, Path(path.name))
        return
    seen = [file for file in files if not file.name.startswith(".") and file.is_file()]
    pictures = [file for file in seen if file.suffix.lower() in PICTURES]
    left_out += [file for file in seen if file.suffix.lower() not in PICTURES]
    if not pictures:
        raise InputError(
            f"{name} holds no picture; their names end in {', '.join(sorted(PICTURES))}."
        )
    for picture in pictures:
        yield _Found(picture, picture.relative_to(base), listed=True)


def _fixed_part(pattern: Path) -> Path:
    """Return the folders of a pattern before its first wildcard."""
    fixed = Path(pattern.anchor)
    for part in pattern.relative_to(pattern.anchor).parts[:-1]:
        if not _WILDCARDS.isdisjoint(part):
            break
        fixed /= part
    return fixed


def _check_distinct(jobs: Sequence[Job], side_files: SideFiles) -> None:
    """Refuse to write a file that is read, or to write one twice."""
    read = {os.path.realpath(job.source): f"{job.name}, a source" for job in jobs if job.source}
    for overlay in (side_files.mask, side_files.strength_map):
        if overlay is not None:
            read.setdefault(os.path.realpath(overlay), f"{overlay}, which is read too")
    written: dict[str, str] = {}
    for file, what in _written_files(jobs, side_files):
        place = os.path.realpath(file)
        if place in read:
            raise InputError(f"{what} would replace {read[place]}.")
        if place in written:
            raise InputError(
                f"{written[place]} and {what[0].lower()}{what[1:]} would both be {file}; "
                f"choose other names or separate folders."
            )
        written[place] = what


def _written_files(jobs: Sequence[Job], side_files: SideFiles) -> Iterator[tuple[Path, str]]:
    for job in jobs:
        if job.target is not None:
            yield job.target, f"The result of {job.name}"
        if side_files.compare and job.comparison is not None:
            yield job.comparison, f"The comparison of {job.name}"
    if side_files.preview is not None:
        yield side_files.preview, "The preview"


def read_source(job: Job, max_pixels: int) -> Path | bytes:
    """Return the path of a file, or the bytes of what can be read only once.

    Raises:
        OptionError: standard input is a terminal.
        TooLargeError: there is more to read than any picture within the limit has.
        PathError: it cannot be read.
    """
    from tegula.images.open import opened_file

    path = job.source
    if path is not None and not _is_stream(path):
        return path
    stream: Path | BinaryIO = sys.stdin.buffer if path is None else path
    if not isinstance(stream, Path) and stream.isatty():
        raise OptionError("Standard input is a terminal; pipe a picture into it.")
    with opened_file(stream, max_pixels) as file:
        file.seek(0)
        return file.read()


def _is_stream(path: Path) -> bool:
    """Tell whether a path is a pipe or device, which can be read only once."""
    return path.exists() and not (path.is_file() or path.is_dir())


def check_job(
    job: Job,
    source: Path | bytes,
    options: UpscaleOptions,
    *,
    makes_folder: bool,
    compares: bool = False,
) -> None:
    """Refuse a source that is not a picture, a result too large, and a target not writable.

    Raises:
        InputError: see its subclasses.
        PathError: the source cannot be read or the target not written.
    """
    from tegula.images.open import upright_size

    if job.target is not None:
        check_place(job.target, makes_folder=makes_folder)
        if compares and job.comparison is not None:
            check_place(job.comparison, makes_folder=makes_folder)
    elif is_stdout_closed():
        raise PathError("Standard output is closed, and the picture has nowhere to go.")
    elif sys.stdout.isatty():
        raise OptionError(
            "Standard output is a terminal, which shows no picture; send it to a file or a pipe."
        )
    width, height = upright_size(source, max_pixels=options.max_pixels)
    check_sides(*target_size(options, width, height), job.format)


def check_side_files(side_files: SideFiles, max_pixels: int) -> None:
    """Refuse a mask or strength map that is not a picture, and a preview that cannot be written.

    Raises:
        InputError: see its subclasses.
        PathError: a file cannot be read or written.
    """
    from tegula.images.open import upright_size

    if side_files.preview is not None:
        format_for(side_files.preview)
        check_place(side_files.preview, makes_folder=False)
    for overlay in (side_files.mask, side_files.strength_map):
        if overlay is not None and not _is_stream(overlay):
            upright_size(overlay, max_pixels=max_pixels)


def _check_name(target: Path) -> None:
    length, longest = len(os.fsencode(target.name)), _LONGEST_NAME
    folder = target.parent
    if hasattr(os, "pathconf") and folder.is_dir():
        longest = os.pathconf(folder, "PC_NAME_MAX")
    if length > longest:
        raise PathError(
            f"{target} cannot be written: its name has {length} bytes, and the file system takes "
            f"{longest}."
        )


def check_place(target: Path, *, makes_folder: bool) -> None:
    """Refuse a place where no file can be written, by writing a nameless one there.

    Args:
        target: the file to be.
        makes_folder: whether a missing folder is created for it later.

    Raises:
        PathError: says why.
    """
    _check_name(target)
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
