"""`tegula batch`: any number of pictures, from folders or buckets into one of them.

A thread lists the sources into a journal on disk while they are worked on, so that neither their
number nor that of the results counts in memory. What became of each goes into the manifest beside
the results, which lets the same command go on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import click

from tegula import __version__
from tegula.cli.batch_jobs import MANIFEST, BatchJob, Counts, Journal, Outcome, fingerprint_of
from tegula.cli.batch_work import BatchWorker, failed
from tegula.cli.console import Console, Failure, Interruption, plural
from tegula.cli.options import JSON, PROGRESS, QUIET, Option, SectionedCommand, flag, option_name
from tegula.cli.pictures import Request
from tegula.cli.targets import PICTURES, Naming, SideFiles, check_place
from tegula.cli.upscale import EVERYDAY, SECTIONS, naming_of, request_without_files
from tegula.errors import InputError, OptionError, PathError
from tegula.images.formats import EXTENSIONS
from tegula.progress import about
from tegula.storage import BucketStorage, Entry, FolderStorage, is_address, open_storage

_HELP = """Make any number of pictures larger and better, here or on a cluster.

\b
  tegula batch photos/ large/                    all below photos/, with their folders
  tegula batch a.jpg photos/ more/ large/        the last one is the output
  tegula batch s3://bucket/photos s3://bucket/large
  tegula batch s3://bucket/photos s3://bucket/large --ray --actors 8

