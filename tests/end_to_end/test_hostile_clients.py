"""What strangers may do to the server, and that the others do not notice. Loopback only."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import logging
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from api_support import DATA_URI, PNG
from live_server import Live, certificate, eventually, live_server
from serve_support import free_port

from bench import hostile, soak

MB = 1_000_000


@contextmanager
def watched_loop(live: Live) -> Iterator[list[float]]:
    """Collect how long the event loop computes between two of its turns, in processor time.

    The clock of a thread stands still while other programs run: a busy machine changes nothing.
    """
    turns: list[float] = []

    async def watch() -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0.002)
            turns.append(time.thread_time() - began)

    watching = asyncio.run_coroutine_threadsafe(watch(), live.program.servers[0].get_loop())
    try:
        yield turns
    finally:
        watching.cancel()


def test_eight_bodies_of_sixty_megabytes_hold_up_nobody(tmp_path):
    picture = "data:image/png;base64,iVBORw0KGgoA" + "A" * (60 * MB)
    body = json.dumps({"version": "tegula/upscale", "input": {"image": picture}}).encode()
    began = time.thread_time()
    json.loads(body)
    parsing = time.thread_time() - began

    def post(live: Live) -> int:
        connection = http.client.HTTPConnection(live.url.removeprefix("http://"))
        headers = {"authorization": f"Bearer {live.token}", "content-type": "application/json"}
        connection.request("POST", "/v1/predictions", body, headers)
        status = connection.getresponse().status
        connection.close()
        return status

    with (
        live_server(tmp_path, max_bodies_bytes=500 * MB) as live,
        ThreadPoolExecutor(8) as pool,
        watched_loop(live) as turns,
    ):
        assert list(pool.map(lambda _: post(live), range(8))) == [201] * 8
    # A sixth of it on a quiet machine, and several times as much for a body that the loop reads.
    assert max(turns) < parsing


def connect(live: Live, stack: ExitStack, beginning: bytes = b"") -> socket.socket:
    """A connection to the server, with what it sends at once; closed with the stack."""
    host, port = live.url.partition("://")[2].split(":")
    connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=120))
    connection.sendall(beginning)
    return connection


def closed(live: Live, trust: ssl.SSLContext | bool = True) -> dict[str, float]:
    """How many connections the server closed, by reason.

    It may close ours, too, where it gives little time for headers and the machine is busy.
    """
    while True:
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{live.url}/metrics", verify=trust, timeout=120)
            if answer.status_code == 200:
                break
    lines = answer.text.splitlines()
    name = "tegula_connections_closed_total{reason="
    counts = [line.removeprefix(name).split("} ") for line in lines if line.startswith(name)]
    return {reason.strip('"'): float(count) for reason, count in counts}


@contextmanager
def half_open(live: Live, count: int) -> Iterator[None]:
    """Hold connections that never complete their headers."""
    with ExitStack() as stack:
        for _ in range(count):
            connect(live, stack, b"GET / HTTP/1.1\r\nHost: x\r\n")
        yield


@pytest.mark.parametrize(
    "limits", [{}, {"max_connections_per_address": 50}, {"max_connections": 60}]
)
def test_a_thousand_half_open_requests_refuse_nobody_else(tmp_path, limits):
    with (
        live_server(tmp_path, header_seconds=600, **limits) as live,
        httpx.Client(base_url=live.url, timeout=120) as kept,
    ):
        assert kept.get("/healthz").status_code == 200
        with half_open(live, 1030):
            for _ in range(20):
                assert httpx.get(f"{live.url}/healthz", timeout=120).status_code == 200
            assert kept.get("/healthz").status_code == 200  # anew, where it was closed
            most = min(limits.get("max_connections_per_address", 512), 512)
            most = min(limits.get("max_connections", most), most)
            assert closed(live)["it waited longest of too many"] >= 1030 - most


def test_requests_that_run_are_never_closed_to_make_room(tmp_path):
    with live_server(tmp_path, max_connections_per_address=5) as live, ExitStack() as stack:
        head = f"POST /v1/predictions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.token}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        busy = [connect(live, stack, head.encode()) for _ in range(5)]
        table = live.program.config.http.table
        eventually(lambda: len(table._all) == 5 and not table._waiting)
        refused = connect(live, stack).recv(1000)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 5" in refused
        for connection in busy:
            connection.sendall(b"x" * 100)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
        assert closed(live)["too many connections of its address"] == 1


@pytest.mark.parametrize(
    "beginning",
    [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /"],
    ids=["nothing", "half", "half of a second"],
)
def test_headers_have_their_time_however_they_drip(tmp_path, beginning):
    with live_server(tmp_path, header_seconds=0.5) as live, ExitStack() as stack:
        dripping = connect(live, stack, beginning)
        began, heard = time.monotonic(), b""
        dripping.settimeout(0.1)
        while time.monotonic() - began < 300:
            try:
                more = dripping.recv(1000)
            except TimeoutError:
                if beginning:
                    dripping.sendall(b"x")
                continue
            except ConnectionError:
                break
            if not more:
                break
            heard += more
        assert 0.4 < time.monotonic() - began < 300
        assert b"HTTP/1.1 408 " in heard
        assert set(closed(live)) == {"its headers are slow"}


def test_a_client_that_does_not_take_its_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tegula.server.api.connections.WRITE_S", 1.0)
    with live_server(tmp_path) as live, ExitStack() as stack:
        file = live.store.files.keep(
            live.store.accounts.ensure("ana").id, "large.bin", b"0" * 20 * MB
        )
        path = live.store.links.output(live.store.files.reference(file)).removeprefix(live.url)
        connect(live, stack, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        eventually(lambda: "it does not take its answer" in closed(live))


def heard(connection: socket.socket) -> bytes:
    """Everything that comes until the connection ends."""
    reported = b""
    with suppress(ConnectionError):
        while more := connection.recv(65536):
            reported += more
    return reported


@pytest.mark.parametrize("pieces", [1, 20])
def test_headers_have_a_size_however_they_come(tmp_path, pieces):
    with live_server(tmp_path) as live, ExitStack() as stack:
        large = connect(live, stack, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Large: ")
        with suppress(ConnectionError):
            for _ in range(pieces):
                large.sendall(b"y" * (100_000 // pieces))
                time.sleep(0.01)
            large.sendall(b"\r\n\r\n")
        answer = heard(large)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"The headers must have at most 64 kB." in answer
        assert closed(live) == {"its headers are too large": 1}
        assert httpx.get(f"{live.url}/healthz", headers={"x": "y" * 60_000}).status_code == 200
        long = connect(live, stack, b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert heard(long).startswith(b"HTTP/1.1 431 ")


def test_headers_behind_a_request_that_runs_have_a_size_too(tmp_path):
    with live_server(tmp_path) as live, ExitStack() as stack:
        body = {"version": "tegula/upscale", "input": {"image": DATA_URI, "prompt": "gated"}}
        token = {"authorization": f"Bearer {live.token}"}
        made = httpx.post(f"{live.url}/v1/predictions", json=body, headers=token).json()
        stream = made["urls"]["stream"].removeprefix(live.url)
        busy = connect(live, stack, f"GET {stream} HTTP/1.1\r\nHost: x\r\n\r\nGET /".encode())
        with suppress(ConnectionError):
            for _ in range(50):
                busy.sendall(b"y" * 10_000)
                time.sleep(0.01)
        assert b"431" not in heard(busy)  # nothing may stand in the middle of an answer
        assert closed(live) == {"its headers are too large": 1}


def test_what_is_no_http_is_told_so_once_and_never_within_another_answer(tmp_path):
    with live_server(tmp_path) as live, ExitStack() as stack:
        answer = heard(connect(live, stack, b"\x00\xff" * 100))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"content-type: application/problem+json" in answer
        body = {"version": "tegula/upscale", "input": {"image": DATA_URI, "prompt": "gated"}}
        token = {"authorization": f"Bearer {live.token}"}
        made = httpx.post(f"{live.url}/v1/predictions", json=body, headers=token).json()
        stream = made["urls"]["stream"].removeprefix(live.url)
        busy = connect(live, stack, f"GET {stream} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert busy.recv(100).startswith(b"HTTP/1.1 200 ")
        busy.sendall(b"\x00\xff" * 100)
        assert b"HTTP/1.1 400" not in heard(busy)


def test_a_connection_may_send_some_requests_ahead_and_not_thousands(tmp_path):
    ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    with live_server(tmp_path) as live, ExitStack() as stack:
        few = connect(live, stack, (ask + b"\r\n") * 20 + ask + b"Connection: close\r\n\r\n")
        assert heard(few).count(b"HTTP/1.1 200 ") == 21
        assert heard(connect(live, stack, (ask + b"\r\n") * 2000)).count(b"HTTP/1.1 200 ") <= 34
        assert closed(live) == {"too many requests at once": 1}


# Over TLS, without a proxy in front.


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"))


def trusting(tls: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=tls[0])


@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_over_tls_predictions_are_created_streamed_and_read(tmp_path, tls, loop):
    large = {"version": "tegula/upscale", "input": {"image": DATA_URI, "prompt": "y" * MB}}
    with (
        live_server(tmp_path, tls, loop=loop) as live,
        httpx.Client(base_url=live.url, verify=trusting(tls), timeout=120) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        client.headers["authorization"] = f"Bearer {live.token}"
        made = client.post("/v1/predictions", json=large).json()
        assert "event: done" in client.get(made["urls"]["stream"]).text
        output = client.get(made["urls"]["get"]).json()["output"]
        assert output.startswith(f"{live.url}/o/")
        assert client.get(output).content == PNG

        def begin(_: int) -> int:
            answer = httpx.get(f"{live.url}/healthz", verify=trusting(tls), timeout=120)
            return answer.status_code

        # What a client sends at once must not be lost between TCP and TLS.
        assert list(pool.map(begin, range(60))) == [200] * 60
        assert closed(live, trusting(tls)) == {}


@pytest.mark.parametrize("loop", ["auto", "asyncio"])
@pytest.mark.parametrize("beginning", [b"", b"\x16\x03\x01\x02"], ids=["nothing", "a little"])
def test_a_handshake_has_the_time_of_headers(tmp_path, tls, loop, beginning):
    with live_server(tmp_path, tls, loop=loop, header_seconds=0.5) as live, ExitStack() as stack:
        silent = connect(live, stack, beginning)
        began = time.monotonic()
        assert heard(silent) == b""
        assert time.monotonic() - began > 0.4
        assert "its TLS handshake is slow" in closed(live, trusting(tls))


def test_a_client_that_speaks_no_tls_is_closed_and_counted(tmp_path, tls):
    with live_server(tmp_path, tls) as live, ExitStack() as stack:
        heard(connect(live, stack, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
        eventually(lambda: closed(live, trusting(tls)) == {"its TLS handshake failed": 1})


def test_a_handshake_for_which_no_file_is_left_leaves_nothing_behind(tmp_path, tls, monkeypatch):
    def fail(_descriptor):
        raise OSError(errno.EMFILE, "Too many open files")

    with live_server(tmp_path, tls) as live, ExitStack() as stack:
        with monkeypatch.context() as full:
            full.setattr("tegula.server.api.connections.os.dup", fail)
            for _ in range(5):
                assert heard(connect(live, stack)) == b""
        assert closed(live, trusting(tls)) == {"its TLS handshake failed": 5}


@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_handshakes_that_never_begin_count_as_connections_and_refuse_nobody(tmp_path, tls, loop):
    limits = {"max_connections_per_address": 20, "header_seconds": 600}
    with live_server(tmp_path, tls, loop=loop, **limits) as live, ExitStack() as stack:
        silent = [connect(live, stack) for _ in range(100)]
        for _ in range(5):
            answer = httpx.get(f"{live.url}/healthz", verify=trusting(tls), timeout=120)
            assert answer.status_code == 200
        assert closed(live, trusting(tls))["it waited longest of too many"] >= 80
        for connection in silent[:80]:
            assert heard(connection) == b""


def test_headers_over_tls_have_what_the_handshake_left_of_their_time(tmp_path, tls):
    with live_server(tmp_path, tls, header_seconds=0.5) as live, ExitStack() as stack:
        raw = connect(live, stack)
        connection = stack.enter_context(
            trusting(tls).wrap_socket(raw, server_hostname="127.0.0.1")
        )
        connection.sendall(b"GET / HTTP/1.1\r\n")
        assert heard(connection).startswith(b"HTTP/1.1 408 ")
        assert "its headers are slow" in closed(live, trusting(tls))


def test_a_server_that_stops_waits_for_no_handshake(tmp_path, tls):
    with ExitStack() as stack:
        with live_server(tmp_path, tls, header_seconds=600) as live:
            connect(live, stack)
            assert httpx.get(f"{live.url}/healthz", verify=trusting(tls)).status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < 300


# What the operator sees, and what the system allows.


def test_the_log_has_one_line_for_many_connections_that_were_closed(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "tegula.api")

    def lines():
        return [each for each in caplog.records if each.name == "tegula.api"]

    with (
        live_server(tmp_path, max_connections_per_address=5, header_seconds=600) as live,
        half_open(live, 60),
    ):
        assert httpx.get(f"{live.url}/healthz", timeout=120).status_code == 200
        eventually(lambda: sum(vars(each)["connections"] for each in lines()) >= 56)
    (first, *more) = lines()
    assert first.getMessage() == "Connections closed: it waited longest of too many"
    # A line a second: one or two, and some more where connecting takes seconds.
    assert (vars(first)["client"], len(more) < 20) == ("127.0.0.1", True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_the_server_raises_its_limit_of_files_and_fits_connections_into_it(tmp_path):
    program = """
