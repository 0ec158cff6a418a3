"""Whether anything is lost or made twice while parts of a cluster fail.

    python -m bench.faults [--runs 200] [--seed 1] [--minutes 90] [--lease 15]

Each run creates predictions with webhooks on a cluster of this machine (``bench.cluster``) and lets
one part fail at a seeded moment. Then every accepted prediction has to have ended once, with an
output of its last attempt, and a webhook of its end has to have come for each, with ids of their
own. A rescue is timed from the fault until the prediction waits for its next attempt, which begins
once an actor is free. While the store answers 503, or
the disk that servers and actors write to is full, a prediction may fail, if it says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psutil
from PIL import Image
from sqlalchemy import text

from bench.cluster import DISK_BYTES, Cluster, answers, new_token, open_cluster, until

_AT_ONCE = 3
_SIDE = 64
"""Pixels: some seconds of work on a busy machine, so that faults meet predictions."""
_PIECE = 1 << 20
Mend = Callable[[], Any] | None
_BROKEN = (httpx.TransportError, httpx.HTTPStatusError)


@dataclass
class Receiver:
    """Takes webhooks and remembers the ids of those that tell of an end."""

    ends: dict[str, set[str]] = field(default_factory=dict)
    url: str = ""

    def start(self) -> None:
        """Begin to listen."""
        ends = self.ends

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                ends.setdefault(body["id"], set()).add(self.headers["webhook-id"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}/"


@dataclass
class Bench:
    """The runs, and what they found."""

    cluster: Cluster
    client: httpx.Client
    receiver: Receiver
    chance: random.Random
    image: str
    lease: float
    found: list[str] = field(default_factory=list)
    rescues: dict[str, list[float]] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)

    def run(self, fault: str) -> None:
        """Let one thing fail while predictions run, and look what became of them."""
        names = {self._create() for _ in range(_AT_ONCE)}
        until(lambda: self._rows(names, "processing"), "a run")
        time.sleep(self.chance.uniform(0.0, 1.0))
        before = {row["id"]: row["attempt"] for row in self._rows(names)}
        began = time.monotonic()
        mend = FAULTS[fault](self)
        watching = threading.Thread(
            target=self._time_rescue, args=(fault, before, began), daemon=True
        )
        watching.start()
        until(lambda: not self._rows(names, "starting", "processing"), "the end of all")
        if mend is not None:
            mend()
        until(lambda: all(name in self.receiver.ends for name in names), "a webhook of each")
        watching.join(1.0)
        self._check(names, fault)
        self.done[fault] += 1

    def _create(self) -> str:
        body = {
            "version": "tegula/upscale",
            "input": {"image": self.image, "scale": 2},
            "webhook": self.receiver.url,
            "webhook_events_filter": ["completed"],
        }
        while True:
            with contextlib.suppress(*_BROKEN):
                answer = self.client.post("/v1/predictions", json=body).raise_for_status()
                return str(answer.json()["id"])
            time.sleep(0.3)

    def _rows(self, names: set[str], *statuses: str) -> list[Any]:
        rows = [row for row in self.cluster.rows() if row["id"] in names]
        return [row for row in rows if not statuses or row["status"].lower() in statuses]

    # Faults. Each returns what mends it once all have ended, if it needs mending.

    def kill_actor(self) -> None:
        """Kill a process that runs predictions."""
        if actors := self.cluster.actors():
            self.chance.choice(actors).kill()

    def stop_actor(self) -> Mend:
        """Stop a process until its lease is long over, then let it go on."""
        if not (actors := self.cluster.actors()):
            return None
        actor = self.chance.choice(actors)
        actor.send_signal(signal.SIGSTOP)

        def wake() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                actor.send_signal(signal.SIGCONT)

        threading.Timer(self.lease * 1.5, wake).start()
        return wake

    def kill_raylet(self) -> Mend:
        """Lose a machine. Not the head: with that the cluster itself is gone, as any of Ray's."""
        rays = self.cluster.rays
        node = self.chance.choice(sorted(rays.worker_nodes, key=lambda each: each.node_id))
        rays.remove_node(node, allow_graceful=False)
        return self.cluster.add_raylet

    def kill_server(self) -> Mend:
        """Kill an API process."""
        port = self.chance.choice(sorted(self.cluster.servers))
        self.cluster.servers[port].kill()
        self.cluster.servers[port].wait()

        def restart() -> None:
            self.cluster.serve(port)
            until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), "a server's start")

        return restart

    def cut_connections(self) -> None:
        """Cut all connections to the database but the one that says so."""
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        with self.cluster.database.connect() as connection:
            connection.execute(text(query))

    def refuse_store(self) -> Mend:
        """Let the store answer 503."""
        self.cluster.store.refuse()
        return self._for_a_while(self.cluster.store.serve_again)

    def fill_disk(self) -> Mend:
        """Fill the disk that servers and actors write to, if it is one of its own."""
        filling = self.cluster.disk / "filling"
        if not self.cluster.disk.is_mount():
            return None
        with contextlib.suppress(OSError), filling.open("wb") as file:
            for _ in range(DISK_BYTES // _PIECE + 1):
                file.write(bytes(_PIECE))
        return self._for_a_while(partial(filling.unlink, missing_ok=True))

    def _for_a_while(self, mend: Callable[[], Any]) -> Callable[[], Any]:
        """Mend after a time within which some attempts get through and some do not."""
        threading.Timer(self.chance.uniform(0.5, 15.0), mend).start()
        return mend

    # What became of predictions.

    def _time_rescue(self, fault: str, before: dict[str, int], began: float) -> None:
        """Note how long it takes until a prediction that was lost is given back to the queue."""
        while time.monotonic() - began < 20 * self.lease:
            rows = self._rows(set(before))
            for row in rows:
                waits_again = row["status"].lower() == "starting" and row["worker"] is None
                if before[row["id"]] and (row["attempt"] > before[row["id"]] or waits_again):
                    self.rescues.setdefault(fault, []).append(time.monotonic() - began)
                    return
            if not [row for row in rows if row["status"].lower() in ("starting", "processing")]:
                return
            time.sleep(0.1)

    def _check(self, names: set[str], fault: str) -> None:
        outputs = "SELECT attempt FROM events WHERE prediction_id = :name AND kind = 'output'"
        ends = "SELECT count(*) FROM events WHERE prediction_id = :name AND kind = 'done'"
        with self.cluster.database.connect() as connection:
            for row in self._rows(names):
                name = {"name": row["id"]}
                ended = connection.execute(text(ends), name).scalar_one()
                attempts = connection.execute(text(outputs), name).scalars().all()
                webhooks = self.receiver.ends[row["id"]]
                if ended != 1:
                    self.found.append(f"{fault}: {row['id']} ended {ended} times")
                words, error = _MAY_FAIL.get(fault, ()), row["error"] or ""
                if row["status"].lower() == "failed" and any(each in error for each in words):
                    self.excused[fault] += 1
                elif row["status"].lower() != "succeeded":
                    self.found.append(f"{fault}: {row['id']} {row['status']}: {row['error']}")
                elif attempts[-1:] != [row["attempt"]]:
                    self.found.append(f"{fault}: {row['id']} has an output of {attempts}")
                if len(webhooks) != 1:
                    self.found.append(f"{fault}: {row['id']} has webhooks {webhooks}")
        ids = [one for some in self.receiver.ends.values() for one in some]
        if len(ids) != len(set(ids)):
            self.found.append(f"{fault}: an id of a webhook came for two predictions")


FAULTS: dict[str, Callable[[Bench], Mend]] = {
    "database connections cut": Bench.cut_connections,
    "actor killed": Bench.kill_actor,
    "raylet killed": Bench.kill_raylet,
    "store answers 503": Bench.refuse_store,
    "full disk": Bench.fill_disk,
    "actor stopped": Bench.stop_actor,
    "server killed": Bench.kill_server,
}
_MAY_FAIL = {
    "store answers 503": ("object store",),
    "full disk": ("is full", "No space left"),
}
"""Faults that no other machine makes good, and what the sentence of a failure then speaks of."""


def main() -> int:
    """Run faults until there were enough of them or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--lease", type=float, default=15.0)
    given = parser.parse_args()
    with open_cluster(TEGULA_LEASE_SECONDS=str(given.lease)) as cluster:
        receiver = Receiver()
        receiver.start()
        picture = Image.radial_gradient("L").resize((_SIDE, _SIDE)).convert("RGB")
        path = cluster.folder / "photo.png"
        picture.save(path)
        headers = {"Authorization": f"Bearer {new_token(cluster)}"}
        client = httpx.Client(base_url=cluster.balancer.url, headers=headers, timeout=60.0)
        with path.open("rb") as file:
            uploaded = client.post("/v1/files", files={"content": file}).raise_for_status().json()
        image = uploaded["urls"]["get"]
        bench = Bench(cluster, client, receiver, random.Random(given.seed), image, given.lease)
        end = time.monotonic() + given.minutes * 60
        while sum(bench.done.values()) < given.runs and time.monotonic() < end:
            fault = list(FAULTS)[sum(bench.done.values()) % len(FAULTS)]
            began, found = time.monotonic(), len(bench.found)
            bench.run(fault)
            took = max(bench.rescues.get(fault, [0.0]))
            count, failed = sum(bench.done.values()), sum(bench.excused.values())
            print(
                f"{count} {fault}, {time.monotonic() - began:.0f} s: "
                f"rescues within {took:.1f} s so far, "
                f"{failed} failed as they may, {len(bench.found)} found",
                *bench.found[found:],
                sep="\n",
                flush=True,
            )
    for fault, runs in bench.done.items():
        rescues, failed = sorted(bench.rescues.get(fault, [])), bench.excused[fault]
        times = (
            f"{rescues[len(rescues) // 2]:.1f} and at most {rescues[-1]:.1f} s" if rescues else "-"
        )
        print(
            f"{fault}: {runs} runs, {failed} failed as they may, {len(rescues)} rescues in {times}"
        )
    print(f"{sum(bench.done.values())} runs; a lease is {given.lease:g} s.")
    print("\n".join(bench.found) or "Nothing was lost, made twice or ended twice.")
    return 1 if bench.found else 0


if __name__ == "__main__":
    sys.exit(main())
