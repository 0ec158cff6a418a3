"""What hostile connections do to somebody who uses the server as it is meant.

    python -m bench.hostile [--seconds 10] [--plain]

Serves on the loopback, over TLS with a certificate made for it and with the settings that are there
by default, and attacks it in one way after the other, for so many seconds each and with a bounded
number of connections. Meanwhile a well-behaved client of the same address creates predictions, asks
for them until they are done, and reads their outputs, each request over a connection of its own.
Prints one row for each attack; fails if a request of the well-behaved client did.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import multiprocessing
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.server import BODY, PICTURE, NoOp
from bench.soak import resident

HOST = "127.0.0.1"
MANY = 1030
SOME = 200
MB = 1_000_000
_LARGE_OUTPUT = 20 * MB
_PACE_S = 0.2
_PATIENCE_S = 60.0
_WORDS = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
_CLOSED = re.compile(r'^tegula_connections_closed_total\{reason="(.*)"\} (.*)$', re.MULTILINE)
_ANSWERED = re.compile(
    r'^tegula_http_requests_total\{method="\w+",status="([45].*)"\} (.*)$', re.MULTILINE
)


@dataclass(frozen=True)
class Target:
    """The server as its clients see it.

    certificate: what it proves itself with; None without TLS.
    output: the path of a large output.
    """

    port: int
    token: str
    output: str
    certificate: str | None

    def connect(self, timeout: float = 20.0) -> socket.socket:
        """Open a connection, and TLS on it."""
        raw = socket.create_connection((HOST, self.port), timeout=timeout)
        if self.certificate is None:
            return raw
        context = ssl.create_default_context(cafile=self.certificate)
        try:
            return context.wrap_socket(raw, server_hostname=HOST)
        except BaseException:
            raw.close()
            raise

    def ask(self, method: str, path: str, body: str | None = None) -> bytes:
        """Return the body of an answer, over a connection of its own.

        Raises:
            RuntimeError: the answer is an error.
        """
        connection = http.client.HTTPConnection(HOST, self.port)
        connection.sock = self.connect(_PATIENCE_S)
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {content[:200]!r}")
            return content


# The attacks. Each is called in a process of its own, with the target and the moment of its end.


def _keep(target: Target, count: int, beginning: bytes, end: float) -> list[socket.socket]:
    """Open many connections, and send how a request begins."""
    opened: list[socket.socket] = []
    while len(opened) < count and time.monotonic() < end:
        with contextlib.suppress(OSError):
            opened.append(target.connect())
            opened[-1].sendall(beginning)
    return opened


def _drip(target: Target, count: int, beginning: bytes, piece: bytes, end: float) -> None:
    """Send requests piece by piece, and open others in place of those that are closed."""
    dripping = _keep(target, count, beginning, end)
    while time.monotonic() < end:
        going_on = [connection for connection in dripping if _sent(connection, piece)]
        dripping = going_on + _keep(target, count - len(going_on), beginning, end)
        time.sleep(0.5)


def _sent(connection: socket.socket, piece: bytes) -> bool:
    """Send a piece; return whether the connection is open."""
    try:
        connection.sendall(piece)
    except OSError:
        connection.close()
        return False
    return True


def _repeat(work: Callable[[], object], end: float, threads: int = 4) -> None:
    """Do something again and again in some threads."""

    def run() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                work()

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(run)


def half_open(target: Target, end: float) -> None:
    """Hold connections whose headers never end."""
    held = _keep(target, MANY, b"GET / HTTP/1.1\r\nHost: x\r\n", end)
    time.sleep(max(0.0, end - time.monotonic()))
    del held


def idle_handshakes(target: Target, end: float) -> None:
    """Hold connections on which TLS never begins."""
    held = []
    for _ in range(MANY):
        with contextlib.suppress(OSError):
            held.append(socket.create_connection((HOST, target.port), timeout=20))
    time.sleep(max(0.0, end - time.monotonic()))


def slow_headers(target: Target, end: float) -> None:
    """Send headers a byte at a time."""
    _drip(target, SOME, b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"y", end)


def slow_bodies(target: Target, end: float) -> None:
    """Send bodies a byte at a time."""
    head = (
        f"POST /v1/predictions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.token}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    )
    _drip(target, SOME, head.encode(), b" ", end)


def huge_headers(target: Target, end: float) -> None:
    """Send headers of ten megabytes."""

    def send() -> None:
        with target.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Large: ")
            for _ in range(100):
                connection.sendall(b"y" * (MB // 10))

    _repeat(send, end)


def pipelined_junk(target: Target, end: float) -> None:
    """Send thousands of requests at once and read no answer, then what is no HTTP."""

    def send() -> None:
        with target.connect() as connection:
            connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
            connection.sendall(b"\x00\xff" * 1000)

    _repeat(send, end)


def slow_readers(target: Target, end: float) -> None:
    """Ask for large outputs and take a byte at a time."""
    asked = f"GET {target.output} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    readers = _keep(target, SOME, asked, end)
    while time.monotonic() < end:
        for connection in readers:
            with contextlib.suppress(OSError):
                connection.recv(1)
        time.sleep(0.5)


def large_bodies(target: Target, end: float) -> None:  # noqa: ARG001 - ends with its bodies
    """Send eight bodies of sixty megabytes at once."""
    picture = f"data:image/png;base64,{'A' * (60 * MB)}"
    body = json.dumps({"version": "tegula/upscale", "input": {"image": picture}})

    def send(_: int) -> None:
        with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
            target.ask("POST", "/v1/predictions", body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))


Attack = Callable[[Target, float], None]
ATTACKS: Sequence[tuple[str, Attack]] = (
    (f"{MANY} half-open requests", half_open),
    (f"{MANY} connections without a TLS handshake", idle_handshakes),
    (f"{SOME} dripping headers", slow_headers),
    (f"{SOME} dripping bodies", slow_bodies),
    ("headers of 10 MB, 4 at a time", huge_headers),
    ("2000 pipelined requests and junk, 4 at a time", pipelined_junk),
    (f"{SOME} slow readers of 20 MB", slow_readers),
    ("8 bodies of 60 MB", large_bodies),
)


def attack(work: Attack, target: Target, seconds: float) -> None:
    """Run one attack; the entry of its process."""
    from tegula.server.api.connections import raise_file_limit

    raise_file_limit()
    work(target, time.monotonic() + seconds)


# The well-behaved client, and what is seen meanwhile.


@dataclass
class Seen:
    """What happened while something went on.

    seconds: of each request that was answered.
    refused: what the server refused or closed, by reason or status.
    """

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory_mib: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def worst_ms(self) -> float:
        """The longest that a request took."""
        return 1000 * max(self.seconds, default=0.0)


def timed(seen: Seen, target: Target, method: str, path: str, body: str | None = None) -> bytes:
    """Ask, and note how long it took."""
    began = time.monotonic()
    content = target.ask(method, path, body)
    seen.seconds.append(time.monotonic() - began)
    return content


def use(seen: Seen, target: Target) -> None:
    """Do once what clients do: create a prediction, wait for it and read its output."""
    try:
        made = json.loads(timed(seen, target, "POST", "/v1/predictions", BODY))
        for _ in range(int(_PATIENCE_S / _PACE_S)):
            if made["status"] == "succeeded":
                break
            time.sleep(_PACE_S)
            made = json.loads(timed(seen, target, "GET", f"/v1/predictions/{made['id']}"))
        path = made["output"].partition(f":{target.port}")[2]
        if timed(seen, target, "GET", path) != base64.b64decode(PICTURE.partition(",")[2]):
            seen.failures.append("the output is another")
    except (OSError, RuntimeError, http.client.HTTPException, AttributeError) as error:
        seen.failures.append(repr(error))


def refusals(target: Target) -> Counter[str]:
    """Return what the server refused so far."""
    text = target.ask("GET", "/metrics").decode()
    counts: Counter[str] = Counter()
    for name, count in (*_CLOSED.findall(text), *_ANSWERED.findall(text)):
        counts[f"answered {name}" if name.isdigit() else name] += int(float(count))
    return counts


def watch(target: Target, pid: int, goes_on: Callable[[], bool]) -> Seen:
    """Use the server for as long as something goes on."""
    seen, before = Seen(), refusals(target)
    client = threading.Thread(target=_use_while, args=(seen, target, goes_on))
    client.start()
    while client.is_alive():
        seen.memory_mib = max(seen.memory_mib, resident(pid))
        time.sleep(0.1)
    seen.refused = refusals(target) - before
    return seen


def _use_while(seen: Seen, target: Target, goes_on: Callable[[], bool]) -> None:
    while goes_on():
        use(seen, target)
        time.sleep(_PACE_S)


# The server.


def serve(folder: str, port: int, certificate: tuple[str, str] | None, ready: Any) -> None:
    """Serve until killed; puts two tokens and the path of a large output into the queue."""
    from tegula.cli.serve import share_heaps
    from tegula.server.api.app import GracefulServer, create_app
    from tegula.server.api.connections import serving_config
    from tegula.server.settings import ServerSettings
    from tegula.server.store import Store

    share_heaps()
    scheme = "https" if certificate else "http"
    url = f"{scheme}://{HOST}:{port}"
    store = Store.open(ServerSettings(folder=Path(folder), public_url=url, inline_output_bytes=0))
    accounts = [store.accounts.ensure(name).id for name in ("good", "bad")]
    tokens = [store.accounts.create_token(account, account)[1] for account in accounts]
    large = store.files.keep(accounts[0], "large.bin", b"\0" * _LARGE_OUTPUT)
    link = store.links.output(store.files.reference(large))
    app = create_app(store, background=[NoOp(store, base64.b64decode(PICTURE.partition(",")[2]))])
    files = dict(zip(("ssl_certfile", "ssl_keyfile"), certificate or (), strict=False))
    config = serving_config(app, host=HOST, port=port, log_level="error", **files)
    ready.put((*tokens, link.removeprefix(url)))
    GracefulServer(config, app.state.service).run()


@contextlib.contextmanager
def serving(*, tls: bool) -> Iterator[tuple[Target, Target, int]]:
    """Give the server as its well-behaved and as its hostile clients see it, and its process."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = make_certificate(Path(folder)) if tls else None
        ready = context.Queue()
        process = context.Process(target=serve, args=(f"{folder}/data", port, files, ready))
        process.start()
        try:
            good, bad, output = ready.get(timeout=60)
            while socket.socket().connect_ex((HOST, port)):
                time.sleep(0.05)
            ends = [Target(port, token, output, files and files[0]) for token in (good, bad)]
            yield ends[0], ends[1], process.pid or 0
        finally:
            process.kill()
            process.join()


