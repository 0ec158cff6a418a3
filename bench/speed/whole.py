"""Whole upscales: from a picture to a file, by stage, by size and from the command line."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.speed.clock import peak_growth, seconds_of
from bench.speed.job import JOBS, Job
from bench.speed.methods import Method
from bench.speed.models import Models
from bench.speed.stages import NETS, Stopwatch
from tegula.errors import OutOfMemoryError
from tegula.images.encode import save
from tegula.images.pixels import to_image
from tegula.models.prescalers.load import load_prescaler
from tegula.options import UpscaleOptions
from tegula.upscaler import Upscaler

Row = dict[str, Any]
STAGES = ("prepare", "prescale", "encode", "denoise", "decode", "finish", "write")
MEGAPIXELS = (1, 2, 4, 8, 16, 32, 64)
_GROWTH_SCALE = 4
_GROWTH_PRESCALER = "realesrgan-animevideov3"


def by_stage(job: Job, models: Models, method: Method) -> Row:
    """Time a whole upscale of a job with the settings of a method, from picture to PNG.

    It is the second one: the first also reads the prescaler and counts what nets cost.
    """
    options = job.options(**({"prescaler": job.prescaler} | dict(method.options)))
    upscaler = models.upscaler(method)
    _timed_upscale(upscaler, job, options, models)
    return {"name": method.name} | _timed_upscale(upscaler, job, options, models)


def growth(
    job: Job, models: Models, method: Method, sizes: Sequence[float] = MEGAPIXELS
) -> Iterator[Row]:
    """Yield what upscales to 1, 2, 4 and more megapixels take.

    The prescaler is the light one, so that it does not hide what grows.
    """
    _grown(job, models, method, sizes[0])
    for megapixels in sizes:
        try:
            yield _grown(job, models, method, megapixels)
        except OutOfMemoryError as error:  # noqa: PERF203 - the first one ends it
            yield {"megapixels": megapixels, "stopped": str(error)}
            return


def _grown(job: Job, models: Models, method: Method, megapixels: float) -> Row:
    side = round(math.sqrt(megapixels * 1e6) / 8) * 8
    sized = dataclasses.replace(job, source=side // _GROWTH_SCALE, side=side)
    options = sized.options(**({"prescaler": _GROWTH_PRESCALER} | dict(method.options)))
    upscaler = models.upscaler(method)
    rows: list[Row] = []

    def run() -> None:
        rows.append(_timed_upscale(upscaler, sized, options, models))

    peak = peak_growth(run, models.device)
    return {"megapixels": megapixels, "side": side, "peak_mb": peak} | rows[0]


def _timed_upscale(upscaler: Upscaler, job: Job, options: UpscaleOptions, models: Models) -> Row:
    source = to_image(job.photograph)
    bundle, name = upscaler.bundle, str(options.prescaler)
    watch = Stopwatch(models.device)
    watched = watch.watching(bundle, load_prescaler(name, bundle.device, bundle.dtype))
    with tempfile.TemporaryDirectory() as folder, watched, watch.timing("total"):
        result = upscaler.upscale(source, options)
        with watch.timing("write"):
            save(result.image, Path(folder) / "result.png", settings=result.settings)
    seconds = {**result.timings, **watch.seconds}
    total = seconds["total"]
    return {
        "seconds": total,
        "stages": {stage: seconds.get(stage, 0.0) for stage in STAGES},
        "outside_nets": max(0.0, 1 - seconds[NETS] / total),
        "windows": result.plan.windows,
    }


def command_to_file(source: int, device: str, repeats: int) -> Row:
    """Time the command that enlarges a photograph twice with mini, process start and all."""
    job = dataclasses.replace(JOBS["mini"], source=source)
    with tempfile.TemporaryDirectory() as folder:
        photograph = Path(folder) / "photograph.png"
        to_image(job.photograph).save(photograph)
        command = _command(photograph, Path(folder) / "large.png", device)

        def run() -> None:
            subprocess.run(command, check=True, capture_output=True)

        taken = [seconds_of(run, torch.device("cpu")) for _ in range(repeats)]
    return {"source": source, "side": 2 * source, "seconds": taken, "least": min(taken)}


def _command(source: Path, target: Path, device: str) -> Sequence[str]:
    words = [sys.executable, "-m", "tegula", "upscale", str(source), "--output", str(target)]
    return [*words, "--scale", "2", "--device", device, "--overwrite"]
