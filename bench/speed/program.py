"""The command of the bench: what it runs, in which order, and where figures are kept."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.speed.compare import Comparison
from bench.speed.job import JOBS, Job, job_for
from bench.speed.machine import describe
from bench.speed.methods import ladder, methods_for, usual_method
from bench.speed.models import Models
from bench.speed.page import RESULTS, section
from bench.speed.probe import best_rates, matrix_rates, name_of
from bench.speed.whole import MEGAPIXELS, by_stage, command_to_file, growth
from tegula.models.device import pick_device

PARTS = ("comparison", "whole", "growth", "command")
_COMMAND_SOURCE = 512


class Figures:
    """The figures of a run, on disk as soon as they are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, value: Any) -> None:
        """Keep one part and write all."""
        self.all[name] = value
        self.path.write_text(json.dumps(self.all, indent=1) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    """Run the bench and print its tables."""
    words = sys.argv[1:] if words is None else words
    arguments = _parser().parse_args(words)
    start = time.perf_counter()
    device = pick_device(arguments.device).type
    size = arguments.size or ("full" if device == "cuda" else "small")
    job = job_for(size, device, quick=arguments.quick)
    job = dataclasses.replace(job, side=arguments.side or job.side)
    figures = Figures(arguments.out or _usual_path(job, quick=arguments.quick))
    figures.keep("command", shlex.join(["python", "-m", "bench.speed", *words]))
    with torch.no_grad():
        _run(arguments, job, figures)
    figures.keep("seconds_of_bench", round(time.perf_counter() - start, 1))
    print(section({figures.path.stem: figures.all}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=tuple(JOBS), help="full on a GPU, else small")
    parser.add_argument("--quick", action="store_true", help="a smaller picture, timed once")
    parser.add_argument("--repeats", type=int, help="3 on a GPU, else 2")
    parser.add_argument(
        "--minutes", type=float, default=4, help="no further round of timing begins after these"
    )
    parser.add_argument("--compile", action="store_true", help="compile on a processor too")
    parser.add_argument("--side", type=int, help="of the compared result: pixels, times of 64")
    parser.add_argument("--largest", type=int, help="megapixels up to which growth is shown")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", default=[""], help="methods with this in the name")
    parser.add_argument("--out", type=Path, help="JSON; else bench/results, or out when quick")
    return parser


def _usual_path(job: Job, *, quick: bool) -> Path:
    name = f"speed-{job.device}-{job.size}"
    return Path("out") / f"{name}-quick.json" if quick else RESULTS / f"{name}.json"


def _run(arguments: argparse.Namespace, job: Job, figures: Figures) -> None:
    models = Models(job)
    figures.keep("machine", describe(models.device))
    figures.keep("job", {"size": job.size, "source": job.source, "side": job.side})
    usual = 3 if job.device == "cuda" else 2
    repeats = arguments.repeats or (1 if arguments.quick else usual)
    rates = matrix_rates(models.device, models.fastest)
    figures.keep("rates", rates)
    if "comparison" in arguments.parts:
        _compare(arguments, job, models, repeats, figures)
    figures.keep("rates", best_rates(rates, matrix_rates(models.device, models.fastest)))
    if job.size == "small":
        job = job_for("mini", job.device, quick=arguments.quick)
        models = Models(job)
    largest = arguments.largest or (64 if job.device == "cuda" else 16)
    _run_whole(arguments, job, models, min(largest, 4) if arguments.quick else largest, figures)
    if "command" in arguments.parts:
        print("from command to file", flush=True)
        figures.keep("command_to_file", command_to_file(_COMMAND_SOURCE, job.device, repeats))


def _compare(
    arguments: argparse.Namespace, job: Job, models: Models, repeats: int, figures: Figures
) -> None:
    print(f"comparison, {job.source} to {job.side} px", flush=True)
    methods = [
        method
        for method in methods_for(job, name_of(models.fastest))
        if any(part in method.name for part in arguments.only)
        # Compiling takes a processor longer than all else.
        and (arguments.compile or job.device != "cpu" or not method.load.get("compile"))
    ]
    until = time.perf_counter() + 60 * arguments.minutes
    Comparison(job, models, methods, partial(figures.keep, "comparison")).run(repeats, until)


def _run_whole(
    arguments: argparse.Namespace, job: Job, models: Models, largest: int, figures: Figures
) -> None:
    fast = name_of(models.fastest)
    usual, least = usual_method(job, fast), ladder(job, fast)[-1]
    if "whole" in arguments.parts:
        print(f"whole upscales, {job.source} to {job.side} px", flush=True)
        chosen = [usual] if least.same_work else [usual, least]
        figures.keep("whole", [by_stage(job, models, method) for method in chosen])
    if "growth" in arguments.parts:
        print("growth", flush=True)
        rows: list[Mapping[str, Any]] = []
        sizes = [each for each in MEGAPIXELS if each <= largest]
        for row in growth(job, models, usual, sizes):
            figures.keep("growth", [*rows, row])
            rows.append(row)
