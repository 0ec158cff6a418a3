"""The program `tegula serve` itself, on a port of the loopback, with the packaged weights."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Served:
    """Where the server is, without ``/v1``, and a token for it."""

    url: str
    token: str


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Run the program until the block is left; it then has to end by itself."""
    where = ["--folder", str(folder)]
    made = _tegula("tokens", "create", "tests", *where, stdout=subprocess.PIPE, text=True)
    token = made.communicate()[0].strip()
    port = free_port()
    server = _tegula("serve", "--port", str(port), "--device", "cpu", *where)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(url, server)
        yield Served(url, token)
        server.send_signal(signal.SIGTERM)
        assert server.wait(300) == 0
    finally:
        server.kill()
        server.wait()


def photo() -> bytes:
    """A picture with slopes and an edge, small enough to be enlarged in seconds."""
    rows, columns = np.mgrid[0:48, 0:64]
    levels = np.stack([columns * 4, rows * 5, (columns > 32) * 200], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _tegula(*words: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "tegula", *words], env=environment, **options)


def _wait_until_up(url: str, server: subprocess.Popen) -> None:
    while True:
        assert server.poll() is None
        try:
            httpx.get(f"{url}/readyz").raise_for_status()
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
