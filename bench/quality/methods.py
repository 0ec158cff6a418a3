"""The methods that the bench compares, all through tegula's own stages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tegula.images.adjust import lock_colour
from tegula.images.pixels import enlarge_lanczos
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.load import load_prescaler
from tegula.options import PRESETS, Preset, ResolvedOptions, UpscaleOptions
from tegula.pipeline.finish import finish
from tegula.pipeline.prepare import Prepared
from tegula.pipeline.prescale import prescale
from tegula.pipeline.refine import RefineJob, refine_canvas
from tegula.pipeline.windows import canvas_piece
from tegula.upscaler import Upscaler

Picture = NDArray[np.float32]
PRESCALERS = ("realesrgan-x4plus", "realesrgan-x4plus-anime", "realesrgan-animevideov3")
SEED = 1


@dataclass(frozen=True)
class Method:
    """A name and the options behind it; ``scale`` is filled in per run."""

    name: str
    options: UpscaleOptions


def alone(prescaler: str) -> Method:
    """Return a prescaler's net and nothing else."""
    options = UpscaleOptions(prescaler=prescaler, creativity=0, colour_lock="none", seed=SEED)
    return Method(prescaler, options)


def held(prescaler: str) -> Method:
    """Return a prescaler whose colours are held to the source, without refine."""
    options = UpscaleOptions(prescaler=prescaler, creativity=0, seed=SEED)
    return Method(f"{prescaler}, colours held", options)


def preset(name: Preset) -> Method:
    """Return a preset of the packaged model."""
    return Method(f"mini {name}", UpscaleOptions(preset=name, seed=SEED))


METHODS = (
    alone("lanczos"),
    *map(alone, PRESCALERS),
    held(PRESCALERS[0]),
    held("tegula-photo"),
    *map(preset, PRESETS),
)


@dataclass(frozen=True)
class Result:
    """A picture, the seconds its refine took, and the borders of its windows."""

    picture: Picture
    seconds: float
    columns: tuple[int, ...]
    rows: tuple[int, ...]


class Runner:
    """Runs methods on one picture after another; the prescaled picture is shared."""

    def __init__(self, upscaler: Upscaler) -> None:
        self._upscaler = upscaler
        self._prescalers: dict[str, Prescaler] = {}
        self._kept: dict[tuple[int, str], Picture] = {}
        self._kept_of: int | None = None

    def run(self, small: NDArray[np.uint8], scale: int, options: UpscaleOptions) -> Result:
        """Enlarge one picture with one method, as ``Upscaler.upscale`` does."""
        image = Image.fromarray(small)
        prepared, resolved, _ = self._upscaler.prepare(image, replace(options, scale=scale))
        source = enlarge_lanczos(prepared.rgb, (resolved.width, resolved.height))
        prescaled = lock_colour(self._prescaled(prepared, resolved, small), source, resolved)
        if resolved.creativity == 0:
            return Result(prescaled, 0.0, (), ())
        began = time.perf_counter()
        refined = refine_canvas(RefineJob(self._upscaler.bundle, prescaled, source, resolved))
        seconds = time.perf_counter() - began
        finished = finish(refined, prescaled, prepared, resolved)
        picture = np.asarray(finished.image.convert("RGB"), np.float32) / np.float32(255)
        return Result(picture, seconds, *self._borders(resolved))

    def _prescaled(
        self, prepared: Prepared, options: ResolvedOptions, small: NDArray[np.uint8]
    ) -> Picture:
        if self._kept_of != id(small):
            self._kept, self._kept_of = {}, id(small)
        key = (options.width, options.prescaler)
        if key not in self._kept:
            net = self._prescaler(options.prescaler)
            self._kept[key] = prescale(prepared.rgb, (options.width, options.height), net)
        return self._kept[key]

    def _prescaler(self, name: str) -> Prescaler:
        if name not in self._prescalers:
            bundle = self._upscaler.bundle
            self._prescalers[name] = load_prescaler(name, bundle.device, bundle.dtype)
        return self._prescalers[name]

    def _borders(self, options: ResolvedOptions) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return where windows begin or end inside the picture, in pixels."""
        facts = self._upscaler.bundle.facts
        size = options.width, options.height
        grid = canvas_piece(facts, *size, options.window, options.overlap).grid
        factor = facts.latent_factor
        columns = _inside(grid.columns, grid.window_width, factor, options.width)
        return columns, _inside(grid.rows, grid.window_height, factor, options.height)


def _inside(starts: Sequence[int], window: int, factor: int, side: int) -> tuple[int, ...]:
    edges = {edge * factor for start in starts for edge in (start, start + window)}
    return tuple(sorted(edge for edge in edges if 0 < edge < side))
