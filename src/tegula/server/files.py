"""Files of accounts: uploads, and the inputs and outputs of predictions.

A row gives stored bytes a name, an owner and an end; several rows may name the same bytes, and
the sweep removes those that no row names any more.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from tegula.errors import InputError, NotFoundError, TooLargeError
from tegula.images.formats import START, may_be_read, not_readable
from tegula.server.blobs import Blob, Blobs, content_type_of, safe_name
from tegula.server.db import Clock, Database, Page, new_id, read_page
from tegula.server.links import Links
from tegula.server.tables import FILE_KEY, FileRecord, Prediction

_CHUNK = 1 << 20
_SLICE = 1 << 20
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
_UNCLAIMED_FOR = timedelta(hours=1)
"""A file of a request that is then refused, or never finished, is removed after so long."""


def is_data_uri(value: str) -> bool:
    """Whether a text is a data URI."""
    return value[:5].lower() == "data:"


def decode_data_uri(uri: str) -> tuple[Iterator[bytes], str]:
    """Return the bytes, in chunks, and the type that ``data:[type][;base64],...`` holds.

    Base64 is accepted as clients send it: with percent-escapes, line breaks, the URL-safe
    alphabet, or without padding. It is read in slices, because each call that reads all of a
    large picture would stop every other thread until it returns.

    Raises:
        InputError: it has no comma, or, while its chunks are read, its base64 is broken.
    """
    comma = uri.find(",")
    if comma < 0:
        raise InputError("A data URI needs a comma before its data.")
    kind, *parameters = (part.strip() for part in uri[5:comma].split(";"))
    kind = kind.lower() or "text/plain"
    plain = _unescaped(uri, comma + 1)
    if "base64" in (parameter.lower() for parameter in parameters):
        return _decode_base64(plain), kind
    return plain, kind


def _unescaped(text: str, start: int) -> Iterator[bytes]:
    """Yield the bytes of a text from a place on, percent-escapes decoded."""
    while start < len(text):
        end = start + _SLICE
        # An escape is three characters, of which the slice may have only one or two.
        half = text.rfind("%", max(start, end - 2), end)
        end = half if start < half and end < len(text) else end
        piece = text[start:end]
        yield unquote_to_bytes(piece) if "%" in piece else piece.encode()
        start = end


def _decode_base64(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what base64 says, without padding too.

    Raises:
        InputError: it is broken.
    """
    rest, padded = b"", False
    try:
        for chunk in chunks:
            some = rest + b"".join(chunk.split()).translate(_PLAIN_ALPHABET)
            digits = some.rstrip(b"=")
            if b"=" in digits or (padded and len(digits) > len(rest)):
                break  # there is more after the padding
            padded = padded or len(digits) < len(some)
            whole = len(digits) - len(digits) % 4
            yield base64.b64decode(digits[:whole], validate=True)
            rest = digits[whole:]
        else:
            yield base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True)
            return
    except (binascii.Error, ValueError) as error:
        raise InputError("The data URI holds broken base64.") from error
    raise InputError("The data URI holds broken base64.")


