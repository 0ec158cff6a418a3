"""What `tegula batch` has to do, and what became of it: on disk, however much it is.

The journal is a database in a temporary file: which sources there are, which of them wait, are
begun or have ended. Whoever works takes jobs from it, also from another process of the machine, and
memory holds only those that are begun. The manifest lies beside the results and outlives the run:
a line of JSON for each source. The next run reads it into its journal and leaves out what is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tegula.cli.console import Failure
from tegula.cli.pictures import Request
from tegula.storage import Entry

MANIFEST = "tegula-manifest"
_LOOK_EVERY_S = 0.05
_TABLES = """
CREATE TABLE known (
    source TEXT PRIMARY KEY, target TEXT, version TEXT, options TEXT, done INT, attempts INT
) WITHOUT ROWID;
CREATE INDEX known_by_target ON known (target);
CREATE TABLE there (target TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, source TEXT UNIQUE, target TEXT, job TEXT,
    attempts INT, tries INT DEFAULT 0, state TEXT
);
CREATE UNIQUE INDEX jobs_by_target ON jobs (target) WHERE target IS NOT NULL;
CREATE INDEX jobs_by_state ON jobs (state, tries, number);
CREATE TABLE listing (ended INT, streams INT);
INSERT INTO listing VALUES (0, 0);
"""


@dataclass(frozen=True)
class BatchJob:
    """One source and its result.

    root, key: where the source lies, and its path from there.
    version: what the storage says of its bytes.
    target: path of the result within the output.
    format: of the result.
    exists: whether there was a file in its place.
    number: in the journal.
    attempts: of earlier runs.
    tries: of this run, before this one.
    """

    root: str
    key: str
    size: int
    version: str
    target: str
    format: str
    exists: bool = False
    number: int = 0
    attempts: int = 0
    tries: int = 0

    @property
    def source(self) -> str:
        """The path or address of the source."""
        return f"{self.root.rstrip('/')}/{self.key}"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    error: why it failed, else None.
    may_succeed: whether the same may go well another time.
    """

    job: BatchJob
    seconds: float = 0.0
    width: int = 0
    height: int = 0
    seed: int | None = None
    warnings: tuple[str, ...] = ()
    error: Failure | None = None
    may_succeed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, as it travels between machines."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Outcome:
        """Return what ``to_json`` was made of."""
        error = values["error"]
        own = {
            "job": BatchJob(**values["job"]),
            "warnings": tuple(values["warnings"]),
            "error": None if error is None else Failure(**error),
        }
        return cls(**{**values, **own})

    def row(self, options: str) -> dict[str, Any]:
        """Return the line of the manifest; ``options`` is the fingerprint of the request."""
        job = self.job
        row: dict[str, Any] = {
            "source": job.source,
            "size": job.size,
            "version": job.version,
            "options": options,
            "output": job.target,
            "status": "done" if self.error is None else "failed",
            "attempts": job.attempts + job.tries + 1,
            "seconds": round(self.seconds, 3),
        }
        if self.error is not None:
            return {**row, "error": self.error.as_json()}
        row |= {"width": self.width, "height": self.height, "seed": self.seed}
        return {**row, "warnings": list(self.warnings)} if self.warnings else row


def fingerprint_of(request: Request) -> str:
    """Return what is equal for requests that make the same pictures, but for a random seed."""
    options = request.options.changed()
    for name in ("max_pixels", "window_batch"):
        options.pop(name, None)
    values = [
        options,
        request.models.given(),
        request.runtime.precision,
        request.quality,
        request.png_level,
        request.all_frames,
    ]
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Counts:
    """Sources by what became of them so far; ``left`` of those that are listed."""

    left: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    left_out: int = 0
    pixels: float = 0.0
    is_listed: bool = field(default=False)


