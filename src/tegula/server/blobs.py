"""Stored bytes: under their hash, with the media type that their beginning tells.

They lie in a folder of this machine, or in a bucket of an object store, which several servers may
share. Equal bytes are stored once. The rows that give them names are in ``files``.
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
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from tegula.errors import (
    MissingExtraError,
    PathError,
    ServiceError,
    StorageError,
    TooLargeError,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

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
_IDENTITY = "identity"


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
        path = self.folder / _IDENTITY
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


_KEY = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})")
_PART = 8 << 20
"""Bytes of one request, each of which has to be answered within ``_PATIENCE``."""
_UPLOADS = 4
"""Parts of one file that are uploaded at once."""
_PATIENCE, _RETRIES_FOR = timedelta(seconds=30), timedelta(seconds=45)
_LOOK_PATIENCE = timedelta(seconds=5)
_COPY_STAYS_S = 1800.0
_COPY_UNUSED_S = 86_400.0
_LISTED_EVERY_S = 600.0
_CREDENTIALS = {401, 403}


class ObjectBlobs:
    """Blobs in a bucket of an object store, with copies of those that are in use in a folder.

    What comes is written to the folder while it is hashed, and then uploaded; it stays there as a
    copy. Other blobs are downloaded when they are read first. The object store speaks through
    obstore: S3 and what is like it, Google Cloud Storage, Azure Blob Storage.
    """

    listed_every = _LISTED_EVERY_S

    def __init__(
        self, place: str, store: ObjectStore, folder: Path, copies_bytes: int, quick: ObjectStore
    ) -> None:
        """Take the store.

        Args:
            place: its bucket and prefix.
            store: of obstore.
            folder: for the copies.
            copies_bytes: of all copies together, beyond which those longest unused are removed.
            quick: the same store, for requests that are to fail soon.
        """
        self.folder = folder
        self._place = place
        self._store = store
        self._quick = quick
        self._copies = FolderBlobs(folder)
        self._copies_bytes = copies_bytes
        self._downloading: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """Bucket and prefix."""
        return self._place

    def identity(self) -> str:
        """Return what tells this bucket and prefix from every other; empty if it has none yet."""
        import obstore

        try:
            with _answering():
                return bytes(obstore.get(self._store, _IDENTITY).bytes()).decode("ascii").strip()
        except FileNotFoundError:
            return ""

    def claim(self) -> str:
        """Return the identity for a database that has no files yet.

        A sweep removes what its own database does not know, so two databases must never share a
        bucket and prefix.

        Raises:
            ServiceError: the files of another database are here.
            StorageError: the store does not answer.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        new = secrets.token_hex(16)
        try:
            with _answering():
                obstore.put(self._store, _IDENTITY, new.encode(), mode="create")
        except AlreadyExistsError:
            raise ServiceError(
                f"{self._place} holds the files of another database. Set database_url to that one, "
                "or blobs_url to a prefix of its own; if that database is lost, remove the object "
                "named identity."
            ) from None
        except FileNotFoundError:
            raise StorageError(f"There is no bucket for {self._place}.") from None
        return new

    def put(self, chunks: Iterable[bytes], limit: int) -> Blob:
        """Store bytes; they are in the bucket when this returns.

        Raises:
            TooLargeError: there are more than ``limit`` of them.
            PathError: they cannot be written on this machine.
            StorageError: the store does not take them.
        """
        import obstore

        blob = self._copies.put(chunks, limit)
        source, key = self._copies.path(blob.sha256), _key(blob.sha256)
        upload = partial(
            obstore.put, self._store, key, source, chunk_size=_PART, max_concurrency=_UPLOADS
        )
        kind = content_type_of(blob.head)
        # Always, also where it is there: the time of the upload tells the sweep to leave it.
        try:
            with _answering():
                try:
                    upload(attributes={"Content-Type": kind})
                except NotImplementedError:  # of a folder, which keeps no types
                    upload()
        except FileNotFoundError:
            raise StorageError(f"There is no bucket for {self._place}.") from None
        return blob

    def free_bytes(self) -> int:
        """Return the free bytes for copies.

        Raises:
            PathError: this machine, or the store, keeps nothing.
        """
        import obstore

        try:
            with _answering():
                obstore.head(self._quick, _IDENTITY)
        except FileNotFoundError:
            raise StorageError(f"The files are not in {self._place} any more.") from None
        return self._copies.free_bytes()

    def path(self, sha256: str) -> Path:
        """Return the copy of a blob, downloaded if there is none; once for all who ask meanwhile.

        Raises:
            PathError: it cannot be written on this machine.
            StorageError: the store does not answer.
        """
        place = self._copies.path(sha256)
        with contextlib.suppress(OSError):
            os.utime(place)  # somebody uses it
            return place
        with self._lock:
            future = self._downloading.get(sha256)
            mine = future is None
            if future is None:
                future = self._downloading[sha256] = Future()
        if not mine:
            future.result()
            return place
        try:
            self._download(sha256)
        except BaseException as error:
            future.set_exception(error)
            raise
        else:
            future.set_result(None)
        finally:
            with self._lock:
                del self._downloading[sha256]
        return place

    def link(self, sha256: str, seconds: float) -> str | None:
        """Return a signed address of the bucket, or None where the store cannot sign."""
        import obstore

        signing: Any = self._store
        try:
            with _answering():
                link: str = obstore.sign(signing, "GET", _key(sha256), timedelta(seconds=seconds))
                return link
        except ValueError:
            return None

    def names(self, seconds: float = 0.0) -> Iterator[str]:
        """Yield the hash of every blob that was last put at least this long ago.

        Raises:
            StorageError: the store does not answer.
        """
        import obstore

        with _answering():
            pages = iter(obstore.list(self._store, chunk_size=1000))
        while True:
            with _answering():
                page = next(pages, None)
            if page is None:
                return
            for one in page:
                found = _KEY.fullmatch(one["path"])
                if found and _since(one["last_modified"]) >= seconds:
                    yield found[1]

    def age(self, sha256: str) -> float:
        """Return the seconds since a blob was last put, or -1 if it is gone.

        Raises:
            StorageError: the store does not answer.
        """
        import obstore

        try:
            with _answering():
                return _since(obstore.head(self._store, _key(sha256))["last_modified"])
        except FileNotFoundError:
            return -1.0

    def remove(self, sha256: str) -> None:
        """Remove a blob, if it is there; copies of other machines go when they are unused.

        Raises:
            StorageError: the store does not answer.
        """
        import obstore

        with _answering(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, _key(sha256))
        self._copies.remove(sha256)

    def clean(self, seconds: float) -> None:
        """Remove half-written copies, and those that nobody used for a day or that are too many."""
        self._copies.clean(seconds)
        copies = []
        for name in self._copies.names():
            with contextlib.suppress(OSError):
                stat = self._copies.path(name).stat()
                copies.append((stat.st_mtime, stat.st_size, name))
        size, now = sum(size for _, size, _ in copies), time.time()
        for used_at, bytes_, name in sorted(copies):
            unused = now - used_at
            too_many = size > self._copies_bytes and unused > _COPY_STAYS_S
            if unused > _COPY_UNUSED_S or too_many:
                self._copies.remove(name)
                size -= bytes_

    def _download(self, sha256: str) -> None:
        """Bring a blob to the folder, if there is one; piece by piece, so that none takes long."""
        import obstore

        key = _key(sha256)

        def pieces() -> Iterator[bytes]:
            for start in range(0, size, _PART):
                end = min(start + _PART, size)
                with _answering():
                    piece = bytes(obstore.get_range(self._store, key, start=start, end=end))
                yield piece

        try:
            with _answering():
                size = obstore.head(self._store, key)["size"]
            blob = self._copies.put(pieces(), size)
        except FileNotFoundError:
            return
        if blob.sha256 != sha256:
            self._copies.remove(blob.sha256)
            raise StorageError("The object store holds other bytes than were put there.")


