"""What an engine is: it runs one job at a time and tells what happens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Cancelled = Callable[[], bool]


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
