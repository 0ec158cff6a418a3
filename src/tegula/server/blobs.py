"""Stored bytes: under their hash, with the media type that their beginning tells.

They lie in a folder of this machine, or in a bucket of an object store (``object_blobs``), which
several servers may share. Equal bytes are stored once. The rows that give them names are in
``files``.
"""

from __future__ import annotations

import contextlib
import hashlib
import mimetypes
import os
import re
import secrets
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Protocol

from tegula.errors import PathError, TooLargeError

UNKNOWN = "application/octet-stream"

_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"BM", "image/bmp"),
    (b"\xff\x0a", "image/jxl"),
    (b"\x00\x00\x00\x0cJXL ", "image/jxl"),
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
)
_BRANDS = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"mif1": "image/heif",
}
_EXTENSIONS = {
    "image/jpeg": ".jpg",
    "image/tiff": ".tif",
    "image/webp": ".webp",
    "image/avif": ".avif",
}
_LONGEST_NAME = 120


def content_type_of(head: bytes, claimed: str | None = None) -> str:
    """Return the media type of bytes that begin with ``head``.

    The bytes are given out under this type from our own address, where a browser would run
    HTML or SVG with the rights of our pages. So what a client claims counts only where the
    beginning says nothing, and only for types that no browser runs.
    """
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        return _BRANDS[head[8:12]]
    claim = (claimed or "").partition(";")[0].strip().lower()
    harmless = claim in ("text/plain", "application/json", "text/csv")
    return claim if harmless else UNKNOWN


def safe_name(name: str | None, content_type: str) -> str:
    """Return a name for a file: no folders, no odd characters, the right extension."""
    plain = unicodedata.normalize("NFC", PurePath((name or "").replace("\\", "/")).name)
    # Cut at the front, because the extension is at the end.
    stem = re.sub(r"[^\w. -]", "_", plain).strip(" .")[-_LONGEST_NAME:] or "file"
    extension = _EXTENSIONS.get(content_type) or mimetypes.guess_extension(content_type) or ""
    guessed = mimetypes.guess_type(stem)[0]
    if content_type == UNKNOWN or guessed == content_type:
        return stem
    return f"{PurePath(stem).stem if guessed else stem}{extension}"


_HEAD = 64
IDENTITY = "identity"
"""Of the file, or the object, that tells a place from every other one."""


@dataclass(frozen=True)
class Blob:
    """Stored bytes: their size and hashes, and their first 64 bytes or fewer."""

    sha256: str
    md5: str
    size: int
    head: bytes


class Blobs(Protocol):
    """A place of blobs; equal ones are stored once. May be used from many threads at once.

    A blob is there whole or not at all: no name ever stands for half of its bytes.
    """

    @property
    def place(self) -> str:
        """Where it is, in words for the operator."""

    @property
    def listed_every(self) -> float:
        """Seconds between two looks at all names, which costs requests in an object store."""

    def identity(self) -> str:
        """Return what tells this place from every other one; empty if it has none yet.

        Raises:
            PathError: it can be neither read nor written.
        """

    def claim(self) -> str:
        """Return the identity for a database that has no files yet.

        Raises:
            ServiceError: the files of another database are here.
            PathError: it can be neither read nor written.
        """

    def put(self, chunks: Iterable[bytes], limit: int) -> Blob:
        """Store bytes; they are kept when this returns.

        Raises:
            TooLargeError: there are more than ``limit`` of them.
            PathError: they cannot be written.
        """

    def free_bytes(self) -> int:
        """Return how many bytes can still be stored on this machine.

        Raises:
            PathError: nothing can be stored, as a try shows.
        """

    def path(self, sha256: str) -> Path:
        """Return a file of this machine with the bytes of this hash; missing if they are.

        It stays for half an hour at the least, unless the blob is removed. May take as long as a
        download, so it is not called from an event loop.

        Raises:
            PathError: they cannot be read.
        """

    def link(self, sha256: str, seconds: float) -> str | None:
        """Return an address from which anybody may read a blob for so long, or None."""

    def names(self, seconds: float = 0.0) -> Iterator[str]:
        """Yield the hash of every blob that was last put at least this long ago."""

    def age(self, sha256: str) -> float:
        """Return the seconds since a blob was last put, or -1 if it is gone."""

    def remove(self, sha256: str) -> None:
        """Remove a blob, if it is there."""

    def clean(self, seconds: float) -> None:
        """Remove half-written blobs that nobody has written to for this long."""


