"""`tegula batch --ray`: Ray Data hands the jobs of a run to actors on the machines of a cluster.

Two steps make the stream. The first, a task on the machine of the command, takes jobs from the
journal, some at a time, and no more than a few for each actor before their ends are recorded; so
neither the cluster nor the command ever holds many. The second is a pool of actors, each with its
loaded model. What comes out is recorded by the command, on whose disk journal and manifest are.

An actor that dies, or its machine, is replaced by Ray, and what it had is done again. A picture
that kills its actors would do so for ever, so one more actor counts how often each job was begun.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tegula.cli.batch import BatchRun
from tegula.cli.batch_jobs import BatchJob, Journal, Outcome
from tegula.cli.batch_work import BatchWorker, failed
from tegula.cli.console import Console, Failure, Interruption
from tegula.cli.pictures import Request
from tegula.cluster import join_cluster
from tegula.errors import (
    ActorLostError,
    FullDiskError,
    MissingExtraError,
    ModelError,
    ServiceError,
    TegulaError,
)

log = logging.getLogger(__name__)

_GROUP = 8
"""Jobs that an actor gets at once, as long as many wait; so it reads and writes beside the work."""
_GROUPS_AHEAD = 3
_LONG_WAIT_S = 60.0
_GROUPS_OF_A_STREAM = 20_000
"""Ray Data keeps a kilobyte or two on each group until its stream ends; then a new one begins."""


@dataclass(frozen=True)
class Pool:
    """How many actors there may be, and what each takes of a machine."""

    least: int
    most: int
    cpus: float
    gpus: float

    @classmethod
    def of(
        cls,
        machines: Sequence[Mapping[str, float]],
        actors: tuple[int, int] | None,
        gpus: float | None,
        cpus: float | None,
    ) -> Pool:
        """Fill what is left open by what the machines of a cluster have.

        An actor takes one GPU and one CPU. Without GPUs there is one for each machine, with all of
        its CPUs, or the CPUs are shared among as many as there may be.
        """
        if gpus is None:
            gpus = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
        processors = [machine["CPU"] for machine in machines if machine.get("CPU")] or [1.0]
        if actors is None:
            room = sum(int(machine.get("GPU", 0.0) / gpus) for machine in machines) if gpus else 0
            actors = 1, max(1, room if gpus else len(processors))
        least, most = actors
        if cpus is None:
            share = min(processors) / -(-most // len(processors))
            cpus = 1.0 if gpus else float(int(share)) or share
        return cls(least, most, cpus, gpus)


def run_on_cluster(
    run: BatchRun, actors: tuple[int, int] | None, gpus: float | None, cpus: float | None
) -> int:
    """Do a run on the cluster of ``RAY_ADDRESS``, or on one of this machine.

    Args:
        run: what there is to do.
        actors: least and most of them; None fills the cluster as it is.
        gpus: of each actor; None is one where there are any.
        cpus: of each actor.

    Returns:
        The status for the shell.

    Raises:
        MissingExtraError: Ray, or its part for data, is not installed.
        ServiceError: the cluster cannot be used.
        TegulaError: nothing can be done, as without the model.
    """
    with run.listing():
        if run.journal.has_jobs():
            _run(run, actors, gpus, cpus)
    return run.status()


def _run(
    run: BatchRun, actors: tuple[int, int] | None, gpus: float | None, cpus: float | None
) -> None:
    # What Ray writes for its developers goes to the logs of its session.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    is_own = join_cluster("--ray")
    import ray

    try:
        import ray.data.exceptions
    except ImportError as error:
        raise MissingExtraError("--ray needs Ray Data: pip install 'tegula[ray]'.") from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        pool = Pool.of(machines, actors, gpus, cpus)
        with _waiting_reported(run.console, pool) as heard:
            for number in itertools.count(1):
                stream = _stream(run, pool, number)
                for batch in stream.iter_batches(batch_size=None, prefetch_batches=0):
                    heard()
                    for text in batch["answer"]:
                        answer = json.loads(str(text))
                        run.record(*map(Outcome.from_json, answer["outcomes"]))
                        if answer["stopped_by"] is not None:
                            raise _error_of(Failure(**answer["stopped_by"]))
                if not run.journal.has_jobs():
                    break
    except (ray.exceptions.RayError, ray.data.exceptions.SystemException) as error:
        log.debug("The batch is given up", exc_info=error)  # it names machines and addresses
        raise ServiceError(
            "The Ray cluster gave the batch up; the same command goes on from here, and the "
            "cluster's logs say why."
        ) from error
    finally:
        if is_own:
            ray.shutdown()


@contextmanager
def _waiting_reported(console: Console, pool: Pool) -> Iterator[Callable[[], None]]:
    """Say what an actor takes if none has worked for long: others may hold all of the cluster.

    Gives what is to be called once one has.
    """
    wanted = [(pool.cpus, "CPU"), *([(pool.gpus, "GPU")] if pool.gpus else [])]
    takes = " and ".join(f"{count:g} {kind}{'s' * (count != 1)}" for count, kind in wanted)
    sentence = f"Still waiting for the cluster: an actor takes {takes}, and loads its model first."
    timer = threading.Timer(_LONG_WAIT_S, console.message, (sentence,))
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def _stream(run: BatchRun, pool: Pool, number: int) -> Any:
    """Return the dataset of answers, which begins to work once it is read."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Rows go on one by one. Otherwise Ray Data would wait until it has megabytes of them.
    context.target_max_block_size = 1
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    tries = ray.remote(Tries).options(num_cpus=0, label_selector=here).remote()
    return (
        # One row, to begin with, that takes no task and so no CPU, which actors may need all of.
        ray.data.from_items([0])
        .map_batches(
            take_jobs,
            fn_kwargs={
                "journal": str(run.journal_path),
                "actors": pool.most,
                "number": number,
            },
            batch_size=None,
            num_cpus=0,
            label_selector=here,
        )
        .map_batches(
            BatchActor,
            fn_constructor_args=(
                run.output.address,
                run.request,
                run.options,
                run.retries,
                tries,
            ),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
    )


def take_jobs(_: Any, *, journal: str, actors: int, number: int) -> Iterator[dict[str, list[str]]]:
    """Yield groups of jobs while there are any; smaller ones where few are left to share.

    Args:
        journal: of the run, on this machine.
        actors: that there may be.
        number: of the stream, counted from 1; each has a limited number of groups.

    Raises:
        RuntimeError: groups of this stream were taken before.
    """
    taking = Journal(Path(journal))
    if not taking.begin_stream(number):
        # Ray would drop as many groups of a second try as the first has yielded, but these are
        # others, and their jobs would never end.
        raise RuntimeError("The jobs of a stream are taken once.")
    ahead = actors * _GROUP * _GROUPS_AHEAD

    def group(waiting: int) -> int:
        return min(_GROUP, waiting // (actors * _GROUPS_AHEAD))

    groups = taking.jobs(ahead, group, settles=True)
    for jobs in itertools.islice(groups, _GROUPS_OF_A_STREAM):
        yield {"jobs": [json.dumps([vars(job) for job in jobs])]}
    taking.close()


class Tries:
    """An actor that counts how often jobs were begun whose ends nobody has heard of."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def of(self, numbers: Sequence[int]) -> list[int]:
        """Return the counts of jobs."""
        return [self._begun[number] for number in numbers]

    def begin(self, number: int) -> None:
        """Count a job."""
        self._begun[number] += 1

    def end(self, numbers: Sequence[int]) -> None:
        """Forget jobs."""
        for number in numbers:
            self._begun.pop(number, None)


class BatchActor:
    """Does groups of jobs on a machine of the cluster, with one loaded model."""

    def __init__(
        self, output: str, request: Request, options: str, retries: int, tries: Any
    ) -> None:
        self._worker = BatchWorker(output, request, options, Console(quiet=True), Interruption())
        self._retries = retries
        self._tries = tries

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return a JSON text of the outcomes for each group."""
        return {
            "answer": [json.dumps(self._answer(json.loads(str(text)))) for text in batch["jobs"]]
        }

    def _answer(self, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import ray

        jobs = [BatchJob(**each) for each in values]
        numbers = [job.number for job in jobs]
        begun = ray.get(self._tries.of.remote(numbers))
        again = [(job, count) for job, count in zip(jobs, begun, strict=True) if count]
        outcomes: list[Outcome] = []
        stopped_by = None
        try:
            self._worker.run(
                self._begin(job for job, count in zip(jobs, begun, strict=True) if not count),
                outcomes.append,
            )
            # Each alone, to tell which of them it is that ends the actor.
            for job, count in again:
                tried = dataclasses.replace(job, tries=job.tries + count)
                if tried.tries > self._retries:
                    times = f"{tried.tries} times" if tried.tries > 1 else "once"
                    lost = ActorLostError(f"Its actor died while it was worked on, {times}.")
                    last = dataclasses.replace(tried, tries=tried.tries - 1)
                    outcomes.append(dataclasses.replace(failed(last, lost), may_succeed=False))
                else:
                    self._worker.run(self._begin([tried]), outcomes.append)
        except (ModelError, FullDiskError) as error:
            stopped_by = dataclasses.asdict(Failure.of(error))
        self._tries.end.remote(numbers)
        return {"outcomes": [each.to_json() for each in outcomes], "stopped_by": stopped_by}

    def _begin(self, jobs: Any) -> Iterator[BatchJob]:
        import ray

        for job in jobs:
            ray.get(self._tries.begin.remote(job.number))
            yield job


def _error_of(failure: Failure) -> TegulaError:
    """Return the error that a failure was made of on another machine."""
    kinds: list[type[TegulaError]] = [TegulaError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next(kind for kind in kinds if kind.code == failure.code)(failure.message)
