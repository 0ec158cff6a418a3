"""Where many pictures lie: a folder, or a prefix in a bucket of an object store.

Both list what they hold without holding the list, read whole files, and write them whole or not at
all. Buckets speak through obstore, which is an extra and imported when an address names one.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tegula.errors import InputError, MissingExtraError, PathError, StorageError
from tegula.folders import make_folder, write_atomically

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
SCHEMES = ("s3", "gs", "az")
CONNECT_PATIENCE = timedelta(seconds=5)
_PATIENCE, _RETRIES_FOR = timedelta(seconds=30), timedelta(seconds=45)
_CREDENTIALS = {401, 403}
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
)
"""Variables that name another server than that of the provider; without TLS if it says so."""
_SORTED_AT_ONCE = 10_000
"""Files of one folder that are sorted together, which larger folders are not as a whole."""
_PAGE = 1000
_LINES_OF_A_PART = 1000
_PART_WRITTEN_EVERY_S = 1.0


@dataclass(frozen=True)
class Entry:
    """A file below the root of a storage.

    key: its path from there, with slashes.
    version: another one where its bytes are others; the ETag, or the time of its last change.
    """

    key: str
    size: int
    version: str


class Log(Protocol):
    """Lines that are added one by one, and read again by a later run."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of earlier runs; the last may be cut off."""

    def append(self, line: str) -> None:
        """Add a line."""

    def flush(self) -> None:
        """See to it that the lines so far outlive this process."""


class Storage(Protocol):
    """Files below one root. May be used from several threads."""

    @property
    def address(self) -> str:
        """The root: the absolute path of a folder, or an address without a slash at its end."""

    def entries(self) -> Iterator[Entry]:
        """Yield all files but hidden ones, also of folders below."""

    def entry(self, key: str) -> Entry | None:
        """Return one file, None where there is none."""

    def source(self, key: str) -> Path | bytes:
        """Return a file as ``tegula.images`` reads it."""

    def write(self, key: str, data: bytes) -> None:
        """Write a file whole or not at all."""

    def log(self, name: str) -> Log:
        """Return a log of this name."""


def is_address(place: str) -> bool:
    """Tell whether a place is an address and no path of this machine."""
    return ADDRESS.match(place) is not None


def open_storage(place: str) -> FolderStorage | BucketStorage:
    """Return what a path or an address such as ``s3://bucket/prefix`` names.

    Raises:
        InputError: addresses of this kind cannot be listed.
        MissingExtraError: obstore is not installed.
        StorageError: the address or the environment is not complete.
    """
    found = ADDRESS.match(place)
    if found is None:
        return FolderStorage(Path(os.path.abspath(place)))  # noqa: PTH100 - links stay
    if found[1].lower() not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise InputError(f"{place} is no folder and no address that begins with one of {known}.")
    try:
        store = open_store(place.rstrip("/"))
    except ImportError as error:
        raise MissingExtraError(
            f"{place} lies in an object store, which needs obstore: pip install 'tegula[objects]'."
        ) from error
    except ValueError as error:
        raise StorageError(f"{place} cannot be used: {error}.") from None
    return BucketStorage(place.rstrip("/"), store)


