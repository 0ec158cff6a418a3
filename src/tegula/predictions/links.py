"""Addresses of what the server holds, and what an address of ours stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from tegula.predictions.records import FILE_KEY
from tegula.predictions.signing import Signer

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PORTS = {"http": 80, "https": 443}
_FILE_PATH = re.compile(r"(?:/v1)*/files/([0-9a-z]+)(?:/download)?/?")
_OUTPUT_PATH = re.compile(r"/o/([^/]+)/[^/]*")


@dataclass(frozen=True)
class Links:
    """Makes and reads the addresses of one server.

    public_url: how clients reach it, without ``/v1``.
    aliases: its other addresses.
    """

    public_url: str
    signer: Signer
    aliases: tuple[str, ...] = ()

    def prediction(self, prediction_id: str) -> str:
        """Return where a prediction is got."""
        return f"{self.public_url}/v1/predictions/{prediction_id}"

    def cancel(self, prediction_id: str) -> str:
        """Return where a prediction is cancelled."""
        return f"{self.prediction(prediction_id)}/cancel"

    def web(self, prediction_id: str) -> str:
        """Return the page of a prediction."""
        return f"{self.public_url}/p/{prediction_id}"

    def stream(self, prediction_id: str) -> str:
        """Return where the events of a prediction are streamed, without authentication.

        JavaScript's client takes outputs for files only under ``/v1/files/``.
        """
        return f"{self.public_url}/v1/files/streams/{self.signer.token('stream', prediction_id)}"

    def file(self, file_id: str) -> str:
        """Return where an uploaded file is described; its owner alone may read it."""
        return f"{self.public_url}/v1/files/{file_id}"

    def output(self, file: Mapping[str, Any]) -> str:
        """Return where everybody who has the link reads a kept file.

        Args:
            file: a file as inputs and outputs hold it, see ``FILE_KEY``.
        """
        token = self.signer.token("output", file[FILE_KEY])
        return f"{self.public_url}/o/{token}/{quote(file['name'])}"

    def streamed(self, token: str) -> str | None:
        """Return the id of the prediction that a stream's token opens."""
        return self.signer.name_of("stream", token)

    def opened(self, token: str) -> str | None:
        """Return the id of the file that an output's token opens."""
        return self.signer.name_of("output", token)

    def resolve(self, value: Any) -> Any:
        """Return a JSON value with each kept file in it replaced by its link."""
        if isinstance(value, Mapping):
            if FILE_KEY in value:
                return self.output(value)
            return {key: self.resolve(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.resolve(item) for item in value]
        return value

    def own_file(self, url: str) -> tuple[str, bool] | None:
        """Return the id of the file of ours that a URL names, or None if it is not ours.

        The second part says whether the URL opens it to everybody.
        """
        try:
            parts = urlsplit(url)
            if not any(_same_server(parts, urlsplit(base)) for base in self._bases):
                return None
        except ValueError:
            return None
        path = parts.path
        for base in self._bases:
            path = path.removeprefix(urlsplit(base).path.rstrip("/"))
        if match := _FILE_PATH.fullmatch(path):
            return match[1], False
        if (match := _OUTPUT_PATH.fullmatch(path)) and (name := self.opened(match[1])):
            return name, True
        return None

    @property
    def _bases(self) -> tuple[str, ...]:
        return (self.public_url, *self.aliases)


def _same_server(one: SplitResult, other: SplitResult) -> bool:
    """Whether both reach the same server; the names of the loopback are all the same."""
    if one.scheme not in _PORTS or _port(one) != _port(other):
        return False
    hosts = {one.hostname or "", other.hostname or ""}
    return len(hosts) == 1 or hosts <= _LOOPBACK


def _port(parts: SplitResult) -> int | None:
    return parts.port or _PORTS.get(parts.scheme)
