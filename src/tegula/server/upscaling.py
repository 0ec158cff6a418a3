"""What runs in the engine's process: the catalogue over the bundles that jobs name."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tegula.catalog import Catalog, run, validate
from tegula.models import BundleSettings
from tegula.progress import Cancel, Cancelled, OnPreview
from tegula.server.engine import (
    Job,
    Log,
    OutputFile,
    Preview,
    Progressed,
    Started,
    public_words,
)
from tegula.server.ray_helpers import Free
from tegula.server.runner import Emit, RunnerSpec

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tegula.pipeline.shards import HelperNets, Task
    from tegula.upscaler import Upscaler


Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class RunnerOptions:
    """What a process loads and accepts.

    models: the bundle of all jobs that name none.
    weights: a fingerprint of the weights, which is part of the ids of versions.
    max_pixels: the largest picture that is taken or returned.
    backend, compile: as ``Upscaler.load`` takes them.
    bundles: further bundles, by the name that jobs have for them.
    idle_seconds: after which a bundle that no job used is unloaded; 0 keeps all.
    shard_above: megapixels of a result above which other processes help with it; 0 is never.
    """

    models: BundleSettings
    weights: str
    max_pixels: int
    backend: str = "torch"
    compile: bool = False
    bundles: Mapping[str, BundleSettings] = dataclasses.field(default_factory=dict)
    idle_seconds: float = 0.0
    shard_above: float = 0.0


def upscaling_spec(options: RunnerOptions) -> RunnerSpec:
    """Return how a process gets a runner of the catalogue."""
    return RunnerSpec(f"{__name__}:open_runner", vars(options))


def open_runner(device: str, options: Mapping[str, Any]) -> UpscaleRunner:
    """Load the bundle; called in the engine's process.

    Raises:
        ModelError: its weights are missing or broken.
    """
    return UpscaleRunner(device, RunnerOptions(**options))


@dataclass(frozen=True)
class NetsOf:
    """Which nets a picture runs with.

    bundle: its name; empty for the usual one.
    loras: those that the job brings.
    merged: those that its prompts name, which are in the networks while it is refined.
    """

    bundle: str
    loras: Loras
    merged: Loras


@dataclass(frozen=True)
class _Helping:
    """The nets that this process helps others with, and what gives their LoRAs back."""

    wanted: NetsOf
    nets: HelperNets
    ends: ExitStack


@dataclass
class _Loaded:
    """A bundle that is loaded, and one more with the LoRAs of its last job that wanted some."""

    plain: Upscaler
    with_loras: tuple[Loras, Upscaler] | None = None
    used_at: float = 0.0


class UpscaleRunner:
    """Runs versions of the catalogue, each with the bundle that its job names.

    The usual bundle is loaded at once, others when a job names them. They stay beside each other
    until no job has used them for a while.
    """

    def __init__(self, device: str, options: RunnerOptions) -> None:
        self._device = device
        self._options = options
        self._catalog = Catalog(options.weights)
        self._loaded: dict[str, _Loaded] = {}
        self._free: Free | None = None
        self._helping: _Helping | None = None
        self._bundle("")

    def __call__(self, job: Job, emit: Emit, cancelled: Cancelled) -> None:
        """Run a job."""
        version = self._catalog.find(job.version)
        self._end_helping()
        self._unload_idle(job.bundle)
        loaded = self._bundle(job.bundle)
        emit(Started())
        outputs = run(
            version,
            validate(version, job.input),
            lambda loras: self._spreading(job.bundle, loaded, tuple(loras)),
            max_pixels=self._options.max_pixels,
            on_progress=lambda progress: emit(Progressed(progress.fraction, progress.seconds_left)),
            on_preview=_previews(emit) if job.previews else None,
            on_log=lambda text: emit(Log(public_words(text, job.input))),
            cancelled=cancelled,
        )
        for output in outputs:
            path = job.folder / output.name
            path.write_bytes(output.data)
            emit(OutputFile(path, output.name, output.media_type))
        loaded.used_at = time.monotonic()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the bundles that are loaded; the usual one has an empty name."""
        return tuple(self._loaded)

    # Large pictures: help from other processes, and help for them.

    def be_helped_by(self, free: Free) -> None:
        """Spread large pictures over the helpers that this returns, from now on."""
        self._free = free

    def kind(self, nets: NetsOf) -> object:
        """Load nets for helping, where they are not, and return what kind they are."""
        from tegula.pipeline.shards import kind_of

        return kind_of(self._helper_nets(nets).bundle)

    def help(self, nets: NetsOf, task: Task, cancel: Cancel) -> Sequence[Tensor]:
        """Do a task of another process with some nets."""
        from tegula.pipeline.shards import run_task

        return run_task(task, self._helper_nets(nets), cancel)

    def _helper_nets(self, wanted: NetsOf) -> HelperNets:
        from tegula.pipeline.shards import HelperNets

        if self._helping is None or self._helping.wanted != wanted:
            self._end_helping()
            upscaler = self._upscaler(wanted.bundle, self._bundle(wanted.bundle), wanted.loras)
            ends = ExitStack()
            if wanted.merged and upscaler.bundle.with_loras is not None:
                ends.enter_context(upscaler.bundle.with_loras(wanted.merged))
            nets = HelperNets(upscaler.bundle, upscaler.nets.prescaler)
            self._helping = _Helping(wanted, nets, ends)
        return self._helping.nets

    def _end_helping(self) -> None:
        """Take LoRAs out of the networks, and give back the constants of others' pictures."""
        if self._helping is not None:
            self._helping.ends.close()
            self._helping = None

    def _spreading(self, name: str, loaded: _Loaded, loras: Loras) -> Upscaler:
        """Return an upscaler that spreads large pictures over helpers."""
        upscaler, free = self._upscaler(name, loaded, loras), self._free
        if free is not None and self._options.shard_above:
            from tegula.pipeline.shards import Spread, kind_of

            kind = kind_of(upscaler.bundle)
            upscaler.spread = Spread(
                self._options.shard_above,
                lambda merged: free(NetsOf(name, loras, merged), kind),
            )
        return upscaler

    def _unload_idle(self, wanted: str) -> None:
        longest, now = self._options.idle_seconds, time.monotonic()
        for name, loaded in list(self._loaded.items()):
            if longest and name != wanted and now - loaded.used_at > longest:
                del self._loaded[name]

    def _bundle(self, name: str) -> _Loaded:
        if name not in self._loaded:
            self._loaded[name] = _Loaded(self._load(name, ()))
        self._loaded[name].used_at = time.monotonic()
        return self._loaded[name]

    def _upscaler(self, name: str, loaded: _Loaded, loras: Loras) -> Upscaler:
        if not loras:
            return loaded.plain
        if loaded.with_loras is None or loaded.with_loras[0] != loras:
            loaded.with_loras = None  # first give back the memory of the one before
            loaded.with_loras = (loras, self._load(name, loras))
        return loaded.with_loras[1]

    def _load(self, name: str, loras: Loras) -> Upscaler:
        from tegula.upscaler import Upscaler

        options = self._options
        models = options.bundles[name] if name else options.models
        models = models.replaced(loras=(*models.loras, *loras))
        return Upscaler.load(
            **dict(models),
            device=self._device,
            backend=options.backend,
            compile=options.compile,
        )


def _previews(emit: Emit) -> OnPreview:
    """Return what emits previews."""

    def show(image: Image) -> None:
        jpeg = io.BytesIO()
        image.convert("RGB").save(jpeg, "JPEG", quality=85)
        emit(Preview(jpeg.getvalue()))

    return show
