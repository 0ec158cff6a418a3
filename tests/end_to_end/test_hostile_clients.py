"""What strangers may do to the server, and that the others do not notice. Loopback only."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from live_server import Live, live_server

MB = 1_000_000


def worst_answer(live: Live, goes_on: Callable[[], bool]) -> float:
    """The longest that /healthz takes, asked again and again over one connection."""
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"))
    worst = 0.0
    while goes_on():
        began = time.perf_counter()
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        worst = max(worst, time.perf_counter() - began)
        time.sleep(0.005)
    connection.close()
    return worst


def test_eight_bodies_of_sixty_megabytes_hold_up_nobody(tmp_path):
    picture = "data:image/png;base64," + "A" * (60 * MB)
    body = json.dumps({"version": "tegula/upscale", "input": {"image": picture}}).encode()

    def post(live: Live) -> int:
        connection = http.client.HTTPConnection(live.url.removeprefix("http://"))
        headers = {"authorization": f"Bearer {live.token}", "content-type": "application/json"}
        connection.request("POST", "/v1/predictions", body, headers)
        status = connection.getresponse().status
        connection.close()
        return status

    with live_server(tmp_path, max_bodies_bytes=500 * MB) as live, ThreadPoolExecutor(8) as pool:
        end = time.monotonic() + 1
        idle = worst_answer(live, lambda: time.monotonic() < end)
        posts = [pool.submit(post, live) for _ in range(8)]
        busy = worst_answer(live, lambda: not all(one.done() for one in posts))
        assert [one.result() for one in posts] == [201] * 8
    # A tenth of a second where the machine is quiet, and in proportion where it is not.
    assert busy < max(0.1, 5 * idle)


def connect(live: Live, stack: ExitStack, beginning: bytes = b"") -> socket.socket:
    """A connection to the server, with what it sends at once; closed with the stack."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
    connection.sendall(beginning)
    return connection


def closed(live: Live) -> dict[str, float]:
    """How many connections the server closed, by reason."""
    lines = httpx.get(f"{live.url}/metrics").text.splitlines()
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
    with live_server(tmp_path, **limits) as live, httpx.Client(base_url=live.url) as kept:
        assert kept.get("/healthz").status_code == 200
        with half_open(live, 1030):
            for _ in range(20):
                assert httpx.get(f"{live.url}/healthz").status_code == 200
            assert kept.get("/healthz").status_code == 200  # anew, where it was closed
            most = min(limits.get("max_connections_per_address", 512), 512)
            most = min(limits.get("max_connections", most), most)
            assert closed(live)["it waited longest of too many"] >= 1030 - most


def test_requests_that_run_are_never_closed_to_make_room(tmp_path):
    with live_server(tmp_path, max_connections_per_address=5) as live, ExitStack() as stack:
        head = f"POST /v1/predictions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.token}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        busy = [connect(live, stack, head.encode()) for _ in range(5)]
        time.sleep(0.2)
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
        while time.monotonic() - began < 10:
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
        assert 0.4 < time.monotonic() - began < 5
        assert b"HTTP/1.1 408 " in heard
        assert closed(live) == {"its headers are slow": 1}


def test_a_client_that_does_not_take_its_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tegula.server.api.connections._WRITE_S", 1.0)
    with live_server(tmp_path) as live, ExitStack() as stack:
        file = live.store.files.keep(
            live.store.accounts.ensure("ana").id, "large.bin", b"0" * 20 * MB
        )
        path = live.store.links.output(live.store.files.reference(file)).removeprefix(live.url)
        connect(live, stack, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        until = time.monotonic() + 10
        while "it does not take its answer" not in closed(live):
            assert time.monotonic() < until
            time.sleep(0.1)