@dataclass(frozen=True)
class FolderStorage:
    """A folder and those below it; links to folders are not followed."""

    root: Path

    @property
    def address(self) -> str:
        """The path of the folder."""
        return str(self.root)

    def entries(self) -> Iterator[Entry]:
        """Yield the files; those of a folder are sorted, ten thousand at a time.

        Raises:
            PathError: a folder cannot be read.
        """
        folders = [self.root]
        while folders:
            folder, below = folders.pop(), []
            try:
                with os.scandir(folder) as found:
                    seen = (each for each in found if not each.name.startswith("."))
                    while some := list(itertools.islice(seen, _SORTED_AT_ONCE)):
                        for each in sorted(some, key=lambda one: one.name):
                            if each.is_dir(follow_symlinks=False):
                                below.append(folder / each.name)
                            elif each.is_file():
                                yield self._entry(Path(each.path), each.stat())
            except OSError as error:
                raise PathError(f"{folder} cannot be read: {error.strerror}.") from error
            folders += sorted(below, reverse=True)

    def entry(self, key: str) -> Entry | None:
        """Return one file, None where there is none."""
        path = self.root / key
        return self._entry(path, path.stat()) if path.is_file() else None

    def source(self, key: str) -> Path:
        """Return the path of a file."""
        return self.root / key

    def write(self, key: str, data: bytes) -> None:
        """Write a file whole or not at all, and the folders above it.

        Raises:
            FullDiskError: there is no room left.
            PathError: it cannot be written.
        """
        path = self.root / key
        make_folder(path.parent)
        write_atomically(path, data)

    def log(self, name: str) -> FolderLog:
        """Return the log in the file ``NAME.jsonl``."""
        return FolderLog(self.root / f"{name}.jsonl")

    def _entry(self, path: Path, facts: os.stat_result) -> Entry:
        key = path.relative_to(self.root).as_posix()
        return Entry(key, facts.st_size, str(facts.st_mtime_ns))


class FolderLog:
    """A file to whose end lines are added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None

    def lines(self) -> Iterator[str]:
        """Yield the lines so far."""
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                yield from file
        except FileNotFoundError:
            return
        except OSError as error:
            raise PathError(f"{self._path} cannot be read: {error.strerror}.") from error

    def append(self, line: str) -> None:
        """Add a line at once, so that it outlives this process.

        Raises:
            PathError: it cannot be written.
        """
        try:
            if self._file is None:
                make_folder(self._path.parent)
                self._file = self._path.open("a+b", buffering=0)
                # A process that was killed within a line left it without its end.
                if self._file.seek(0, os.SEEK_END):
                    self._file.seek(-1, os.SEEK_END)
                    line = line if self._file.read(1) == b"\n" else f"\n{line}"
            self._file.write(f"{line}\n".encode())
        except OSError as error:
            raise PathError(f"{self._path} cannot be written: {error.strerror}.") from error

    def flush(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class BucketStorage:
    """A prefix in a bucket."""

    address: str
    store: ObjectStore

    def entries(self) -> Iterator[Entry]:
        """Yield the objects, a thousand with each request.

        Raises:
            StorageError: the store does not answer.
        """
        for each in listed(self.store):
            key = each["path"]
            if not any(part.startswith(".") for part in key.split("/")):
                yield _object_entry(each)

    def entry(self, key: str) -> Entry | None:
        """Return one object, None where there is none.

        Raises:
            StorageError: the store does not answer.
        """
        import obstore

        try:
            with answering():
                return _object_entry(obstore.head(self.store, key))
        except FileNotFoundError:
            return None

    def source(self, key: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            PathError: there is no such object.
            StorageError: the store does not answer.
        """
        import obstore

        try:
            with answering():
                return bytes(obstore.get(self.store, key).bytes())
        except FileNotFoundError:
            raise PathError(f"{self.address}/{key} does not exist.") from None

    def write(self, key: str, data: bytes) -> None:
        """Put an object, which is there whole or not at all.

        Raises:
            StorageError: the store does not take it.
        """
        import obstore

        try:
            with answering():
                obstore.put(self.store, key, data)
        except FileNotFoundError:
            raise StorageError(f"There is no bucket for {self.address}.") from None

    def log(self, name: str) -> BucketLog:
        """Return the log in the objects ``NAME/0000000.jsonl`` and so on."""
        return BucketLog(self, name)


