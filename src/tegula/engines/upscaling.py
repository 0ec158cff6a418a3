"""What runs in the engine's process: the catalogue over one loaded upscaler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tegula.catalog import Catalog, Output, run, validate
from tegula.engines.child import Emit, RunnerSpec
from tegula.engines.engine import FileMade, Job, Log, Progressed, Started
from tegula.options import UpscaleOptions
from tegula.progress import Progress

if TYPE_CHECKING:
    from tegula.upscaler import Upscaler

Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class RunnerOptions:
    """What a process loads and takes.

    bundle: name, folder or file of the weights.
    weights: their fingerprint, which is part of the ids of versions.
    max_pixels: the largest picture that is taken or made.
    backend, compile: as ``Upscaler.load`` takes them.
    """

    bundle: str
    weights: str
    max_pixels: int
    backend: str = "torch"
    compile: bool = False


def upscaling_spec(options: RunnerOptions) -> RunnerSpec:
    """Return how a process gets its runner."""
    return RunnerSpec(f"{__name__}:open_runner", dataclasses.asdict(options))


def open_runner(device: str, options: Mapping[str, Any]) -> UpscaleRunner:
    """Load the bundle; called in the process of an engine.

    Raises:
        ModelError: its weights are missing or broken.
    """
    return UpscaleRunner(device, RunnerOptions(**options))


class UpscaleRunner:
    """Runs versions of the catalogue with the upscaler that is loaded.

    One more upscaler, that with the LoRAs last asked for, is kept beside the plain one.
    """

    def __init__(self, device: str, options: RunnerOptions) -> None:
        self._device = device
        self._options = options
        self._catalog = Catalog(options.weights)
        self._limits = UpscaleOptions(max_pixels=options.max_pixels)
        self._plain = self._load(())
        self._other: tuple[Loras, Upscaler] | None = None

    def __call__(self, job: Job, emit: Emit, cancelled: Callable[[], bool]) -> None:
        """Run a job."""
        version = self._catalog.find(job.version)
        emit(Started())
        outputs = run(
            version,
            validate(version, job.input),
            self._provide,
            limits=self._limits,
            on_progress=lambda progress: emit(_progressed(progress)),
            on_log=lambda text: emit(Log(text)),
            cancelled=cancelled,
        )
        for output in outputs:
            emit(_written(output, job))

    def _provide(self, loras: Sequence[tuple[str, float]]) -> Upscaler:
        wanted = tuple(loras)
        if not wanted:
            return self._plain
        if self._other is None or self._other[0] != wanted:
            self._other = None
            self._other = (wanted, self._load(wanted))
        return self._other[1]

    def _load(self, loras: Loras) -> Upscaler:
        from tegula.upscaler import Upscaler

        options = self._options
        return Upscaler.load(
            options.bundle,
            loras=loras,
            device=self._device,
            backend=options.backend,
            compile=options.compile,
        )


def _progressed(progress: Progress) -> Progressed:
    return Progressed(progress.fraction, progress.seconds_left)


def _written(output: Output, job: Job) -> FileMade:
    path = job.folder / output.name
    path.write_bytes(output.data)
    return FileMade(path, output.name, output.media_type)
