"""The Cog package in Cog's own runtime, coglet, as its image runs it but without Docker."""

from __future__ import annotations

import base64
import importlib.util
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from photo_support import SIZE, distance, photograph
from PIL import Image
from serve_support import free_port

import tegula
from tegula.catalog import find, openapi_schema

PACKAGE = Path(__file__).parents[2] / "cog"
CONFIG = yaml.safe_load((PACKAGE / "cog.yaml").read_text(encoding="utf-8"))
PHOTO = f"data:image/png;base64,{base64.b64encode(photograph()).decode()}"

needs_cog = pytest.mark.skipif(
    importlib.util.find_spec("coglet") is None,
    reason="Cog's runtime, coglet, is not installed",
)


@dataclass(frozen=True)
class Model:
    """The model where it listens."""

    client: httpx.Client

    def health(self) -> dict:
        return self.client.get("/health-check").json()

    def predict(self, **inputs: object) -> httpx.Response:
        self.wait()
        return self.client.post("/predictions", json={"input": inputs})

    def wait(self) -> None:
        """Wait until it takes a prediction: it is busy for a moment after each."""
        while (status := self.health()["status"]) != "READY":
            assert status in ("STARTING", "BUSY"), self.health()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The runtime over a copy of the package, with the schema that a build puts there."""
    folder = tmp_path_factory.mktemp("cog") / "src"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("wheels", "__pycache__"))
    (folder / ".cog").mkdir(exist_ok=True)
    schema = json.dumps(openapi_schema(find("tegula/upscale")))
    (folder / ".cog" / "openapi_schema.json").write_text(schema, encoding="utf-8")
    port = free_port()
    environment = {
        **os.environ,
        # The runtime starts its worker with the `python3` of the path.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "COG_PREDICT_TYPE_STUB": CONFIG["run"],
        "OMP_NUM_THREADS": "1",
        "PORT": str(port),
    }
    program = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    log = folder.parent / "log"
    with log.open("wb") as stream:
        runtime = subprocess.Popen(
            program, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            _wait_until_up(client, runtime, log)
            yield Model(client)
    finally:
        runtime.terminate()
        runtime.wait(300)


@needs_cog
def test_the_inputs_are_those_of_the_catalogue():
    runner = _loaded().Runner
    parameters = list(inspect.signature(runner.run).parameters.values())[1:]
    assert [_described(one) for one in parameters] == [
        (
            known.name,
            known.description,
            known.default,
            known.low,
            known.high,
            list(known.choices) or None,
            _KINDS[known.kind] + ("" if known.required or known.default is not None else " | None"),
        )
        for known in find("tegula/upscale").fields
    ]


@pytest.mark.slow
@needs_cog
def test_a_photograph_is_enlarged(model):
    answer = model.predict(image=PHOTO, scale=2, seed=1)
    made = answer.json()
    assert (answer.status_code, made["status"]) == (200, "succeeded"), made
    kind, _, content = made["output"].partition(";base64,")
    assert kind == "data:image/png"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (2 * SIZE[0], 2 * SIZE[1])
        assert 0.5 < distance(picture) < 12
    assert "100%|##########| 100/100" in made["logs"]
    assert made["metrics"]["predict_time"] > 0


@pytest.mark.slow
@needs_cog
def test_a_container_is_healthy_once_the_model_is_loaded(model):
    model.wait()
    health = model.health()
    assert health["setup"]["status"] == "succeeded"
    assert "Running setup" in health["setup"]["logs"]


@pytest.mark.slow
@needs_cog
@pytest.mark.parametrize(
    ("inputs", "place"),
    [
        ({"image": PHOTO, "scale": 99}, "scale"),
        ({"image": PHOTO, "preset": "wild"}, "preset"),
        ({"image": None}, "image"),
        ({"scale": 2}, "image"),
    ],
)
def test_a_bad_input_is_refused_by_its_name(model, inputs, place):
    answer = model.predict(**inputs)
    assert answer.status_code == 422
    assert [one["loc"][-1] for one in answer.json()["detail"]] == [place]


@pytest.mark.slow
@needs_cog
@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("data:image/png;base64,AAAA", "The input is not a PNG"),
        (str(PACKAGE.parent / "examples" / "cat.jpg"), "http, https or data URL"),
    ],
)
def test_what_is_no_picture_fails_in_words_and_harms_nothing(model, image, words):
    failed = model.predict(image=image).json()
    assert failed["status"] == "failed"
    assert words in failed["error"]
    assert model.predict(image=PHOTO, scale=1, format="jpg").json()["status"] == "succeeded"


def test_the_image_gets_this_version_of_tegula():
    wheel = f"./wheels/tegula-{tegula.__version__}-py3-none-any.whl"
    assert (PACKAGE / CONFIG["build"]["python_requirements"]).read_text().splitlines() == [wheel]


_KINDS = {
    "file": "Path",
    "string": "str",
    "number": "float",
    "integer": "int",
    "boolean": "bool",
}


def _described(parameter: inspect.Parameter) -> tuple:
    """What the signature says of an input."""
    said = parameter.default
    bounds = (said.ge, said.le)
    return (
        parameter.name, said.description, said.default, *bounds, said.choices,
        parameter.annotation,
    )  # fmt: skip


def _loaded():
    spec = importlib.util.spec_from_file_location("cog_run", PACKAGE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wait_until_up(client: httpx.Client, runtime: subprocess.Popen, log: Path) -> None:
    for _ in range(6000):
        assert runtime.poll() is None, log.read_text()[-2000:]
        try:
            if client.get("/health-check").json()["status"] != "STARTING":
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-2000:])
