"""`tegula serve` from nothing to an upscaled picture, with the packaged weights."""

from __future__ import annotations

import io
import time

import httpx
import pytest
from PIL import Image
from serve_support import photo, served

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


def test_a_picture_that_is_none_fails_with_a_sentence(api):
    given = {"image": "data:image/png;base64,AAAA", "scale": 2}
    body = {"version": "tegula/upscale", "input": given}
    made = api.post("/v1/predictions", json=body, headers={"prefer": "wait"}).json()
    assert made["status"] == "failed"
    assert made["error"].endswith(".")
