"""Upscaling the pictures of `tegula upscale` with one loaded model.

Of several pictures, the next is decoded and the one before is encoded while one is upscaled.
A picture that goes wrong does not stop the others.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tegula.cli.console import Console, Failure, Interruption, plural
from tegula.cli.models import Runtime, load_upscaler
from tegula.cli.progress import show_progress
from tegula.cli.several import RemainingWork, staggered
from tegula.cli.targets import (
    Job,
    SideFiles,
    Work,
    check_job,
    check_side_files,
    read_source,
)
from tegula.errors import (
    CancelledError,
    FullDiskError,
    InputError,
    ModelError,
    PathError,
    TegulaError,
)
from tegula.models import BundleSettings
from tegula.options import UpscaleOptions
from tegula.progress import ANNOUNCED_FROM_S, about
from tegula.resolve import target_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from tegula.images.deep import DeepPixels
    from tegula.images.encode import Encoded
    from tegula.images.frames import FrameFacts
    from tegula.pipeline.prepare import Prepared
    from tegula.plan import Plan
    from tegula.progress import OnPreview
    from tegula.result import UpscaleResult
    from tegula.upscaler import Upscaler

_NAMES_SHOWN = 5

_TEDIOUS_S = 120.0
"""Expected seconds from which on a quicker preset is suggested."""

_QUICKER = 0.7
"""Share of the expected time that the suggested preset may take at most."""

STOPPING = (CancelledError, ModelError, FullDiskError, BrokenPipeError)
"""Errors that no later picture can escape."""


@dataclass(frozen=True)
class Request:
    """What is done with every picture.

    fingerprint: of the model that made the result which ``--like`` names.
    quality: of JPEG, WebP and AVIF, 1..100.
    png_level: how hard PNG is compressed, 0..9.
    overwrite: whether results that exist are made again.
    debug: whether the first error stops the command, for its traceback.
    all_frames: whether all frames and pages are enlarged, or the first.
    """

    options: UpscaleOptions
    models: BundleSettings
    runtime: Runtime
    fingerprint: str | None = None
    side_files: SideFiles = field(default_factory=SideFiles)
    quality: int = 95
    png_level: int = 4
    overwrite: bool = False
    debug: bool = False
    all_frames: bool = False

    def load_upscaler(self, console: Console) -> Upscaler:
        """Load the models; the fast preset looks for a LoRA for few steps.

        Raises:
            ModelError, OptionError: as ``Upscaler.load``, or there is no such face model.
        """
        from tegula.models.faces import face_file
        from tegula.models.headers import check_file
        from tegula.models.library import FileKind

        if self.options.prescaler is not None:
            check_file(self.options.prescaler, FileKind.PRESCALER)
        if self.options.faces:
            face_file(self.options.faces)
        fast = self.options.preset == "fast"
        return load_upscaler(console, self.models, self.runtime, fast=fast)


@dataclass(frozen=True)
class Upscaled:
    """A result on its way to its file, and when its work began.

    frames: those of an animation or the pages of a file, the first of them the result.
    """

    result: UpscaleResult
    began: float
    facts: FrameFacts | None = None
    frames: tuple[tuple[Image, DeepPixels | None], ...] = ()

    def encoded(
        self, file_format: str, request: Request, settings: Mapping[str, Any] | None = None
    ) -> Encoded:
        """Return the bytes of the file, which tell how it was made; ``settings`` tell more.

        Raises:
            InputError: a side is longer than the format allows.
        """
        result, quality, level = self.result, request.quality, request.png_level
        settings = {**result.settings, "models": request.models.given(), **(settings or {})}
        if self.facts is None:
            return result.encoded(file_format, quality=quality, png_level=level, settings=settings)
        from tegula.images.frames import encode_frames

        encoded = encode_frames(
            self.frames,
            self.facts,
            file_format,
            quality=quality,
            png_level=level,
            metadata=result.metadata,
            settings=settings,
        )
        lost = result.lost_exactness(file_format)
        return dataclasses.replace(encoded, warnings=(*encoded.warnings, *lost))


UpscaleOne = Callable[[str, "Path | bytes | Prepared", UpscaleOptions], "UpscaleResult"]
"""Upscales one picture, or one frame of it, which has a name of its own."""


def decoded_ahead(source: Path | bytes, request: Request) -> Path | bytes | Prepared:
    """Decode ahead of time, for the upscale to start at once.

    Raises:
        InputError: it is not a picture, or a damaged one; see its subclasses.
        PathError: it cannot be read.
    """
    from tegula.pipeline.prepare import prepare

    # All frames together may take more memory than there is.
    return source if request.all_frames else prepare(source, request.options)


def upscale_all_of(
    source: Path | bytes | Prepared,
    name: str,
    file_format: str,
    request: Request,
    upscale_one: UpscaleOne,
) -> Upscaled:
    """Upscale a picture, or with ``all_frames`` every frame or page of it.

    Raises:
        TegulaError: as ``Upscaler.upscale``.
    """
    began = time.perf_counter()
    if request.all_frames and isinstance(source, Path | bytes):
        from tegula.images.frames import frame_facts

        facts = frame_facts(source, request.options.max_pixels)
        if facts.count > 1:
            return _upscale_frames(source, name, file_format, request, upscale_one, facts, began)
    return Upscaled(upscale_one(name, source, request.options), began)


def _upscale_frames(
    source: Path | bytes,
    name: str,
    file_format: str,
    request: Request,
    upscale_one: UpscaleOne,
    facts: FrameFacts,
    began: float,
) -> Upscaled:
    """Upscale frame by frame, all from the noise of the first, so that they do not flicker."""
    from tegula.images.frames import check_frames, read_frames
    from tegula.pipeline.prepare import prepare

    check_frames(facts, file_format)
    options, first = request.options, None
    frames: list[tuple[Image, DeepPixels | None]] = []
    warnings: dict[str, None] = {}
    for picture in read_frames(source, facts, options.max_pixels):
        frame_name = f"{name}, {facts.kind} {len(frames) + 1} of {facts.count}"
        result = upscale_one(frame_name, prepare(picture, options), options)
        if first is None:
            first, options = result, options.replaced(seed=result.seed)
        frames.append((result.image, result.deep))
        warnings |= dict.fromkeys(result.warnings)
    if first is None:
        raise InputError(f"{name} has no frames.")
    first = dataclasses.replace(first, warnings=tuple(warnings))
    return Upscaled(first, began, facts, tuple(frames))


@dataclass
class Pictures:
    """The pictures of one command and what has become of them so far."""

    request: Request
    work: Work
    console: Console
    interruption: Interruption
    _done: int = 0
    _skipped: int = 0
    _announced: bool = False
    _failures: list[Failure] = field(default_factory=list)

    def run(self) -> int:
        """Upscale what is not done yet.

        Returns:
            The exit status: that of the first failure, or 0.

        Raises:
            TegulaError: what stops everything: a cancel, a model, or the only picture.
        """
        jobs = self.work.jobs
        check_side_files(self.request.side_files, self.request.options.max_pixels)
        self._report_left_out()
        try:
            if len(jobs) == 1 or self.request.debug:
                for job in jobs:
                    self._finish(job, self._upscale(job, self._read(job)))
            else:
                steps = (self._decode, self._upscale, self._finish, self._fail)
                staggered(jobs, *steps, STOPPING)
        except FullDiskError:
            if self.work.resumes:
                self.console.message(
                    "The disk is full. The same command goes on from here once there is room."
                )
            raise
        finally:
            if len(jobs) > 1:
                self._sum_up()
        return self._failures[0].exit_status if self._failures else 0

    def _report_left_out(self) -> None:
        """Say which files of the folders are not read."""
        files = self.work.left_out
        if not files:
            return
        names = ", ".join(file.name for file in files[:_NAMES_SHOWN])
        names += ", ..." if len(files) > _NAMES_SHOWN else ""
        is_are = (
            "is not a picture by its name and is"
            if len(files) == 1
            else ("are not pictures by their names and are")
        )
        self.console.message(f"{plural(len(files), 'file')} {is_are} left out: {names}.")
        self.console.record({"left_out": [str(file) for file in files]})

    @cached_property
    def _upscaler(self) -> Upscaler:
        """The model of all pictures, loaded when the first one needs it."""
        return self.request.load_upscaler(self.console)

    def _is_done(self, job: Job) -> bool:
        target = job.target
        if target is None or not target.is_file():
            return False
        if not self.request.overwrite:
            if self.work.resumes:
                return True
            raise PathError(f"{target} exists already; --overwrite replaces it.")
        if self.work.guessed and not _is_result(target):
            raise InputError(
                f"{target} exists and was not made by tegula: replace it with --output "
                f"{target}, or upscale it too with --output FOLDER/."
            )
        return False

    def _read(self, job: Job) -> Path | bytes | None:
        """Return a source that can be upscaled, None where that is done already."""
        if self._is_done(job):
            return None
        source = read_source(job, self.request.options.max_pixels)
        check_job(
            job,
            source,
            self.request.options,
            makes_folder=self.work.resumes,
            compares=self.request.side_files.compare,
        )
        return source

    def _decode(self, job: Job) -> Path | bytes | Prepared | None:
        source = self._read(job)
        return None if source is None else decoded_ahead(source, self.request)

    @cached_property
    def _remaining(self) -> RemainingWork | None:
        """What is to come, where there are several pictures."""
        jobs = self.work.jobs
        return RemainingWork([self._work_of(job) for job in jobs]) if len(jobs) > 1 else None

    def _work_of(self, job: Job) -> float:
        """Return the pixels of a result, none where it is there already."""
        from tegula.images.open import upright_size

        options = self.request.options
        target, source = job.target, job.source
        is_done = self.work.resumes and not self.request.overwrite
        if source is None or (is_done and target is not None and target.is_file()):
            return 0.0
        try:
            size = upright_size(source, max_pixels=options.max_pixels)
            return float(math.prod(target_size(options, *size)))
        except TegulaError:
            return 1.0  # it will fail in its turn, at once

    def _upscale(self, job: Job, source: Path | bytes | Prepared | None) -> Upscaled | None:
        if source is None:
            return None
        if self._remaining is not None:
            self._remaining.begin(self.work.jobs.index(job))
        upscale_one = partial(self._upscale_one, job)
        return upscale_all_of(source, job.name, job.format, self.request, upscale_one)

    def _upscale_one(
        self, job: Job, name: str, source: Path | bytes | Prepared, options: UpscaleOptions
    ) -> UpscaleResult:
        upscaler, side_files = self._upscaler, self.request.side_files
        whole = None if self._remaining is None else self._remaining.text
        showing = show_progress(self.console, name, job.input, whole)
        with showing as on_progress, self.interruption.polled():
            result = upscaler.upscale(
                source,
                options,
                mask=side_files.mask,
                strength_map=side_files.strength_map,
                on_progress=on_progress,
                on_preview=_save_preview(side_files.preview),
                on_plan=partial(self._announce_time, job, name),
                cancelled=self.interruption.requested,
            )
        if self.request.fingerprint not in (None, upscaler.bundle.facts.fingerprint):
            warning = (
                "The result that --like names was made with other weights; this one will differ."
            )
            result = dataclasses.replace(result, warnings=(warning, *result.warnings))
        return result

    def _announce_time(
        self, job: Job, name: str, plan: Plan, seconds: Mapping[str, float] | None
    ) -> None:
        """Say once, before long work, how long all of it takes, and what is quicker."""
        if seconds is None or self._announced:
            return
        self._announced = True
        one = sum(seconds.values())
        times = 1.0 if self._remaining is None else self._remaining.in_present_pictures()
        expected = one * times
        if self.console.progress:
            self.console.record({"input": job.input, "expected_seconds": expected})
        if not self.console.talks or expected < ANNOUNCED_FROM_S:
            return
        what = name if self._remaining is None else plural(len(self.work.jobs), "picture")
        sentence = f"{what}: expected to take about {about(expected)}"
        options = self.request.options
        if expected > _TEDIOUS_S and options.preset not in ("fast", "exact"):
            try:
                quicker = self._upscaler.expectation.with_preset("fast", plan, options) * times
            except TegulaError:
                quicker = expected  # its prescaler is missing, or memory is short
            if quicker < _QUICKER * expected:
                sentence += f"; with --preset fast about {about(quicker)}"
        self.console.message(sentence)

    def _finish(self, job: Job, upscaled: Upscaled | None) -> None:
        """Write the result and report it."""
        if upscaled is None:
            self._skipped += 1
            self.console.message(f"{job.target} exists already; --overwrite makes it again.")
            self.console.record({"input": job.input, "output": job.output, "skipped": True})
            return
        result = upscaled.result
        warnings = (*result.warnings, *self._write(job, upscaled))
        comparison = self._compare(job, result)
        self._done += 1
        self._report(job, result, warnings, comparison, time.perf_counter() - upscaled.began)
        self.console.record(
            {
                "input": job.input,
                "output": job.output,
                **({} if comparison is None else {"compare": str(comparison)}),
                "width": result.image.width,
                "height": result.image.height,
                **({} if upscaled.facts is None else {"frames": len(upscaled.frames)}),
                "seed": result.seed,
                "options": result.options.settings(),
                "timings": dict(result.timings),
                "found": result.found,
                "consistency": (
                    None if result.consistency is None else dataclasses.asdict(result.consistency)
                ),
                "faces": [dataclasses.asdict(face) for face in result.faces],
                "warnings": list(warnings),
                "settings": {**result.settings, "models": self.request.models.given()},
            }
        )

    def _write(self, job: Job, upscaled: Upscaled) -> tuple[str, ...]:
        """Write the result and return what its format could not hold."""
        from tegula.folders import make_folder, write_atomically

        encoded = upscaled.encoded(job.format, self.request)
        if job.target is None:
            sys.stdout.buffer.write(encoded.data)
            sys.stdout.buffer.flush()
            return encoded.warnings
        if self.work.resumes:
            make_folder(job.target.parent)
        write_atomically(job.target, encoded.data)
        return encoded.warnings

    def _compare(self, job: Job, result: UpscaleResult) -> Path | None:
        if not self.request.side_files.compare or job.comparison is None:
            return None
        from tegula.images.decode import in_srgb
        from tegula.images.encode import save, side_by_side

        after = in_srgb(result.image, result.metadata)
        save(side_by_side(result.source, after), job.comparison)
        return job.comparison

    def _report(
        self,
        job: Job,
        result: UpscaleResult,
        warnings: tuple[str, ...],
        comparison: Path | None,
        seconds: float,
    ) -> None:
        for warning in warnings:
            self.console.message(f"{job.name}: {warning}")
        place = "Standard output" if job.target is None else job.target
        size = f"{result.image.width}x{result.image.height}"
        took = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
        if result.found:
            self.console.message(f"{job.name}: {result.found}")
        number = self._done + len(self._failures)
        whole = "" if self._remaining is None else f"; {self._remaining.text_after(number)}"
        self.console.message(f"{place}: {size}, seed {result.seed}, {took}{whole}")
        for face in result.faces:
            held = "" if face.after == face.before else f", {face.after:.2f} once it was held"
            self.console.message(
                f"{job.name}: the face of {face.side} px at {face.left},{face.top} is "
                f"{face.before:.2f} from its source{held}"
            )
        if (near := result.consistency) is not None:
            self.console.message(
                f"{place}: shrunk again, it differs from the source by {near.mean:.1f} levels of "
                f"255 on average, and by {near.worst:.0f} at the worst pixel"
            )
        if comparison is not None:
            self.console.message(f"{comparison}: before and after")

    def _fail(self, job: Job, error: Exception) -> None:
        """Report a picture that went wrong; the others go on."""
        if self._remaining is not None:
            self._remaining.skip(self.work.jobs.index(job))
        failure = Failure.of(error)
        self.console.record({"input": job.input, "output": job.output, "error": failure.as_json()})
        if job.name not in failure.message:
            failure = dataclasses.replace(failure, message=f"{job.name}: {failure.message}")
        self._failures.append(failure)
        self.console.message(failure.message)

    def _sum_up(self) -> None:
        """Count what has become of the pictures, and repeat what went wrong."""
        if not self.console.json:
            for failure in self._failures:
                self.console.error(failure)
        counts = {
            "done": self._done,
            "skipped": self._skipped,
            "failed": len(self._failures),
        }
        counts["not begun"] = len(self.work.jobs) - sum(counts.values())
        self.console.message(
            ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        )


def _is_result(path: Path) -> bool:
    """Tell whether a file is a picture that tegula made."""
    from tegula.images.encode import read_settings

    try:
        return read_settings(path) is not None
    except TegulaError:
        return False


def _save_preview(path: Path | None) -> OnPreview | None:
    if path is None:
        return None
    from tegula.images.encode import save

    return lambda picture: save(picture, path)
