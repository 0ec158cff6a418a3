"""Whether anything is lost or made twice while parts of a cluster fail.

    python -m bench.faults [--runs 200] [--seed 1] [--minutes 60]

Each run creates predictions with webhooks on a cluster of this machine (``bench.cluster``) and lets
one part fail at a seeded moment. Then every accepted prediction has to have ended once, with an
output of its last attempt, and a webhook of its end has to have come for each, with ids of their
own. Rescues are timed from the fault until the next attempt begins.
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psutil
from PIL import Image
from sqlalchemy import text

from bench.cluster import LEASE_S, Cluster, answers, new_token, open_cluster, until

FAULTS = ("database connection", "actor", "raylet", "stopped actor", "server")
_AT_ONCE = 3
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
    found: list[str] = field(default_factory=list)
    rescues: list[float] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def run(self, fault: str) -> None:
        """Let one thing fail while predictions run, and look what became of them."""
        names = {self._create() for _ in range(_AT_ONCE)}
        until(lambda: self._rows(names, "processing"), "a run")
        time.sleep(self.chance.uniform(0.0, 1.0))
        before = {row["id"]: row["attempt"] for row in self._rows(names)}
        began = time.monotonic()
        mend = self._break(fault)
        watching = threading.Thread(target=self._time_rescue, args=(before, began), daemon=True)
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

    def _break(self, fault: str) -> Callable[[], Any] | None:
        """Let something fail; return what mends it once all have ended, if it needs mending."""
        cluster, chance = self.cluster, self.chance
        if fault in ("actor", "stopped actor"):
            actors = cluster.actors()
            if not actors:
                return None
            actor = chance.choice(actors)
            if fault == "actor":
                actor.kill()
                return None
            actor.send_signal(signal.SIGSTOP)

            def wake() -> None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    actor.send_signal(signal.SIGCONT)

            threading.Timer(LEASE_S * 1.5, wake).start()
            return wake
        if fault == "raylet":
            # Not the head: with that the cluster itself is gone, as with any head of Ray.
            node = chance.choice(sorted(cluster.rays.worker_nodes, key=lambda each: each.node_id))
            cluster.rays.remove_node(node, allow_graceful=False)
            return cluster.add_raylet
        if fault == "server":
            port = chance.choice(sorted(cluster.servers))
            cluster.servers[port].kill()
            cluster.servers[port].wait()

            def restart() -> None:
                cluster.serve(port)
                until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), "a server's start")

            return restart
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        with cluster.database.connect() as connection:
            connection.execute(text(query))
        return None

    def _time_rescue(self, before: dict[str, int], began: float) -> None:
        """Note how long it takes until a prediction that was lost has its next attempt."""
        while time.monotonic() - began < 120.0:
            rows = self._rows(set(before))
            for row in rows:
                if row["attempt"] > before[row["id"]] > 0:
                    self.rescues.append(time.monotonic() - began)
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
                if row["status"].lower() != "succeeded":
                    self.found.append(f"{fault}: {row['id']} {row['status']}: {row['error']}")
                elif attempts[-1:] != [row["attempt"]]:
                    self.found.append(f"{fault}: {row['id']} has an output of {attempts}")
                if len(webhooks) != 1:
                    self.found.append(f"{fault}: {row['id']} has webhooks {webhooks}")
        ids = [one for some in self.receiver.ends.values() for one in some]
        if len(ids) != len(set(ids)):
            self.found.append(f"{fault}: an id of a webhook came for two predictions")


def main() -> int:
    """Run faults until there were enough of them or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    with open_cluster() as cluster:
        receiver = Receiver()
        receiver.start()
        picture = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
        path = cluster.folder / "photo.png"
        picture.save(path)
        headers = {"Authorization": f"Bearer {new_token(cluster)}"}
        client = httpx.Client(base_url=cluster.balancer.url, headers=headers, timeout=60.0)
        with path.open("rb") as file:
            uploaded = client.post("/v1/files", files={"content": file}).raise_for_status().json()
        image = uploaded["urls"]["get"]
        bench = Bench(cluster, client, receiver, random.Random(given.seed), image)
        end = time.monotonic() + given.minutes * 60
        while sum(bench.done.values()) < given.runs and time.monotonic() < end:
            fault = FAULTS[sum(bench.done.values()) % len(FAULTS)]
            bench.run(fault)
            took = f"{bench.rescues[-1]:.1f} s" if bench.rescues else "none yet"
            count = sum(bench.done.values())
            print(f"{count} {fault}; last rescue: {took}; {len(bench.found)} faults", flush=True)
    print(f"{sum(bench.done.values())} runs: {dict(bench.done)}")
    if bench.rescues:
        print(f"Rescues took {max(bench.rescues):.1f} s at most; a lease is {LEASE_S:g} s.")
    print("\n".join(bench.found) or "Nothing was lost, made twice or ended twice.")
    return 1 if bench.found else 0


if __name__ == "__main__":
    sys.exit(main())
