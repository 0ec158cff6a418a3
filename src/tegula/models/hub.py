"""Weights on this machine and on the Hugging Face hub.

A repository of the hub lies in the models folder as ``<models folder>/<owner>/<name>``,
downloaded by ``fetch_all`` or put there by hand, or in the hub client's own cache.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tegula.errors import BrokenWeightsError, MissingWeightsError, ModelError, PathError
from tegula.folders import MODELS_VARIABLE, models_folder

OnBytes = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

WEIGHTS_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_BLOCK = 1 << 22
_LOCAL_FAILURES = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


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


def is_weights_file(reference: str) -> bool:
    """Return whether a reference names one file, rather than a folder or hub id."""
    return Path(reference).suffix.lower() in WEIGHTS_SUFFIXES


def what_is_there(reference: str | Path) -> str | None:
    """Return what lies at a path that is no model, for a refusal; None where nothing lies."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return "a folder"
    if not path.exists():
        return None
    return f"a file ending in {path.suffix}" if path.suffix else "a file without an ending"


# On this machine.


def find(repository: HubRepository) -> Path | None:
    """Return the folder that holds every file of the repository, or None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE) / f"models--{repository.repo.replace('/', '--')}"
    folders = (repository.folder, *_snapshots(cached))
    return next((folder for folder in folders if not missing_files(folder, repository.files)), None)


def cached_snapshots() -> Iterator[tuple[str, Path]]:
    """Yield the repositories in the hub client's cache with the folder of their main commit."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*")):
        snapshot = next(iter(_snapshots(folder)), None)
        if snapshot is not None:
            yield folder.name.removeprefix("models--").replace("--", "/", 1), snapshot


def inner_folder(folder: Path) -> Path:
    """Return the main commit's folder of a repository's folder in the hub client's cache.

    Other folders are returned as they are.
    """
    return next(iter(_snapshots(folder)), folder)


def _snapshots(cached: Path) -> list[Path]:
    """Return the commits of a repository in the cache: that of ``main``, then the newest first."""
    folder = cached / "snapshots"
    if not folder.is_dir():
        return []
    main = cached / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    snapshots = [each for each in folder.iterdir() if each.is_dir()]
    return sorted(
        snapshots, key=lambda each: (each.name == commit, each.stat().st_mtime), reverse=True
    )


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
    pickled = re.sub(r"(^|/)model$", r"\1pytorch_model", stem) + ".bin"
    return (name, f"{stem}.fp16.safetensors", pickled)


def how_to_get(repositories: Sequence[HubRepository]) -> str:
    """Return the sentence that says which files to put where by hand."""
    places = (f"of {part.repo} {', '.join(part.files)} into {part.folder}" for part in repositories)
    return (
        f"{' and '.join(part.repo for part in repositories)} could not be downloaded from the "
        f"hub; download elsewhere and put, under their own names, {'; '.join(places)}."
    )


# From the hub.


def find_or_fetch(repository: HubRepository) -> Path:
    """Return the folder of a repository, from this machine or else from the hub.

    Raises:
        MissingWeightsError: it is not on this machine and the hub does not answer.
    """
    found = find(repository)
    return found if found is not None else fetch_all([repository])[0]


def fetch_all(
    repositories: Sequence[HubRepository], on_progress: OnBytes | None = None
) -> tuple[Path, ...]:
    """Download what repositories lack in the models folder, and verify it.

    Files arrive in a hidden folder beside the final one, where an interrupted download is
    resumed the next time, and are moved into place when all of them are verified. What the
    folder holds already, put there by hand, is neither downloaded nor touched.

    Raises:
        MissingWeightsError: the hub does not answer or lacks a file.
        BrokenWeightsError: what arrived is not what the hub announced.
        PathError: the models folder cannot be written.
    """
    with _clear_errors(repositories):
        chosen = [choose_files(remote_files(each.repo), each) for each in repositories]
        total, done = sum(file.size for files in chosen for file in files), 0
        for repository, files in zip(repositories, chosen, strict=True):
            for file in files:
                _download(repository, file)
                done += file.size
                if on_progress is not None:
                    on_progress(done, total)
            _move_into_place(repository, files)
        return tuple(repository.folder for repository in repositories)


@contextmanager
def _clear_errors(repositories: Sequence[HubRepository]) -> Iterator[None]:
    """Turn what goes wrong into our errors: the hub client's depend on its HTTP library."""
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
        raise MissingWeightsError(how_to_get(repositories)) from error


def remote_files(repo: str) -> tuple[RemoteFile, ...]:
    """Ask the hub for the files of a repository."""
    import huggingface_hub

    siblings = huggingface_hub.HfApi().model_info(repo, files_metadata=True).siblings or []
    return tuple(
        RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None)
        for each in siblings
    )


def choose_files(remote: Sequence[RemoteFile], repository: HubRepository) -> tuple[RemoteFile, ...]:
    """Return the files to download: those that its folder lacks, each in its best format.

    Raises:
        MissingWeightsError: the repository on the hub lacks one of them.
    """
    by_path = {file.path: file for file in remote}
    chosen: dict[str, RemoteFile] = {}
    for name in missing_files(repository.folder, repository.files):
        path = next((path for path in formats(name) if path in by_path), None)
        if path is None:
            raise MissingWeightsError(f"{repository.repo} on the hub holds no {name}.")
        chosen[path] = by_path[path]
    return tuple(chosen.values())


def _partial(repository: HubRepository) -> Path:
    # Beside what the folder links to, so that moving out of it is a rename.
    target = repository.folder.resolve()
    return target.with_name(f".{target.name}.partial")


def _download(repository: HubRepository, file: RemoteFile) -> None:
    import huggingface_hub

    partial = _partial(repository)
    partial.mkdir(parents=True, exist_ok=True)
    path = huggingface_hub.hf_hub_download(repository.repo, file.path, local_dir=partial)
    _verify(Path(path), file)


def _verify(path: Path, file: RemoteFile) -> None:
    """Compare a downloaded file with what the hub announced; remove it if it differs."""
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


def _move_into_place(repository: HubRepository, files: Sequence[RemoteFile]) -> None:
    partial, target = _partial(repository), repository.folder.resolve()
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    if not target.exists():
        partial.rename(target)
        return
    # The user's own folder, or an older one: file by file, so that all else in it stays. An
    # interruption does no harm, since only a complete repository counts as installed.
    for file in files:
        place = target / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        (partial / file.path).replace(place)
    shutil.rmtree(partial, ignore_errors=True)
