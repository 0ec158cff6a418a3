"""Running a model of the catalogue with the upscaler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tegula.catalog.inputs import Recipe, Situation, ValidInputs, Version
from tegula.options import UpscaleOptions
from tegula.progress import Cancelled, OnProgress, Progress, never_cancelled

if TYPE_CHECKING:
    from tegula.images.open import Source
    from tegula.upscaler import Upscaler, UpscaleResult


Provider = Callable[[Sequence[tuple[str, float]]], "Upscaler"]
"""Returns the upscaler to run on, with these (file, weight) LoRAs on its bundle."""

OnLog = Callable[[str], None]
MEDIA_TYPES: Mapping[str, str] = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
QUALITY = 95


@dataclass(frozen=True)
class Output:
    """One output file: its bytes, a name, and what made it."""

    name: str
    media_type: str
    data: bytes
    width: int
    height: int
    settings: Mapping[str, Any]


def run(
    version: Version,
    inputs: ValidInputs,
    provider: Provider,
    *,
    files: Mapping[str, Source] | None = None,
    limits: UpscaleOptions | None = None,
    on_progress: OnProgress | None = None,
    on_log: OnLog | None = None,
    cancelled: Cancelled = never_cancelled,
) -> Iterator[Output]:
    """Run a version and yield its pictures as they are done.

    Args:
        version: what to run.
        inputs: from ``validate``.
        provider: gives the upscaler.
        files: what the file inputs hold, where the inputs have an address only.
        limits: options whose ``max_pixels`` bounds input and result.
        on_progress: told how far all passes together are.
        on_log: told sentences on what is done otherwise than asked.
        cancelled: asked between small pieces of work.

    Raises:
        InputError, ModelError, NumericalError, OutOfMemoryError, CancelledError: as
            ``Upscaler.upscale`` does, or because the model cannot run here.
    """
    log = on_log or _ignore
    sources = {**inputs.values, **(files or {})}
    upscaler = provider(())
    source, situation = _situation(sources[version.image], upscaler, limits or UpscaleOptions())
    recipe = version.plan(inputs.values, situation)
    for sentence in (*inputs.warnings, *recipe.notes):
        log(sentence)
    if recipe.loras:
        upscaler = provider(recipe.loras)
    mask = sources.get(recipe.mask) if recipe.mask else None
    result = _upscaled(upscaler, source, recipe, _Run(mask, limits, on_progress, cancelled, log))
    yield _output(result, recipe)


@dataclass(frozen=True)
class _Run:
    mask: Source | None
    limits: UpscaleOptions | None
    on_progress: OnProgress | None
    cancelled: Cancelled
    log: OnLog


def _situation(
    source: Source, upscaler: Upscaler, limits: UpscaleOptions
) -> tuple[Source, Situation]:
    """Read the size of the source; a stream is read into memory on the way."""
    from PIL import Image

    from tegula.images.open import decode
    from tegula.images.samples import ArrayLike

    if not isinstance(source, str | Path | bytes | Image.Image | ArrayLike):
        source = source.read()
    width, height = decode(source, max_pixels=limits.max_pixels).facts.size
    facts = upscaler.bundle.facts
    return source, Situation(
        width, height, facts.family, facts.window_multiple, facts.minimum_window
    )


def _upscaled(upscaler: Upscaler, source: Source, recipe: Recipe, run: _Run) -> UpscaleResult:
    from tegula.catalog.patterns import upscale_pattern
    from tegula.images.encode import encode
    from tegula.images.open import inverted

    limit = (run.limits or UpscaleOptions()).max_pixels
    mask = run.mask
    if mask is not None and recipe.mask_keeps_white:
        mask = inverted(mask, limit)
    results: list[UpscaleResult] = []
    for number, asked in enumerate(recipe.passes):
        if results:
            source = encode(results[-1].image, metadata=results[-1].metadata).data
        upscale = upscale_pattern if recipe.seamless else _upscale
        result = upscale(
            upscaler,
            source,
            asked.replaced(max_pixels=limit),
            mask,
            _share(run.on_progress, number, len(recipe.passes)),
            run.cancelled,
        )
        for sentence in result.warnings:
            run.log(sentence)
        results.append(result)
    return results[-1]


def _upscale(
    upscaler: Upscaler,
    source: Source,
    options: UpscaleOptions,
    mask: Source | None,
    on_progress: OnProgress | None,
    cancelled: Cancelled,
) -> UpscaleResult:
    return upscaler.upscale(
        source, options, mask=mask, on_progress=on_progress, cancelled=cancelled
    )


def _share(on_progress: OnProgress | None, number: int, passes: int) -> OnProgress | None:
    """Return what turns the progress of one pass into that of all."""
    if on_progress is None or passes == 1:
        return on_progress

    def report(progress: Progress) -> None:
        left = None if number + 1 < passes else progress.seconds_left
        fraction = (number + progress.fraction) / passes
        on_progress(dataclasses.replace(progress, fraction=fraction, seconds_left=left))

    return report


def _output(result: UpscaleResult, recipe: Recipe) -> Output:
    from tegula.images.encode import encode

    encoded = encode(
        result.image,
        recipe.format,
        quality=QUALITY,
        metadata=result.metadata,
        settings=result.settings,
    )
    width, height = result.image.size
    media = MEDIA_TYPES[recipe.format]
    return Output(f"out-0.{recipe.format}", media, encoded.data, width, height, result.settings)


def _ignore(sentence: str) -> None:
    """Tell nobody."""