class Journal:
    """One connection to the database of a run; may be used from several threads at once.

    Names are kept as JSON has them, in ASCII, since those of files need not be UTF-8.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, which is made if there is none."""
        is_new = not path.exists()
        self._lock = threading.RLock()
        self._goes_on = False  # without which most questions need not be asked
        self._rows = sqlite3.connect(
            path, timeout=60, isolation_level=None, check_same_thread=False
        )
        self._rows.execute("PRAGMA journal_mode = WAL")
        # It need not outlive a loss of power, and not even its process.
        self._rows.execute("PRAGMA synchronous = OFF")
        if is_new:
            self._rows.executescript(_TABLES)

    def close(self) -> None:
        """Close the connection."""
        self._rows.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is done within the block at once, which is much quicker."""
        with self._lock:
            self._rows.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                self._rows.execute("COMMIT")

    # What earlier runs left.

    def recall(self, lines: Iterable[str]) -> None:
        """Read a manifest; the last line of a source counts, and one that is cut off does not."""
        self._goes_on = True
        with self.together():
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    done = row["status"] == "done"
                    source, target = json.dumps(row["source"]), json.dumps(row["output"])
                    values = (row["version"], row["options"], done, int(row["attempts"]))
                    self._rows.execute(
                        "REPLACE INTO known VALUES (?, ?, ?, ?, ?, ?)", (source, target, *values)
                    )

    def note_results(self, entries: Iterable[Entry]) -> None:
        """Note which files there are in the output."""
        self._goes_on = True
        with self.together():
            rows = ((json.dumps(entry.key),) for entry in entries)
            self._rows.executemany("INSERT OR IGNORE INTO there VALUES (?)", rows)

    # What there is to do.

    def add(self, job: BatchJob, options: str, *, again: bool) -> str | None:
        """Add a job, unless its source is there already.

        Args:
            job: what there is to do.
            options: fingerprint of the request.
            again: whether it is done again where a manifest says that it is done.

        Returns:
            ``waiting``, or ``done`` if there is nothing to do; None if its source is there already.
            Otherwise the other source whose result is in its place.
        """
        source, target = json.dumps(job.source), json.dumps(job.target)
        other = self._one("SELECT source FROM jobs WHERE source = ? OR target = ?", source, target)
        if other is not None and other[0] == source:
            return None
        exists, is_done, attempts = False, False, 0
        if self._goes_on:
            if other is None and not again:
                other = self._one(
                    "SELECT source FROM known WHERE target = ? AND done AND source != ?",
                    *(target, source),
                )
            exists = self._one("SELECT 1 FROM there WHERE target = ?", target) is not None
            is_done, attempts = self._one(
                "SELECT done AND target = ?, attempts FROM known "
                "WHERE source = ? AND version = ? AND options = ?",
                *(target, source, job.version, options),
            ) or (False, 0)
        state = "done" if is_done and exists and not again else "waiting"
        values = {**vars(job), "exists": exists}
        if other is not None:
            self._insert(source, None, values, 0, "failed")
            return str(json.loads(other[0]))
        self._insert(source, target, values, attempts, state)
        return state

    def end_listing(self) -> None:
        """Note that there are no more jobs than those that are added."""
        with self._lock:
            self._rows.execute("UPDATE listing SET ended = 1")

    def _insert(
        self, source: str, target: str | None, job: Mapping[str, Any], attempts: int, state: str
    ) -> None:
        self._rows.execute(
            "INSERT INTO jobs (source, target, job, attempts, state) VALUES (?, ?, ?, ?, ?)",
            (source, target, json.dumps(job), attempts, state),
        )

    # What is being done.

    def jobs(
        self, ahead: int, group: Callable[[int], int], *, settles: bool
    ) -> Iterator[list[BatchJob]]:
        """Take jobs until there are no more, in groups; those that failed already come last.

        Args:
            ahead: how many may be begun and not ended.
            group: says how many to take at once, of as many as wait. It is told ``ahead`` at most.
            settles: whether to wait for the end of those that are begun, which may have to be done
                once more.
        """
        while True:
            waiting, begun = (
                self._one(
                    "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE state = ? LIMIT ?)",
                    *(state, ahead),
                )[0]
                for state in ("waiting", "begun")
            )
            if waiting and begun < ahead:
                yield self._take(min(max(1, group(waiting)), ahead - begun))
            elif not waiting and self._is_listed() and not (settles and begun):
                return
            else:
                time.sleep(_LOOK_EVERY_S)

    def has_jobs(self) -> bool:
        """Wait until there is a job to do, or none will come; return which of the two it is."""
        while not self._one("SELECT 1 FROM jobs WHERE state = 'waiting' LIMIT 1"):
            if self._is_listed():
                return False
            time.sleep(_LOOK_EVERY_S)
        return True

    def begin_stream(self, number: int) -> bool:
        """Return whether the jobs of this stream, counted from 1, are taken for the first time."""
        with self.together():
            (before,) = self._one("SELECT streams FROM listing")
            self._rows.execute("UPDATE listing SET streams = ?", (number,))
        return bool(before < number)

    def _is_listed(self) -> bool:
        # Looked at after the jobs: what was added before the end of the listing is seen next time.
        ended = self._one("SELECT ended FROM listing")[0]
        return bool(ended) and not self._one("SELECT 1 FROM jobs WHERE state = 'waiting' LIMIT 1")

    def _take(self, count: int) -> list[BatchJob]:
        with self.together():
            rows = self._rows.execute(
                "SELECT number, job, attempts, tries FROM jobs WHERE state = 'waiting' "
                "ORDER BY tries, number LIMIT ?",
                (count,),
            ).fetchall()
            numbers = [(number,) for number, *_ in rows]
            self._rows.executemany("UPDATE jobs SET state = 'begun' WHERE number = ?", numbers)
        return [
            BatchJob(**{**json.loads(job), "number": number, "attempts": before, "tries": tries})
            for number, job, before, tries in rows
        ]

    def end(self, job: BatchJob, state: str) -> None:
        """Note that a job ended as ``done`` or ``failed``, or waits for another try."""
        with self._lock:
            self._rows.execute(
                "UPDATE jobs SET state = ?, tries = tries + 1 WHERE number = ?", (state, job.number)
            )

    def _one(self, statement: str, *values: object) -> Any:
        with self._lock:
            return self._rows.execute(statement, values).fetchone()