def encode_data_uri(data: bytes, kind: str) -> str:
    """Return bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class RemoteInput:
    """An input that is given as an address of another server; ``name`` is that of its field."""

    name: str
    url: str


@dataclass(frozen=True)
class Files:
    """Uploads, and the inputs and outputs of predictions; ``account_id`` hides others' files.

    limit: bytes of the largest upload.
    account_limit: bytes of all uploads of one account together; 0 is no limit.
    """

    database: Database
    blobs: Blobs
    links: Links
    clock: Clock
    limit: int
    account_limit: int = 0

    def keep(
        self,
        account_id: str,
        name: str | None,
        source: bytes | BinaryIO | Iterable[bytes] | Blob,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        prediction_id: str | None = None,
        lifetime: timedelta | None = None,
        limit: int | None = None,
    ) -> FileRecord:
        """Keep a file; it is on the disk when this returns.

        Args:
            account_id: its owner.
            name: what it was called; made safe.
            source: its bytes, or the blob that they were stored as.
            content_type: believed only where the bytes do not tell.
            metadata: given back as it is.
            prediction_id: the prediction that it lives and dies with.
            lifetime: how long it is kept; as long as its prediction if None.
            limit: bytes, instead of the limit of uploads.

        Raises:
            TooLargeError: it has more bytes than are taken, or its account would have.
            PathError: it cannot be written.
        """
        if isinstance(source, Blob):
            blob = source
        else:
            blob = self.blobs.put(_chunks(source), self.limit if limit is None else limit)
        kind, now = content_type_of(blob.head, content_type), self.clock()
        file = FileRecord(
            id=new_id(now),
            account_id=account_id,
            name=safe_name(name, kind),
            content_type=kind,
            size=blob.size,
            sha256=blob.sha256,
            md5=blob.md5,
            created_at=now,
            user_metadata=dict(metadata or {}),
            prediction_id=prediction_id,
            expires_at=None if lifetime is None else now + lifetime,
        )

        def add(session: Session) -> None:
            if prediction_id is not None and _has_no_data(session, prediction_id):
                file.expires_at = now  # a late worker made it; the next sweep removes it
            if self.account_limit and prediction_id is None:
                self._check_account(session, file)
            session.add(file)

        self.database.transact(add)
        return file

    def get(self, file_id: str, account_id: str | None = None) -> FileRecord:
        """Return a file that has not expired.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.read() as session:
            file = session.get(FileRecord, file_id)
        return self._current(file, account_id)

    def fetched(self, prediction_id: str, url: str) -> FileRecord:
        """Return what was fetched from a URL for a prediction.

        Raises:
            NotFoundError: nothing was, or it has been removed.
        """
        query = select(FileRecord).where(FileRecord.prediction_id == prediction_id)
        with self.database.read() as session:
            for file in session.scalars(query):
                if file.user_metadata.get("url") == url:
                    return file
        raise NotFoundError("There is no such file.")

    def of_input(self, value: Any, prediction: Prediction) -> FileRecord:
        """Return the file that a value in the input of a prediction stands for.

        Data URIs were stored when it was created, and addresses have been fetched for its run.

        Raises:
            NotFoundError: it is not here yet, or not any more, or it is somebody else's.
        """
        if isinstance(value, Mapping):
            return self.get(value.get(FILE_KEY, ""), prediction.account_id)
        if own := self.links.own_file(value):
            file_id, public = own
            return self.get(file_id, None if public else prediction.account_id)
        return self.fetched(prediction.id, value)

    def path(self, file: FileRecord) -> Path:
        """Return where the bytes of a file lie, for reading."""
        return self.blobs.path(file.sha256)

    def page(
        self, account_id: str, *, cursor: str | None = None, limit: int = 100
    ) -> Page[FileRecord]:
        """Return the uploads of an account, newest first.

        Raises:
            OptionError: the cursor is not from a page.
        """
        query = select(FileRecord).where(
            FileRecord.account_id == account_id, *_present_uploads(self.clock())
        )
        columns = FileRecord.created_at, FileRecord.id
        with self.database.read() as session:
            return read_page(session, query, columns, cursor=cursor, limit=limit)

    def delete(self, file_id: str, account_id: str | None = None) -> None:
        """Remove a file; its bytes go with the next sweep.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        with self.database.write() as session:
            session.delete(self._current(session.get(FileRecord, file_id), account_id))

    def adopt(
        self, values: Mapping[str, Any], account_id: str, fields: Collection[str]
    ) -> Mapping[str, Any]:
        """Return an input with the data URIs in its file fields stored as files.

        Call it once the input is valid and before the prediction is created, which then owns
        the files. Links to files of this server are looked up, so that a wrong one is refused
        at once and not only when the prediction runs.

        Raises:
            InputError: a data URI cannot be read, a file of this server is not there, a file
                cannot be a picture by its first bytes (every file input is a picture), or a
                value has the form in which inputs refer to stored files.
            TooLargeError: a file has more bytes than are allowed.
        """
        _refuse_kept_files(values)
        adopted = {
            name: self._adopt(value, account_id) for name, value in values.items() if name in fields
        }
        return {**values, **adopted}

    def remote(self, values: Mapping[str, Any], fields: Collection[str]) -> Iterator[RemoteInput]:
        """Yield every address in the file fields of an input that leads to another server."""
        for name, value in values.items():
            if name not in fields:
                continue
            for item in value if isinstance(value, list | tuple) else (value,):
                local = not isinstance(item, str) or item == "" or is_data_uri(item)
                if not local and not self.links.own_file(item):
                    yield RemoteInput(name, item)

    def reference(self, file: FileRecord) -> dict[str, Any]:
        """Return a file as inputs and outputs hold it."""
        return {FILE_KEY: file.id, "name": file.name, "type": file.content_type, "size": file.size}

    def _adopt(self, value: Any, account_id: str) -> Any:
        if isinstance(value, list | tuple):
            return [self._adopt(item, account_id) for item in value]
        if not isinstance(value, str):
            return value
        if is_data_uri(value):
            data, kind = decode_data_uri(value)
            data = _picture(data)
            file = self.keep(account_id, None, data, content_type=kind, lifetime=_UNCLAIMED_FOR)
            return self.reference(file)
        if own := self.links.own_file(value):
            file_id, public = own
            try:
                file = self.get(file_id, None if public else account_id)
                with self.path(file).open("rb") as source:
                    _check_start(source.read(START))
            except (NotFoundError, FileNotFoundError) as error:
                raise InputError(
                    "The input names a file of this server that is not there."
                ) from error
        return value

    def _check_account(self, session: Session, file: FileRecord) -> None:
        kept = session.scalar(
            select(func.coalesce(func.sum(FileRecord.size), 0)).where(
                FileRecord.account_id == file.account_id, *_present_uploads(self.clock())
            )
        )
        if (kept or 0) + file.size > self.account_limit:
            raise TooLargeError(
                f"The uploads of this account may have {self.account_limit:,} bytes together; "
                "delete some, or wait until they expire."
            )

    def _current(self, file: FileRecord | None, account_id: str | None) -> FileRecord:
        """Return a file, if the account may see it and it has not expired."""
        if file is None or account_id not in (None, file.account_id):
            raise NotFoundError("There is no such file.")
        if file.expires_at is not None and file.expires_at <= self.clock():
            raise NotFoundError("There is no such file.")
        return file


def _has_no_data(session: Session, prediction_id: str) -> bool:
    """Whether the data of a prediction has been removed; nobody removes it until the commit."""
    removed = select(Prediction.data_removed).where(Prediction.id == prediction_id)
    return session.scalar(removed.with_for_update(read=True)) is not False


def _present_uploads(now: datetime) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of uploads, which belong to no prediction, that have not expired."""
    in_time = or_(FileRecord.expires_at.is_(None), FileRecord.expires_at > now)
    return FileRecord.prediction_id.is_(None), in_time


def _chunks(source: bytes | BinaryIO | Iterable[bytes]) -> Iterable[bytes]:
    if isinstance(source, bytes):
        return (source,)
    read = getattr(source, "read", None)
    return source if read is None else iter(lambda: read(_CHUNK), b"")


def _picture(data: Iterator[bytes]) -> Iterator[bytes]:
    """Return the bytes of a picture, of which the first are looked at before any is kept.

    Raises:
        ImageError: they are not those of a picture.
    """
    start = b""
    for chunk in data:
        start += chunk
        if len(start) >= START:
            break
    _check_start(start[:START])
    return itertools.chain((start,), data)


def _check_start(start: bytes) -> None:
    if not may_be_read(start):
        raise not_readable("The file", start)


def _refuse_kept_files(value: Any) -> None:
    """Refuse our inner form of a file, with which a client could name files of others."""
    if isinstance(value, Mapping):
        if FILE_KEY in value:
            raise InputError(f"An input must not contain {FILE_KEY!r}; give the file as a URL.")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_kept_files(item)
