"""Running the pictures of one command with one loaded model."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tegula.cli.console import (
    Console,
    Failure,
    Interruption,
    failure_of,
    showing,
    staggered,
    waiting,
)
from tegula.cli.options import Models
from tegula.cli.targets import Job, Work
from tegula.errors import (
    CancelledError,
    InputError,
    ModelError,
    OptionError,
    PathError,
    TegulaError,
)
from tegula.images.formats import check_sides
from tegula.options import UpscaleOptions, target_size

if TYPE_CHECKING:
    from tegula.pipeline.prepare import Prepared
    from tegula.progress import OnPreview
    from tegula.upscaler import Upscaler, UpscaleResult


# What can be found wrong before the long work, and before a model is loaded.


def read_source(job: Job, max_pixels: int) -> Path | bytes:
    """Return the path of a file, or the bytes of what can be read only once.

    Raises:
        OptionError: standard input is a terminal.
        TooLargeError: there is more to read than any picture within the limit has.
        PathError: it cannot be read.
    """
    from tegula.images.open import opened_file

    path = job.source
    if path is not None and (path.is_file() or path.is_dir() or not path.exists()):
        return path
    stream: Path | BinaryIO = sys.stdin.buffer if path is None else path
    if not isinstance(stream, Path) and stream.isatty():
        raise OptionError("Standard input is a terminal; pipe a picture into it.")
    with opened_file(stream, max_pixels) as file:
        file.seek(0)
        return file.read()


def is_result(path: Path) -> bool:
    """Tell whether a file is a picture that tegula made."""
    from tegula.images.encode import read_settings

    try:
        return read_settings(path) is not None
    except TegulaError:
        return False


def check_job(
    job: Job, source: Path | bytes, options: UpscaleOptions, *, makes_folder: bool
) -> None:
    """Refuse a source that is no picture, a result too large, and a place not writable.

    Raises:
        InputError: see its subclasses.
        PathError: the source cannot be read or the target not written.
    """
    from tegula.images.open import upright_size

    if job.target is None:
        _check_standard_output()
    else:
        check_place(job.target, makes_folder=makes_folder)
    width, height = upright_size(source, max_pixels=options.max_pixels)
    check_sides(*target_size(options, width, height), job.format)


def check_place(target: Path, *, makes_folder: bool) -> None:
    """Refuse a place where no file can be written, by writing a nameless one there.

    Args:
        target: the file to be.
        makes_folder: whether its folder is made when it is not there yet.

    Raises:
        PathError: says why.
    """
    if target.is_dir():
        raise PathError(f"{target} is a folder; give the name of a file.")
    if target.exists() and not target.is_file():
        return
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    if folder != target.absolute().parent and not makes_folder:
        raise PathError(f"{target} cannot be written: its folder does not exist.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PathError(f"{target} cannot be written: {reason}.") from error


def _check_standard_output() -> None:
    if sys.stdout.isatty():
        raise OptionError(
            "Standard output is a terminal, which shows no picture; send it to a file or a pipe."
        )


# Running the pictures of one command with one loaded model.


@dataclass(frozen=True)
class Request:
    """What is done with every picture.

    fingerprint: of the model that made the result which ``--like`` names.
    mask, strength_map: pictures that lie over every source.
    preview: a file that shows what the picture in work looks like by now.
    """

    options: UpscaleOptions
    models: Models
    device: str
    precision: str
    quality: int
    overwrite: bool
    compare: bool
    debug: bool
    fingerprint: str | None = None
    mask: Path | None = None
    strength_map: Path | None = None
    preview: Path | None = None
    backend: str = "torch"
    compile: bool = False


@dataclass(frozen=True)
class _Made:
    """A result on its way to its file, warnings about the model, and when it was begun."""

    result: UpscaleResult
    warnings: tuple[str, ...]
    start: float


_STOPPING = (CancelledError, ModelError, BrokenPipeError)


@dataclass
class Batch:
    """The pictures of one command on their way.

    Of several, the next is decoded and the one before is encoded while one is upscaled.
    """

    request: Request
    work: Work
    console: Console
    interruption: Interruption
    _upscaler: Upscaler | None = None
    _done: int = 0
    _skipped: int = 0
    _failures: list[tuple[Job, Failure]] = field(default_factory=list)

    def run(self) -> int:
        """Upscale what is not done yet and go on after a bad picture.

        Returns:
            The exit status: that of the first failure, or 0.

        Raises:
            TegulaError: what stops the whole: a cancel, a model, or the only picture.
        """
        jobs = self.work.jobs
        try:
            if len(jobs) == 1 or self.request.debug:
                for job in jobs:
                    self._finish(job, self._upscale(job, self._read(job)))
            else:
                steps = (self._decode, self._upscale, self._finish, self._fail)
                staggered(jobs, *steps, _STOPPING)
        except (CancelledError, KeyboardInterrupt, ModelError):
            self._sum_up()
            raise
        self._sum_up()
        return self._failures[0][1].exit_status if self._failures else 0

    def _read(self, job: Job) -> Path | bytes | None:
        """Return a source that can be upscaled, None where that is done already."""
        if self._is_done(job):
            return None
        source = read_source(job, self.request.options.max_pixels)
        check_job(job, source, self.request.options, makes_folder=self.work.resumes)
        return source

    def _decode(self, job: Job) -> Prepared | None:
        """Read and decode ahead of time, for the upscale to start at once."""
        from tegula.pipeline.prepare import prepare

        source = self._read(job)
        return None if source is None else prepare(source, self.request.options)

    def _upscale(self, job: Job, source: Path | bytes | Prepared | None) -> _Made | None:
        if source is None:
            return None
        start = time.perf_counter()
        upscaler = self.loaded()
        with showing(self.console, job.name) as on_progress, self.interruption.polled():
            result = upscaler.upscale(
                source,
                self.request.options,
                mask=self.request.mask,
                strength_map=self.request.strength_map,
                on_progress=on_progress,
                on_preview=self._on_preview(),
                cancelled=self.interruption.cancelled,
            )
        return _Made(result, self._about_model(upscaler), start)

    def _finish(self, job: Job, made: _Made | None) -> None:
        """Write the result and tell of it."""
        if made is None:
            self._skipped += 1
            self.console.tell(f"{job.target} is there already; --overwrite makes it again.")
            self.console.data({**_places(job), "skipped": True})
            return
        result = made.result
        warnings = (*made.warnings, *result.warnings, *self._write(job, result))
        compared = self._compare(job, result)
        self._done += 1
        self._tell(job, result, warnings, compared, time.perf_counter() - made.start)

    def _fail(self, job: Job, error: Exception) -> None:
        """Tell of a picture that went wrong; the others go on."""
        failure = failure_of(error)
        self._failures.append((job, failure))
        self.console.tell(_named(job, failure))
        self.console.data({**_places(job), "error": failure.told()})

    def _is_done(self, job: Job) -> bool:
        target = job.target
        if target is None or not target.is_file():
            return False
        if not self.request.overwrite:
            if self.work.resumes:
                return True
            raise PathError(f"{target} is there already; --overwrite replaces it.")
        if self.work.guessed and not is_result(target):
            raise InputError(
                f"{target} is there and is no result of tegula: replace it with --output "
                f"{target}, or upscale it too with --output FOLDER/."
            )
        return False

    def loaded(self) -> Upscaler:
        """Return the upscaler that every picture goes through, loaded by the first call."""
        if self._upscaler is None:
            models = self.request.models
            named = {} if models.bundle is None else {"bundle": models.bundle}
            with waiting(self.console, f"loading {models.bundle or 'the model'}"):
                from tegula.upscaler import Upscaler

                self._upscaler = Upscaler.load(
                    **named,
                    controlnet=models.controlnet,
                    vae=models.vae,
                    loras=models.loras,
                    few_step=models.few_step or self._usual_few_step(),
                    embeddings=models.embeddings,
                    device=self.request.device,
                    precision=self.request.precision,
                    backend=self.request.backend,
                    compile=self.request.compile,
                )
        return self._upscaler

    def _usual_few_step(self) -> str | None:
        return "auto" if self.request.options.preset == "fast" else None

    def _about_model(self, upscaler: Upscaler) -> tuple[str, ...]:
        wanted = self.request.fingerprint
        if wanted in (None, upscaler.bundle.facts.fingerprint):
            return ()
        return ("The result that --like names was made with other weights; this one will differ.",)

    def _write(self, job: Job, result: UpscaleResult) -> tuple[str, ...]:
        """Write the result and return what its format could not hold."""
        from tegula.folders import write_atomically
        from tegula.images.encode import encode

        encoded = encode(
            result.image,
            job.format,
            quality=self.request.quality,
            metadata=result.metadata,
            settings=self._settings(result),
        )
        if job.target is None:
            sys.stdout.buffer.write(encoded.data)
            sys.stdout.buffer.flush()
            return encoded.warnings
        if self.work.resumes:
            job.target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job.target, encoded.data)
        return encoded.warnings

    def _settings(self, result: UpscaleResult) -> dict[str, Any]:
        return {**result.settings, "models": self.request.models.asked()}

    def _on_preview(self) -> OnPreview | None:
        path = self.request.preview
        if path is None:
            return None
        from tegula.images.encode import save

        return lambda picture: save(picture, path)

    def _compare(self, job: Job, result: UpscaleResult) -> Path | None:
        if not self.request.compare or job.target is None:
            return None
        from tegula.images.encode import save, side_by_side

        path = job.target.with_name(f"{job.target.stem}.compare.png")
        save(side_by_side(result.source, result.image), path)
        return path

    def _tell(
        self,
        job: Job,
        result: UpscaleResult,
        warnings: tuple[str, ...],
        compared: Path | None,
        seconds: float,
    ) -> None:
        size = result.image.size
        for warning in warnings:
            self.console.tell(f"{job.name}: {warning}")
        place = "Standard output" if job.target is None else job.target
        took = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
        self.console.tell(f"{place}: {size[0]}x{size[1]}, seed {result.seed}, {took}")
        if compared is not None:
            self.console.tell(f"{compared}: before and after")
        self.console.data(
            {
                **_places(job),
                **({} if compared is None else {"compare": str(compared)}),
                "width": size[0],
                "height": size[1],
                "seed": result.seed,
                "options": result.options.settings(),
                "timings": dict(result.timings),
                "warnings": list(warnings),
                "settings": self._settings(result),
            }
        )

    def _sum_up(self) -> None:
        if len(self.work.jobs) == 1:
            return
        for job, failure in self._failures:
            self.console.complain(_named(job, failure))
        left = len(self.work.jobs) - self._done - self._skipped - len(self._failures)
        counts = {
            "done": self._done,
            "skipped": self._skipped,
            "failed": len(self._failures),
            "not begun": left,
        }
        self.console.tell(", ".join(f"{count} {what}" for what, count in counts.items() if count))


def _named(job: Job, failure: Failure) -> str:
    named = job.name in failure.message
    return failure.message if named else f"{job.name}: {failure.message}"


def _places(job: Job) -> Mapping[str, Any]:
    return {
        "input": "-" if job.source is None else str(job.source),
        "output": "-" if job.target is None else str(job.target),
    }
