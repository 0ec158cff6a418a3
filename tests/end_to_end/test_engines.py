"""Engines that run jobs in a process of their own: whatever the process does, we go on.

What holds for every engine is tried on both kinds: a process of this machine, and an actor of a
small Ray cluster, which is started once for the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_support import KillingRequest
from cli_support import put, size_of
from engine_support import HereEngine, ended, until
from store_support import ask, open_store

from tegula.catalog import find
from tegula.catalog.lookup import packaged_fingerprint
from tegula.cli.batch import BatchRun, Input
from tegula.cli.batch_ray import run_on_cluster
from tegula.cli.console import Console
from tegula.cli.models import Runtime
from tegula.cli.targets import Naming
from tegula.errors import CancelledError, MissingExtraError, ServiceError
from tegula.models import BundleSettings
from tegula.options import UpscaleOptions
from tegula.server.addresses import Policy
from tegula.server.db import utc_now
from tegula.server.engine import (
    Alive,
    Done,
    Failed,
    Job,
    Log,
    OutputFile,
    Started,
    device_of,
    discover_devices,
)
from tegula.server.fetch import Fetcher
from tegula.server.files import encode_data_uri
from tegula.server.ray_engine import Place, RayEngine, SharedBlobs, _Actor, connect, introduce
from tegula.server.ray_helpers import Helping, Peer, _PeerHelper
from tegula.server.runner import LocalEngine, RunnerSpec, Timeouts
from tegula.server.settings import ServerSettings
from tegula.server.supervisor import Supervisor
from tegula.server.tables import FILE_KEY, State
from tegula.server.upscaling import RunnerOptions
from tegula.server.work import InputFiles, ResolvedVersion
from tegula.storage import FolderStorage

TIMEOUTS = Timeouts(load=300.0, run=300.0, cancel=300.0)
PICTURE = b"\x89PNG\r\n\x1a\nhello"
PLACE = Place("cpu", {"CPU": 0.01, "GPU": 0.0}, "", 2)
DEATHS = {
    "local": "its process ended with signal 9",
    "ray": "its actor died, or the machine that it ran on",
}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one machine, whose actors find what tests run."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'tegula[ray]'.")
    import ray

    with pytest.MonkeyPatch.context() as patch:
        support = str(Path(__file__).parents[1] / "support")
        patch.setenv("PYTHONPATH", os.pathsep.join([support, *filter(None, sys.path)]))
        patch.delenv("RAY_ADDRESS", raising=False)
        # Workers that no actor has asked for yet would only take time.
        patch.setenv("RAY_enable_worker_prestart", "0")
        patch.setenv("RAY_worker_niceness", "0")  # it is 15 by default, which is endless here
        for _ in range(
            3
        ):  # a raylet gives its own helpers 15 s, which a busy machine may not do in
            with contextlib.suppress(ServiceError):
                connect(ServerSettings(engine="ray"))
                break
            ray.shutdown()
        else:
            pytest.skip("Ray did not start in three tries: the machine is too busy.")
        yield
        ray.shutdown()


@pytest.fixture
def kind():
    return "local"


@pytest.fixture
def on_ray(cluster):
    """Return what makes engines whose jobs run in actors, and ends these."""
    made = []

    def make(timeouts=TIMEOUTS, silence=60.0, shared=None, **options):
        spec = RunnerSpec("engine_support:open_runner", options)
        made.append(RayEngine(len(made), spec, PLACE, timeouts, silence, shared))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def make_engine(request, kind):
    if kind == "ray":
        yield request.getfixturevalue("on_ray")
        return
    made = []

    def make(timeouts=TIMEOUTS, **options):
        made.append(LocalEngine(RunnerSpec("engine_support:open_runner", options), "cpu", timeouts))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


both = pytest.mark.parametrize("kind", ["local", "ray"])


@pytest.fixture
def run(tmp_path):
    def run_job(engine, do="finish", cancelled=lambda: False):
        job = Job("name", 1, "tegula/upscale", "ab", {"do": do}, tmp_path)
        return [event for event in engine.run(job, cancelled) if not isinstance(event, Alive)]

    return run_job


def pid_of(events):
    return next(int(event.text.split()[1]) for event in events if isinstance(event, Log))


def gone(pid, seconds=0.0):
    """Whether a process has ended; of an actor the cluster takes a moment to end it."""
    end = time.monotonic() + seconds
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)


@both
def test_one_process_takes_one_job_after_the_other(make_engine, run):
    engine = make_engine()
    assert engine.loaded == frozenset()
    first, second = run(engine), run(engine)
    assert [type(event) for event in first if isinstance(event, Started | OutputFile | Done)] == [
        Started,
        OutputFile,
        Done,
    ]
    assert pid_of(first) == pid_of(second) == engine.pid
    assert engine.loaded == {"ab"}


@both
def test_a_death_is_told_and_the_next_job_gets_a_new_process(make_engine, run, kind):
    engine = make_engine()
    before = pid_of(run(engine))
    assert run(engine, "die")[-1] == Failed(DEATHS[kind], lost=True)
    after = run(engine)
    assert isinstance(after[-1], Done)
    assert pid_of(after) != before


def test_a_process_that_died_while_idle_is_replaced(make_engine, run):
    engine = make_engine()
    run(engine)
    os.kill(engine.pid, signal.SIGKILL)
    while engine.pid is not None:
        time.sleep(0.01)
    assert isinstance(run(engine)[-1], Done)


@pytest.mark.parametrize("do", ["hang", "stop"])
def test_a_silent_process_is_taken_for_dead(make_engine, run, do):
    engine = make_engine()
    pid = pid_of(run(engine))
    engine._timeouts = Timeouts(load=300, run=0.3, cancel=0.3)
    events = run(engine, do)
    assert events[-1].lost
    assert "silent" in events[-1].error
    assert gone(pid)


def test_a_process_that_asks_whether_to_go_on_is_alive(make_engine, run):
    engine = make_engine()
    run(engine)
    engine._timeouts = Timeouts(load=300, run=4, cancel=300)
    assert isinstance(run(engine, "toil")[-1], Done)


@both
def test_out_of_memory_ends_the_process(make_engine, run):
    engine = make_engine()
    events = run(engine, "run_out_of_memory")
    assert events[-1] == Failed("Even one window does not fit.", lost=True)
    assert engine.pid is None


@both
def test_errors_of_ours_are_told_and_others_are_not(make_engine, run):
    engine = make_engine()
    assert run(engine, "refuse")[-1] == Failed("The input is no image.")
    stumbled = run(engine, "stumble")[-1]
    assert "ZeroDivisionError" in stumbled.error
    assert "secret" not in stumbled.error
    assert run(engine, "fill_disk")[-1] == Failed(
        "The disk of the server is full; try again later."
    )
    assert engine.pid is not None


@both
def test_errors_name_inputs_and_no_path_of_the_server(make_engine, tmp_path, capfd, kind):
    kept = tmp_path / "files" / "ab" / "abcd"
    engine = make_engine()
    for do, words in (
        ("miss_input", "image is a damaged or truncated image; save it again."),
        ("miss_weights", "There is no LoRA file style.safetensors; check https://a.example/b/c."),
    ):
        job = Job("name", 1, "tegula/upscale", "ab", {"do": do, "image": kept}, tmp_path)
        assert list(engine.run(job, lambda: False))[-1] == Failed(words)
    if kind == "local":  # the operator's log says which; that of an actor lies where Ray keeps it
        assert str(kept) in capfd.readouterr().err


def test_what_a_process_logs_is_json_and_names_the_prediction(make_engine, run, capfd):
    run(make_engine(), "stumble")
    (line,) = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert (line["level"], line["prediction"]) == ("error", "name")
    assert "ZeroDivisionError" in line["trace"]


@both
def test_cancelling_ends_the_job_and_keeps_the_process(make_engine, run):
    engine = make_engine()
    run(engine)
    pid = engine.pid
    assert run(engine, "wait", cancelled=lambda: True)[-1].cancelled
    assert engine.pid == pid
    assert isinstance(run(engine)[-1], Done)


@both
def test_a_job_that_will_not_stop_is_stopped(make_engine, run):
    engine = make_engine(Timeouts(load=300, run=300, cancel=0.3))
    events = run(engine, "hang", cancelled=lambda: True)
    assert events[-1].cancelled
    assert engine.pid is None


@both
def test_a_job_that_nobody_follows_any_more_is_ended(make_engine, tmp_path):
    engine = make_engine()
    events = engine.run(Job("name", 1, "m", "ab", {"do": "hang"}, tmp_path), lambda: False)
    pid = pid_of(events)
    events.close()
    assert gone(pid, 30)


@both
def test_a_model_that_cannot_be_loaded_says_why(make_engine, run):
    assert run(make_engine(open="fail"))[-1] == Failed("The weights are not here.")


def test_loading_has_a_timeout_of_its_own(make_engine, run):
    engine = make_engine(Timeouts(load=0.5, run=300, cancel=1), open="hang")
    assert "loading" in run(engine)[-1].error


def test_a_process_is_kept_ready_but_not_started_again_and_again(make_engine):
    engine = make_engine(open="fail")
    engine.load()
    first = engine._worker.process
    first.join(300)
    engine.load()
    assert engine._worker.process is first


def test_unloading_ends_the_process(make_engine, run):
    engine = make_engine()
    pid = pid_of(run(engine))
    engine.unload()
    assert gone(pid)
    assert engine.loaded == frozenset()


def test_the_process_ends_with_the_server(make_engine, run):
    engine = make_engine()
    pid = pid_of(run(engine))
    engine._worker.pipe.close()
    engine._worker.process.join(300)
    assert gone(pid)


def test_the_servers_process_has_neither_torch_nor_numpy_and_the_store_no_web_framework():
    heavy = {"torch", "numpy", "PIL", "diffusers", "transformers"}
    # One process imports them all in turn. That of an engine imports what it runs when it is up.
    steps = (
        ("tegula.server.runner", {*heavy, "starlette", "sqlalchemy", "pydantic"}),
        ("tegula.server.store", {*heavy, "starlette"}),
        ("tegula.server.supervisor", {*heavy, "starlette"}),
        ("tegula.server.api.app", heavy),
    )
    look = "import sys\n" + "".join(
        f"import {module}\nif found := {unwanted!r} & set(sys.modules):\n"
        f"    sys.exit(f'{module} imports {{found}}')\n"
        for module, unwanted in steps
    )
    subprocess.run([sys.executable, "-c", look], check=True)


@pytest.mark.parametrize(
    ("name", "title", "sku"),
    [
        ("cpu", "CPU (x86_64)", "cpu"),
        ("cuda:0", "NVIDIA H100 80GB HBM3", "gpu-h100-80gb-hbm3"),
        ("mps", "Apple GPU", "gpu-apple-gpu"),
    ],
)
def test_devices_have_short_names(name, title, sku):
    assert device_of(name, title).sku == sku


@pytest.mark.slow
def test_there_is_a_device():
    assert discover_devices()


# The Ray engine alone.


@pytest.fixture
def store(tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    opened = open_store(tmp_path / "server", utc_now, blobs_url=bucket.as_uri(), lease_seconds=60.0)
    yield opened
    opened.close()


@pytest.fixture
def shared(tmp_path, store):
    """The bucket, as an actor on a machine with another folder reaches it."""
    return SharedBlobs(tmp_path / "elsewhere", store.settings.blobs_url, 1 << 30, 1000)


@pytest.fixture
def supervise(store):
    started = []

    def start(*engines):
        inputs = InputFiles(
            store.files, Fetcher(Policy(), tls=ssl.create_default_context()), 1000, 60.0
        )
        version = ResolvedVersion("ab", ("image",), True)
        started.append(Supervisor(store, engines, lambda _: version, inputs))
        started[-1].start()
        return started[-1]

    yield start
    for supervisor in started:
        supervisor.stop()


def output_of(store, prediction):
    (file,) = prediction.output
    return store.files.path(store.files.get(file[FILE_KEY])).read_bytes()


def test_actors_fetch_inputs_and_store_outputs_themselves(store, shared, supervise, on_ray):
    supervise(on_ray(shared=shared))
    ada = store.accounts.ensure("ada")
    values = store.files.adopt({"image": encode_data_uri(PICTURE, "image/png")}, ada.id, ["image"])
    done = ended(store, ask(store, input={**values, "do": "copy"}).id)
    assert (done.status, done.error) == (State.SUCCEEDED, None)
    assert output_of(store, done).endswith(PICTURE)
    assert list((shared.folder / "copies").glob("??/*"))
    assert not list((shared.folder / "spool").iterdir())


def test_what_an_actor_that_was_stopped_makes_later_is_refused(store, supervise, on_ray):
    first, second = on_ray(silence=2.5), on_ray(silence=2.5)
    supervise(first, second)
    made = ask(store, input={"do": "stop_once"})
    done = ended(store, made.id)
    assert (done.status, done.attempt, done.losses) == (State.SUCCEEDED, 2, 1)
    assert "gave no sign of life" in done.logs
    assert output_of(store, done).endswith(b"attempt 2")


def test_a_prediction_of_an_actor_that_died_goes_to_another_and_late_results_are_refused(
    store, shared, supervise, on_ray
):
    supervise(on_ray(shared=shared))
    done = ended(store, ask(store, input={"do": "die_once"}).id)
    assert (done.status, done.attempt, done.losses) == (State.SUCCEEDED, 2, 1)
    assert not store.queue.succeed(done.id, 1)


def test_actors_follow_the_queue_between_bounds(store, supervise, on_ray):
    object.__setattr__(store.settings, "engine", "ray")
    object.__setattr__(store.settings, "ray_min_actors", 1)
    engines = [on_ray() for _ in range(3)]

    def started():
        return sum(engine.started for engine in engines)

    supervise(*engines)
    until(lambda: started() == 1)
    time.sleep(1.2)
    assert started() == 1
    names = [ask(store, input={"do": "wait"}).id for _ in range(2)]
    until(lambda: all(store.predictions.get(n).status is State.PROCESSING for n in names))
    assert started() == 2
    object.__setattr__(store.settings, "idle_unload_seconds", 0.01)
    for name in names:
        store.predictions.cancel(name)
    until(lambda: started() == 1)
    time.sleep(1.2)
    assert started() == 1


# One large picture on several actors.


class Pair:
    """Two engines with the packaged model, the first of which runs what the second helps with."""

    def __init__(self, engines, folder, picture):
        self.engines, self.folder, self.picture = engines, folder, picture

    def run(self, *, introduced=True, cancelled=lambda: False, do=()):
        """Run a picture; return the last event, the result, and what the helper noted."""
        for each in ("notes", "introduced", "wait", "die"):
            (self.folder / each).unlink(missing_ok=True)
        for each in (*do, *(["introduced"] if introduced else [])):
            (self.folder / each).touch()
        for engine in self.engines:
            engine.others = ()
        if introduced:
            introduce(self.engines)
        until(lambda: all(map(self._is_ready, self.engines)))
        values = {"image": self.picture, "scale": 1, "preset": "creative", "seed": 1}
        job = Job("name", 1, "tegula/upscale", find().id, values, self.folder)
        last = list(self.engines[0].run(job, cancelled))[-1]
        result = self.folder / "out-0.png"
        made = result.read_bytes() if result.exists() else b""
        result.unlink(missing_ok=True)
        return last, made, self.notes()

    @staticmethod
    def _is_ready(engine):
        if not engine.ready:  # it may have been killed a moment ago
            engine._started_at = -math.inf
            engine.load()
        return engine.ready

    def notes(self):
        notes = self.folder / "notes"
        return notes.read_text().split("\n")[:-1] if notes.exists() else []


@pytest.fixture(scope="module")
def pair(cluster, tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("pair")
    picture = folder / "picture.png"
    Image.effect_noise((300, 200), 80).convert("RGB").save(picture)
    models = ServerSettings(precision="fp32").models
    options = RunnerOptions(models, packaged_fingerprint(), 1 << 20, shard_above=0.05)
    spec = RunnerSpec(
        "engine_support:open_helpful_runner", {"folder": str(folder), "runner": vars(options)}
    )
    engines = [RayEngine(number, spec, PLACE, TIMEOUTS, 60.0) for number in range(2)]
    yield Pair(engines, folder, picture)
    for engine in engines:
        engine.close()


def test_a_picture_that_two_actors_share_is_that_of_one_and_a_death_changes_nothing(pair):
    last, alone, notes = pair.run(introduced=False)
    assert (last, notes) == (Done(), [])
    last, together, notes = pair.run()
    assert (last, {line.split()[1] for line in notes}) == (Done(), {"WindowTask"})
    assert together == alone
    last, together, notes = pair.run(do=["die"])
    assert (last, len(notes)) == (Done(), 1)
    assert together == alone


def test_a_cancelled_picture_is_dropped_by_those_that_help(pair):
    last, _, _ = pair.run(do=["wait"], cancelled=lambda: bool(pair.notes()))
    assert last.cancelled
    until(lambda: any("dropped" in line for line in pair.notes()), 30)


def test_an_actor_drops_what_it_helps_with_for_a_prediction_of_its_own():
    helping, began = Helping(), threading.Event()

    class Busy:
        def help(self, nets, task, cancel):
            began.set()
            while True:
                cancel.check()
                time.sleep(0.001)

    helping.runner = Busy()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(helping.help("nets", "task", "call")))
    thread.start()
    began.wait(60)
    with helping.own_job():
        assert answers in ([], [None])
        assert helping.help("nets", "task", "another") is None
        assert helping.kind("nets") is None
    thread.join(60)
    assert answers == [None]


def test_an_actor_that_was_given_up_gets_no_task_before_it_says_that_it_is_free(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tegula[ray]'.")
    monkeypatch.setattr(ray, "wait", lambda waiting, **_: ([], waiting))
    calls = []
    handle = SimpleNamespace(
        help=SimpleNamespace(remote=lambda *_: calls.append("help")),
        drop=SimpleNamespace(remote=lambda _: calls.append("drop")),
        can_help=SimpleNamespace(remote=lambda _: calls.append("can help") or "later"),
    )
    helper = _PeerHelper(Peer("other", handle), "nets", "kind")
    helper._ready = True
    assert helper.is_free()
    with pytest.raises(CancelledError):
        helper.run("task", lambda: True)
    assert not helper.is_free()
    helper._ask_at = 0.0
    assert not helper.is_free()
    assert calls == ["help", "drop", "can help"]


def test_a_large_picture_calls_for_all_actors_and_keeps_them(store, supervise):
    def engine(wants_help):
        made = HereEngine()
        made.ready, made.wants_help = False, wants_help
        return made

    engines = [engine(True), engine(False), engine(False)]
    supervise(*engines)
    until(lambda: all(each.started for each in engines))


def test_an_actor_that_loads_its_models_may_be_silent_for_longer(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tegula[ray]'.")
    monkeypatch.setattr(ray, "wait", lambda *_, **__: ([], []))
    handle = SimpleNamespace(receive=SimpleNamespace(remote=object))
    actor = _Actor(handle, silence=0.0, load_silence=60.0)
    actor.pid = 1
    assert (actor.receive(), actor.death()) == ([], None)
    actor.ready = True
    assert (actor.receive(), actor.death()) == ([], "its actor gave no sign of life for 0 s")
    assert not actor.alive


def test_a_cluster_of_several_machines_needs_a_bucket(cluster, monkeypatch):
    import ray

    machines = [{"Alive": True, "Resources": {"CPU": 2.0}} for _ in range(3)]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    with pytest.raises(ServiceError) as refused:
        connect(ServerSettings(engine="ray"))
    assert str(refused.value) == (
        "The Ray cluster has 3 machines, which cannot read the folder of this one: set blobs_url "
        "to a bucket that all of them reach, or use a cluster of one."
    )
    place, _ = connect(ServerSettings(engine="ray", blobs_url="s3://bucket/a", ray_cpus=0.5))
    assert (place.most, place.node, place.device) == (12, "", "cpu")


@pytest.mark.parametrize(
    ("machines", "settings", "most", "resources", "name"),
    [
        ([{"CPU": 8.0}], {}, 1, {"CPU": 8.0, "GPU": 0.0}, "cpu"),
        ([{"CPU": 8.0}, {"CPU": 4.0}], {}, 3, {"CPU": 4.0, "GPU": 0.0}, "cpu"),
        ([{"CPU": 8.0}], {"ray_max_actors": 9}, 9, {"CPU": 8.0, "GPU": 0.0}, "cpu"),
        (
            [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:L4": 1.0}, {"CPU": 2.0}],
            {},
            4,
            {"CPU": 1.0, "GPU": 1.0},
            "gpu-l4",
        ),
        ([{"CPU": 8.0, "GPU": 4.0}], {"devices": "cpu"}, 1, {"CPU": 8.0, "GPU": 0.0}, "cpu"),
        ([{"CPU": 8.0}], {"ray_gpus": 0.5}, 1, {"CPU": 1.0, "GPU": 0.5}, "gpu-gpu"),
    ],
)
def test_an_actor_takes_a_gpu_or_a_machine_unless_settings_say_otherwise(
    machines, settings, most, resources, name
):
    from tegula.server.ray_engine import _place

    place, device = _place(ServerSettings(engine="ray", **settings), machines, "")
    assert (place.most, place.resources, device.sku) == (most, resources, name)


def test_without_ray_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as refused:
        connect(ServerSettings(engine="ray"))
    assert str(refused.value) == "The ray engine needs Ray: pip install 'tegula[ray]'."


# Batches on the same cluster.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's of its own settings
def test_a_batch_goes_on_when_an_actor_dies_within_it(cluster, pair, tmp_path):
    for engine in pair.engines:
        engine.close()  # the batch's actor takes all CPUs
    sources, output = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b", "c/d", "kills-once", "last"):
        put(sources / f"{name}.png")
    request = KillingRequest(UpscaleOptions(), BundleSettings(), Runtime(), all_frames=True)

    def run_again():
        inputs, folder = [Input(FolderStorage(sources))], FolderStorage(output)
        journal = tmp_path / str(time.monotonic())
        run = BatchRun(request, inputs, folder, Naming(), 1, Console(quiet=True), journal)
        with contextlib.closing(run):
            status = run_on_cluster(run, (1, 1), None, None)
        return status, run.counts

    status, counts = run_again()
    assert (status, counts.done, counts.failed, counts.left) == (0, 5, 0, 0)
    lines = (output / "tegula-manifest.jsonl").read_text().splitlines()
    rows = {row["output"]: row for row in map(json.loads, lines) if "source" in row}
    assert len(rows) == 5
    assert rows["kills-once.png"]["attempts"] == 2
    assert size_of(output / "c/d.png") == (24, 16)
    status, counts = run_again()
    assert (status, counts.done, counts.skipped) == (0, 0, 5)