def make_certificate(folder: Path) -> tuple[str, str]:
    """Return the files of a certificate for the loopback, and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise SystemExit("The certificate is made by openssl, which is not installed; --plain?")
    names = ["-addext", f"subjectAltName=IP:{HOST}", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([openssl, *_WORDS.split(), *names], cwd=folder, check=True, capture_output=True)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def row(name: str, seen: Seen, idle: Seen) -> str:
    """Return a line of the table."""
    refused = ", ".join(f"{count} {reason}" for reason, count in seen.refused.most_common())
    cells = [
        name,
        f"{len(seen.failures)} of {len(seen.seconds) + len(seen.failures)}",
        f"{seen.worst_ms:.0f} ms",
        f"{seen.worst_ms / idle.worst_ms:.1f}",
        refused or "none",
        f"{seen.memory_mib:.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Attack, watch and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each attack")
    parser.add_argument("--plain", action="store_true", help="without TLS")
    parser.add_argument("--only", help="attacks whose name has this in it")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    failed = False
    with serving(tls=not given.plain) as (target, attacked, pid):
        print("| attack | failed | worst | to idle | refused or closed | memory |")
        print("|---|---|---|---|---|---|", flush=True)
        end = time.monotonic() + given.seconds
        idle = watch(target, pid, lambda: time.monotonic() < end)
        print(row("none", idle, idle), flush=True)
        for name, work in ATTACKS:
            if (given.only or "") not in name or (given.plain and work is idle_handshakes):
                continue
            process = context.Process(target=attack, args=(work, attacked, given.seconds))
            process.start()
            seen = watch(target, pid, process.is_alive)
            process.join()
            print(row(name, seen, idle), flush=True)
            for failure in seen.failures[:5]:
                print(f"  {failure}", file=sys.stderr)
            failed = failed or bool(seen.failures)
    if failed:
        raise SystemExit("Requests of the well-behaved client failed.")


if __name__ == "__main__":
    main()