@dataclass(frozen=True)
class FolderBlobs:
    """A folder of blobs.

    A blob is written beside its place, forced to the disk and then renamed, so that no
    name ever stands for half of its bytes, also after a loss of power.
    """

    folder: Path
    listed_every: float = 0.0

    @property
    def place(self) -> str:
        """The folder."""
        return f"the folder {self.folder}"

    def identity(self) -> str:
        """Return what tells this folder from every other one: written once, copied with it.

        Raises:
            PathError: it can be neither read nor written.
        """
        path = self.folder / IDENTITY
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                handle, name = tempfile.mkstemp(dir=self.folder)
                with os.fdopen(handle, "w", encoding="ascii") as file:
                    file.write(secrets.token_hex(16))
                # Of several servers that start at once one gets to name the folder.
                try:
                    os.link(name, path)
                    Path(name).unlink()
                except FileExistsError:
                    Path(name).unlink()
                except OSError:  # a file system without links
                    Path(name).replace(path)
            return path.read_text(encoding="ascii").strip()
        except OSError as error:
            raise PathError(
                f"The server cannot use its folder: {error.strerror or error}."
            ) from error

    def claim(self) -> str:
        """Return the identity: a folder also serves a new database in the place of a lost one."""
        return self.identity()

    def link(self, sha256: str, seconds: float) -> str | None:  # noqa: ARG002
        """Return None: a folder has no addresses."""
        return None

    def put(self, chunks: Iterable[bytes], limit: int) -> Blob:
        """Store bytes; they are on the disk when this returns.

        Raises:
            TooLargeError: there are more than ``limit`` of them.
            PathError: they cannot be written.
        """
        incoming: Path | None = None
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._incoming)
            incoming = Path(name)
            with os.fdopen(handle, "wb") as file:
                blob = _copy(chunks, file, limit)
            place = self.path(blob.sha256)
            place.parent.mkdir(exist_ok=True)
            incoming.replace(place)
            _sync_folder(place.parent)
            _sync_folder(self.folder)
        except OSError as error:
            raise PathError(
                f"The server cannot keep the file: {error.strerror or error}."
            ) from error
        finally:
            if incoming is not None:
                incoming.unlink(missing_ok=True)
        return blob

    def free_bytes(self) -> int:
        """Return how many bytes can still be stored.

        Raises:
            PathError: none can, as a try shows: permissions do not tell of a disk that fails, or
                that was mounted for reading alone.
        """
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._incoming) as file:
                file.write(b"\0")
                file.flush()
            return shutil.disk_usage(self._incoming).free
        except OSError as error:
            raise PathError(
                f"The server cannot write to its folder: {error.strerror or error}."
            ) from error

    def path(self, sha256: str) -> Path:
        """Return where the bytes of this hash lie."""
        return self.folder / sha256[:2] / sha256

    def names(self, seconds: float = 0.0) -> Iterator[str]:
        """Yield the hash of every blob that was last put at least this long ago."""
        newest = time.time() - seconds
        for folder in self.folder.glob("??"):
            # Folders and files may vanish while they are listed: others tidy up too.
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        # Without an age nothing is looked at but the names, which is much quicker.
                        if seconds == 0.0 or entry.stat().st_mtime <= newest:
                            yield entry.name

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
        """Remove half-written blobs that nobody has written to for this long."""
        for path in self._incoming.glob("*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()

    @property
    def _incoming(self) -> Path:
        return self.folder / "incoming"


def _copy(chunks: Iterable[bytes], file: BinaryIO, limit: int) -> Blob:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    size, head = 0, b""
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise TooLargeError(f"The file has more than the {limit:,} bytes that are allowed.")
        head = head if len(head) >= _HEAD else (head + chunk)[:_HEAD]
        sha256.update(chunk)
        md5.update(chunk)
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    return Blob(sha256.hexdigest(), md5.hexdigest(), size, head)


def _sync_folder(folder: Path) -> None:
    # The name of a file is data of its folder: without this the rename itself could be lost.
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
