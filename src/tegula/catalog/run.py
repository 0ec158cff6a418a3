"""Running a model by name with the upscaler."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tegula.catalog.inputs import RunContext, ValidInputs, Version
from tegula.options import MAX_PIXELS, UpscaleOptions
from tegula.progress import (
    ANNOUNCED_FROM_S,
    Cancelled,
    OnPreview,
    OnProgress,
    Progress,
    about,
    never_cancelled,
)
from tegula.resolve import enlargement, target_size

# The catalogue is listed without numpy and torch, which the first run loads.
if TYPE_CHECKING:
    from tegula.images.decode import Picture
    from tegula.images.open import Source
    from tegula.plan import Plan
    from tegula.result import UpscaleResult
    from tegula.upscaler import Upscaler


Provider = Callable[[Sequence[tuple[str, float]]], "Upscaler"]
"""Returns the upscaler to run on, with these (file, weight) LoRAs on its bundle."""

OnLog = Callable[[str], None]
_MEDIA_TYPES: Mapping[str, str] = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
_QUALITY = 95


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
    max_pixels: int = MAX_PIXELS,
    on_progress: OnProgress | None = None,
    on_log: OnLog | None = None,
    on_preview: OnPreview | None = None,
    cancelled: Cancelled = never_cancelled,
) -> Iterator[Output]:
    """Run a version and yield its pictures as they are done: one, for the models of today.

    Args:
        version: what to run.
        inputs: from ``validate``.
        provider: gives the upscaler.
        max_pixels: limit of the source and of the result.
        on_progress: receives how far all passes together are.
        on_log: receives sentences on what is done otherwise than asked for.
        on_preview: shown small pictures of the work so far.
        cancelled: asked between small pieces of work.

    Raises:
        InputError, ModelError, NumericalError, OutOfMemoryError, CancelledError: as
            ``Upscaler.upscale`` does, or because the model cannot run here.
    """
    from tegula.images.decode import decode, inverted, reopened
    from tegula.pipeline.prepare import prepare

    log = on_log or (lambda _sentence: None)
    sources = dict(inputs.values)
    upscaler = provider(())
    picture = decode(sources[version.image], max_pixels=max_pixels)
    facts = upscaler.bundle.facts
    request = inputs.values.request(
        RunContext(*picture.facts.size, facts.family, facts.window_multiple, facts.minimum_window)
    )
    for sentence in (*inputs.warnings, *request.notes):
        log(sentence)
    if request.loras:
        upscaler = provider(request.loras)
    mask = sources.get(request.mask) if request.mask else None
    if mask is not None and request.mask_keeps_white:
        mask = inverted(mask, max_pixels)
    strength_map = sources.get(request.strength_map) if request.strength_map else None
    works = _works(request.passes, picture.facts.size)

    def log_expected(_plan: Plan, seconds: Mapping[str, float] | None) -> None:
        expected = sum((seconds or {}).values()) * sum(works) / works[0]
        if expected >= ANNOUNCED_FROM_S:
            log(f"Expected to take about {about(expected)}.")

    def run_pass(number: int, source: Picture) -> UpscaleResult:
        options = request.passes[number].replaced(max_pixels=max_pixels)
        make_pass = _wrapped if request.seamless else _Pass
        given = make_pass(source, options, mask, strength_map)
        done = upscaler.upscale(
            prepare(given.source, given.options),
            given.options,
            mask=given.mask,
            strength_map=given.strength_map,
            on_progress=_overall(on_progress, number, works),
            on_preview=on_preview,
            on_plan=log_expected if number == 0 else None,
            cancelled=cancelled,
        )
        done = _unwrapped(done, given.margins, source.facts.depth)
        for sentence in (*([done.found] if done.found else []), *done.warnings):
            log(sentence)
        return done

    result = run_pass(0, picture)
    for number in range(1, len(request.passes)):
        picture = reopened(result.image, result.deep, result.metadata)
        del result  # a large one takes gigabytes, and the next pass needs its picture alone
        result = run_pass(number, picture)
    encoded = result.encoded(request.format, quality=_QUALITY)
    for sentence in encoded.warnings:
        log(sentence)
    yield Output(
        f"out-0.{request.format}",
        _MEDIA_TYPES[request.format],
        encoded.data,
        result.image.width,
        result.image.height,
        result.settings,
    )


def _works(passes: Sequence[UpscaleOptions], size: tuple[int, int]) -> Sequence[float]:
    """Return the work of each pass over a source of this size: the pixels of its result."""
    width, height = float(size[0]), float(size[1])
    works = []
    for options in passes:
        across, down = enlargement(options, round(width), round(height))
        width, height = width * across, height * down
        works.append(width * height)
    return works


def _overall(
    on_progress: OnProgress | None, number: int, works: Sequence[float]
) -> OnProgress | None:
    """Return what turns the progress of one pass into that of all, by the work of each."""
    if on_progress is None or len(works) == 1:
        return on_progress
    before, own, after = sum(works[:number]), works[number], sum(works[number + 1 :])
    began = time.monotonic()

    def report(progress: Progress) -> None:
        left = progress.seconds_left
        if left is not None:
            left += (time.monotonic() - began + left) * after / own
        fraction = (before + own * progress.fraction) / sum(works)
        on_progress(dataclasses.replace(progress, fraction=fraction, seconds_left=left))

    return report


@dataclass(frozen=True)
class _Pass:
    """What the upscaler is given for one pass.

    mask, strength_map: laid over the source.
    margins: pixels of the result, across and down, that are cut off each side of it again.
    """

    source: Source | Picture
    options: UpscaleOptions
    mask: Source | None
    strength_map: Source | None
    margins: tuple[int, int] | None = None


def _wrapped(
    picture: Picture,
    options: UpscaleOptions,
    mask: Source | None,
    strength_map: Source | None,
) -> _Pass:
    """Return the pass of a texture whose opposite edges meet, so that they meet in the result too.

    An eighth of the picture is repeated beyond each edge and enlarged along, so what lies beyond
    an edge is seen. The result is sRGB and has no metadata of the source.
    """
    from tegula.images.decode import decode
    from tegula.images.pixels import margins, to_image, wrapped

    image = to_image(picture.rgb, picture.alpha)
    width, height = target_size(options, *image.size)
    across, down = margins(*image.size)
    right = max(1, round(across * width / image.width))
    below = max(1, round(down * height / image.height))
    size = width + 2 * right, height + 2 * below

    def wrapped_map(source: Source | None) -> Source | None:
        if source is None:
            return None
        opened = decode(source, max_pixels=options.max_pixels)
        flat = to_image(opened.rgb, opened.alpha)
        return wrapped(flat, *margins(*flat.size))

    return _Pass(
        wrapped(image, across, down),
        options.replaced(size=size, scale=None, resolution=None),
        wrapped_map(mask),
        wrapped_map(strength_map),
        (right, below),
    )


def _unwrapped(result: UpscaleResult, margins: tuple[int, int] | None, depth: int) -> UpscaleResult:
    """Fade the margins of a texture into the edges that they repeat, and cut them off.

    Args:
        result: of a pass.
        margins: of the pass; a result without them comes back itself.
        depth: bits of the source.
    """
    if margins is None:
        return result
    from tegula.images.pixels import unwrapped

    warnings = result.warnings
    if depth > 8:
        warnings += (f"A seamless result has 8 of the source's {depth} bits.",)
    return dataclasses.replace(result, image=unwrapped(result.image, *margins), warnings=warnings)
