"""The official clients, as their registries have them, against a server on the loopback.

They are those in the folder that TEGULA_CLIENTS names. Without it they are installed into the
user's cache; where that cannot be done the tests are skipped, and say why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from api_support import PNG
from live_server import Live, eventually, live_server, proxy
from photo_support import SIZE, distance, photograph
from PIL import Image
from serve_support import Served, free_port, served

from tegula.catalog import find
from tegula.server.predictions import NewPrediction
from tests.end_to_end.clients import install

SCRIPTS = Path(__file__).parent / "clients"
OLDEST_NODE = 18
A_PAGE = 100
PATIENCE_S = 1800 if os.environ.get("TEGULA_GUIDE") else 300
PYTHON_1, PYTHON_2 = "py_replicate_1.py", "py_replicate_2.py"
NPM, STAINLESS, MCP = "npm_replicate.mjs", "npm_stainless.mjs", "mcp.py"
PYTHONS = {PYTHON_1: "py-1.0.7", PYTHON_2: "py-2.0.0b4", MCP: "py-1.0.7"}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Clients:
    """Runs programs with a client in them."""

    folder: Path

    def drive(
        self, live: Live | Served, folder: Path, script: str, picture: bytes = PNG, **more: str
    ) -> dict:
        """Run a program and return what it printed."""
        image, output = folder / "photo.png", folder / "output.png"
        image.write_bytes(picture)
        given = {
            "PATH": os.environ["PATH"],
            "CLIENTS": str(self.folder),
            "URL": live.url,
            "TOKEN": live.token,
            "REPLICATE_BASE_URL": live.url,
            "REPLICATE_API_TOKEN": live.token,
            "IMAGE": str(image),
            "OUTPUT": str(output),
            **more,
        }
        words = [self._program(script), str(SCRIPTS / script)]
        done = subprocess.run(
            words, env=given, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def _program(self, script: str) -> str:
        if script not in PYTHONS:
            return "node"
        return str(self.folder / PYTHONS[script] / "bin" / "python")


@pytest.fixture(scope="session")
def clients():
    if given := os.environ.get("TEGULA_CLIENTS"):
        folder = Path(given).resolve()
        if not install.is_installed(folder):
            install.install(folder)
        return Clients(folder)
    if reason := _lacking():
        pytest.skip(reason)
    try:
        return Clients(install.install_in_cache())
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the clients could not be installed: {error}")


def _lacking() -> str:
    """What the JavaScript clients need and is not here."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "the JavaScript clients need node and npm"
    reported = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
    if int(reported.stdout.strip().lstrip("v").split(".")[0] or 0) < OLDEST_NODE:
        return f"the JavaScript clients need node {OLDEST_NODE} or newer"
    return ""


@pytest.fixture(scope="module")
def live(clients, tmp_path_factory):
    """A server whose predictions fill more than a page."""
    with live_server(tmp_path_factory.mktemp("server")) as server:
        owner = server.store.accounts.ensure("ana").id
        version = find("tegula/upscale")
        new = NewPrediction(owner, version.name, version.id, {})
        for _ in range(A_PAGE + 1):
            server.store.predictions.cancel(server.store.predictions.create(new).prediction.id)
        yield server


def test_npm_replicate(clients, live, tmp_path):
    seen = clients.drive(live, tmp_path, NPM)
    assert seen["guide"] == {"kind": "PNG", "uploaded": True}
    assert seen["uploaded"] == {"same": True, "bytes": len(PNG)}
    assert seen["polled"] == {"bytes": len(PNG), "last": 1}
    assert seen["streamed"] == {"kinds": ["output", "done"], "bytes": len(PNG)}
    assert seen["aborted"] == "canceled"
    assert seen["failed"] == "Prediction failed: The model broke."
    assert seen["refused"] == [422, True]
    assert seen["files"] == {
        "type": "image/png",
        "metadata": {"kind": "test"},
        "listed": True,
        "gone": True,
    }
    assert seen["webhook"] == {
        "status": "succeeded",
        "valid": True,
        "parsed": True,
        "tampered": False,
    }
    assert "batouresearch/high-resolution-controlnet-tile" in seen["lists"]["models"]
    assert seen["lists"]["collections"] == ["super-resolution"]
    assert seen["lists"]["pages"][0] == A_PAGE < sum(seen["lists"]["pages"])
    assert seen["lists"]["account"] == "ana"
    assert seen["deployments"] == {
        "number": 2,
        "status": "succeeded",
        "deployment": "ana/fast",
        "listed": 1,
        "gone": True,
    }


def test_python_replicate_1(clients, live, tmp_path):
    seen = clients.drive(live, tmp_path, PYTHON_1)
    assert seen["guide"] == ["PNG"]
    assert seen["single"] == "PNG"
    assert seen["base64"] == seen["in_async"] == len(PNG)
    assert seen["streamed"] == ["output", "done"]
    assert seen["by_module"] == [len(PNG), ["output", "done"]] * 2
    assert seen["lists"]["pages"][0] == A_PAGE < sum(seen["lists"]["pages"])
    assert seen["progressed"] == ["succeeded", 1.0]
    assert seen["cancelled"] == "canceled"
    assert seen["failed"] == "The model broke."
    assert seen["refused"] == [422, "Input validation failed"]
    assert seen["files"] == ["image/png", {"kind": "test"}, True]
    assert seen["lists"]["schema"] == ["Input", "Output"]
    assert "high-resolution-controlnet-tile" in seen["lists"]["search"]
    assert seen["lists"]["account"] == "ana"
    assert seen["deployment"] == "succeeded"


