"""Whether the memory of the server stays flat while it is used.

    python -m bench.server --soak 600 [--bundle mini]

Clients create predictions with a picture and a webhook and wait for them, get, stream and
list them and read outputs, while retention removes what is a minute old. As many slow
clients beside them send the body of a create a few bytes at a time, or read an answer so. The
engine's worker is a process of its own; without ``--bundle`` its model does nothing.
"""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEPT_S = 60
_EVERY_S = 5.0
_WARM_UP = 0.3
_FLAT_MIB_A_MINUTE = 0.25
_PAUSE_S = 0.25
_DRIP_S, _DRIP_BYTES, _DRIPS = 0.1, 64, 100


def open_runner(_device: str, _options: Mapping[str, Any]) -> Callable[..., None]:
    """Return a model that gives the picture back."""
    from tegula.server.engine import Log, OutputFile, Progressed, Started

    def run(job: Any, emit: Callable[[Any], None], _cancelled: Callable[[], bool]) -> None:
        emit(Started())
        emit(Log("Nothing to do."))
        emit(Progressed(0.5))
        path = job.folder / "out-0.png"
        path.write_bytes(Path(job.input["image"]).read_bytes())
        emit(OutputFile(path, path.name, "image/png"))

    return run


def background(store: Any, bundle: str | None) -> list[Any]:
    """Return everything that works in the background of a server, its worker included."""
    from tegula.catalog import Catalog, packaged_fingerprint
    from tegula.models import BundleSettings
    from tegula.server.addresses import Policy
    from tegula.server.background import Sweeper, WebhookSender
    from tegula.server.fetch import Fetcher
    from tegula.server.runner import LocalEngine, RunnerSpec
    from tegula.server.supervisor import open_supervisor
    from tegula.server.upscaling import RunnerOptions, upscaling_spec

    catalog = Catalog(packaged_fingerprint())
    spec = RunnerSpec("bench.soak:open_runner", {})
    if bundle is not None:
        models = BundleSettings(bundle=bundle)
        spec = upscaling_spec(RunnerOptions(models, catalog.weights, store.settings.max_pixels))
    fetcher = Fetcher(Policy.of(store.settings))
    supervisor = open_supervisor(store, catalog, [LocalEngine(spec, "cpu")], fetcher)
    return [WebhookSender(store, fetcher), Sweeper(store, every=10.0), supervisor]


@contextmanager
def receiving() -> Iterator[tuple[str, list[int]]]:
    """Take webhooks; give their address, and a list that holds how many came."""
    came = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            came[0] += 1
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", came
    finally:
        server.shutdown()


def cycle(client: Any, body: str) -> int:
    """Do once what clients do; return how many requests it took."""
    made = client.ask("POST", "/v1/predictions", body, prefer="wait=10")
    name = made["id"]
    while client.ask("GET", f"/v1/predictions/{name}")["completed_at"] is None:
        time.sleep(_PAUSE_S)
    with urllib.request.urlopen(made["urls"]["stream"]) as stream:
        stream.read()
    newest = client.ask("GET", "/v1/predictions")["results"][0]["output"]
    if newest:
        with urllib.request.urlopen(newest) as output:
            output.read()
    client.ask("GET", "/v1/models")
    return 6


def dawdle(client: Any, body: str) -> None:
    """Create a prediction or list them over a connection of its own, a few bytes at a time.

    The server may end it for being slow; that is no failure.
    """
    drips = [body[at : at + _DRIP_BYTES] for at in range(0, _DRIPS * _DRIP_BYTES, _DRIP_BYTES)]
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {client.token}\r\n"
    create = (
        f"POST /v1/predictions HTTP/1.1\r\n{head}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        try:
            connection.sendall(create.encode())
            for drip in drips:
                connection.sendall(drip.encode())
                time.sleep(_DRIP_S)
            connection.sendall(body[len("".join(drips)) :].encode())
            connection.recv(_DRIP_BYTES)
            connection.sendall(f"GET /v1/predictions HTTP/1.1\r\n{head}\r\n".encode())
            for _ in range(_DRIPS):
                connection.recv(_DRIP_BYTES)
                time.sleep(_DRIP_S)
        except OSError:
            time.sleep(_PAUSE_S)


@dataclass(frozen=True)
class Sample:
    """Resident memory in MiB at a moment, in seconds from the start."""

    at: float
    server: float
    worker: float


def sample(at: float, pid: int) -> Sample:
    """Look at the server and its worker."""
    return Sample(at, resident(pid), sum(map(resident, workers_of(pid))))


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line) / 1024


def workers_of(pid: int) -> list[int]:
    """Return the processes of a server's engines."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for task in children for child in task.read_text().split()]
    return [
        child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def slope(times: list[float], values: list[float]) -> float:
    """Return the growth of values a minute, by least squares."""
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((at - middle) ** 2 for at in times)
    rise = sum((a - middle) * (v - mean) for a, v in zip(times, values, strict=True))
    return 60 * rise / spread if spread else 0.0


def soak(
    clients: list[Any], body: Callable[[str], str], pid: int, seconds: float
) -> dict[str, Any]:
    """Use the server for so long and return what became of its memory."""
    samples, done, slow, failures = [], [0] * len(clients), [0], []
    start = time.monotonic()
    with receiving() as (url, webhooks):

        def use(number: int) -> None:
            try:
                while time.monotonic() - start < seconds:
                    done[number] += cycle(clients[number], body(url))
                    time.sleep(_PAUSE_S)
            except Exception as error:
                failures.append(repr(error))

        def use_slowly(client: Any) -> None:
            while time.monotonic() - start < seconds:
                dawdle(client, body(url))
                slow[0] += 1

        threads = [threading.Thread(target=use, args=(number,)) for number in range(len(clients))]
        threads += [threading.Thread(target=use_slowly, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(_EVERY_S)
            samples.append(sample(time.monotonic() - start, pid))
    figures = {"seconds": seconds, "requests": sum(done), "webhooks": webhooks[0], "slow": slow[0]}
    return {**figures, "failures": failures, **_memory(samples)}


def plateaus(first: float, last: float) -> bool:
    """Whether memory stops growing, by its growth in the first and the last third."""
    return last < max(_FLAT_MIB_A_MINUTE, first / 4)


def _memory(samples: list[Sample]) -> dict[str, Any]:
    """Sum up, without the beginning, in which caches fill; and compare the thirds of the whole."""
    warm = samples[int(len(samples) * _WARM_UP) :]
    times = [each.at for each in warm]
    figures: dict[str, Any] = {}
    for who in ("server", "worker"):
        values = [getattr(each, who) for each in warm]
        figures[f"{who}_mib_first_and_last"] = [round(values[0], 1), round(values[-1], 1)]
        figures[f"{who}_mib_a_minute"] = round(slope(times, values), 3)
        third = max(1, len(samples) // 3)
        first, last = (
            slope([each.at for each in part], [getattr(each, who) for each in part])
            for part in (samples[:third], samples[-third:])
        )
        figures[f"{who}_mib_a_minute_in_first_and_last_third"] = [round(first, 3), round(last, 3)]
        figures[f"{who}_plateaus"] = plateaus(first, last)
        every = samples[:: max(1, len(samples) // 20)]
        figures[f"{who}_mib_over_time"] = [round(getattr(each, who), 1) for each in every]
    return figures
