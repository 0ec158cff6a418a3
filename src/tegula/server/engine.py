"""What an engine is: it runs one prediction at a time on one device and reports what happens.

Who runs what in which process, from here down to ``runner.py``:

The **server's process** (``tegula serve``) answers HTTP in its main thread's event loop and in a
pool of threads. Beside these it has one thread for each input that is being fetched; one for each
engine, which claims a prediction from the queue once its inputs are there, and records what the
engine reports; and one that keeps leases and deadlines (``supervisor.py``, ``work.py``). It imports
neither torch nor numpy: it stays small and quick, and no model can take it down.

The **engine's process**, one for each device, loads the models and runs them (``runner.py``). It
is started for the first job and kept. A pipe connects the two: jobs and cancellations go in, the
events below come out. It may crash, hang or run out of memory; the thread of its engine then kills
it, reports the job as lost, and starts another process for the next job.

With the Ray engine the process is an actor of a cluster, on this machine or another one, and what
goes over the pipe are calls of the actor (``ray_engine.py``). Nothing else differs: the rows in
SQL say what there is to do and what became of it, in both.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from tegula.progress import Cancelled
from tegula.server.blobs import Blob

if TYPE_CHECKING:
    from tegula.models import BundleSettings


@dataclass(frozen=True)
class StoredFile:
    """A file of an input, by its name in the blobs that the server and its engine share."""

    sha256: str


@dataclass(frozen=True)
class Job:
    """One prediction, ready to run.

    id: of the prediction.
    attempt: number of the claim that runs it; those that fetched its inputs count, too.
    model: ``owner/name`` as the prediction names it.
    version: the 64 hex digits of the catalogue's version that does the work.
    input: with paths in place of files, or, for an engine that shares the blobs, stored files.
    folder: an empty folder for the output files, on the machine of the server.
    bundle: the name of its bundle in the settings; empty for the one of all others.
    previews: whether somebody may look while it runs.
    """

    id: str
    attempt: int
    model: str
    version: str
    input: Mapping[str, Any]
    folder: Path
    bundle: str = ""
    previews: bool = False


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
class Preview:
    """A small JPEG of the work so far."""

    jpeg: bytes


@dataclass(frozen=True)
class OutputFile:
    """An output file is complete: in the folder of the job, or stored as a blob already."""

    file: Path | Blob
    name: str
    content_type: str


@dataclass(frozen=True)
class Done:
    """The job succeeded."""


@dataclass(frozen=True)
class Failed:
    """The job ended otherwise.

    error: for the caller to read.
    lost: the process died, hung or ran out of memory; another run may succeed.
    cancelled: it ended because the caller cancelled it.
    """

    error: str
    lost: bool = False
    cancelled: bool = False


@dataclass(frozen=True)
class Alive:
    """A sign of life: nothing else happened for a moment."""


EngineEvent = Started | Log | Progressed | Preview | OutputFile | Done | Failed | Alive


class Engine(Protocol):
    """Runs jobs on one device.

    device: such as ``cuda:0``.
    shares_blobs: inputs come to it as stored files, which it fetches itself.
    """

    device: str
    shares_blobs: bool

    @property
    def wants_help(self) -> bool:
        """Whether more engines, if they were started, would help with what it runs."""

    @property
    def started(self) -> bool:
        """Whether it has a process, or waits for one to get its place in a cluster."""

    @property
    def ready(self) -> bool:
        """Whether it can take a job now; one that starts for its first job always can."""

    @property
    def loaded(self) -> Collection[str]:
        """Versions that would start without loading anything."""

    def load(self) -> None:
        """Get ready without a job, as far as that is possible."""

    def run(self, job: Job, cancelled: Cancelled) -> Generator[EngineEvent, None, None]:
        """Run a job; the last event is ``Done`` or ``Failed``.

        Something is yielded several times a second, ``Alive`` if nothing happens, and
        ``cancelled`` is called as often. Once it returns True the job ends soon. Closing the
        generator early ends the job, too.
        """

    def unload(self) -> None:
        """Give back the memory that models take."""

    def close(self) -> None:
        """Stop for good, at once."""


# The devices of this machine.


@dataclass(frozen=True)
class Device:
    """A device: its name for torch, a short one for addresses, one for people."""

    name: str
    sku: str
    title: str


def discover_devices() -> tuple[Device, ...]:
    """Return what predictions would run on: every GPU, or else the CPU.

    Only torch knows, so a process of its own asks it; the server's never imports torch.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_devices).result()


def check_bundles(bundles: Sequence[BundleSettings]) -> None:
    """Make sure that bundles can be loaded, in a process of its own, which imports torch.

    Raises:
        ModelError: a part is missing, broken or of another family.
        OptionError: a setting names what does not exist.
    """
    if not bundles:
        return
    from tegula.models.load import check_bundle

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for bundle in bundles:
            pool.submit(check_bundle, bundle).result()


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


# A path at the beginning of a word: of a URL, a fraction or "and/or" something stands before it.
_FOLDERS_OF_PATH = re.compile(
    r"""(?<![^\s'"(\[=])(?:[A-Za-z]:)?[/\\](?:[^\s'"/\\]+[/\\])*(?=[^\s/\\])"""
)


NO_ROOM = "The disk of the server is full; try again later."
"""The error of a prediction for whose files there is no room."""


def public_words(text: str, inputs: Mapping[str, Any] | None = None) -> str:
    """Return a sentence as clients may see it: without any path of this server.

    The file of an input is called by the name of the input, and any other by its own name.

    Args:
        text: a sentence for the log or of an error.
        inputs: those of the job, with paths in place of files.

    >>> public_words("/data/files/ab/abcd is empty.", {"image": Path("/data/files/ab/abcd")})
    'image is empty.'
    >>> public_words("There is no LoRA file /srv/weights/style.safetensors; check the path.")
    'There is no LoRA file style.safetensors; check the path.'
    """
    for name, value in (inputs or {}).items():
        for path in value if isinstance(value, list | tuple) else (value,):
            if isinstance(path, Path):
                text = text.replace(str(path), name)
    return _FOLDERS_OF_PATH.sub("", text)


def progress_line(fraction: float, spent: float, left: float | None) -> str:
    """Return a line of progress for the log, in the form that Replicate's clients parse.

    It looks like a bar of tqdm that counts in hundredths of the work; the time left is not
    tqdm's, which would assume that every hundredth takes as long.

    Args:
        fraction: share of the work that is done, 0..1.
        spent: seconds since the work began.
        left: seconds until it ends, if known.

    >>> progress_line(0.42, 3.0, 4.2)
    ' 42%|####      | 42/100 [00:03<00:04]'
    """
    remaining = "?" if left is None else tqdm.format_interval(left)
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<" + remaining + "]"
    return str(tqdm.format_meter(int(fraction * 100), 100, spent, ascii=" #", bar_format=form))
