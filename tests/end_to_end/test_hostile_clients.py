"""What strangers may do to the server, and that the others do not notice. Loopback only."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
