"""Bytes on the disk under the hash of what they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tegula.errors import PathError, TooLargeError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """What is known of kept bytes: their size and hashes, and how they begin."""

    sha256: str
    md5: str
    size: int
    head: bytes


@dataclass(frozen=True)
class Blobs:
    """A folder of blobs; equal ones are kept once.

    A blob is written beside its place, forced to the disk and then renamed, so that no
    name ever stands for half of its bytes.
    """

    folder: Path

    def put(self, chunks: Iterable[bytes], limit: int) -> Blob:
        """Keep bytes.

        Raises:
            TooLargeError: there are more than ``limit`` of them.
            PathError: they cannot be written.
        """
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._incoming)
        except OSError as error:
            raise _unwritable(error) from error
        incoming = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                blob = _copy(chunks, file, limit)
            self._publish(incoming, blob)
        except OSError as error:
            raise _unwritable(error) from error
        finally:
            incoming.unlink(missing_ok=True)
        return blob

    def path(self, sha256: str) -> Path:
        """Return where the bytes of this hash lie."""
        return self.folder / sha256[:2] / sha256

    def names(self) -> Iterator[str]:
        """Yield the hash of every blob."""
        for folder in self.folder.glob("??"):
            for path in folder.iterdir():
                yield path.name

    def age(self, sha256: str) -> float:
        """Return the seconds since a blob was last put, or -1 if it is gone."""
        try:
            return max(0.0, time.time() - self.path(sha256).stat().st_mtime)
        except OSError:
            return -1.0

    def remove(self, sha256: str) -> None:
        """Remove a blob, if it is there."""
        self.path(sha256).unlink(missing_ok=True)

    def clean(self, seconds: float) -> None:
        """Remove what a writer that died left half written so long ago."""
        for path in self._incoming.glob("*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()

    @property
    def _incoming(self) -> Path:
        return self.folder / "incoming"

    def _publish(self, incoming: Path, blob: Blob) -> None:
        place = self.path(blob.sha256)
        place.parent.mkdir(exist_ok=True)
        incoming.replace(place)
        _sync_folder(place.parent)
        _sync_folder(self.folder)


def chunks_of(source: bytes | BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a source piece by piece."""
    if isinstance(source, bytes):
        yield source
        return
    while chunk := source.read(CHUNK):
        yield chunk


def _copy(chunks: Iterable[bytes], file: BinaryIO, limit: int) -> Blob:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    size, head = 0, b""
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise TooLargeError(f"A file has at most {limit:,} bytes.")
        head = head or chunk[:64]
        sha256.update(chunk)
        md5.update(chunk)
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    return Blob(sha256.hexdigest(), md5.hexdigest(), size, head)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unwritable(error: OSError) -> PathError:
    return PathError(f"The server cannot keep the file: {error.strerror or error}.")