Run again, it goes on: what the manifest in the output says is done, of the same source and with the
same options, is left out, and what failed is tried again.
"""
_LISTED_AT_ONCE = 500
_BETWEEN_WRITES_S = 0.02
_AHEAD = 4
"""Jobs that this process has begun at most: one each is read, worked on and written."""
_SHOWN = 20
"""Failures that are printed; the manifest has all of them."""
_LINE_EVERY_S, _BAR_EVERY_S = 10.0, 0.5


@dataclass(frozen=True)
class Input:
    """What an argument names: a storage, or one file of it."""

    storage: FolderStorage | BucketStorage
    key: str | None = None

    def entries(self) -> Iterator[Entry]:
        """Yield its files.

        Raises:
            PathError: it cannot be read.
        """
        if self.key is None:
            yield from self.storage.entries()
        elif entry := self.storage.entry(self.key):
            yield dataclasses.replace(entry, key=self.key)


def _batch(**parameters: Any) -> None:
    context = click.get_current_context()
    console = Console.open(
        quiet=parameters["quiet"], json=parameters["json"], progress=parameters["progress"]
    )
    interruption = Interruption()
    with interruption.installed(), ExitStack() as stack:
        request = dataclasses.replace(
            request_without_files(parameters),
            side_files=SideFiles(),
            quality=parameters["quality"],
            png_level=parameters["png_level"],
            overwrite=parameters["overwrite"],
            all_frames=parameters["frames"] == "all",
        )
        inputs, output = _places(parameters["places"])
        naming = naming_of(parameters, request.options)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tegula-batch-")))
        run = BatchRun(
            request, inputs, output, naming, parameters["retries"], console, folder / "journal"
        )
        with closing(run):
            of_ray = {name: parameters[name] for name in _OF_RAY}
            if parameters["ray"]:
                from tegula.cli.batch_ray import run_on_cluster

                status = run_on_cluster(run, *of_ray.values())
            elif useless := [name for name, value in of_ray.items() if value is not None]:
                raise OptionError(f"{option_name(useless[0])} needs --ray.")
            else:
                status = run.run(interruption)
    context.exit(status)


def _places(places: Sequence[str]) -> tuple[list[Input], FolderStorage | BucketStorage]:
    """Return what the arguments name: the sources, and the output.

    Raises:
        OptionError: there is no output, or it is a file.
        InputError: the output is one of the sources.
        PathError: a source does not exist, or the output cannot be written.
    """
    *sources, place = places
    if not sources:
        raise OptionError(
            "Name the pictures and, as the last argument, the folder or address for their results."
        )
    inputs = [_input(source) for source in sources]
    output = open_storage(place)
    if isinstance(output, FolderStorage):
        is_like_picture = output.root.suffix.lower() in PICTURES and not output.root.is_dir()
        if output.root.is_file() or is_like_picture:
            raise OptionError(f"{place} is not a folder; the last argument is one for the results.")
        check_place(output.root / f"{MANIFEST}.jsonl", makes_folder=True)
    for each in inputs:
        if each.key is None and _real(each.storage) == _real(output):
            raise InputError(
                f"The results would lie among their sources in {place}; name another folder."
            )
    return inputs, output


def _input(place: str) -> Input:
    path = Path(place)
    if is_address(place):
        parent, _, name = place.rstrip("/").rpartition("/")
        if PurePosixPath(name).suffix.lower() in PICTURES and not place.endswith("/"):
            storage = open_storage(parent)
            if storage.entry(name) is not None:
                return Input(storage, name)
        return Input(open_storage(place))
    if path.is_dir():
        return Input(open_storage(place))
    if not path.exists():
        raise PathError(f"{place} does not exist.")
    return Input(open_storage(str(path.parent)), path.name)


def _real(storage: FolderStorage | BucketStorage) -> str:
    """Return the root, with a slash at its end, without links."""
    root = storage.root.resolve() if isinstance(storage, FolderStorage) else storage.address
    return f"{str(root).rstrip('/')}/"


class BatchRun:
    """One run of the command: lists, hands out jobs, and records what becomes of them."""

    def __init__(
        self,
        request: Request,
        inputs: Sequence[Input],
        output: FolderStorage | BucketStorage,
        naming: Naming,
        retries: int,
        console: Console,
        journal: Path,
    ) -> None:
        """Take what there is to do.

        Args:
            request: what is done with every picture.
            inputs: where the sources are.
            output: where results go.
            naming: how they are named.
            retries: how often what may succeed is tried again.
            console: where it is reported.
            journal: where the database of this run is to be.
        """
        self.request = request
        self.options = fingerprint_of(request)
        self.output = output
        self.console = console
        self.counts = Counts()
        self.journal_path = journal
        self._inputs = inputs
        self._naming = naming
        self.retries = retries
        self.journal = Journal(journal)
        self._manifest = output.log(MANIFEST)
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._listing_error: Exception | None = None
        self._stopped = threading.Event()
        self._pace = Pace(self.counts)

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()

    def run(self, interruption: Interruption) -> int:
        """Do everything here, and return the status for the shell.

        Raises:
            TegulaError: nothing can be done, as without the model.
        """
        worker = BatchWorker(
            self.output.address, self.request, self.options, self.console, interruption
        )
        with self.listing():
            while True:  # once more for those that are to be tried again
                groups = self.journal.jobs(_AHEAD, lambda _: 1, settles=False)
                first = next(groups, None)
                if first is None:
                    break
                worker.run((job for group in chain([first], groups) for job in group), self.record)
        return self.status()

    @contextmanager
    def listing(self) -> Iterator[None]:
        """List the sources within the block, show how far it is, and sum up at its end.

        Raises:
            TegulaError: a source cannot be listed.
        """
        there = iter(self.output.entries() if self._is_there() else ())
        if (first := next(there, None)) is not None:
            self.journal.recall(self._manifest.lines())
            self.journal.note_results(chain([first], there))
        # Before the work, which would be lost where nothing can be written.
        run = {"tegula": __version__, "options": self.options, "changed": self._changed()}
        self._write({"run": run})
        self._manifest.flush()
        lister = threading.Thread(target=self._list, name="listing", daemon=True)
        shower = threading.Thread(target=self._show, name="progress", daemon=True)
        self._pace.begin()
        lister.start()
        shower.start()
        try:
            yield
        finally:
            self._stopped.set()
            lister.join()
            shower.join()
            self._manifest.flush()
            self._sum_up()
        if self._listing_error is not None:
            raise self._listing_error

    def status(self) -> int:
        """Return the status for the shell: that of the first failure."""
        return self._failures[0].exit_status if self._failures else 0

    def record(self, *outcomes: Outcome) -> None:
        """Write what became of jobs into the manifest, or let them be tried again.

        May be called from any thread.

        Raises:
            PathError: the manifest cannot be written.
        """
        with self._lock, self.journal.together():
            for outcome in outcomes:
                self._record(outcome)

    def _record(self, outcome: Outcome) -> None:
        job, error, counts = outcome.job, outcome.error, self.counts
        if error is not None and outcome.may_succeed and job.tries < self.retries:
            self.journal.end(job, "waiting")
            return
        self._write(outcome.row(self.options))
        if job.number:
            self.journal.end(job, "done" if error is None else "failed")
            counts.left -= 1
        if error is None:
            counts.done += 1
            counts.pixels += outcome.width * outcome.height
            return
        counts.failed += 1
        if len(self._failures) < _SHOWN:
            self._failures.append(error)
            self.console.message(error.message)

    def _is_there(self) -> bool:
        return not isinstance(self.output, FolderStorage) or self.output.root.is_dir()

    def _changed(self) -> Mapping[str, Any]:
        return {**self.request.options.changed(), "models": self.request.models.given()}

    def _write(self, row: Mapping[str, Any]) -> None:
        self._manifest.append(json.dumps(row, default=str))
        if "source" in row:
            self.console.record(row)

    # Listing.

    def _list(self) -> None:
        """Add the sources to the journal, in a thread of its own."""
        try:
            jobs = self._found()
            while not self._stopped.is_set() and (some := list(islice(jobs, _LISTED_AT_ONCE))):
                self._add(some)
                # Lets others write, who may be in another process and only look now and then.
                time.sleep(_BETWEEN_WRITES_S)
        except Exception as error:  # noqa: BLE001, RUF100 - raised again where people see it
            self._listing_error = error
        self.journal.end_listing()
        self.counts.is_listed = self._listing_error is None

    def _add(self, jobs: Sequence[BatchJob]) -> None:
        again = self.request.overwrite
        with self.journal.together():
            states = [self.journal.add(job, self.options, again=again) for job in jobs]
        # Apart, since who records an outcome has the counts first and then the journal.
        with self._lock:
            self.counts.left += states.count("waiting")
            self.counts.skipped += states.count("done")
        for job, state in zip(jobs, states, strict=True):
            if state not in ("waiting", "done", None):
                sentence = (
                    f"The results of {state} and {job.source} would both be {job.target}; give "
                    "them outputs of their own."
                )
                self.record(failed(job, InputError(sentence)))

    def _found(self) -> Iterator[BatchJob]:
        """Yield a job for each picture of the inputs, but for those in the output."""
        output = _real(self.output)
        for each in self._inputs:
            root = _real(each.storage)
            # Results in a folder below are none of its sources.
            own = output[len(root) :] if output.startswith(root) else None
            for entry in each.entries():
                if own and each.key is None and entry.key.startswith(own):
                    continue
                folder, slash, name = entry.key.rpartition("/")
                picture = Path(name)
                if picture.suffix.lower() not in PICTURES and each.key is None:
                    self.counts.left_out += 1
                    continue
                result = self._naming.file_name(picture, beside=False)
                target = f"{folder}{slash}{result}"
                job = BatchJob(
                    each.storage.address,
                    entry.key,
                    entry.size,
                    entry.version,
                    target,
                    EXTENSIONS[f".{result.rpartition('.')[2].lower()}"],
                )
                if own is None and each.key is None and f"{output}{target}".startswith(root):
                    sentence = f"Its result would lie among the sources in {root}."
                    self.record(failed(job, InputError(sentence)))
                    continue
                yield job

    # Showing.

    def _show(self) -> None:
        """Tell how far it is, in a thread of its own."""
        if not (self.console.talks or (self.console.json and self.console.progress)):
            return
        if self.console.talks and sys.stderr.isatty():
            from rich.console import Console as Terminal

            with Terminal(stderr=True).status(self._pace.line()) as status:
                while not self._stopped.wait(_BAR_EVERY_S):
                    status.update(self._pace.line())
            return
        while not self._stopped.wait(_LINE_EVERY_S):
            self.console.message(self._pace.line())
            self.console.record({"progress": self._pace.facts()})

    def _sum_up(self) -> None:
        """Count what has become of the pictures, and repeat what went wrong."""
        counts = self.counts
        if not self.console.json:
            for failure in self._failures:
                self.console.error(failure)
        hidden = counts.failed - len(self._failures)
        if hidden:
            self.console.message(
                f"{plural(hidden, 'failure')} more: {self.output.address}/{MANIFEST} has them all."
            )
        if counts.left_out:
            is_are = (
                "is not a picture by its name and is"
                if counts.left_out == 1
                else "are not pictures by their names and are"
            )
            self.console.message(f"{plural(counts.left_out, 'file')} {is_are} left out.")
        self.console.message(self._pace.summary())


class Pace:
    """How many pictures and pixels a run makes in a second."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._began = time.monotonic()

    def begin(self) -> None:
        """Count from now on."""
        self._began = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """Return it for programs; the time left is None until all sources are listed."""
        counts = self._counts
        seconds = max(time.monotonic() - self._began, 1e-3)
        rate = counts.done / seconds
        known = counts.is_listed and rate > 0
        return {
            "done": counts.done,
            "failed": counts.failed,
            "skipped": counts.skipped,
            "left": counts.left,
            "is_listed": counts.is_listed,
            "pictures_per_second": rate,
            "megapixels_per_second": counts.pixels / 1e6 / seconds,
            "seconds_left": counts.left / rate if known else None,
        }

    def line(self) -> str:
        """Return it for people."""
        facts = self.facts()
        left = f"{facts['left']:,} left" + ("" if facts["is_listed"] else " so far")
        line = ", ".join([*self._ended(), left])
        line += f"; {self._rates(facts)}"
        seconds = facts["seconds_left"]
        return line if seconds is None else f"{line}; about {about(seconds)} left"

    def summary(self) -> str:
        """Return it at the end."""
        facts, counts = self.facts(), self._counts
        parts = [*self._ended(), *([f"{counts.left:,} not done"] if counts.left else [])]
        line = ", ".join(parts) or "no picture found"
        return f"{line}; {self._rates(facts)}" if counts.done else line

    def _ended(self) -> list[str]:
        counts = self._counts
        named = {
            "done": counts.done,
            "failed": counts.failed,
            "skipped, done before": counts.skipped,
        }
        return [f"{count:,} {what}" for what, count in named.items() if count]

    def _rates(self, facts: Mapping[str, Any]) -> str:
        pictures, pixels = facts["pictures_per_second"], facts["megapixels_per_second"]
        return f"{pictures:.3g} pictures/s, {pixels:.3g} megapixels/s"


