"""The engine that runs jobs in a process of its own: whatever the process does, we go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

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
from tegula.server.runner import LocalEngine, RunnerSpec, Timeouts

TIMEOUTS = Timeouts(load=300.0, run=300.0, cancel=300.0)


@pytest.fixture
def make_engine():
    made = []

    def make(timeouts=TIMEOUTS, **options):
        made.append(LocalEngine(RunnerSpec("engine_support:open_runner", options), "cpu", timeouts))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def run(tmp_path):
    def run_job(engine, do="finish", cancelled=lambda: False):
        job = Job("name", 1, "tegula/upscale", "ab", {"do": do}, tmp_path)
        return [event for event in engine.run(job, cancelled) if not isinstance(event, Alive)]

    return run_job


def pid_of(events):
    return next(int(event.text.split()[1]) for event in events if isinstance(event, Log))


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


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


def test_a_death_is_told_and_the_next_job_gets_a_new_process(make_engine, run):
    engine = make_engine()
    events = run(engine, "die")
    assert events[-1] == Failed("its process ended with signal 9", lost=True)
    after = run(engine)
    assert isinstance(after[-1], Done)
    assert pid_of(after) != pid_of(events)


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


def test_out_of_memory_ends_the_process(make_engine, run):
    engine = make_engine()
    events = run(engine, "run_out_of_memory")
    assert events[-1] == Failed("Even one window does not fit.", lost=True)
    assert engine.pid is None


def test_errors_of_ours_are_told_and_others_are_not(make_engine, run):
    engine = make_engine()
    assert run(engine, "refuse")[-1] == Failed("The input is no image.")
    stumbled = run(engine, "stumble")[-1]
    assert "ZeroDivisionError" in stumbled.error
    assert "secret" not in stumbled.error
    assert engine.pid is not None


def test_errors_name_inputs_and_no_path_of_the_server(make_engine, tmp_path, capfd):
    kept = tmp_path / "files" / "ab" / "abcd"
    engine = make_engine()
    for do, words in (
        ("miss_input", "image is a damaged or truncated image; save it again."),
        ("miss_weights", "There is no LoRA file style.safetensors; check https://a.example/b/c."),
    ):
        job = Job("name", 1, "tegula/upscale", "ab", {"do": do, "image": kept}, tmp_path)
        assert list(engine.run(job, lambda: False))[-1] == Failed(words)
    assert str(kept) in capfd.readouterr().err  # the operator's log says which


def test_what_a_process_logs_is_json_and_names_the_prediction(make_engine, run, capfd):
    run(make_engine(), "stumble")
    (line,) = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert (line["level"], line["prediction"]) == ("error", "name")
    assert "ZeroDivisionError" in line["trace"]


def test_cancelling_ends_the_job_and_keeps_the_process(make_engine, run):
    engine = make_engine()
    run(engine)
    pid = engine.pid
    assert run(engine, "wait", cancelled=lambda: True)[-1].cancelled
    assert engine.pid == pid
    assert isinstance(run(engine)[-1], Done)


def test_a_job_that_will_not_stop_is_stopped(make_engine, run):
    engine = make_engine(Timeouts(load=300, run=300, cancel=0.3))
    events = run(engine, "hang", cancelled=lambda: True)
    assert events[-1].cancelled
    assert engine.pid is None


def test_a_job_that_nobody_follows_any_more_is_ended(make_engine, tmp_path):
    engine = make_engine()
    events = engine.run(Job("name", 1, "m", "ab", {"do": "hang"}, tmp_path), lambda: False)
    pid = pid_of(events)
    events.close()
    assert gone(pid)


def test_a_model_that_cannot_be_loaded_says_why(make_engine, run):
    assert run(make_engine(open="fail"))[-1] == Failed("The weights are not here.")


def test_loading_has_a_timeout_of_its_own(make_engine, run):
    engine = make_engine(Timeouts(load=0.5, run=300, cancel=1), open="hang")
    assert "loading" in run(engine)[-1].error


def test_a_process_is_kept_ready_but_not_started_again_and_again(make_engine):
    engine = make_engine(open="fail")
    engine.load()
    first = engine._child.process
    first.join(300)
    engine.load()
    assert engine._child.process is first


def test_unloading_ends_the_process(make_engine, run):
    engine = make_engine()
    pid = pid_of(run(engine))
    engine.unload()
    assert gone(pid)
    assert engine.loaded == frozenset()


def test_the_process_ends_with_the_server(make_engine, run):
    engine = make_engine()
    pid = pid_of(run(engine))
    engine._child.pipe.close()
    engine._child.process.join(300)
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
