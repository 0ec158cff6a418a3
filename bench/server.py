"""How the server bears load: durable creates a second, the time of a get, what a wait adds.

    python -m bench.server [--clients 50] [--seconds 5] [--steady 60] [--streams 300]
    python -m bench.server --soak 600 [--clients 4] [--bundle mini]

Serves over SQLite on the loopback with an engine that does nothing, and drives it from a
second process over kept connections. Prints one JSON object. ``soak`` measures memory.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import resource
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench.soak import KEPT_S, background, soak

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5E"
    "rkJggg=="
)
BODY = json.dumps({"version": "tegula/upscale", "input": {"image": PICTURE}})
LINK = json.dumps(
    {"version": "tegula/upscale", "input": {"image": "https://pictures.example/a.png"}}
)
HELD = "never ends"
HELD_BODY = json.dumps(
    {"version": "tegula/upscale", "input": {"image": "https://a.example/a.png", "prompt": HELD}}
)


class NoOp:
    """Ends every prediction at once, with a picture as its output if one is given.

    One whose prompt is ``HELD`` is begun and never ended.
    """

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
            if claimed.input.get("prompt") == HELD:
                continue
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

    from tegula.cli.serve import share_heaps, spare_what_is_loaded
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
    config.load()
    spare_what_is_loaded()
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


@dataclass
class Steady:
    """What clients at an even pace saw: the sorted seconds of each create and each get."""

    creates: list[float] = field(default_factory=list)
    gets: list[float] = field(default_factory=list)
    failed: int = 0


def steady(clients: list[Client], seconds: float) -> Steady:
    """Let every client create a prediction once a second, and get it."""
    seen = Steady()
    began = time.perf_counter()

    def run(number: int, client: Client) -> None:
        for turn in range(int(seconds)):
            due = began + turn + number / len(clients)
            time.sleep(max(0.0, due - time.perf_counter()))
            start = time.perf_counter()
            try:
                made = client.ask("POST", "/v1/predictions", LINK)["id"]
                between = time.perf_counter()
                client.ask("GET", f"/v1/predictions/{made}")
            except (RuntimeError, OSError, http.client.HTTPException):
                seen.failed += 1
                continue
            seen.creates.append(between - start)
            seen.gets.append(time.perf_counter() - between)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.creates.sort()
    seen.gets.sort()
    return seen


def idle_streams(client: Client, server: int, count: int, seconds: float = 10.0) -> float:
    """Return the share of a core that the server takes for streams on which nothing happens."""
    open_streams = []
    for _ in range(count):
        address = client.ask("POST", "/v1/predictions", HELD_BODY)["urls"]["stream"]
        path = urlsplit(address).path
        connection = socket.create_connection(("127.0.0.1", client.port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        open_streams.append(connection)
    process = psutil.Process(server)
    time.sleep(5)  # until all of them are begun
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    for connection in open_streams:
        connection.close()
    return float(after.user + after.system - before.user - before.system) / seconds


def milliseconds(times: list[float], share: float) -> float:
    """Return a percentile of sorted times."""
    return round(1000 * times[min(len(times) - 1, int(len(times) * share))], 1)


def measure(
    port: int, token: str, server: int, count: int, seconds: float, steady_s: float, streams: int
) -> dict[str, Any]:
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
    paced = steady(clients, steady_s)
    while clients[0].ask("GET", "/readyz")["waiting"]:
        time.sleep(0.2)
    idle = idle_streams(clients[0], server, streams)
    return {
        "clients": count,
        "creates_with_a_file_per_second": round(files, 1),
        "creates_per_second": round(links, 1),
        "create_p50_ms": milliseconds(link_times, 0.5),
        "create_p99_ms": milliseconds(link_times, 0.99),
        "create_with_a_file_p99_ms": milliseconds(file_times, 0.99),
        "gets_per_second": round(gets, 1),
        "get_p99_ms_at_full_load": milliseconds(get_times, 0.99),
        "get_p50_ms_polling": milliseconds(polls, 0.5),
        "get_p99_ms_polling": milliseconds(polls, 0.99),
        "steady_creates_per_second": round(len(paced.creates) / steady_s, 1),
        "steady_create_p50_ms": milliseconds(paced.creates, 0.5),
        "steady_create_p99_ms": milliseconds(paced.creates, 0.99),
        "steady_get_p50_ms": milliseconds(paced.gets, 0.5),
        "steady_get_p99_ms": milliseconds(paced.gets, 0.99),
        "steady_failed": paced.failed,
        f"{streams}_idle_streams_share_of_a_core": round(idle, 3),
        "load_of_the_machine": [round(load, 1) for load in os.getloadavg()],
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
    parser.add_argument(
        "--steady", type=float, default=60.0, metavar="SECONDS", help="creates at an even pace"
    )
    parser.add_argument("--streams", type=int, default=300, help="streams that wait")
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
                figures = soak(clients, soaked_body, server.pid or 0, given.soak)
            else:
                figures = measure(
                    port,
                    token,
                    server.pid or 0,
                    given.clients or 50,
                    given.seconds,
                    given.steady,
                    given.streams,
                )
            print(json.dumps(figures, indent=2))
        finally:
            server.kill()
            server.join()


if __name__ == "__main__":
    main()
