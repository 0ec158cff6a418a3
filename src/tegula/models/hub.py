"""Weights on this machine and on the Hugging Face hub.

A repository of the hub lies in the models folder as ``<models folder>/<owner>/<name>``,
put there by ``fetch_all`` or by hand, or in the hub client's own cache.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tegula.errors import BrokenWeightsError, MissingWeightsError, ModelError, PathError
from tegula.folders import MODELS_VARIABLE, models_folder

OnBytes = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_BLOCK = 1 << 22


@dataclass(frozen=True)
class HubRepository:
    """A repository and what is needed of it.

    ``files`` are paths inside it; where weights come in several formats the name is that
    of the safetensors file.
    """

    repo: str
    files: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Return where it lies in the models folder."""
        return models_folder() / self.repo


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub; ``sha256`` is known for large files only."""

    path: str
    size: int
    sha256: str | None


def is_hub_id(reference: str) -> bool:
    """Return whether a reference has the form of a hub id, ``owner/name``."""
    owner, slash, name = reference.partition("/")
    return bool(owner and slash and name) and "/" not in name and not owner.startswith((".", "~"))


def find(repository: HubRepository) -> Path | None:
    """Return the folder that holds every file of the repository, or None."""
    folders = [repository.folder, *_cached_snapshots(repository.repo)]
    return next((folder for folder in folders if not missing_files(folder, repository.files)), None)


def missing_files(folder: Path, files: Sequence[str]) -> tuple[str, ...]:
    """Return which of the files the folder lacks, other formats of weights allowed."""
    return tuple(name for name in files if not any((folder / n).is_file() for n in formats(name)))


def formats(name: str) -> tuple[str, ...]:
    """Return the names that a file may have, the best first."""
    if name.endswith(("/vocab.json", "/merges.txt")):
        return (name, name.rpartition("/")[0] + "/tokenizer.json")
    if not name.endswith(".safetensors"):
        return (name,)
    stem = name.removesuffix(".safetensors")
    pickled = stem.replace("/model", "/pytorch_model") + ".bin"
    return (name, f"{stem}.fp16.safetensors", pickled)


def find_or_fetch(repository: HubRepository) -> Path:
    """Return the folder of a repository, from this machine or else from the hub.

    Raises:
        MissingWeightsError: it is not here and the hub does not answer.
    """
    found = find(repository)
    return found if found is not None else fetch_all([repository])[0]


def fetch_all(
    repositories: Sequence[HubRepository], on_progress: OnBytes | None = None
) -> tuple[Path, ...]:
    """Download repositories into the models folder and verify them.

    Files arrive in a hidden folder beside the final one, where an interrupted download
    goes on the next time; the folder gets its name when everything in it is verified.

    Raises:
        MissingWeightsError: the hub does not answer or lacks a file.
        BrokenWeightsError: what arrived is not what the hub announced.
        PathError: the models folder cannot be written.
    """
    with _failures_told(repositories):
        chosen = [choose(remote_files(each.repo), each) for each in repositories]
        count = _Count(sum(file.size for files in chosen for file in files), on_progress)
        pairs = zip(repositories, chosen, strict=True)
        return tuple(_download(repository, files, count) for repository, files in pairs)


@dataclass
class _Count:
    total: int
    report: OnBytes | None
    done: int = 0

    def add(self, size: int) -> None:
        self.done += size
        if self.report is not None:
            self.report(self.done, self.total)


def where_to_put(repositories: Sequence[HubRepository]) -> str:
    """Return the sentence that says which files to put where."""
    each = (f"of {part.repo} {', '.join(part.files)} into {part.folder}" for part in repositories)
    return (
        f"{' and '.join(part.repo for part in repositories)} cannot be had from the hub now; "
        f"download elsewhere and put, under the names they have there, {'; '.join(each)}."
    )


def _download(repository: HubRepository, files: Sequence[RemoteFile], count: _Count) -> Path:
    import huggingface_hub

    target = repository.folder
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for file in files:
        path = huggingface_hub.hf_hub_download(repository.repo, file.path, local_dir=partial)
        verify(Path(path), file)
        count.add(file.size)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    return partial.rename(target)


def remote_files(repo: str) -> tuple[RemoteFile, ...]:
    """Ask the hub for the files of a repository."""
    import huggingface_hub

    siblings = huggingface_hub.HfApi().model_info(repo, files_metadata=True).siblings or []
    return tuple(
        RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None)
        for each in siblings
    )


def choose(remote: Sequence[RemoteFile], repository: HubRepository) -> tuple[RemoteFile, ...]:
    """Return the files to download: the wanted ones, each in its best format.

    Raises:
        MissingWeightsError: the repository lacks one of them.
    """
    by_path = {file.path: file for file in remote}
    chosen: list[RemoteFile] = []
    for name in repository.files:
        path = next((path for path in formats(name) if path in by_path), None)
        if path is None:
            raise MissingWeightsError(f"{repository.repo} on the hub holds no {name}.")
        if by_path[path] not in chosen:
            chosen.append(by_path[path])
    return tuple(chosen)


def verify(path: Path, file: RemoteFile) -> None:
    """Compare a downloaded file with what the hub announced.

    Raises:
        BrokenWeightsError: its size or hash differs; the file is removed.
    """
    if path.stat().st_size == file.size and file.sha256 in (None, _sha256(path)):
        return
    path.unlink()
    raise BrokenWeightsError(f"{file.path} arrived damaged and was removed; pull again.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _cached_snapshots(repo: str) -> list[Path]:
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    return sorted(snapshots.iterdir()) if snapshots.is_dir() else []


_LOCAL_FAILURES = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@contextmanager
def _failures_told(repositories: Sequence[HubRepository]) -> Iterator[None]:
    """Turn what goes wrong into our errors; the hub client's depend on its HTTP library."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LOCAL_FAILURES:
            raise PathError(
                f"Cannot write weights into {models_folder()}: {error.strerror}; set "
                f"{MODELS_VARIABLE} to a folder with room."
            ) from error
        raise MissingWeightsError(where_to_put(repositories)) from error
