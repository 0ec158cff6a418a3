"""What a graphics card takes: by stage, by batch, compiled, in redraw mode, and by size.

    make bench-card                                    on a card; every row is kept as it comes
    python -m bench.card --device cpu --size tiny      a rehearsal on a processor

Networks are Stable Diffusion 1.5 in full size with random weights, and mini. diffusers' tile loop
does the same job beside them. Rows are JSON, one a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.networks import random_bundle
from bench.speed.clock import peak_growth, seconds_of
from bench.speed.job import JOBS, Job, job_for
from bench.speed.loop import by_tiles
from bench.speed.machine import describe
from bench.speed.methods import OURS, Method
from bench.speed.models import Models
from bench.speed.probe import matrix_rates, name_of
from bench.speed.whole import by_stage, growth
from tegula.models.bundle import Bundle, ControlImage
from tegula.models.compiled import compile_bundle, compile_prescaler
from tegula.models.device import lay_out, pick_device
from tegula.models.prescalers.load import load_prescaler
from tegula.pipeline.prescale import run_network
from tegula.pipeline.redraw import refine_redraw
from tegula.pipeline.refine import RefineJob, refine_canvas

Row = dict[str, Any]
_BATCHES = (1, 4, 9, 18, 36, None)
_MEGAPIXELS = (4, 16, 64)
_TINY_MEGAPIXELS = (0.01, 0.02)
_TIMES = 3
_TRACED = 3
"""Runs of a compiled part, after the one that compiles it."""
NO_CARD = (
    "There is no CUDA device here, and the figures are those of a card; rehearse on a processor "
    "with --device cpu --size tiny."
)


@dataclass(frozen=True)
class Card:
    """What is measured, and on what.

    job: the work, with networks of its size.
    """

    job: Job

    @cached_property
    def models(self) -> Models:
        """The networks of the job."""
        return Models(self.job)

    @cached_property
    def method(self) -> Method:
        """The fastest precision, not compiled."""
        precision = name_of(self.models.fastest)
        return Method(f"tegula, {precision}", OURS, precision, self.job.overlap)

    @property
    def bundle(self) -> Bundle:
        """The networks as they are loaded on the card."""
        return self.models.upscaler(self.method).bundle

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return self.models.device

    @cached_property
    def picture(self) -> Tensor:
        """What refine begins with."""
        return torch.tensor(self.job.picture, device=self.device)

    def refine(self, bundle: Bundle, **changes: Any) -> Callable[[], Tensor]:
        """Return what refines the picture of the job with a bundle."""
        options = self.job.resolved(bundle.facts, **changes)
        refine = refine_redraw if options.mode == "redraw" else refine_canvas
        return lambda: refine(RefineJob(bundle, self.picture, self.picture, options))

    def least(self, run: Callable[[], object], times: int = _TIMES) -> float:
        """Return the shortest of some runs, after one that is not timed."""
        run()
        return min(seconds_of(run, self.device) for _ in range(times))


def stages(card: Card) -> Iterator[Row]:
    """Yield a whole upscale by its stages, and the host's time outside of kernels."""
    yield by_stage(card.job, card.models, card.method)
    run = card.refine(card.bundle)
    seconds = seconds_of(run, card.device)
    yield {"name": "refine", "seconds": seconds, "outside_kernels": _outside_kernels(run, card)}


def _outside_kernels(run: Callable[[], object], card: Card) -> float | None:
    """Return the share of a run in which the card computed nothing; None on a processor."""
    if card.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        seconds = seconds_of(run, card.device)
    busy = float(sum(event.self_device_time_total for event in trace.key_averages())) / 1e6
    return max(0.0, 1 - busy / seconds)


def batches(card: Card) -> Iterator[Row]:
    """Yield refine with so many windows in one forward pass; null is what is chosen by itself."""
    for windows in _BATCHES if card.job.size == "full" else (1, None):
        run = card.refine(card.bundle, window_batch=windows)
        yield {
            "windows": windows,
            "seconds": card.least(run, 1),
            "peak_mb": peak_growth(run, card.device),
        }


def compiled(card: Card) -> Iterator[Row]:
    """Yield how long compiling takes, whole and by blocks, and what it wins."""
    expected = card.refine(card.bundle)()
    for blocks in (False, True):
        plain = random_bundle(card.job.size, card.device, card.models.fastest)
        bundle = compile_bundle(plain, blocks=blocks)
        run, few = card.refine(bundle), card.refine(bundle, **card.job.few)
        first = seconds_of(run, card.device)
        off = (run() - expected).abs()
        yield {
            "what": "blocks" if blocks else "whole",
            "first_seconds": first,
            "seconds": card.least(run, _TRACED),
            "mean_difference": float(off.mean()),
            "few_steps_seconds": card.least(few, _TRACED),
        }
    prescaler = load_prescaler(card.job.prescaler, card.device, card.models.fastest)
    if prescaler.network is not None:
        tile = card.picture[:512, :512]
        for what, each in (("plain", prescaler), ("compiled", compile_prescaler(prescaler))):
            run_tile = partial(run_network, tile, each)
            first = seconds_of(run_tile, card.device)
            yield {
                "what": f"{card.job.prescaler}, {what}",
                "first_seconds": first,
                "seconds": card.least(run_tile),
            }