def test_python_replicate_2(clients, live, tmp_path):
    seen = clients.drive(live, tmp_path, PYTHON_2)
    assert seen["guide"] == ["PNG"]
    assert seen["single"] == seen["in_async"] == len(PNG)
    assert seen["streamed"] > 0
    assert seen["cancelled"] == "canceled"
    assert seen["failed"] == ["ModelError", "The model broke."]
    assert seen["files"] == ["image/png", True]
    assert seen["lists"]["predictions"] > A_PAGE
    assert "high-resolution-controlnet-tile" in seen["lists"]["search"]
    assert seen["lists"]["account"] == "ana"


def test_npm_replicate_stainless(clients, live, tmp_path):
    seen = clients.drive(live, tmp_path, STAINLESS)
    assert seen["guide"] == "PNG"
    assert seen["polled"] == "data:image/png"
    assert seen["files"] == ["image/png", True]
    assert seen["cancelled"] == "canceled"
    assert seen["lists"]["predictions"] > A_PAGE
    assert "high-resolution-controlnet-tile" in seen["lists"]["models"]
    assert seen["lists"]["account"] == "ana"
    assert seen["lists"]["readme"]


def test_python_replicate_2_use_gives_paths_where_outputs_are_links(clients, tmp_path):
    with live_server(tmp_path / "server", inline_output_bytes=0) as live:
        seen = clients.drive(live, tmp_path, PYTHON_2, STEPS="used used_in_async")
        assert seen == {"used": [".png", "PNG"], "used_in_async": [".png", "PNG"]}


def test_npm_replicate_mcp(clients, live, tmp_path):
    seen = clients.drive(live, tmp_path, MCP)
    assert seen["tools"] == 35
    assert seen["found"]
    assert seen["status"] == "succeeded"
    assert seen["output"] == "data:image/png"
    assert seen["fetched"]
    assert seen["account"] == "ana"


@pytest.fixture(scope="module")
def really(clients, tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.mark.parametrize("script", [NPM, STAINLESS, PYTHON_1, PYTHON_2, MCP])
def test_every_client_really_enlarges_a_photograph(clients, really, tmp_path, script):
    clients.drive(really, tmp_path, script, photograph(), STEPS="enlarged")
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (2 * SIZE[0], 2 * SIZE[1])
        assert 0.5 < distance(picture) < 12


@pytest.mark.skipif(
    not os.environ.get("TEGULA_GUIDE"),
    reason="2560 pixels on a CPU take minutes; TEGULA_GUIDE=1 asks for them",
)
def test_the_guides_program_really_enlarges_a_photograph(clients, really, tmp_path):
    square = (48, 48)
    clients.drive(really, tmp_path, NPM, photograph(square), STEPS="guide")
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (2560, 2560)
        assert 0.5 < distance(picture, square) < 25


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for the loopback, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    program = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    about = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run([*program.split(), *about, *files], check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_over_tls_the_clients_read_outputs_by_their_links(clients, certificate, tmp_path):
    trust = {"NODE_EXTRA_CA_CERTS": str(certificate[0]), "SSL_CERT_FILE": str(certificate[0])}
    with live_server(tmp_path / "server", tls=certificate) as live:
        seen = clients.drive(live, tmp_path, NPM, **trust)
        assert seen["guide"] == {"kind": "PNG", "uploaded": True}
        assert seen["streamed"] == {"kinds": ["output", "done"], "bytes": len(PNG)}
        output = live.store.predictions.page(None).items[-1].output
        assert live.store.links.resolve(output)[0].startswith("https://")
        for script in (PYTHON_1, PYTHON_2):
            seen = clients.drive(live, tmp_path, script, **trust)
            assert seen["guide"] == ["PNG"]
            assert seen["in_async"] == len(PNG)


@pytest.mark.parametrize("script", [NPM, PYTHON_1, PYTHON_2])
def test_two_servers_are_restarted_in_turn_and_no_client_notices(clients, tmp_path, script):
    ports = free_port(), free_port()
    stacks = [ExitStack(), ExitStack()]

    def start(number):
        context = live_server(tmp_path / "server", port=ports[number], public_url=url)
        return stacks[number].enter_context(context)

    def created():
        return {one.id for one in lives[0].store.predictions.page(None).items}

    with proxy(ports) as url, ThreadPoolExecutor(1) as pool, stacks[0], stacks[1]:
        lives = [start(0), start(1)]
        through = replace(lives[0], url=url)
        seen = pool.submit(clients.drive, through, tmp_path, script, STEPS="restarted")
        restarts = 0
        while not seen.done():
            # Each restart falls into the wait of a prediction that was just created.
            eventually(partial(lambda before: seen.done() or created() != before, created()))
            stacks[restarts % 2].close()
            lives[restarts % 2] = start(restarts % 2)
            restarts += 1
        assert seen.result() == {"restarted": [len(PNG)] * 4}
        assert restarts > 2
        assert len(created()) == 4
