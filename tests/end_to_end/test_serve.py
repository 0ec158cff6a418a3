"""`tegula serve` from nothing to an upscaled picture, with the packaged weights."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time

import httpx
import pytest
from cli_support import names_in, run
from PIL import Image
from serve_support import free_port, photo, served

pytestmark = pytest.mark.slow


@pytest.fixture
def api(tmp_path):
    with served(tmp_path) as server:
        headers = {"authorization": f"Bearer {server.token}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=70) as client:
            yield client


def test_a_picture_is_uploaded_enlarged_and_read_back(api):
    uploaded = api.post("/v1/files", files={"content": ("photo.png", photo())}).json()
    body = {"input": {"image": uploaded["urls"]["get"], "scale": 2, "seed": 1}}
    answer = api.post(
        "/v1/models/tegula/upscale/predictions", json=body, headers={"prefer": "wait"}
    )
    prediction = answer.json()
    while prediction["status"] in ("starting", "processing"):
        time.sleep(0.5)
        prediction = api.get(f"/v1/predictions/{prediction['id']}").json()
    assert prediction["status"] == "succeeded", prediction["error"]
    assert "100%|" in prediction["logs"]
    listed = api.get("/v1/predictions").json()["results"][0]["output"]
    picture = Image.open(io.BytesIO(api.get(listed, headers={"authorization": ""}).content))
    assert picture.size == (128, 96)


def test_a_port_that_is_taken_is_told_in_a_sentence(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run("serve", "--port", port, "--device", "cpu", "--folder", tmp_path)
    assert result.exit_code == 2
    assert f"127.0.0.1, port {port}: Address already in use" in result.stderr
    assert names_in(tmp_path) == []


def test_a_certificate_that_is_none_is_told_in_a_sentence(tmp_path):
    bad = tmp_path / "cert.pem"
    bad.write_text("no certificate")
    words = ["--tls-cert", bad, "--tls-key", bad, "--folder", tmp_path, "--port", free_port()]
    command = [sys.executable, "-m", "tegula", "serve", "--device", "cpu", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no PEM files of a certificate and its key" in done.stderr.splitlines()[-1]


def test_a_picture_that_is_none_fails_with_a_sentence(api):
    given = {"image": "data:image/png;base64,AAAA", "scale": 2}
    body = {"version": "tegula/upscale", "input": given}
    made = api.post("/v1/predictions", json=body, headers={"prefer": "wait"}).json()
    assert made["status"] == "failed"
    assert made["error"].endswith(".")