class BucketLog:
    """Objects of a thousand lines each, since nothing can be added to an object.

    The last one is written anew each second while lines come.
    """

    def __init__(self, storage: BucketStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._part: int | None = None
        self._lines: list[str] = []
        self._written = 0
        self._written_at = 0.0

    def lines(self) -> Iterator[str]:
        """Yield the lines so far, part by part.

        Raises:
            StorageError: the store does not answer.
        """
        for key in self._parts():
            yield from self._storage.source(key).decode("utf-8", "replace").splitlines()

    def append(self, line: str) -> None:
        """Add a line, and write it now or within a second if another one comes.

        Raises:
            StorageError: the store does not take it.
        """
        self._lines.append(line)
        full = len(self._lines) >= _LINES_OF_A_PART
        if full or time.monotonic() - self._written_at > _PART_WRITTEN_EVERY_S:
            self.flush()
        if full:
            self._part, self._lines, self._written = (self._part or 0) + 1, [], 0

    def flush(self) -> None:
        """Write what is not written yet.

        Raises:
            StorageError: the store does not take it.
        """
        if len(self._lines) == self._written:
            return
        if self._part is None:
            last = max((key for key in self._parts()), default=None)
            self._part = 0 if last is None else int(Path(last).stem) + 1
        text = "".join(f"{line}\n" for line in self._lines)
        self._storage.write(f"{self._name}/{self._part:07}.jsonl", text.encode())
        self._written, self._written_at = len(self._lines), time.monotonic()

    def _parts(self) -> list[str]:
        pattern = re.compile(rf"{re.escape(self._name)}/\d+\.jsonl")
        keys = (each["path"] for each in listed(self._storage.store, self._name))
        return sorted(key for key in keys if pattern.fullmatch(key))


def _object_entry(facts: Any) -> Entry:
    version = facts.get("e_tag") or facts["last_modified"].isoformat()
    return Entry(facts["path"], facts["size"], str(version).strip('"'))


def listed(store: ObjectStore, prefix: str | None = None) -> Iterator[Any]:
    """Yield what obstore says of the objects of a store, a thousand with each request.

    Raises:
        StorageError: the store does not answer.
    """
    import obstore

    with answering():
        pages = iter(obstore.list(store, prefix, chunk_size=_PAGE))
    while True:
        with answering():
            page: Iterable[Any] | None = next(pages, None)
        if page is None:
            return
        yield from page


def open_store(
    url: str,
    timeout: timedelta = _PATIENCE,
    retries: int = 5,
) -> ObjectStore:
    """Return a store of obstore; who signs in stands in the environment.

    Args:
        url: bucket and prefix.
        timeout: of one request.
        retries: of a request that the store answers with 503, or not at all.

    Raises:
        ImportError: obstore is not installed.
        ValueError: says what is missing, such as an account.
    """
    from obstore.store import from_url

    if url.startswith("file:"):
        return from_url(url)
    client: ClientConfig = {"connect_timeout": CONNECT_PATIENCE, "timeout": timeout}
    if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
        client["allow_http"] = True
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": _RETRIES_FOR}
    try:
        return from_url(url, client_options=client, retry_config=retry)
    except Exception as error:
        # Its first line names what is missing; the rest is for debugging.
        raise ValueError(str(error).splitlines()[0]) from None


@contextmanager
def answering() -> Iterator[None]:
    """Say in one sentence that the store does not answer, or refuses.

    What obstore says is not passed on: answers of stores repeat keys and signatures.

    Raises:
        StorageError: so it is.
        FileNotFoundError, AlreadyExistsError: as obstore raises them.
    """
    from obstore import exceptions

    try:
        yield
    except exceptions.AlreadyExistsError:
        raise
    except exceptions.BaseError as error:
        refused = isinstance(
            error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
        )
        found = re.search(r"status(?: code)?:? (\d{3})|\b(5\d\d) [A-Z]", str(error))
        status = next((int(digits) for digits in (found.groups() if found else ()) if digits), 0)
        if refused or status in _CREDENTIALS:
            raise StorageError("The object store refuses what it is shown to sign in.") from None
        how = f"answers with {status}" if status else "does not answer"
        raise StorageError(f"The object store {how}; try again later.") from None
