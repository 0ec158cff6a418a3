"""Files of accounts: uploads, and the inputs and outputs of predictions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import delete, or_, select

from tegula.errors import InputError, NotFoundError
from tegula.predictions import tables
from tegula.predictions.blobs import Blobs, chunks_of
from tegula.predictions.clock import Clock
from tegula.predictions.data_uris import decode_data_uri, is_data_uri
from tegula.predictions.database import Database
from tegula.predictions.ids import new_id
from tegula.predictions.links import Links
from tegula.predictions.mapping import columns_of, record
from tegula.predictions.paging import read_page
from tegula.predictions.records import FILE_KEY, FileRecord, Page
from tegula.predictions.sniffing import content_type_of, safe_name

_UNCLAIMED_FOR = timedelta(hours=1)


@dataclass(frozen=True)
class Files:
    """Keeps files; ``account_id`` hides those of other accounts.

    limit: bytes of the largest file that is taken.
    """

    database: Database
    blobs: Blobs
    links: Links
    clock: Clock
    limit: int

    def keep(
        self,
        account_id: str,
        name: str | None,
        source: bytes | BinaryIO | Iterable[bytes],
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
            source: its bytes.
            content_type: believed only where the bytes do not tell.
            metadata: given back as it is.
            prediction_id: the prediction that it lives and dies with.
            lifetime: how long it is kept; as long as its prediction if None.
            limit: bytes, instead of the limit of uploads.

        Raises:
            TooLargeError: it has more bytes than are taken.
            PathError: it cannot be written.
        """
        stream = hasattr(source, "read") or isinstance(source, bytes)
        chunks: Any = chunks_of(source) if stream else source  # type: ignore[arg-type]
        blob = self.blobs.put(chunks, self.limit if limit is None else limit)
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
            metadata=dict(metadata or {}),
            prediction_id=prediction_id,
            expires_at=None if lifetime is None else now + lifetime,
        )
        with self.database.write() as connection:
            connection.execute(tables.files.insert().values(columns_of(file)))
        return file

    def get(self, file_id: str, account_id: str | None = None) -> FileRecord:
        """Return a file that has not expired.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        query = select(tables.files).where(tables.files.c.id == file_id)
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None or account_id not in (None, row.account_id) or self._expired(row.expires_at):
            raise NotFoundError("There is no such file.")
        return record(FileRecord, row)

    def fetched(self, prediction_id: str, url: str) -> FileRecord:
        """Return what was fetched from an address for the run of a prediction.

        Raises:
            NotFoundError: nothing was, or it has been removed.
        """
        query = select(tables.files).where(tables.files.c.prediction_id == prediction_id)
        with self.database.read() as connection:
            kept = [record(FileRecord, row) for row in connection.execute(query)]
        for file in kept:
            if file.metadata.get("url") == url:
                return file
        raise NotFoundError("There is no such file.")

    def path(self, file: FileRecord) -> Path:
        """Return where the bytes of a file lie, for reading."""
        return self.blobs.path(file.sha256)

    def page(
        self, account_id: str, *, cursor: str | None = None, limit: int = 100
    ) -> Page[FileRecord]:
        """Return the uploads of an account, newest first.

        Raises:
            OptionError: the cursor is none of ours.
        """
        table = tables.files
        query = select(table).where(
            table.c.account_id == account_id,
            table.c.prediction_id.is_(None),
            or_(table.c.expires_at.is_(None), table.c.expires_at > self.clock()),
        )
        with self.database.read() as connection:
            return read_page(
                connection,
                table,
                query,
                lambda row: record(FileRecord, row),
                cursor=cursor,
                limit=limit,
            )

    def delete(self, file_id: str, account_id: str | None = None) -> None:
        """Remove a file; its bytes go with the next sweep.

        Raises:
            NotFoundError: there is none with this id in the account.
        """
        self.get(file_id, account_id)
        with self.database.write() as connection:
            connection.execute(delete(tables.files).where(tables.files.c.id == file_id))

    def adopt(
        self, values: Mapping[str, Any], account_id: str, fields: Collection[str]
    ) -> Mapping[str, Any]:
        """Return an input with the data URIs in its file fields kept as files.

        Call it once the input is valid and before the prediction is made, which then owns
        the files. Links to files of ours are looked up, so that a wrong one is refused now.

        Raises:
            InputError: a data URI cannot be read, a file of ours is not there, or a value
                has the form in which we keep files.
            TooLargeError: a file has more bytes than are taken.
        """
        _refuse_kept_files(values)
        adopted = {
            name: self._adopt(value, account_id) for name, value in values.items() if name in fields
        }
        return {**values, **adopted}

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
            file = self.keep(account_id, None, data, content_type=kind, lifetime=_UNCLAIMED_FOR)
            return self.reference(file)
        if found := self.links.own_file(value):
            self._look_up(*found, account_id)
        return value

    def _look_up(self, file_id: str, public: bool, account_id: str) -> None:  # noqa: FBT001
        try:
            self.get(file_id, None if public else account_id)
        except NotFoundError as error:
            raise InputError("The input names a file of this server that is not there.") from error

    def _expired(self, time: datetime | None) -> bool:
        return time is not None and time <= self.clock()


def _refuse_kept_files(value: Any) -> None:
    if isinstance(value, Mapping):
        if FILE_KEY in value:
            raise InputError(f"An input holds no {FILE_KEY!r}; give a URL.")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_kept_files(item)
