"""A server over a fresh store, and a worker that tests move by hand."""

from __future__ import annotations

import base64
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from document_support import checked
from starlette.testclient import TestClient
from store_support import open_quickly

from tegula.catalog import find
from tegula.catalog.inputs import ARRAY
from tegula.server.api.app import create_app
from tegula.server.db import Clock, utc_now
from tegula.server.queue import Report
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Prediction

BATOU = "batouresearch/high-resolution-controlnet-tile"
SETTINGS = {"fetch_private": True, "fetch_ports": ()}


def png(width: int = 3, height: int = 2) -> bytes:
    """A small grey PNG, written by hand so that no image library is needed."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + check

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


PNG = png()
DATA_URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@dataclass
class Server:
    """A client that is somebody, and the store behind the server."""

    client: TestClient
    store: Store
    token: str

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        return self.client.post(path, json=body, **options)

    def create(self, model: str = "tegula/upscale", **inputs: Any) -> dict[str, Any]:
        body = {"version": model, "input": {"image": DATA_URI, **inputs}}
        answer = self.post("/v1/predictions", body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def work(self, outputs: int = 1, data: bytes = PNG) -> Prediction:
        """Run the next prediction as a worker would."""
        claimed = self._claim()
        self.store.queue.start(claimed.id, claimed.attempt)
        lines = "  0%|          | 0/2 [00:00<?, ?it/s]\n100%|##########| 2/2 [00:01<00:00]\n"
        self.store.queue.report(claimed.id, claimed.attempt, Report(logs=lines, progress=0.5))
        for number in range(outputs):
            kept = self.store.files.keep(
                claimed.account_id, f"out-{number}.png", data, prediction_id=claimed.id
            )
            item = self.store.files.reference(kept)
            report = Report(outputs=[item], append=find(claimed.version).output == ARRAY)
            self.store.queue.report(claimed.id, claimed.attempt, report)
        self.store.queue.succeed(claimed.id, claimed.attempt)
        return self.store.predictions.get(claimed.id)

    def _claim(self) -> Prediction:
        """The next prediction, which a request of another thread may just be making."""
        for _ in range(15_000):
            if claimed := self.store.queue.claim("tests"):
                return claimed
            time.sleep(0.02)
        raise AssertionError("nothing came to be worked on")

    def work_soon(self, seconds: float = 0.1) -> threading.Timer:
        """Run the next prediction from another thread, in a moment."""
        timer = threading.Timer(seconds, self.work)
        timer.start()
        return timer


def open_server(folder: Path, *, clock: Clock = utc_now, **settings: Any) -> Server:
    """A server with one account and its token."""
    given = {"folder": folder, "public_url": "https://tile.example", **SETTINGS, **settings}
    store = open_quickly(ServerSettings(**given), clock)
    account = store.accounts.ensure("ana", "Ana")
    _, token = store.accounts.create_token(account.id, "tests")
    client = checked(TestClient(create_app(store), base_url="https://tile.example"))
    client.headers["authorization"] = f"Bearer {token}"
    return Server(client, store, token)


@pytest.fixture
def server(tmp_path):
    opened = open_server(tmp_path)
    with opened.client:
        yield opened
    opened.store.close()
