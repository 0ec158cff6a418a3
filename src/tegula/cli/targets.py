"""Where results go, and what can be refused before any work."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tegula.errors import InputError, OptionError, PathError
from tegula.images.formats import EXTENSIONS, format_for

STREAM = "-"
PICTURES = frozenset({*EXTENSIONS, ".bmp", ".gif"})
_MAGIC = frozenset("*?[")


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


@dataclass(frozen=True)
class Work:
    """All pictures of one command.

    resumes: results go into a folder, where those that are there already are skipped.
    guessed: the place of the result is a bare word that could be a second input.
    """

    jobs: tuple[Job, ...]
    resumes: bool = False
    guessed: bool = False


@dataclass(frozen=True)
class Naming:
    """How results are called.

    format: one of ``FORMATS``; None keeps that of the source, or takes PNG.
    size: what is added beside the source, such as ``_x2``.
    crop: what is added everywhere when only a part is run: ``_crop`` or nothing.
    """

    format: str | None = None
    size: str = "_x2"
    crop: str = ""

    def of(self, source: Path, *, beside: bool) -> str:
        """Return the name of the file of a result."""
        return source.stem + (self.size if beside else "") + self.crop + self._ending(source)

    def _ending(self, source: Path) -> str:
        own = EXTENSIONS.get(source.suffix.lower())
        if own is not None and self.format in (None, own):
            return source.suffix
        wanted = self.format or "png"
        return next(ending for ending, name in EXTENSIONS.items() if name == wanted)


@dataclass(frozen=True)
class _Found:
    """A source; ``relative`` is where its result lies in a folder of results."""

    path: Path
    relative: Path
    listed: bool = False


def find_work(words: Sequence[str], output: str | None, naming: Naming) -> Work:
    """Settle what the words of the command line mean.

    Args:
        words: pictures, folders and patterns; and the output, unless it is given apart.
        output: what ``--output`` says.
        naming: how results are called.

    Raises:
        OptionError: the words contradict each other or could mean two things.
        InputError: a pattern or folder holds no picture, or a source would be replaced.
        PathError: a folder cannot be read.
    """
    inputs, place = _divided(words, output)
    if STREAM in inputs:
        return _stream_work(inputs, place, naming)
    if place == STREAM and not _is_many(inputs):
        return Work((Job(Path(inputs[0]), None, naming.format or "png"),))
    if _is_many(inputs) or (place is not None and is_folder(place)):
        return _folder_work(inputs, place, naming)
    source = Path(inputs[0])
    target = source.with_name(naming.of(source, beside=True)) if place is None else Path(place)
    job = Job(source, target, settle_format(target, naming.format))
    _check_distinct([job])
    return Work((job,), guessed=place is not None and output is None)


def is_folder(word: str) -> bool:
    """Tell whether a word names a folder, by its slash or because there is one."""
    return word.endswith(("/", os.sep)) or Path(word).is_dir()


def settle_format(target: Path, wanted: str | None) -> str:
    """Return the format of a file.

    Raises:
        OptionError: the ending stands for no format, or for another than the wanted one.
    """
    own = EXTENSIONS.get(target.suffix.lower())
    if own is not None and wanted not in (None, own):
        raise OptionError(f"{target.name} says {own} and --format says {wanted}; give one of them.")
    return format_for(target, wanted)


def _divided(words: Sequence[str], output: str | None) -> tuple[list[str], str | None]:
    if output is not None or len(words) == 1:
        alone = output is None and words[0] == STREAM
        return list(words), STREAM if alone else output
    return list(words[:-1]), words[-1]


def _is_many(inputs: Sequence[str]) -> bool:
    return len(inputs) > 1 or Path(inputs[0]).is_dir() or _is_pattern(inputs[0])


def _is_pattern(word: str) -> bool:
    return not _MAGIC.isdisjoint(word) and not Path(word).exists()


def _stream_work(inputs: Sequence[str], place: str | None, naming: Naming) -> Work:
    if len(inputs) > 1:
        raise OptionError("Standard input is one picture; give it alone.")
    if place is None or place == STREAM:
        return Work((Job(None, None, naming.format or "png"),))
    if is_folder(place):
        raise OptionError(
            f"A picture from standard input has no name; give that of a file in {place}."
        )
    target = Path(place)
    return Work((Job(None, target, settle_format(target, naming.format)),))


def _folder_work(inputs: Sequence[str], place: str | None, naming: Naming) -> Work:
    if place is None or place == STREAM:
        raise OptionError(
            "Several pictures need a folder for their results: end with FOLDER/ or "
            "give --output FOLDER/."
        )
    folder = Path(place)
    if not is_folder(place):
        state = "is a file" if folder.exists() else "does not exist"
        raise OptionError(
            f"{place} {state}, and several pictures need a folder for their results: end "
            f"its name with a slash to have it made."
        )
    if folder.exists() and not folder.is_dir():
        raise PathError(f"{place} is a file, not a folder.")
    found = [each for word in inputs for each in _expanded(word)]
    unique = {os.path.realpath(each.path): each for each in found}
    jobs = [_folder_job(each, folder, naming) for each in unique.values()]
    _check_distinct(jobs)
    return Work(tuple(jobs), resumes=True)


def _folder_job(found: _Found, folder: Path, naming: Naming) -> Job:
    source, into = found.path, folder / found.relative.parent
    beside = os.path.realpath(source.parent) == os.path.realpath(into)
    if beside and found.listed:
        raise InputError(
            f"The results would lie among their sources in {source.parent}; name another folder."
        )
    target = into / naming.of(source, beside=beside)
    return Job(source, target, settle_format(target, naming.format))


def _expanded(word: str) -> Iterator[_Found]:
    path = Path(word)
    if path.is_dir():
        yield from _listed(_entries(path), path, f"The folder {word}")
    elif _is_pattern(word):
        files = [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
        yield from _listed(files, _fixed_part(path), f"The pattern {word}")
    else:
        yield _Found(path, Path(path.name))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise PathError(f"{folder} cannot be read: {error.strerror}.") from error


def _listed(paths: Sequence[Path], base: Path, name: str) -> Iterator[_Found]:
    pictures = [path for path in paths if _is_picture(path)]
    if not pictures:
        raise InputError(f"{name} holds no picture; known are {', '.join(sorted(PICTURES))}.")
    for path in pictures:
        yield _Found(path, path.relative_to(base), listed=True)


def _is_picture(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower() in PICTURES and path.is_file()


def _fixed_part(pattern: Path) -> Path:
    """Return the folders of a pattern before its first magic part."""
    fixed = Path(pattern.anchor)
    for part in pattern.relative_to(pattern.anchor).parts[:-1]:
        if not _MAGIC.isdisjoint(part):
            break
        fixed /= part
    return fixed


def _check_distinct(jobs: Sequence[Job]) -> None:
    """Refuse results in one and the same place, or in that of a source."""
    sources = {os.path.realpath(job.source): job.name for job in jobs if job.source is not None}
    taken: dict[str, str] = {}
    for job in jobs:
        if job.target is None:
            continue
        place = os.path.realpath(job.target)
        if place in sources:
            raise InputError(f"The result of {job.name} would replace {sources[place]}, a source.")
        if place in taken:
            raise InputError(
                f"{taken[place]} and {job.name} would both become {job.target}; upscale them apart."
            )
        taken[place] = job.name
