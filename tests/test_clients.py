"""The official clients, as their registries have them, against a server on the loopback.

``tests/clients/install.py`` installs them into the folder that TEGULA_CLIENTS names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from api_support import PNG
from live_server import live_server
from PIL import Image
from serve_support import photo, served

SCRIPTS = Path(__file__).parent / "clients"
CLIENTS = Path(os.environ.get("TEGULA_CLIENTS", "/nonexistent"))

needs_clients = pytest.mark.skipif(not CLIENTS.is_dir(), reason="TEGULA_CLIENTS names no folder")
pytestmark = [needs_clients, pytest.mark.slow]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def drive(live, folder: Path, program: list[str], picture: bytes = PNG, **environment: str):
    """Run a program with a client in it and return what it printed."""
    image, output = folder / "photo.png", folder / "output.png"
    image.write_bytes(picture)
    given = {
        "PATH": os.environ["PATH"],
        "CLIENTS": str(CLIENTS),
        "URL": live.url,
        "TOKEN": live.token,
        "IMAGE": str(image),
        "OUTPUT": str(output),
        **environment,
    }
    done = subprocess.run(
        program, env=given, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_npm_replicate(live, tmp_path):
    seen = drive(live, tmp_path, ["node", str(SCRIPTS / "npm_replicate.mjs")])
    assert seen["guide"] == "PNG"
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
    assert seen["lists"]["account"] == "ana"
    assert seen["deployments"] == {
        "number": 2,
        "status": "succeeded",
        "deployment": "ana/fast",
        "listed": 1,
        "gone": True,
    }


def test_python_replicate_1(live, tmp_path):
    python = CLIENTS / "py-1.0.7" / "bin" / "python"
    seen = drive(live, tmp_path, [str(python), str(SCRIPTS / "py_replicate_1.py")])
    assert seen["guide"] == ["PNG"]
    assert seen["single"] == "PNG"
    assert seen["base64"] == seen["in_async"] == len(PNG)
    assert seen["streamed"] == ["output", "done"]
    assert seen["progressed"] == ["succeeded", 1.0]
    assert seen["cancelled"] == "canceled"
    assert seen["failed"] == "The model broke."
    assert seen["refused"] == [422, "Input validation failed"]
    assert seen["files"] == ["image/png", {"kind": "test"}, True]
    assert seen["lists"]["schema"] == ["Input", "Output"]
    assert "high-resolution-controlnet-tile" in seen["lists"]["search"]
    assert seen["lists"]["account"] == "ana"
    assert seen["deployment"] == "succeeded"


def test_python_replicate_2(live, tmp_path):
    python = CLIENTS / "py-2.0.0b4" / "bin" / "python"
    seen = drive(live, tmp_path, [str(python), str(SCRIPTS / "py_replicate_2.py")])
    assert seen["guide"] == ["PNG"]
    assert seen["single"] == seen["in_async"] == len(PNG)
    assert seen["streamed"] > 0
    assert seen["cancelled"] == "canceled"
    assert seen["failed"] == ["ModelError", "The model broke."]
    assert seen["files"] == ["image/png", True]
    assert "high-resolution-controlnet-tile" in seen["lists"]["search"]
    assert seen["lists"]["account"] == "ana"


def test_npm_replicate_stainless(live, tmp_path):
    seen = drive(live, tmp_path, ["node", str(SCRIPTS / "npm_stainless.mjs")])
    assert seen["guide"] == "PNG"
    assert seen["polled"] == "data:image/png"
    assert seen["lists"]["account"] == "ana"
    assert seen["lists"]["readme"]


def test_python_replicate_2_use_gives_paths_where_outputs_are_links(tmp_path):
    python = CLIENTS / "py-2.0.0b4" / "bin" / "python"
    with live_server(tmp_path / "server", inline_output_bytes=0) as live:
        script = [str(python), str(SCRIPTS / "py_replicate_2.py")]
        assert drive(live, tmp_path, script, STEPS="used")["used"] == [".png", "PNG"]


def test_npm_replicate_mcp(live, tmp_path):
    python = CLIENTS / "py-1.0.7" / "bin" / "python"
    seen = drive(live, tmp_path, [str(python), str(SCRIPTS / "mcp.py")])
    assert seen["tools"] == 35
    assert seen["found"]
    assert seen["status"] == "succeeded"
    assert seen["output"] == "data:image/png"
    assert seen["account"] == "ana"


@pytest.fixture(scope="module")
def really(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.mark.parametrize(
    ("program", "script"),
    [
        ("node", "npm_replicate.mjs"),
        ("node", "npm_stainless.mjs"),
        ("py-1.0.7/bin/python", "py_replicate_1.py"),
        ("py-2.0.0b4/bin/python", "py_replicate_2.py"),
        ("py-1.0.7/bin/python", "mcp.py"),
    ],
)
def test_every_client_really_enlarges_a_picture(really, tmp_path, program, script):
    known = CLIENTS / program
    words = [str(known) if known.exists() else program, str(SCRIPTS / script)]
    drive(really, tmp_path, words, photo(), STEPS="enlarged")
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (128, 96)


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
def test_over_tls_the_clients_read_outputs_by_their_links(certificate, tmp_path):
    trust = {"NODE_EXTRA_CA_CERTS": str(certificate[0]), "SSL_CERT_FILE": str(certificate[0])}
    with live_server(tmp_path / "server", tls=certificate) as live:
        seen = drive(live, tmp_path, ["node", str(SCRIPTS / "npm_replicate.mjs")], **trust)
        assert seen["guide"] == "PNG"
        assert seen["streamed"] == {"kinds": ["output", "done"], "bytes": len(PNG)}
        output = live.store.predictions.page(None).items[-1].output
        assert live.store.links.resolve(output)[0].startswith("https://")
        for name, version in (("py_replicate_1.py", "1.0.7"), ("py_replicate_2.py", "2.0.0b4")):
            python = CLIENTS / f"py-{version}" / "bin" / "python"
            seen = drive(live, tmp_path, [str(python), str(SCRIPTS / name)], **trust)
            assert seen["guide"] == ["PNG"]
            assert seen["in_async"] == len(PNG)