_OF_RAY = ("actors", "gpus_per_actor", "cpus_per_actor")


def _bounds(text: str) -> tuple[int, int]:
    """Read ``4`` or ``1..4``."""
    found = re.fullmatch(r"(?:(\d{1,5})\.\.)?(\d{1,5})", text.strip())
    least, most = (int(found[1] or found[2]), int(found[2])) if found else (0, 0)
    if not 1 <= least <= most:
        raise click.BadParameter(f"{text!r} is no number of actors, such as 4 or 1..4.")
    return least, most


_LEFT_OUT = {"output", "compare", "preview", "mask", "strength_map"}
_SECTIONS: Mapping[str, Sequence[click.Option]] = {
    **{
        name: [option for option in options if option.name not in _LEFT_OUT]
        for name, options in SECTIONS.items()
        if name != "Messages"
    },
    "Batch": (
        Option(
            ["--retries"],
            "How often a picture is tried again that failed for another reason than its bytes and "
            "the options.",
            type=click.IntRange(0, 100),
            default=2,
            metavar="INTEGER",
        ),
    ),
    "Cluster": (
        flag(
            ["--ray"], "Work in actors of a Ray cluster: that of RAY_ADDRESS, or one started here."
        ),
        Option(
            ["--actors"],
            "How many work at a time, or the least and the most; those without room wait for it.",
            "default: up to as many as there is room for",
            type=_bounds,
            metavar="N|MIN..MAX",
        ),
        Option(
            ["--gpus-per-actor"],
            "GPUs of each, also a part of one.",
            "default: 1 where there are any",
            type=click.FloatRange(0, 64),
            metavar="NUMBER",
        ),
        Option(
            ["--cpus-per-actor"],
            "CPUs of each.",
            "default: 1 beside a GPU, else an equal share",
            type=click.FloatRange(0, 4096, min_open=True),
            metavar="NUMBER",
        ),
    ),
    "Messages": (JSON, PROGRESS, QUIET),
}

BATCH = SectionedCommand(
    "batch",
    _batch,
    [click.Argument(["places"], nargs=-1, required=True, metavar="IN... OUT")],
    _SECTIONS,
    help_text=_HELP,
    short_help="Make any number of pictures larger, here or on a cluster.",
    everyday=tuple({*EVERYDAY, "retries", "ray", "actors"} - _LEFT_OUT),
)