def open_blobs(folder: Path, url: str | None, copies_bytes: int) -> Blobs:
    """Return the blobs of a server.

    Args:
        folder: the server's.
        url: bucket and prefix; None keeps them in the folder.
        copies_bytes: of copies in the folder, where they are in a bucket.

    Raises:
        MissingExtraError: obstore is not installed.
        StorageError: the address or the environment is not complete.
    """
    if url is None:
        return FolderBlobs(folder / "files")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise MissingExtraError(
            "Files in an object store need its client: pip install 'tegula[objects]'."
        ) from error
    plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    opened = []
    for timeout, retries in ((_PATIENCE, 5), (_LOOK_PATIENCE, 0)):
        client: ClientConfig = {"connect_timeout": _LOOK_PATIENCE, "timeout": timeout}
        if plain:
            client["allow_http"] = True
        retry: RetryConfig = {"max_retries": retries, "retry_timeout": _RETRIES_FOR}
        local = url.startswith("file:")
        try:
            opened.append(
                from_url(url) if local else from_url(url, client_options=client, retry_config=retry)
            )
        except Exception as error:
            # Its first line names what is missing, such as an account; the rest is for debugging.
            reason = str(error).splitlines()[0]
            raise StorageError(f"blobs_url cannot be used: {reason}.") from None
    return ObjectBlobs(url, opened[0], folder / "copies", copies_bytes, opened[1])


_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
)
"""Variables that name another server than that of the provider; without TLS if it says so."""


def _key(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256}"


def _since(moment: datetime) -> float:
    return max(0.0, time.time() - moment.timestamp())


@contextmanager
def _answering() -> Iterator[None]:
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
            raise StorageError(
                "The object store refuses what the server shows it to sign in."
            ) from None
        how = f"answers with {status}" if status else "does not answer"
        raise StorageError(f"The object store {how}; try again later.") from None


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
