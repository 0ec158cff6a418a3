"""What an engine is: what it is given, and the events it yields."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from tegula.progress import Cancelled

# The devices of this machine, asked for in a process of its own: torch stays out of ours.


@dataclass(frozen=True)
class Device:
    """A device: its name for torch, a short one for addresses, one for people."""

    name: str
    sku: str
    title: str


def discover_devices() -> tuple[Device, ...]:
    """Return what predictions would run on: every GPU, or else the processor."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_devices).result()


def device_of(name: str, title: str) -> Device:
    """Return a device of this name; the words of its title make its short name."""
    if name == "cpu":
        return Device(name, "cpu", title)
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Device(name, f"gpu-{words.removeprefix('nvidia-')}", title)


def _devices() -> tuple[Device, ...]:
    import torch

    if torch.cuda.is_available():
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        return tuple(device_of(name, torch.cuda.get_device_name(name)) for name in names)
    if torch.backends.mps.is_available():
        return (device_of("mps", "Apple GPU"),)
    return (device_of("cpu", f"CPU ({platform.machine()})"),)


# What an engine is: it runs one job at a time and tells what happens.


@dataclass(frozen=True)
class Job:
    """One prediction, ready to run.

    id, attempt: which prediction, and its how manieth run.
    version: the 64 hex digits of the version of ours that does the work.
    input: with paths in the place of files.
    folder: an empty folder for the output files.
    """

    id: str
    attempt: int
    model: str
    version: str
    input: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Started:
    """The model is loaded, and the job runs."""


@dataclass(frozen=True)
class Log:
    """One sentence for the caller."""

    text: str


@dataclass(frozen=True)
class Progressed:
    """Share of the work that is done, 0..1, and the seconds that are left, if known."""

    fraction: float
    seconds_left: float | None = None


@dataclass(frozen=True)
class FileMade:
    """An output file is finished; ``path`` lies in the folder of the job."""

    path: Path
    name: str
    content_type: str


@dataclass(frozen=True)
class Done:
    """The job ended well."""


@dataclass(frozen=True)
class Failed:
    """The job ended otherwise.

    error: for the caller to read.
    lost: the process died, hung or ran out of memory, and another run may go well.
    cancelled: it ended because it was asked to.
    """

    error: str
    lost: bool = False
    cancelled: bool = False


@dataclass(frozen=True)
class Quiet:
    """Nothing happened for a moment."""


EngineEvent = Started | Log | Progressed | FileMade | Done | Failed | Quiet


class Engine(Protocol):
    """Runs jobs on one device.

    device: such as ``cuda:0``.
    loaded: versions that would start without loading anything.
    """

    device: str

    @property
    def loaded(self) -> Collection[str]:
        """Versions that would start without loading anything."""

    def load(self) -> None:
        """Get ready without a job, as far as that is possible."""

    def run(self, job: Job, cancelled: Cancelled) -> Generator[EngineEvent, None, None]:
        """Run a job; the last event is ``Done`` or ``Failed``.

        Something is yielded several times a second, ``Quiet`` if nothing happens.
        ``cancelled`` is asked as often; after True the job ends soon. Closing the
        generator early ends the job too.
        """

    def unload(self) -> None:
        """Give back the memory that models take."""

    def close(self) -> None:
        """Stop for good, at once."""


# Progress as lines that every client's parser of progress bars reads.

_WIDTH = 10


def progress_line(fraction: float, spent: float, left: float | None) -> str:
    """Return a line like a bar of tqdm, counting in hundredths of the work.

    Args:
        fraction: share of the work that is done, 0..1.
        spent: seconds since the work began.
        left: seconds until it ends, if known.

    >>> progress_line(0.42, 3.0, 4.2)
    ' 42%|####      | 42/100 [00:03<00:04]'
    """
    percent = int(fraction * 100)
    bar = ("#" * (percent * _WIDTH // 100)).ljust(_WIDTH)
    return f"{percent:3d}%|{bar}| {percent}/100 [{_clock(spent)}<{_clock(left)}]"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
