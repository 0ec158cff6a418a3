"""How the server bears load: durable creates a second, the time of a get, what a wait adds.

    python -m bench.server [--clients 50] [--seconds 5]
    python -m bench.server --soak 600 [--clients 4] [--bundle mini]

Serves over SQLite on the loopback with an engine that does nothing, and drives it from a
second process over kept connections. Prints one JSON object. ``soak`` measures memory.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import random
import resource
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.soak import KEPT_S, background, soak

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5E"
    "rkJggg=="
)
BODY = json.dumps({"version": "tegula/upscale", "input": {"image": PICTURE}})
LINK = json.dumps(
    {"version": "tegula/upscale", "input": {"image": "https://pictures.example/a.png"}}
)


class NoOp:
    """Ends every prediction at once, with a picture as its output if one is given."""

    def __init__(self, store: Any, picture: bytes | None = None) -> None:
        self._store = store
        self._picture = picture
        self._stopping = threading.Event()
        self._wake = threading.Event()
        store.pubsub.subscribe(lambda _: self._wake.set())
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            queue = self._store.queue
            claimed = queue.claim("bench")
            if claimed is None and (unfetched := queue.claim_fetch("bench")):
                queue.hand_on(unfetched.id, unfetched.attempt, None)
                continue
            if claimed is None:
                self._wake.wait(0.2)
                continue
            queue.start(claimed.id, claimed.attempt)
            if self._picture is not None:
                self._give(claimed, self._picture)
            queue.succeed(claimed.id, claimed.attempt)

    def _give(self, claimed: Any, picture: bytes) -> None:
        from tegula.server.queue import Report

        files, owner = self._store.files, claimed.account_id
        kept = files.keep(owner, "out-0.png", picture, prediction_id=claimed.id)
        report = Report(outputs=[files.reference(kept)], append=False)
        self._store.queue.report(claimed.id, claimed.attempt, report)


@dataclass(frozen=True)
class Soaked:
    """That the server is to be soaked, with the weights of a bundle or with none."""

    bundle: str | None


def serve(folder: str, port: int, token: Any, soaked: Soaked | None) -> None:
    """Serve until killed; puts a token into the queue when ready."""
    import uvicorn

    from tegula.cli.serve import share_heaps
    from tegula.server.api.app import create_app
    from tegula.server.api.connections import serving_config
    from tegula.server.settings import ServerSettings
    from tegula.server.store import Store

    share_heaps()
    settings = ServerSettings(
        folder=Path(folder),
        public_url=f"http://127.0.0.1:{port}",
        creates_per_minute=0,
        requests_per_minute=0,
        max_waiting=1_000_000,
        max_waiting_seconds=1e12,
        retention_seconds=KEPT_S,
        fetch_private=True,
        fetch_ports=(),
    )
    store = Store.open(settings)
    token.put(store.accounts.create_token(store.accounts.ensure("bench").id, "bench")[1])
    work = background(store, soaked.bundle) if soaked else [NoOp(store)]
    app = create_app(store, background=work)
    config = serving_config(app, port=port, log_level="warning", timeout_keep_alive=600)
    uvicorn.Server(config).run()


@dataclass
class Client:
    """One kept connection."""

    port: int
    token: str

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port)

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> Any:
        """Send a request and return the JSON of its answer."""
        given = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        self._connection.request(method, path, body, {**given, **headers})
        answer = self._connection.getresponse()
        content = json.loads(answer.read())
        if answer.status >= 300:
            raise RuntimeError(content)
        return content


def poll(client: Client, prediction_id: str) -> float:
    """Ask as clients do, every half second; return the seconds that the answer took."""
    time.sleep(random.uniform(0.4, 0.6))
    start = time.perf_counter()
    client.ask("GET", f"/v1/predictions/{prediction_id}")
    return time.perf_counter() - start


def ask_only(client: Client, method: str, path: str, body: str | None = None, **h: str) -> None:
    """Ask, and leave the time to whoever calls."""
    client.ask(method, path, body, **h)


def load(
    clients: list[Client], seconds: float, one: Callable[[Client], float | None]
) -> tuple[float, list[float]]:
    """Return requests a second and the seconds of each, over all clients at once.

    ``one`` may return the seconds itself.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds

    def run(client: Client) -> None:
        while (start := time.perf_counter()) < end:
            own = one(client)
            times.append(time.perf_counter() - start if own is None else own)

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(times) / seconds, sorted(times)


def milliseconds(times: list[float], share: float) -> float:
    """Return a percentile of sorted times."""
    return round(1000 * times[min(len(times) - 1, int(len(times) * share))], 1)


def measure(port: int, token: str, count: int, seconds: float) -> dict[str, Any]:
    """Return everything that is measured."""
    clients = [Client(port, token) for _ in range(count)]
    files, file_times = load(
        clients, seconds, lambda c: ask_only(c, "POST", "/v1/predictions", BODY)
    )
    links, link_times = load(
        clients, seconds, lambda c: ask_only(c, "POST", "/v1/predictions", LINK)
    )
    known = clients[0].ask("POST", "/v1/predictions", LINK)["id"]
    while clients[0].ask("GET", "/readyz")["waiting"]:
        time.sleep(0.2)
    gets, get_times = load(
        clients, seconds, lambda c: ask_only(c, "GET", f"/v1/predictions/{known}")
    )
    polls = load(clients, seconds, lambda c: poll(c, known))[1]
    waits = load(
        clients[:1],
        seconds / 2,
        lambda c: ask_only(c, "POST", "/v1/predictions", LINK, prefer="wait=10"),
    )[1]
    return {
        "clients": count,
        "creates_with_a_file_per_second": round(files, 1),
        "creates_per_second": round(links, 1),
        "create_p99_ms": milliseconds(link_times, 0.99),
        "create_with_a_file_p99_ms": milliseconds(file_times, 0.99),
        "gets_per_second": round(gets, 1),
        "get_p99_ms_at_full_load": milliseconds(get_times, 0.99),
        "get_p50_ms_polling": milliseconds(polls, 0.5),
        "get_p99_ms_polling": milliseconds(polls, 0.99),
        "wait_added_median_ms": round(1000 * statistics.median(waits), 1),
        "client_cpu_seconds": round(resource.getrusage(resource.RUSAGE_SELF).ru_utime, 1),
    }


def soaked_body(webhook: str) -> str:
    """Return a create with a picture of its own and a webhook."""
    given = {"image": PICTURE, "prompt": str(random.random())}
    return json.dumps({"version": "tegula/upscale", "input": given, "webhook": webhook})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="measure memory instead")
    parser.add_argument("--bundle", help="weights that the soaked worker runs; none by default")
    given = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tokens = context.Queue()
        soaked = Soaked(given.bundle) if given.soak else None
        server = context.Process(target=serve, args=(folder, port, tokens, soaked))
        server.start()
        token = tokens.get(timeout=60)
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        try:
            if given.soak:
                clients = [Client(port, token) for _ in range(given.clients or 4)]
                told = soak(clients, soaked_body, server.pid or 0, given.soak)
            else:
                told = measure(port, token, given.clients or 50, given.seconds)
            print(json.dumps(told, indent=2))
        finally:
            server.kill()
            server.join()


if __name__ == "__main__":
    main()
