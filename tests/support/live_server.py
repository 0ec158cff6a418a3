"""A server on a port of the loopback, with an engine of a few lines, and a proxy before several."""

from __future__ import annotations

import http.client
import itertools
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from api_support import PNG
from store_support import open_quickly

from tegula.catalog import Catalog, find, packaged_fingerprint
from tegula.catalog.inputs import ARRAY
from tegula.server.addresses import Policy
from tegula.server.api.app import GracefulServer, create_app
from tegula.server.api.connections import serving_config
from tegula.server.background import WebhookSender
from tegula.server.db import utc_now
from tegula.server.fetch import Fetcher
from tegula.server.queue import Report
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.supervisor import Supervisor, open_engines, open_supervisor
from tegula.server.tables import Prediction

_OTHERS_S = 0.2
"""Between two looks for what another server on the same store accepted."""


class QuickEngine:
    """Answers every prediction with one PNG; the prompt can ask for other things."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.gate = threading.Event()
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._unsubscribe = store.pubsub.subscribe(lambda _: self._wake.set())
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        self._unsubscribe()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            claimed = self._store.queue.claim("quick")
            if claimed is None:
                self._wake.wait(_OTHERS_S)
            else:
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
        if prompt == "gated":
            preview = self._store.files.keep(
                claimed.account_id, "preview-1.png", PNG, prediction_id=claimed.id
            )
            shown = Report(preview=self._store.files.reference(preview))
            queue.report(*held, shown)
            while not self.gate.wait(0.05) and queue.report(*held):
                pass
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
class _Supervised:
    """Engines that are stopped at once."""

    supervisor: Supervisor

    def start(self) -> None:
        self.supervisor.start()

    def stop(self) -> None:
        self.supervisor.stop()


@dataclass(frozen=True)
class Live:
    """Where the server is, without ``/v1``, and a token for it."""

    url: str
    token: str
    store: Store
    program: GracefulServer
    gate: threading.Event

    def stop(self) -> None:
        """Ask it to stop, as SIGTERM does; the block of ``live_server`` waits for its end."""
        self.program.should_exit = True


@contextmanager
def live_server(
    folder: Path,
    tls: tuple[Path, Path] | None = None,
    port: int = 0,
    loop: str = "auto",
    *,
    packaged_model: bool = False,
    **settings: Any,
) -> Iterator[Live]:
    """Serve until the block is left; ``tls`` is a certificate and its key, ``loop`` uvicorn's.

    With ``packaged_model`` predictions run on it as they do for users, in a process of its own.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        scheme = "https" if tls else "http"
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        given = {"folder": folder, "public_url": url, "fetch_private": True, "fetch_ports": ()}
        store = open_quickly(ServerSettings(**{**given, **settings}), utc_now)
        token = store.accounts.create_token(store.accounts.ensure("ana").id, f"tests {uuid4()}")[1]
        webhooks = WebhookSender(store, Fetcher(Policy.of(store.settings)))
        engine = QuickEngine(store)
        if packaged_model:
            catalog = Catalog(packaged_fingerprint())
            engines = open_engines(store.settings, catalog, ("cpu",))
            fetcher = Fetcher(Policy.of(store.settings))
            runner = _Supervised(open_supervisor(store, catalog, engines, fetcher))
            app = create_app(store, catalog=catalog, background=[webhooks, runner])
        else:
            app = create_app(store, background=[webhooks, engine])
        files = {"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1])} if tls else {}
        config = serving_config(app, log_level="warning", lifespan="on", loop=loop, **files)
        server = GracefulServer(config, app.state.service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Live(url, token, store, server, engine.gate)
        finally:
            engine.gate.set()
            server.should_exit = True
            thread.join()
            store.close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody signed but itself, and its key."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=tegula"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    openssl = shutil.which("openssl") or pytest.skip("needs openssl")
    subprocess.run([openssl, *words.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def eventually(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until it is true; only a failing test waits for long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


class _ProxyHandler(BaseHTTPRequestHandler):
    """Passes one request on."""

    turns = itertools.count()
    ports: Sequence[int]
    mount = ""
    keeps_mount = False

    def handle_one_request(self) -> None:
        """Read a request of any method and answer it."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        if not self.path.startswith(f"{self.mount}/"):
            self.send_error(404)
            return
        if not self.keeps_mount:
            self.path = self.path[len(self.mount) :]
        body, first = self._body(), next(self.turns) % len(self.ports)
        ports = (*self.ports[first:], *self.ports[:first])
        if not any(self._pass_on(port, body, last=port == ports[-1]) for port in ports):
            self.send_error(502)

    def _pass_on(self, port: int, body: bytes | None, *, last: bool) -> bool:
        """Return whether the answer of the server was passed back."""
        dropped = ("connection", "transfer-encoding", "content-length", "expect", "date", "server")
        sent = {name: text for name, text in self.headers.items() if name.lower() not in dropped}
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as upstream:
            try:
                upstream.request(self.command, self.path, body, sent)
                answer = upstream.getresponse()
            except (OSError, http.client.HTTPException):
                return False
            with answer:
                if answer.status == 503 and not last:
                    return False
                self.send_response(answer.status)
                for name, text in answer.getheaders():
                    if name.lower() not in dropped:
                        self.send_header(name, text)
                self.end_headers()
                while chunk := answer.read1(65536):
                    self.wfile.write(chunk)
        return True

    def _body(self) -> bytes | None:
        if self.headers.get("transfer-encoding") != "chunked":
            length = self.headers.get("content-length")
            return None if length is None else self.rfile.read(int(length))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def proxy(ports: Sequence[int], mount: str = "", *, keeps_mount: bool = False) -> Iterator[str]:
    """Pass requests on to several servers in turn, as docs/server.md asks of a proxy.

    Where one cannot be reached or answers 503, the next one gets the request. What does not lie
    under ``mount`` is not found; ``mount`` is taken off paths unless ``keeps_mount``.
    """
    about = {"ports": ports, "mount": mount, "keeps_mount": keeps_mount}
    handler = type("Handler", (_ProxyHandler,), about)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
