"""What hostile connections do to somebody who uses the server as it is meant.

    python -m bench.hostile [--seconds 10] [--port 443] [--other-port 8443] [--plain]

Starts ``tegula serve --port 443`` on the loopback, as it is installed: over TLS with a certificate
made for it, without a proxy, with the settings that are there by default and the packaged weights,
in a folder that is deleted at the end. Then attacks it in one way after the other, for so many
seconds each and with a bounded number of connections. Meanwhile a well-behaved client of the same
address creates predictions, asks for them until they are done, and reads their outputs, each over a
connection of its own. Prints one row for each attack; fails if a request of the well-behaved client
did, or if the server logged an error of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import re
import shutil
import signal
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil

from bench.server import BODY

HOST = "127.0.0.1"
MANY = 1030
SOME = 200
MB = 1_000_000
_LARGE = 20 * MB
_PNG = b"\x89PNG\r\n"
_START_S = 120.0
_STOP_S = 60.0
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
    download: the path of a large file that needs no token.
    scale: the share of the connections and bytes of each attack.
    """

    port: int
    token: str
    certificate: str | None
    download: str = ""
    scale: float = 1.0

    def share(self, count: int) -> int:
        """Return this share of a number of connections or bytes, one at the least."""
        return max(1, round(self.scale * count))

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

    def ask(
        self,
        method: str,
        path: str,
        body: str | bytes | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        """Return the body of an answer, over a connection of its own.

        Raises:
            RuntimeError: the answer is an error.
        """
        connection = http.client.HTTPConnection(HOST, self.port)
        connection.sock = self.connect(_PATIENCE_S)
        headers = {"authorization": f"Bearer {self.token}", "content-type": content_type}
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
    held = _keep(target, target.share(MANY), b"GET / HTTP/1.1\r\nHost: x\r\n", end)
    time.sleep(max(0.0, end - time.monotonic()))
    del held


def idle_handshakes(target: Target, end: float) -> None:
    """Hold connections on which TLS never begins."""
    held = []
    for _ in range(target.share(MANY)):
        with contextlib.suppress(OSError):
            held.append(socket.create_connection((HOST, target.port), timeout=20))
    time.sleep(max(0.0, end - time.monotonic()))


def slow_headers(target: Target, end: float) -> None:
    """Send headers a byte at a time."""
    _drip(target, target.share(SOME), b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"y", end)


def slow_bodies(target: Target, end: float) -> None:
    """Send bodies a byte at a time."""
    head = (
        f"POST /v1/predictions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.token}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    )
    _drip(target, target.share(SOME), head.encode(), b" ", end)


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
    """Ask for large files and take a byte at a time."""
    request = f"GET {target.download} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    readers = _keep(target, target.share(SOME), request, end)
    while time.monotonic() < end:
        for connection in readers:
            with contextlib.suppress(OSError):
                connection.recv(1)
        time.sleep(0.5)


def large_bodies(target: Target, end: float) -> None:  # noqa: ARG001 - ends with its bodies
    """Send eight bodies of sixty megabytes at once."""
    picture = f"data:image/png;base64,iVBORw0KGgoA{'A' * target.share(60 * MB)}"
    body = json.dumps({"version": "tegula/upscale", "input": {"image": picture}})

    def send(_: int) -> None:
        with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
            target.ask("POST", "/v1/predictions", body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))


Attack = Callable[[Target, float], None]
ATTACKS: Sequence[tuple[str, Attack]] = (
    ("{many} half-open requests", half_open),
    ("{many} connections without a TLS handshake", idle_handshakes),
    ("{some} dripping headers", slow_headers),
    ("{some} dripping bodies", slow_bodies),
    ("headers of 10 MB, 4 at a time", huge_headers),
    ("2000 pipelined requests and junk, 4 at a time", pipelined_junk),
    ("{some} slow readers of {download:.0f} MB", slow_readers),
    ("8 bodies of {body:.0f} MB", large_bodies),
)


def named(name: str, target: Target) -> str:
    """Return the name of an attack with its numbers in it."""
    return name.format(
        many=target.share(MANY),
        some=target.share(SOME),
        download=target.share(_LARGE) / MB,
        body=target.share(60 * MB) / MB,
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
    memory_mib: resident memory of all processes of the server, again and again from the beginning
        to a moment after the end; pages that two of them share are counted twice.
    refused: what the server refused or closed, by reason or status.
    """

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
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
            if made["completed_at"] is not None:
                break
            time.sleep(_PACE_S)
            made = json.loads(timed(seen, target, "GET", f"/v1/predictions/{made['id']}"))
        if made["status"] != "succeeded":
            seen.failures.append(f"a prediction is {made['status']}: {made['error']}")
        elif not timed(seen, target, "GET", urlsplit(made["output"]).path).startswith(_PNG):
            seen.failures.append("an output is no picture")
    except (OSError, RuntimeError, http.client.HTTPException) as error:
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
    seen.memory_mib.append(tree_mib(pid))
    client.start()
    while client.is_alive():
        time.sleep(0.2)
        seen.memory_mib.append(tree_mib(pid))
    seen.refused = refusals(target) - before
    return seen


def tree_mib(pid: int) -> float:
    """Return the resident memory in MiB of a process and all below it."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total / 2**20


def _use_while(seen: Seen, target: Target, goes_on: Callable[[], bool]) -> None:
    while goes_on():
        use(seen, target)
        time.sleep(_PACE_S)


# The server.


def choose_port(wanted: int, other: int) -> int:
    """Return the wanted port, or the other and say so where that cannot be bound."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, wanted))
    except OSError as error:
        print(
            f"Port {wanted} cannot be bound ({error.strerror}); serving on {other}.",
            file=sys.stderr,
        )
        return other
    return wanted


@contextlib.contextmanager
def serving(port: int, scale: float, *, tls: bool) -> Iterator[tuple[Target, Target, int]]:
    """Run `tegula serve`; give it as its well-behaved and as its hostile clients see it.

    The third is its process.

    Raises:
        RuntimeError: it does not start, logs an error of its own, or does not end in order.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = make_certificate(Path(folder)) if tls else None
        good, bad = (
            Target(port, _create_token(name, folder), files and files[0], scale=scale)
            for name in ("good", "bad")
        )
        words = ["serve", "--host", HOST, "--port", str(port), "--folder", f"{folder}/data"]
        words += ["--tls-cert", files[0], "--tls-key", files[1]] if files else []
        log = Path(folder) / "log"
        with log.open("wb") as errors:
            server = _tegula(*words, stderr=errors)
        try:
            _wait_until_ready(good, server, log)
            download = _upload(good, b"\0" * good.share(_LARGE))
            yield replace(good, download=download), replace(bad, download=download), server.pid
            server.send_signal(signal.SIGTERM)
            if ended := server.wait(_STOP_S):
                raise RuntimeError(f"The server ended with status {ended}.")
            wrong = [line for line in log.read_text().splitlines() if '"level": "error"' in line]
            if wrong:
                raise RuntimeError("The server logged:\n" + "\n".join(wrong[:5]))
        finally:
            server.kill()
            server.wait()


def _tegula(
    *words: str, stdout: int | None = None, stderr: IO[bytes] | None = None
) -> subprocess.Popen[str]:
    """Run the command with no setting but those of its words."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("TEGULA_")}
    command = [sys.executable, "-m", "tegula", *words]
    return subprocess.Popen(command, env=inherited, text=True, stdout=stdout, stderr=stderr)


def _create_token(name: str, folder: str) -> str:
    """Create an account with a token, and return that."""
    words = ("tokens", "create", name, "--account", name, "--folder", f"{folder}/data")
    return _tegula(*words, stdout=subprocess.PIPE).communicate()[0].strip()


def _wait_until_ready(target: Target, server: subprocess.Popen[str], log: Path) -> None:
    """Wait until the server answers, and its engine has run once.

    Raises:
        RuntimeError: the server ended, or is not ready in time.
    """
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
            target.ask("GET", "/readyz")
            use(first := Seen(), target)
            if not first.failures:
                return
        time.sleep(0.1)
    raise RuntimeError(f"The server does not start:\n{log.read_text()[-2000:]}")


def _upload(target: Target, content: bytes) -> str:
    """Upload a file; return the path at which everybody may download it."""
    head = '--end\r\nContent-Disposition: form-data; name="content"; filename="large.bin"\r\n\r\n'
    form = head.encode() + content + b"\r\n--end--\r\n"
    kept = json.loads(target.ask("POST", "/v1/files", form, "multipart/form-data; boundary=end"))
    parts = urlsplit(kept["urls"]["download"])
    return f"{parts.path}?{parts.query}"


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
    memory = (seen.memory_mib[0], max(seen.memory_mib), seen.memory_mib[-1])
    cells = [
        name,
        f"{len(seen.failures)} of {len(seen.seconds) + len(seen.failures)}",
        f"{seen.worst_ms:.0f} ms",
        f"{seen.worst_ms / idle.worst_ms:.1f}",
        refused or "none",
        f"{', '.join(f'{mib:.0f}' for mib in memory)} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> None:
    """Attack, watch and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each attack")
    parser.add_argument("--port", type=int, default=443, help="of the server")
    parser.add_argument(
        "--other-port", type=int, default=8443, help="where that cannot be bound", metavar="PORT"
    )
    parser.add_argument("--plain", action="store_true", help="without TLS")
    parser.add_argument("--only", help="attacks whose name has this in it", default="")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the connections and bytes, 0..1"
    )
    given = parser.parse_args(words)
    port = choose_port(given.port, given.other_port)
    context = multiprocessing.get_context("spawn")
    failed = False
    with serving(port, min(1.0, given.scale), tls=not given.plain) as (target, attacked, pid):
        print("| attack | failed | worst | to idle | refused or closed | memory |")
        print("|---|---|---|---|---|---|", flush=True)
        end = time.monotonic() + given.seconds
        idle = watch(target, pid, lambda: time.monotonic() < end)
        failed = bool(idle.failures)
        print(row("none", idle, idle), flush=True)
        for name, work in ATTACKS:
            if given.only not in name or (given.plain and work is idle_handshakes):
                continue
            process = context.Process(target=attack, args=(work, attacked, given.seconds))
            process.start()
            seen = watch(target, pid, process.is_alive)
            process.join()
            print(row(named(name, target), seen, idle), flush=True)
            for failure in seen.failures[:5]:
                print(f"  {failure}", file=sys.stderr)
            failed = failed or bool(seen.failures)
    if failed:
        raise SystemExit("Requests of the well-behaved client failed.")


if __name__ == "__main__":
    main()
