"""Processes that are forked in milliseconds, and in one a server without its HTTP part."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from store_support import ask

from tegula.server.addresses import Policy, host_of
from tegula.server.background import WebhookSender
from tegula.server.engine import Alive, Done, Log, OutputFile, Progressed, Started
from tegula.server.fetch import Fetcher
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.supervisor import Supervisor
from tegula.server.work import InputFiles, ResolvedVersion

FETCHER = Fetcher(Policy(private=True, ports=()))
MOST_WAITING = 100
PICTURE = b"hello"


def forking() -> ForkServerContext:
    """Return what starts processes by forking one that has imported the server.

    Importing takes most of a second and most of the time until a server is ready, and a test
    that kills 200 servers would do little else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chaos_imported"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


class QuickEngine:
    device = "quick"
    shares_blobs = False
    wants_help = False
    started = ready = True
    loaded = frozenset()

    def load(self): ...

    def unload(self): ...

    def close(self): ...

    def run(self, job, cancelled):
        if picture := job.input.get("image"):
            assert picture.read_bytes() == PICTURE
        yield Started()
        for step in range(4):
            time.sleep(0.002)
            yield Log(f"step {step}")
            yield Progressed(step / 4)
            yield Alive()
        path = job.folder / "out-0.png"
        path.write_bytes(job.id.encode())
        yield OutputFile(path, "out-0.png", "image/png")
        yield Done()


def open_chaos_store(folder: Path) -> Store:
    settings = ServerSettings(folder=folder, lease_seconds=1.0, webhook_seconds=1.0)
    return Store.open(settings)


def supervisor_of(store: Store, engine: Any) -> Supervisor:
    inputs = InputFiles(store.files, FETCHER, 1000, 60.0)
    version = ResolvedVersion("ab", ("image",), is_list=True)
    return Supervisor(store, [engine], lambda _: version, inputs)


def serve(folder: Path, hook: str, accepted: Connection, *, accepting: bool) -> None:
    """Work and deliver for ever; accept too, and tell each id once it is accepted.

    Half of the predictions have a picture to fetch, each from an address of its own.
    """
    accepted.send("imported")
    store = open_chaos_store(folder)
    accepted.send("opened")
    supervisor_of(store, QuickEngine()).start()
    WebhookSender(store, FETCHER).start()
    count = 0
    while True:
        if accepting and store.predictions.waiting().count < MOST_WAITING:
            values: dict[str, Any] = {"webhook": hook, "webhook_events": ("completed",)}
            count += 1
            if count % 2:
                values |= {"input": {"image": f"{hook}/{count}"}, "fetch_host": host_of(hook)}
            accepted.send(ask(store, **values).id)
        time.sleep(0.005)
