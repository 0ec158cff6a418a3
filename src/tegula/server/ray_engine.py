"""The Ray engine: jobs run in actors of a cluster, each on its GPU or its share of the processors.

``RayEngine`` lives in the server's process, beside the local engine and with the same loop
(``runner.py``). Its worker is an actor, ``JobActor``, which Ray places where there is room; it runs
what a local process runs. The rows in SQL stay the truth: a server claims a prediction, hands it to
an actor of its own and records what the actor sends. So an actor that dies, also with its machine,
is a lost attempt as a dead process is, and what a forgotten one still makes is recorded nowhere.
Actors belong to the server that started them and end with it.

Ray calls an actor; an actor calls no server, and others of its kind only for help with a large
picture (``ray_helpers.py``). The server therefore always has one call of ``receive``
open, which the actor answers once there is something to tell, and each second if there is not.
These answers are its heartbeat: an actor that was stopped, or whose machine cannot be reached,
gives none, which shows long before Ray itself would call the machine dead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tegula.cluster import OBJECT_STORE, join_cluster
from tegula.errors import ServiceError
from tegula.folders import make_folder
from tegula.server.engine import (
    Alive,
    Device,
    Done,
    EngineEvent,
    Failed,
    Job,
    Log,
    OutputFile,
    Progressed,
    Started,
    StoredFile,
    device_of,
)
from tegula.server.log import log_as_json
from tegula.server.ray_helpers import HelpfulRunner, Helping, Peer, Peers, Sharding
from tegula.server.runner import (
    LOOK_EVERY_S,
    CancelJob,
    Ready,
    RunJob,
    Runner,
    RunnerSpec,
    Timeouts,
    Worker,
    WorkerEngine,
    serve_jobs,
)

if TYPE_CHECKING:  # each actor imports this module, and settings take a while
    from torch import Tensor

    from tegula.pipeline.shards import Task
    from tegula.server.settings import ServerSettings

log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
_GATHER_S = 0.2
"""The server writes what happened about as often."""
_OWN_OBJECT_STORE_OF_SHARDS = 512 << 20
"""Bytes, where windows and tiles of large pictures travel, too: some tiles at a time."""
_CLEAN_EVERY_S = 600.0
_COPY_HALF_WRITTEN_S = 3600.0
_PIECE = 1 << 20


# The actor's side.


@dataclass(frozen=True)
class SharedBlobs:
    """How an actor gets at the files of jobs: through the bucket that the server keeps them in.

    folder: for copies, and for outputs until they are stored; the server's own folder, so that
        they share copies where they share a machine.
    url, copies_bytes: as the settings ``blobs_url`` and ``blobs_copies_bytes``.
    limit: bytes of the largest output.
    """

    folder: Path
    url: str
    copies_bytes: int
    limit: int


@dataclass(frozen=True)
class Answer:
    """What an actor tells at once; ``over``: it could not load its models and runs nothing."""

    events: Sequence[EngineEvent | Ready | Sharding]
    pid: int
    over: bool


class JobActor:
    """What lives in a process of the cluster. Ray calls its methods from several threads."""

    def __init__(
        self, spec: RunnerSpec, device: str, log_level: int, shared: SharedBlobs | None
    ) -> None:
        log_as_json(log_level)
        self._inbox: Queue[RunJob | CancelJob] = Queue()
        self._outbox: Queue[EngineEvent | Ready | Sharding] = Queue()
        self._over = threading.Event()
        self._helping = Helping()
        self._peers = Peers(lambda: self._outbox.put(Sharding()))
        files = None if shared is None else _Files(shared)

        def send(event: EngineEvent | Ready) -> None:
            if files is not None and isinstance(event, OutputFile):
                event = files.stored(event)
            self._outbox.put(event)

        @contextmanager
        def here(job: Job) -> Iterator[Job]:
            self._peers.forget()
            with self._helping.own_job(), files.here(job) if files else nullcontext(job) as job:
                yield job

        def loaded(runner: Runner) -> None:
            if isinstance(runner, HelpfulRunner):
                runner.be_helped_by(self._peers.free)
                self._helping.runner = runner

        def serve() -> None:
            serve_jobs(self._inbox.get, send, spec, device, here, loaded)
            self._over.set()

        threading.Thread(target=serve, name="jobs", daemon=True).start()

    def send(self, message: RunJob | CancelJob) -> None:
        """Take a message of the server."""
        self._inbox.put(message)

    def receive(self) -> Answer:
        """Return what happened, after waiting for it for a heartbeat at most.

        A call costs both sides some milliseconds, and a prediction has a hundred events; so those
        that bring nothing to an end wait a little for others.
        """
        events: list[EngineEvent | Ready | Sharding] = []
        over = self._over.is_set()  # looked at first, so that what came before it is not lost
        with contextlib.suppress(Empty):
            events.append(self._outbox.get(timeout=_HEARTBEAT_S))
            end = time.monotonic() + _GATHER_S
            while True:
                may_wait = isinstance(events[-1], Started | Log | Progressed | Alive)
                left = end - time.monotonic() if may_wait else 0.0
                events.append(self._outbox.get(timeout=max(0.0, left)))
        return Answer(events, os.getpid(), over)

    def meet(self, peers: Sequence[Peer]) -> None:
        """Take the other actors that may help."""
        self._peers.meet(peers)

    # What other actors call.

    def can_help(self, nets: Any) -> object | None:
        """Get nets ready, and return what kind they are; None when busy."""
        return self._helping.kind(nets)

    def help(self, nets: Any, task: Task, call: str) -> Sequence[Tensor] | None:
        """Do a task; None when busy."""
        return self._helping.help(nets, task, call)

    def drop(self, call: str) -> None:
        """End a task that is not wanted any more."""
        self._helping.drop(call)


class _Files:
    """Brings the files of jobs from the shared blobs, and takes outputs there."""

    def __init__(self, shared: SharedBlobs) -> None:
        from tegula.server.object_blobs import open_bucket

        make_folder(shared.folder)
        self._spool = shared.folder / "spool"
        make_folder(self._spool)
        self._limit = shared.limit
        self._blobs = open_bucket(shared.url, shared.folder / "copies", shared.copies_bytes)
        self._cleaned_at = time.monotonic()

    @contextmanager
    def here(self, job: Job) -> Iterator[Job]:
        """Bring the files of a job to this machine for as long as it runs."""
        with tempfile.TemporaryDirectory(prefix=f"{job.id}-", dir=self._spool) as folder:
            values = {name: self._path(value) for name, value in job.input.items()}
            yield dataclasses.replace(job, input=values, folder=Path(folder))
        if time.monotonic() - self._cleaned_at > _CLEAN_EVERY_S:
            self._cleaned_at = time.monotonic()
            self._blobs.clean(_COPY_HALF_WRITTEN_S)

    def stored(self, output: OutputFile) -> OutputFile:
        """Store an output that lies in the folder of its job."""
        if not isinstance(output.file, Path):
            return output
        with output.file.open("rb") as file:
            blob = self._blobs.put(iter(lambda: file.read(_PIECE), b""), self._limit)
        return dataclasses.replace(output, file=blob)

    def _path(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._path(item) for item in value]
        return self._blobs.path(value.sha256) if isinstance(value, StoredFile) else value


# The server's side.


@dataclass(frozen=True)
class Place:
    """What each actor takes of a machine, and how many of them there may be.

    device: what torch calls it there.
    resources: CPUs, GPUs and others, as Ray names them.
    node: id of the only machine that will do, or empty.
    most: actors that have room at present, or that the settings allow.
    """

    device: str
    resources: Mapping[str, float]
    node: str
    most: int


def connect(settings: ServerSettings) -> tuple[Place, Device]:
    """Connect to the cluster of ``RAY_ADDRESS``, or start one on this machine.

    Returns what an actor takes of a machine, and the device that the API names.

    Raises:
        MissingExtraError: Ray is not installed.
        ServiceError: the cluster does not answer, or has several machines that share no files.
    """
    store = _OWN_OBJECT_STORE_OF_SHARDS if settings.ray_shard_above else OBJECT_STORE
    join_cluster("The ray engine", store)
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if settings.blobs_url is None and len(nodes) > 1:
        raise ServiceError(
            f"The Ray cluster has {len(nodes)} machines, which cannot read the folder of this "
            "one: set blobs_url to a bucket that all of them reach, or use a cluster of one."
        )
    # Machines that join later cannot read it either.
    node = ray.get_runtime_context().get_node_id() if settings.blobs_url is None else ""
    return _place(settings, [each["Resources"] for each in nodes], node)


def _place(
    settings: ServerSettings, machines: Sequence[Mapping[str, float]], node: str
) -> tuple[Place, Device]:
    """Return what an actor takes: as set, else a GPU and a CPU, or a machine without GPUs."""
    has_gpus = any(machine.get("GPU") for machine in machines)
    on_cpu = set(settings.devices) == {"cpu"} or not (settings.ray_gpus or has_gpus)
    gpus = 0.0 if on_cpu else settings.ray_gpus or 1.0
    smallest = min((machine["CPU"] for machine in machines if machine.get("CPU")), default=1.0)
    cpus = settings.ray_cpus or (smallest if on_cpu else 1.0)
    resources = {"CPU": cpus, "GPU": gpus, **settings.ray_resources}
    wanted = {name: amount for name, amount in resources.items() if amount}
    room = sum(
        math.floor(min(machine.get(name, 0.0) / amount for name, amount in wanted.items()))
        for machine in machines
    )
    name = "cpu" if on_cpu else "cuda:0"  # Ray shows an actor only the GPUs that are its own
    title = "CPU" if on_cpu else "GPU"
    for kind in (kind for machine in machines for kind in machine):
        if not on_cpu and kind.startswith("accelerator_type:"):
            title = kind.partition(":")[2]
    most = max(1, settings.ray_min_actors, settings.ray_max_actors or room)
    return Place(name, resources, node, most), device_of(name, title)


def ray_engines(
    settings: ServerSettings, place: Place, spec: RunnerSpec, timeouts: Timeouts
) -> list[RayEngine]:
    """Return as many engines as there may be actors; none has started its actor yet."""
    shared = None
    if settings.blobs_url is not None:
        shared = SharedBlobs(
            settings.folder.absolute(),
            settings.blobs_url,
            settings.blobs_copies_bytes,
            settings.max_output_bytes,
        )
    engines = [
        RayEngine(number, spec, place, timeouts, settings.lease_seconds, shared)
        for number in range(place.most)
    ]
    if settings.ray_shard_above:
        introduce(engines)
    return engines


def introduce(engines: Sequence[RayEngine]) -> None:
    """Let the actors of engines help each other with large pictures."""
    for engine in engines:
        engine.others = [other for other in engines if other is not engine]


class RayEngine(WorkerEngine):
    """Runs jobs in an actor of a cluster, which starts once the queue calls for it.

    others: engines whose actors may help with a large picture.
    """

    def __init__(
        self,
        number: int,
        spec: RunnerSpec,
        place: Place,
        timeouts: Timeouts,
        silence: float,
        shared: SharedBlobs | None = None,
    ) -> None:
        """Take what an actor needs.

        Args:
            number: tells it from the others of this server.
            spec: how the actor gets its runner.
            place: what it takes of a machine.
            timeouts: as those of a local process; loading includes the wait for a place.
            silence: seconds without a heartbeat after which an actor that has loaded its models is
                taken for dead; while it imports and loads them it may miss many.
            shared: how actors on other machines get at files; None where paths will do.
        """
        super().__init__(f"ray:{number}", timeouts)
        self.shares_blobs = shared is not None
        self._spec = spec
        self._place = place
        self._silence = silence
        self._shared = shared
        self.others: Sequence[RayEngine] = ()

    @property
    def wants_help(self) -> bool:
        """Whether its actor spreads a large picture, so that more actors are of use."""
        worker = self._worker
        return isinstance(worker, _Actor) and worker.alive and worker.sharding

    @property
    def peer(self) -> Peer | None:
        """Its actor as others call it, once that has loaded its models."""
        worker = self._worker
        return worker.peer if isinstance(worker, _Actor) and worker.alive and worker.ready else None

    @property
    def ready(self) -> bool:
        """Whether its actor has loaded its models and gives signs of life.

        One that could not load them counts too: the next prediction then gets an actor that begins
        anew, perhaps on another machine, or fails with the reason.
        """
        actor = self._worker
        return isinstance(actor, _Actor) and (actor.look() or actor.over)

    def _start(self) -> Worker:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = self._place
        resources = dict(place.resources)
        options: dict[str, Any] = {
            "num_cpus": resources.pop("CPU"),
            "num_gpus": resources.pop("GPU"),
            "resources": resources,
            # One call of receive is always open; messages come beside it, and tasks of others,
            # which are answered at once where they are not done.
            "max_concurrency": 8,
            # Which attempt comes next is for the queue to say.
            "max_restarts": 0,
        }
        if place.node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(place.node, soft=False)
        level = logging.getLogger().level
        actor = ray.remote(JobActor).options(**options)
        handle = actor.remote(self._spec, place.device, level, self._shared)
        return _Actor(handle, self._silence, self._timeouts.load, self._peers_now)

    def _peers_now(self) -> Sequence[Peer]:
        # What other threads change is only looked at: nothing is asked of their actors.
        return [peer for other in self.others if (peer := other.peer) is not None]


class _Actor:
    """An actor as the server sees it.

    pid: known once it has a place and has answered for the first time.
    over: it could not load its models.
    sharding: it runs a picture that others could help with.
    peer: what others call it by.
    """

    def __init__(
        self,
        handle: Any,
        silence: float,
        load_silence: float,
        peers: Callable[[], Sequence[Peer]] = tuple,
    ) -> None:
        self.ready = self.over = self.sharding = False
        self.peer = Peer(uuid4().hex, handle)
        self._peers = peers
        self._introduced: Sequence[Peer] = ()
        self.pid: int | None = None
        self._handle = handle
        self._silence = silence
        self._load_silence = load_silence
        self._call = handle.receive.remote()
        self._heard_at = time.monotonic()
        self._early: list[EngineEvent] = []
        self._death: str | None = None

    @property
    def alive(self) -> bool:
        return self._death is None

    def look(self) -> bool:
        """Take what it has answered so far; return whether it is loaded and alive."""
        if self.alive:
            self._early += self._answered(0.0)
        return self.alive and self.ready

    def send(self, message: RunJob | CancelJob) -> None:
        self._introduce()
        self._handle.send.remote(message)  # a dead actor is found out by receiving

    def _introduce(self) -> None:
        peers = self._peers()
        if peers != self._introduced:
            self._introduced = peers
            self._handle.meet.remote(peers)

    def receive(self) -> list[EngineEvent]:
        if self.sharding:
            self._introduce()  # more of them may have started meanwhile, or one have died
        early, self._early = self._early, []
        return early or (self._answered(LOOK_EVERY_S) if self.alive else [])

    def death(self) -> str | None:
        return None if self._early else self._death

    def kill(self) -> None:
        import ray

        self._death = self._death or "it was ended"
        with contextlib.suppress(Exception):  # it, or its cluster, is gone already
            ray.kill(self._handle)

    def _answered(self, wait: float) -> list[EngineEvent]:
        """Return what it answers within so many seconds, and open the next call."""
        import ray
        from ray.exceptions import RayError

        now = time.monotonic()
        try:
            done, _ = ray.wait([self._call], timeout=wait)
            if not done:
                limit = self._silence if self.ready else self._load_silence
                # Without a place it cannot answer, and may wait for one as long as it takes.
                if self.pid is not None and now - self._heard_at > limit:
                    self._death = f"its actor gave no sign of life for {limit:.0f} s"
                    log.warning("An actor of the cluster is given up: %s", self._death)
                return []
            answer: Answer = ray.get(self._call)
        except (RayError, RuntimeError) as error:
            # What Ray says names machines and addresses, which are the operator's alone.
            log.warning("An actor of the cluster is lost: %s", error)
            self._death = "its actor died, or the machine that it ran on"
            return []
        self.pid, self._heard_at = answer.pid, time.monotonic()
        if answer.over:
            words = [event.error for event in answer.events if isinstance(event, Failed)]
            log.warning("An actor could not load its models: %s", *words)
            self._death, self.over = "its actor could not load its models", True
        else:
            self._call = self._handle.receive.remote()
        self.ready = self.ready or any(isinstance(event, Ready) for event in answer.events)
        for event in answer.events:
            if isinstance(event, Sharding | Done | Failed):
                self.sharding = isinstance(event, Sharding)
        signs = (Ready, Sharding)
        return [Alive() if isinstance(event, signs) else event for event in answer.events]