import logging, resource, sys
logging.basicConfig(format="%(message)s")
from tegula.server.api.app import create_app
from tegula.server.api.connections import serving_config
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
store = Store.open(ServerSettings(folder=sys.argv[1]))
app = create_app(store)
for hard in (2000, 400):
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    most = serving_config(app).http.table.limits.most
    print(*resource.getrlimit(resource.RLIMIT_NOFILE), most)
store.close()
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["2000 2000 1500", "400 400 300"]
    assert ran.stderr.splitlines() == [
        "At most 1500 connections, because 2000 files may be open.",
        "At most 300 connections, because 400 files may be open.",
    ]


# The bench that attacks the command itself.


def test_the_bench_attacks_tegula_serve_and_its_client_notices_nothing(capfd):
    port = str(hostile.choose_port(free_port(), 0))
    hostile.main(
        ["--port", port, "--seconds", "0.3", "--scale", "0.02", "--only", "dripping headers"]
    )
    shown, said = capfd.readouterr()
    idle, attacked = shown.splitlines()[2:]
    assert idle.startswith("| none | 0 of ")
    assert re.match(r"\| 4 dripping headers \| 0 of \d+ \| \d+ ms \|", attacked)
    assert re.search(r"\| \d{2,}, \d{2,}, \d{2,} MiB \|$", attacked)
    assert said == ""


def test_the_soak_tells_growth_that_ends_from_growth_that_goes_on():
    def reported(server):
        return soak._memory([soak.Sample(5.0 * n, server(n), 40.0) for n in range(120)])

    ends = reported(lambda n: 100 + 20 * (1 - 0.95**n))
    goes_on = reported(lambda n: 100 + 0.2 * n)
    assert (ends["server_plateaus"], goes_on["server_plateaus"]) == (True, False)
    assert goes_on["server_mib_a_minute_in_first_and_last_third"] == [2.4, 2.4]


def test_the_bench_takes_another_port_where_its_own_cannot_be_bound(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert hostile.choose_port(port, 8443) == 8443
    said = capsys.readouterr().err
    assert said == f"Port {port} cannot be bound (Address already in use); serving on 8443.\n"
