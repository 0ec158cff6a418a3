"""A runner that does what its job says, in a process that tests kill or in a thread of theirs."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tegula.errors import CancelledError, ImageError, MissingWeightsError, OutOfMemoryError
from tegula.server.engine import (
    Alive,
    Done,
    EngineEvent,
    Failed,
    Job,
    Log,
    OutputFile,
    Progressed,
    Started,
)

if TYPE_CHECKING:  # each process of an engine imports this module, and databases take a while
    from tegula.server.runner import Emit
    from tegula.server.store import Store
    from tegula.server.supervisor import Supervisor
    from tegula.server.tables import Prediction

Cancelled = Callable[[], bool]


@contextmanager
def supervising() -> Iterator[Callable[..., Supervisor]]:
    """Yield what starts a supervisor, by its arguments; those that still run are stopped."""
    from tegula.server.supervisor import Supervisor

    started: list[Supervisor] = []

    def start(*given: Any) -> Supervisor:
        supervisor = Supervisor(*given)
        supervisor.start()
        started.append(supervisor)
        return supervisor

    yield start
    for supervisor in started:
        if not supervisor._ended.is_set():
            supervisor.stop()


def open_runner(device: str, options: Mapping[str, Any]) -> Callable[..., None]:
    if options.get("open") == "fail":
        raise MissingWeightsError("The weights are not here.")
    if options.get("open") == "hang":
        time.sleep(600)
    return run


def open_helpful_runner(device: str, options: Mapping[str, Any]) -> Any:
    """What serves the catalogue, over small windows; it notes in a folder what it helps with.

    It waits for a helper before it spreads a picture, and does what files in the folder say.
    """
    import dataclasses
    from pathlib import Path

    from tegula.server.upscaling import NetsOf, RunnerOptions, UpscaleRunner

    folder = Path(options["folder"])

    def note(line: str) -> None:
        with (folder / "notes").open("a") as file:
            file.write(f"{os.getpid()} {line}\n")

    class HelpfulRunner(UpscaleRunner):
        def _load(self, name: str, loras: Any) -> Any:
            upscaler = super()._load(name, loras)
            facts = dataclasses.replace(upscaler.bundle.facts, window=128)
            upscaler.bundle = dataclasses.replace(upscaler.bundle, facts=facts)
            return upscaler

        def be_helped_by(self, free: Any) -> None:
            def patiently(nets: NetsOf, kind: object) -> Any:
                end = time.monotonic() + 60
                found = free(nets, kind)
                begun = not (folder / "introduced").exists() or (folder / "notes").exists()
                while not (found or begun) and time.monotonic() < end:
                    time.sleep(0.02)
                    found = free(nets, kind)
                return found

            super().be_helped_by(patiently)

        def help(self, nets: NetsOf, task: Any, cancel: Any) -> Any:
            note(type(task).__name__)
            if (folder / "die").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                while (folder / "wait").exists():
                    time.sleep(0.01)
                    cancel.check()
            except CancelledError:
                note("dropped")
                raise
            return super().help(nets, task, cancel)

    return HelpfulRunner(device, RunnerOptions(**options["runner"]))


def run(job: Job, emit: Emit, cancelled: Cancelled) -> None:
    emit(Started())
    emit(Log(f"pid {os.getpid()}"))
    emit(Progressed(0.5, 1.0))
    path = job.folder / "out-0.png"
    made = ACTS[job.input.get("do", "finish")](job, cancelled)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + (made or job.id.encode()))
    emit(OutputFile(path, "out-0.png", "image/png"))
    emit(Progressed(1.0))


def finish(job: Job, cancelled: Cancelled) -> None: ...


def nap(job: Job, cancelled: Cancelled) -> None:
    time.sleep(0.2)


def die(job: Job, cancelled: Cancelled) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(job: Job, cancelled: Cancelled) -> None:
    if job.attempt == 1:
        die(job, cancelled)


def stop(job: Job, cancelled: Cancelled) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_once(job: Job, cancelled: Cancelled) -> bytes:
    if job.attempt == 1:
        stop(job, cancelled)
    return f"attempt {job.attempt}".encode()


def copy(job: Job, cancelled: Cancelled) -> bytes:
    picture: bytes = job.input["image"].read_bytes()
    return picture


def hang(job: Job, cancelled: Cancelled) -> None:
    time.sleep(600)


def toil(job: Job, cancelled: Cancelled) -> None:
    """Work on for five seconds without a word, asking only whether to go on."""
    end = time.monotonic() + 5
    while time.monotonic() < end and not cancelled():
        time.sleep(0.02)


def run_out_of_memory(job: Job, cancelled: Cancelled) -> None:
    raise OutOfMemoryError("Even one window does not fit.")


def refuse(job: Job, cancelled: Cancelled) -> None:
    raise ImageError("The input is no image.")


def miss_input(job: Job, cancelled: Cancelled) -> None:
    raise ImageError(f"{job.input['image']} is a damaged or truncated image; save it again.")


def miss_weights(job: Job, cancelled: Cancelled) -> None:
    weights = job.folder / "weights" / "style.safetensors"
    raise MissingWeightsError(f"There is no LoRA file {weights}; check https://a.example/b/c.")


def stumble(job: Job, cancelled: Cancelled) -> None:
    raise ZeroDivisionError("a secret path")


def fill_disk(job: Job, cancelled: Cancelled) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(job.folder / "out-0.png"))


def wait(job: Job, cancelled: Cancelled) -> None:
    while not cancelled():
        time.sleep(0.01)
    raise CancelledError("Cancelled between two steps.")


ACTS: Mapping[str, Callable[[Job, Cancelled], bytes | None]] = {
    act.__name__: act
    for act in (
        finish,
        nap,
        toil,
        die,
        die_once,
        stop,
        stop_once,
        copy,
        hang,
        run_out_of_memory,
        refuse,
        miss_input,
        miss_weights,
        stumble,
        fill_disk,
        wait,
    )
}


class HereEngine:
    """Runs jobs in a thread of this process."""

    device = "here"
    shares_blobs = False
    wants_help = False
    ready = True

    def __init__(self) -> None:
        self.started = False
        self.loaded: frozenset[str] = frozenset()
        self.ran: list[Job] = []
        self.unloads = self.loads = 0

    def load(self) -> None:
        self.started = True
        self.loads += 1

    def unload(self) -> None:
        self.started = False
        self.unloads += 1

    def close(self) -> None: ...

    def run(self, job: Job, cancelled: Cancelled) -> Generator[EngineEvent, None, None]:
        self.started = True
        self.ran.append(job)
        events: list[EngineEvent] = []

        def work() -> None:
            try:
                run(job, events.append, cancelled)
                events.append(Done())
            except CancelledError:
                events.append(Failed("cancelled", cancelled=True))
            except Exception as error:
                events.append(Failed(str(error)))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while not events or not isinstance(events[0], Done | Failed):
            yield events.pop(0) if events else Alive()
            time.sleep(0.002)
        yield events.pop(0)


def ended(store: Store, name: str, seconds: float = 300.0) -> Prediction:
    end = time.monotonic() + seconds
    while not (now := store.predictions.get(name)).status.terminal:
        assert time.monotonic() < end, f"it never ended: {now}"
        time.sleep(0.01)
    return now


def until(condition: Callable[[], Any], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
