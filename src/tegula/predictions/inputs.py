"""From the files that an input names to files on the disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tegula.errors import FetchError, InputError, NotFoundError
from tegula.predictions.data_uris import decode_data_uri, is_data_uri
from tegula.predictions.fetch import Fetcher
from tegula.predictions.files import Files
from tegula.predictions.records import FILE_KEY, FileRecord, Prediction


@dataclass(frozen=True)
class InputReader:
    """Brings inputs to this machine when their prediction is about to run.

    limit: bytes of the largest file. seconds: time for fetching one.
    """

    files: Files
    fetcher: Fetcher
    limit: int
    seconds: float

    def read(self, prediction: Prediction, fields: Collection[str]) -> Mapping[str, Any]:
        """Return the input with a path in the place of each file.

        What is fetched is kept and removed with the prediction.

        Raises:
            InputError: a file is not there, may not be fetched or cannot be.
        """
        read = {
            name: self._read(value, name, prediction)
            for name, value in prediction.input.items()
            if name in fields
        }
        return {**prediction.input, **read}

    def _read(self, value: Any, name: str, prediction: Prediction) -> Any:
        if isinstance(value, list | tuple):
            return [self._read(item, name, prediction) for item in value]
        if value is None or value == "":
            return None
        try:
            return self.files.path(self._file(value, prediction))
        except NotFoundError as error:
            raise InputError(f"The file of {name} is not on this server any more.") from error
        except FetchError as error:
            raise FetchError(f"{name} cannot be fetched: {error}") from error

    def _file(self, value: Any, prediction: Prediction) -> FileRecord:
        account_id = prediction.account_id
        if isinstance(value, Mapping):
            return self.files.get(value[FILE_KEY], account_id)
        if is_data_uri(value):
            data, kind = decode_data_uri(value)
            return self.files.keep(
                account_id, None, data, content_type=kind, prediction_id=prediction.id
            )
        if own := self.files.links.own_file(value):
            file_id, public = own
            return self.files.get(file_id, None if public else account_id)
        return self._fetch(value, prediction)

    def _fetch(self, url: str, prediction: Prediction) -> FileRecord:
        with self.fetcher.get(url, limit=self.limit, seconds=self.seconds) as fetched:
            return self.files.keep(
                prediction.account_id,
                fetched.name,
                fetched.chunks,
                content_type=fetched.content_type,
                metadata={"url": url},
                prediction_id=prediction.id,
                limit=self.limit,
            )
