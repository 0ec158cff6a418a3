"""A server on a port of the loopback, with an engine of a few lines."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from api_support import PNG

from tegula.catalog import find
from tegula.catalog.inputs import ARRAY
from tegula.server.api.app import create_app
from tegula.server.background import WebhookSender
from tegula.server.fetch import Fetcher, Policy
from tegula.server.queue import Report
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Prediction


class QuickEngine:
    """Answers every prediction with one PNG; the prompt can ask for other things."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            claimed = self._store.queue.claim("quick")
            if claimed is None:
                time.sleep(0.01)
                continue
            self._answer(claimed)

    def _answer(self, claimed: Prediction) -> None:
        queue, held = self._store.queue, (claimed.id, claimed.attempt)
        queue.start(*held)
        prompt = claimed.input.get("prompt", "")
        for step in range(1, 5):
            line = f"{25 * step:3d}%|{'#' * step:4}| {step}/4 [00:0{step}<00:00,  1.00it/s]\n"
            if not queue.report(*held, Report(logs=line, progress=step / 4)):
                return
            time.sleep(0.3 if prompt == "slow" else 0.01)
        if prompt == "fail":
            queue.fail(*held, "The model broke.")
            return
        file = self._store.files.keep(
            claimed.account_id, "out-0.png", PNG, prediction_id=claimed.id
        )
        many = find(claimed.version).output == ARRAY
        queue.report(*held, Report(outputs=[self._store.files.reference(file)], append=many))
        queue.succeed(*held)


@dataclass(frozen=True)
class Live:
    """Where the server is, without ``/v1``, and a token for it."""

    url: str
    token: str
    store: Store


@contextmanager
def live_server(
    folder: Path, tls: tuple[Path, Path] | None = None, **settings: Any
) -> Iterator[Live]:
    """Serve until the block is left; ``tls`` is a certificate and its key."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        scheme = "https" if tls else "http"
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        given = {"folder": folder, "public_url": url, "fetch_private": True, "fetch_ports": ()}
        store = Store.open(ServerSettings(**{**given, **settings}))
        token = store.accounts.create_token(store.accounts.ensure("ana").id, "tests")[1]
        webhooks = WebhookSender(store, Fetcher(Policy.of(store.settings)))
        app = create_app(store, background=[webhooks, QuickEngine(store)])
        files = {"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1])} if tls else {}
        config = uvicorn.Config(app, log_level="warning", lifespan="on", **files)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Live(url, token, store)
        finally:
            server.should_exit = True
            thread.join()
            store.close()
