"""One prediction on one engine, from its claim to its end, with everything recorded."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tegula.engines.engine import (
    Cancelled,
    Done,
    Engine,
    EngineEvent,
    Failed,
    FileMade,
    Job,
    Log,
    Progressed,
    Started,
)
from tegula.engines.progress_lines import progress_line
from tegula.engines.resolving import Resolved, Resolver
from tegula.engines.safety import UNSAFE, Checker, allow_all
from tegula.errors import TegulaError
from tegula.predictions.inputs import InputReader
from tegula.predictions.queue import Report
from tegula.predictions.records import Prediction
from tegula.predictions.store import Store

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