def autoencoder(card: Card) -> Iterator[Row]:
    """Yield the two ways of a canvas through the autoencoder, in both layouts and compiled."""
    side = min(1024, card.job.side)
    image = card.picture[:side, :side].permute(2, 0, 1)[None].contiguous()
    control = ControlImage(image, image)
    bundle = random_bundle(card.job.size, card.device, card.models.fastest)
    plain: Any = bundle.autoencoder
    for name, coder, channels_last in (
        ("channels last", plain, True),
        ("contiguous", plain, False),
        ("compiled, contiguous", compile_bundle(bundle).autoencoder, False),
    ):
        for half in (plain.encoder, plain.decoder):
            lay_out(half, channels_last=channels_last)
        encode = partial(coder.encode, image, control, torch.Generator().manual_seed(0))
        decode = partial(coder.decode, encode(), control)
        first = seconds_of(decode, card.device)
        yield {
            "layout": name,
            "encode": card.least(encode),
            "decode": card.least(decode),
            "first_decode": first,
        }


def beside(card: Card) -> Iterator[Row]:
    """Yield diffusers' tile loop, and ours in both modes and in few steps."""
    pipeline = card.models.pipeline(name_of(card.models.fastest))
    tile = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    loop = seconds_of(lambda: by_tiles(pipeline, card.job, tile, card.job.overlap), card.device)
    yield {"what": "diffusers by tiles", "seconds": loop}
    for what, changes in (("canvas", {}), ("redraw", {"mode": "redraw"}), ("few", card.job.few)):
        yield {"what": what, "seconds": card.least(card.refine(card.bundle, **changes), 1)}


def sizes(card: Card) -> Iterator[Row]:
    """Yield whole upscales of few steps, by the megapixels of the result."""
    few = dataclasses.replace(card.method, options=card.job.few)
    megapixels = _MEGAPIXELS if card.job.size == "full" else _TINY_MEGAPIXELS
    yield from growth(card.job, card.models, few, megapixels)


def eight_gigabytes(card: Card) -> Iterator[Row]:
    """Yield what refining 4096 x 4096 in few steps takes of a card that has 8 GB."""
    if card.device.type != "cuda":
        yield {"left_out": "a processor has no memory of its own to be limited"}
        return
    limit, (_, total) = 8 * 2**30, torch.cuda.mem_get_info(card.device)

    def of_eight(*_: object) -> tuple[int, int]:
        return max(0, limit - torch.cuda.memory_reserved(card.device)), limit

    large = Card(dataclasses.replace(card.job, side=4096))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total, card.device)
    try:
        with mock.patch.object(torch.cuda, "mem_get_info", of_eight):
            run = large.refine(large.bundle, **card.job.few)
            torch.cuda.reset_peak_memory_stats(card.device)
            yield {
                "seconds": seconds_of(run, card.device),
                "peak_mb": torch.cuda.max_memory_allocated(card.device) / 2**20,
                "reserved_mb": torch.cuda.max_memory_reserved(card.device) / 2**20,
            }
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card.device)


def mini(card: Card) -> Iterator[Row]:
    """Yield mini's whole upscale."""
    job = dataclasses.replace(JOBS["mini"], device=card.job.device)
    of_mini = Card(job)
    yield by_stage(job, of_mini.models, of_mini.method)


Part = Callable[[Card], Iterator[Row]]
_IN_ORDER = (stages, batches, beside, autoencoder, sizes, mini, compiled, eight_gigabytes)
PARTS: Mapping[str, Part] = {part.__name__: part for part in _IN_ORDER}
"""In the order in which they run: what compiles, and what limits the card's memory, comes last."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print every row as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench.card", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "small", "tiny"), default="full")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--minutes", type=float, default=15, help="no part begins after these")
    parser.add_argument("--out", type=Path, default=Path("out/card.jsonl"))
    arguments = parser.parse_args(words)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(NO_CARD)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    card, start = Card(job_for(arguments.size, arguments.device, quick=False)), time.perf_counter()

    def keep(part: str, row: Mapping[str, Any]) -> None:
        line = json.dumps({"part": part, **row})
        print(line, flush=True)
        with arguments.out.open("a") as file:
            file.write(line + "\n")

    keep("machine", describe(pick_device(arguments.device)))
    with torch.inference_mode():
        keep("rates", matrix_rates(card.device, card.models.fastest))
        for name in PARTS:
            if name in arguments.parts:
                _run(name, card, keep, until=start + 60 * arguments.minutes)


def _run(
    name: str, card: Card, keep: Callable[[str, Mapping[str, Any]], None], *, until: float
) -> None:
    """Run one part; what fails is a row, so that the others run all the same."""
    if time.perf_counter() > until:
        keep(name, {"left_out": "the minutes are over"})
        return
    try:
        for row in PARTS[name](card):
            keep(name, row)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        keep(name, {"failed": f"{type(error).__name__}: {error}"[:300]})


if __name__ == "__main__":
    main()
