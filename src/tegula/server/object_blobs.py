"""Blobs in a bucket of an object store, with copies of those in use on this machine.

Only a server with ``blobs_url`` imports this module: its client, obstore, is an extra.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore import exceptions

from tegula.errors import ServiceError, StorageError
from tegula.server.blobs import IDENTITY, Blob, FolderBlobs, content_type_of
from tegula.storage import CONNECT_PATIENCE, answering, listed, open_store

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_KEY = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})")
_PART = 8 << 20
"""Bytes of one request, each of which has to be answered within half a minute."""
_UPLOADS = 4
"""Parts of one file that are uploaded at once."""
_COPY_STAYS_S = 1800.0
_COPY_UNUSED_S = 86_400.0
_LISTED_EVERY_S = 600.0


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
        try:
            with answering():
                return bytes(obstore.get(self._store, IDENTITY).bytes()).decode("ascii").strip()
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
        new = secrets.token_hex(16)
        try:
            with answering():
                obstore.put(self._store, IDENTITY, new.encode(), mode="create")
        except exceptions.AlreadyExistsError:
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
        blob = self._copies.put(chunks, limit)
        source, key = self._copies.path(blob.sha256), _key(blob.sha256)
        upload = partial(
            obstore.put, self._store, key, source, chunk_size=_PART, max_concurrency=_UPLOADS
        )
        kind = content_type_of(blob.head)
        # Always, also where it is there: the time of the upload tells the sweep to leave it.
        try:
            with answering():
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
        try:
            with answering():
                obstore.head(self._quick, IDENTITY)
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
        signing: Any = self._store
        try:
            with answering():
                link: str = obstore.sign(signing, "GET", _key(sha256), timedelta(seconds=seconds))
                return link
        except ValueError:
            return None

    def names(self, seconds: float = 0.0) -> Iterator[str]:
        """Yield the hash of every blob that was last put at least this long ago.

        Raises:
            StorageError: the store does not answer.
        """
        for one in listed(self._store):
            found = _KEY.fullmatch(one["path"])
            if found and _since(one["last_modified"]) >= seconds:
                yield found[1]

    def age(self, sha256: str) -> float:
        """Return the seconds since a blob was last put, or -1 if it is gone.

        Raises:
            StorageError: the store does not answer.
        """
        try:
            with answering():
                return _since(obstore.head(self._store, _key(sha256))["last_modified"])
        except FileNotFoundError:
            return -1.0

    def remove(self, sha256: str) -> None:
        """Remove a blob, if it is there; copies of other machines go when they are unused.

        Raises:
            StorageError: the store does not answer.
        """
        with answering(), contextlib.suppress(FileNotFoundError):
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
        key = _key(sha256)

        def pieces() -> Iterator[bytes]:
            for start in range(0, size, _PART):
                end = min(start + _PART, size)
                with answering():
                    piece = bytes(obstore.get_range(self._store, key, start=start, end=end))
                yield piece

        try:
            with answering():
                size = obstore.head(self._store, key)["size"]
            blob = self._copies.put(pieces(), size)
        except FileNotFoundError:
            return
        if blob.sha256 != sha256:
            self._copies.remove(blob.sha256)
            raise StorageError("The object store holds other bytes than were put there.")


def open_bucket(url: str, folder: Path, copies_bytes: int) -> ObjectBlobs:
    """Return the blobs of a bucket.

    Args:
        url: bucket and prefix; who signs in stands in the environment.
        folder: for copies.
        copies_bytes: of all copies together.

    Raises:
        StorageError: the address or the environment is not complete.
    """
    try:
        store, quick = open_store(url), open_store(url, timeout=CONNECT_PATIENCE, retries=0)
    except ValueError as error:
        raise StorageError(f"blobs_url cannot be used: {error}.") from None
    return ObjectBlobs(url, store, folder, copies_bytes, quick)


def _key(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256}"


def _since(moment: datetime) -> float:
    return max(0.0, time.time() - moment.timestamp())
