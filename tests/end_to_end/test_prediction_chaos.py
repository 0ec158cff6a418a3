"""A server that is killed again and again keeps every promise it made."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter

import pytest
from chaos_support import PICTURE, forking, open_chaos_store, serve, supervisor_of
from receiver_support import receiving
from store_support import ask

from tegula.server.queue import MOST_LOSSES
from tegula.server.runner import LocalEngine, RunnerSpec, Timeouts
from tegula.server.tables import FILE_KEY, State


def started(folder, hook, *, accepting):
    context = forking()
    ours, theirs = context.Pipe(duplex=False)
    options = {"accepting": accepting}
    process = context.Process(target=serve, args=(folder, hook, theirs), kwargs=options)
    process.start()
    theirs.close()
    return process, ours


def said(pipe):
    names = []
    try:
        while pipe.poll(0):
            names.append(pipe.recv())
    except (EOFError, OSError):
        pass
    return [name for name in names if name != "opened"]


def answer_in_halves(request):
    """Give the picture, or say that a webhook arrived, with time for a kill between two halves."""
    request.send_response(200)
    request.send_header("content-length", str(len(PICTURE)))
    request.end_headers()
    with contextlib.suppress(OSError):
        request.wfile.write(PICTURE[:2])
        request.wfile.flush()
        time.sleep(0.02 if request.command == "GET" else 0)
        request.wfile.write(PICTURE[2:])


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_accepted_is_lost_or_done_twice(tmp_path, kills):
    moments, accepted = random.Random(1), []
    with receiving() as receiver:
        receiver.handle = answer_in_halves
        for _ in range(kills):
            process, pipe = started(tmp_path, receiver.url, accepting=True)
            assert pipe.recv() == "imported"
            if (depth := moments.random()) < 0.8:
                assert pipe.recv() == "opened"
            if depth < 0.6:
                assert pipe.poll(600), "it accepted nothing"
            time.sleep(moments.uniform(0.0, 0.25))
            process.kill()
            process.join()
            accepted += said(pipe)
        process, _ = started(tmp_path, receiver.url, accepting=False)
        store = open_chaos_store(tmp_path)
        settle(store, 600)
        process.kill()
        process.join()
        assert len(accepted) >= kills // 2
        account_for(store, accepted, receiver)
        store.close()


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_again_and_again_loses_nothing(tmp_path, kills):
    moments = random.Random(6)
    store = open_chaos_store(tmp_path)
    engine = LocalEngine(RunnerSpec("engine_support:open_runner", {}), "cpu", Timeouts(300, 300, 1))
    supervisor = supervisor_of(store, engine)
    supervisor.start()
    names = []
    for _ in range(kills):
        names += [ask(store, input={"do": "nap"}).id for _ in range(3)]
        time.sleep(moments.uniform(0.2, 0.7))
        if pid := engine.pid:
            os.kill(pid, signal.SIGKILL)
    settle(store, 600)
    supervisor.stop()
    done = [store.predictions.get(name) for name in names]
    assert all(len(each.output) == 1 for each in done if each.status is State.SUCCEEDED)
    assert all(each.losses == MOST_LOSSES for each in done if each.status is State.FAILED)
    assert any(each.losses for each in done)
    store.close()


def settle(store, seconds):
    end = time.monotonic() + seconds
    while store.predictions.waiting().count or store.webhooks.next_due() is not None:
        assert time.monotonic() < end, "it never came to rest"
        time.sleep(0.1)


def account_for(store, accepted, receiver):
    assert len(set(accepted)) == len(accepted)
    reported = Counter()
    ids = {}
    for method, _, headers, body in receiver.requests:
        if method == "GET":
            continue  # a picture
        name = json.loads(body)["id"]
        reported[name] += 1
        ids.setdefault(name, set()).add(headers["webhook-id"])
    for name in accepted:
        done = store.predictions.get(name)
        assert done.status.terminal
        if done.status is State.FAILED:
            assert done.losses == MOST_LOSSES, done.error
        else:
            (file,) = done.output
            assert store.files.path(store.files.get(file[FILE_KEY])).read_bytes() == name.encode()
        assert reported[name] >= 1
        assert len(ids[name]) == 1
