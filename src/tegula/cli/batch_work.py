"""How one worker of `tegula batch` does jobs: this process, or an actor on a machine of a cluster.

It reads a source from its storage, upscales it, and writes the result to the output. Results say
in their settings which source and request they were made of, so that a job whose end was never
recorded, since the process that does so was killed, is known to be done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tegula.cli.batch_jobs import BatchJob, Outcome
from tegula.cli.console import Console, Failure, Interruption
from tegula.cli.pictures import STOPPING, Request, Upscaled, decoded_ahead, upscale_all_of
from tegula.cli.several import staggered
from tegula.errors import InputError, TegulaError
from tegula.images.formats import check_sides
from tegula.options import UpscaleOptions
from tegula.resolve import target_size
from tegula.storage import FolderStorage, Storage, open_storage

if TYPE_CHECKING:
    from tegula.pipeline.prepare import Prepared
    from tegula.result import UpscaleResult
    from tegula.upscaler import Upscaler

OnOutcome = Callable[[Outcome], None]
_MADE_OF = "batch"
"""The part of a result's settings that names its source and its request."""


class BatchWorker:
    """Does jobs with one loaded model, which the first job loads."""

    def __init__(
        self,
        output: str,
        request: Request,
        options: str,
        console: Console,
        interruption: Interruption,
    ) -> None:
        """Take what all jobs have in common.

        Args:
            output: path or address that results go below.
            request: what is done with every picture.
            options: its fingerprint.
            console: tells that the model is being loaded.
            interruption: stops the work between two windows.
        """
        self._place = output
        self._request = request
        self._options = options
        self._console = console
        self._interruption = interruption
        self._storages: dict[str, Storage] = {}

    def run(self, jobs: Iterable[BatchJob], on_outcome: OnOutcome) -> None:
        """Do jobs; while one is worked on, the next is read and the one before is written.

        Args:
            jobs: one is taken ahead.
            on_outcome: called with the outcome of each, in a thread of its own.

        Raises:
            ModelError, FullDiskError: no later job can escape it.
            CancelledError: a signal came.
        """

        def write(job: BatchJob, done: Upscaled | Outcome) -> None:
            on_outcome(done if isinstance(done, Outcome) else self._write(job, done))

        def fail(job: BatchJob, error: Exception) -> None:
            on_outcome(failed(job, error))

        staggered(jobs, self._read, self._work, write, fail, STOPPING)

    @cached_property
    def _output(self) -> Storage:
        # Opened by the first job, since what an actor cannot do ends in words only there.
        return open_storage(self._place)

    @cached_property
    def _upscaler(self) -> Upscaler:
        return self._request.load_upscaler(self._console)

    def _read(self, job: BatchJob) -> Path | bytes | Prepared | Outcome:
        """Read and decode ahead of time; or tell that the result is there already."""
        from tegula.images.open import check_bytes, upright_size

        if job.root not in self._storages:
            self._storages[job.root] = open_storage(job.root)
        # Another try may follow one whose end nobody heard of.
        if (job.exists or job.tries) and (outcome := self._result_of(job)):
            return outcome
        options, storage = self._request.options, self._storages[job.root]
        if not isinstance(storage, FolderStorage):
            check_bytes(job.size, options.max_pixels)
        source = storage.source(job.key)
        width, height = upright_size(source, max_pixels=options.max_pixels)
        check_sides(*target_size(options, width, height), job.format)
        return decoded_ahead(source, self._request)

    def _result_of(self, job: BatchJob) -> Outcome | None:
        """Return the outcome of a job whose result lies there.

        Raises:
            InputError: another file is in its place, which tegula did not make.
        """
        from tegula.images.encode import read_settings
        from tegula.images.open import upright_size

        if self._request.overwrite or self._output.entry(job.target) is None:
            return None
        result = self._output.source(job.target)
        try:
            settings = read_settings(result)
        except TegulaError:
            settings = None
        if settings is None:
            raise InputError(
                f"{self._output.address}/{job.target} exists and was not made by tegula; "
                "--overwrite replaces it."
            )
        if settings.get(_MADE_OF) != self._made_of(job):
            return None
        width, height = upright_size(result, max_pixels=UpscaleOptions().max_pixels)
        return Outcome(job, 0.0, width, height, settings.get("seed"))

    def _made_of(self, job: BatchJob) -> dict[str, Any]:
        return {"source": job.source, "version": job.version, "options": self._options}

    def _work(self, job: BatchJob, source: Path | bytes | Prepared | Outcome) -> Upscaled | Outcome:
        if isinstance(source, Outcome):
            return source
        return upscale_all_of(source, job.source, job.format, self._request, self._upscale_one)

    def _upscale_one(
        self, _: str, source: Path | bytes | Prepared, options: UpscaleOptions
    ) -> UpscaleResult:
        upscaler = self._upscaler
        with self._interruption.polled():
            return upscaler.upscale(source, options, cancelled=self._interruption.requested)

    def _write(self, job: BatchJob, upscaled: Upscaled) -> Outcome:
        result = upscaled.result
        made_of = {_MADE_OF: self._made_of(job)}
        encoded = upscaled.encoded(job.format, self._request, made_of)
        self._output.write(job.target, encoded.data)
        return Outcome(
            job,
            time.perf_counter() - upscaled.began,
            result.image.width,
            result.image.height,
            result.seed,
            (*result.warnings, *encoded.warnings),
        )


def failed(job: BatchJob, error: Exception) -> Outcome:
    """Return the outcome of a job that went wrong; what lies in its input does so again."""
    failure = Failure.of(error)
    if job.source not in failure.message:
        failure = Failure(failure.code, f"{job.source}: {failure.message}", failure.exit_status)
    return Outcome(job, error=failure, may_succeed=not isinstance(error, InputError))
