"""`tegula serve` from nothing to an upscaled picture, with the packaged weights."""

from __future__ import annotations

import http.client
import io
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from api_support import DATA_URI
from cli_support import names_in, run
from live_server import eventually, live_server
from PIL import Image
from serve_support import free_port, photo, served

from tegula.server.api.app import GracefulServer, create_app
from tegula.server.api.connections import serving_config
from tegula.server.settings import ServerSettings
from tegula.server.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def api(folder):
    with served(folder) as server:
        headers = {"authorization": f"Bearer {server.token}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=300) as client:
            yield client


def ended(api, prediction):
    """The prediction once it has ended, which may be after the longest wait of a create."""
    while prediction["status"] in ("starting", "processing"):
        time.sleep(0.5)
        prediction = api.get(f"/v1/predictions/{prediction['id']}").json()
    return prediction


def test_a_picture_is_uploaded_enlarged_and_read_back(api, folder):
    uploaded = api.post("/v1/files", files={"content": ("photo.png", photo())}).json()
    body = {"input": {"image": uploaded["urls"]["get"], "scale": 2, "seed": 1}}
    answer = api.post(
        "/v1/models/tegula/upscale/predictions", json=body, headers={"prefer": "wait"}
    )
    prediction = ended(api, answer.json())
    assert prediction["status"] == "succeeded", prediction["error"]
    assert "100%|" in prediction["logs"]
    listed = api.get("/v1/predictions").json()["results"][0]["output"]
    picture = Image.open(io.BytesIO(api.get(listed, headers={"authorization": ""}).content))
    assert picture.size == (128, 96)
    assert not [path for path in folder.rglob("*") if path.stat().st_mode & 0o077]


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


def test_a_picture_that_is_damaged_fails_with_a_sentence(api):
    given = {"image": "data:image/png;base64,iVBORw0KGgoAAAAA", "scale": 2}
    body = {"version": "tegula/upscale", "input": given}
    answer = api.post("/v1/predictions", json=body, headers={"prefer": "wait"})
    made = ended(api, answer.json())
    assert made["status"] == "failed"
    assert made["error"] == "image is a damaged or truncated image; save it again."


def status_of_a_slow_upload(url, headers):
    """Send a body in parts with pauses, as clients do that send on while they are refused."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    connection.putrequest("POST", "/v1/predictions")
    for name, value in {**headers, "content-length": "5000"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    for _ in range(5):
        time.sleep(0.1)
        connection.send(b"x" * 1000)
    with connection.getresponse() as answer:
        connection.close()
        return answer.status


def test_a_server_that_stops_answers_who_waits_and_goes_on_with_what_runs(tmp_path):
    def ask(method, path, **options):
        with httpx.Client(base_url=live.url, headers=me, timeout=300) as client:
            return client.request(method, path, **options)

    given = {"image": DATA_URI, "prompt": "gated"}
    body = {"version": "tegula/upscale", "input": given}
    with live_server(tmp_path) as live, ThreadPoolExecutor(2) as pool:
        me = {"authorization": f"Bearer {live.token}"}
        path = "/v1/predictions"
        wait = {**me, "prefer": "wait"}
        held = pool.submit(ask, "POST", path, json=body, headers=wait)
        eventually(lambda: bool(ask("GET", path).json()["results"]))
        urls = ask("GET", path).json()["results"][0]["urls"]
        stream = pool.submit(ask, "GET", urls["stream"])
        eventually(lambda: ask("GET", urls["get"]).json()["metrics"].get("progress") == 1)
        assert not held.done()
        assert not stream.done()

        live.stop()
        answer = held.result(300)
        assert (answer.status_code, answer.json()["status"]) == (202, "starting")
        assert stream.result(300).text.endswith("\n\nretry: 1000\n\n")
        refused = ask("POST", path, json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-should-retry"] == "true"
        assert refused.headers["connection"] == "close"
        assert status_of_a_slow_upload(live.url, me) == 503
        assert ask("GET", "/readyz").status_code == 503
        assert ask("GET", "/healthz").status_code == 200
        assert ask("GET", urls["get"]).json()["status"] == "processing"
        assert ask("GET", urls["stream"]).text.endswith("retry: 1000\n\n")
        live.gate.set()
    with live_server(tmp_path) as again:
        made = again.store.predictions.page(None).items
        assert [one.status.value for one in made] == ["succeeded"]
        stream = again.url + httpx.URL(urls["stream"]).path
        text = httpx.get(stream, headers={"last-event-id": "0"}, timeout=300).text
        assert ["event: output" in text, "event: done" in text] == [True, True]


def test_no_address_is_told_of_where_the_port_is_taken_after_all(tmp_path):
    store = Store.open(ServerSettings(folder=tmp_path))
    app, listened = create_app(store), []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = serving_config(app, host="127.0.0.1", port=other.getsockname()[1])
        server = GracefulServer(config, app.state.service, lambda: listened.append(True))
        with pytest.raises(SystemExit):
            server.run()
    assert listened == []
    store.close()
