"""A server without its HTTP part, in a process that tests kill at any moment."""

from __future__ import annotations

import ssl
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from store_support import ask

from tegula.server.background import WebhookSender
from tegula.server.engine import Alive, Done, Log, OutputFile, Progressed, Started
from tegula.server.fetch import Fetcher, Policy
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.supervisor import Supervisor
from tegula.server.work import InputReader, ResolvedVersion

FETCHER = Fetcher(Policy(private=True, ports=()), tls=ssl.create_default_context())
MOST_WAITING = 100


class QuickEngine:
    device = "quick"
    loaded = frozenset()

    def load(self): ...

    def unload(self): ...

    def close(self): ...

    def run(self, job, cancelled):
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
    inputs = InputReader(store.files, FETCHER, 1000, 1.0)
    return Supervisor(store, [engine], lambda _: ResolvedVersion("ab", (), is_list=True), inputs)


def serve(folder: Path, hook: str, accepted: Connection, *, accepting: bool) -> None:
    """Work and deliver for ever; accept too, and tell each id once it is accepted."""
    accepted.send("imported")
    store = open_chaos_store(folder)
    accepted.send("opened")
    supervisor_of(store, QuickEngine()).start()
    WebhookSender(store, FETCHER).start()
    while True:
        if accepting and store.predictions.waiting().count < MOST_WAITING:
            accepted.send(ask(store, webhook=hook, webhook_events=("completed",)).id)
        time.sleep(0.005)
