"""All methods on one job, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.speed.clock import interleaved, peak_growth
from bench.speed.job import Job, Picture
from bench.speed.likeness import Reference
from bench.speed.loop import at_once, by_tiles, tile_grid
from bench.speed.methods import LOOP, OURS, REFINERS, WHOLE, Method
from bench.speed.models import Models
from bench.speed.peers import MissingPeerError, refiners_upscale
from bench.speed.stages import NETS, Stopwatch
from tegula.errors import TegulaError
from tegula.images.pixels import to_image
from tegula.models.bundle import Bundle
from tegula.options import ResolvedOptions
from tegula.pipeline.pictures import on_device, on_host
from tegula.pipeline.refine import RefineJob, refine_canvas
from tegula.plan import Plan

Row = dict[str, Any]
Keep = Callable[[dict[str, Any]], None]
_STAGES = ("encode", "denoise", "decode")


def reason_of(error: Exception) -> str:
    """Return why a method cannot be run, in one line without a full stop."""
    is_sentence = isinstance(error, TegulaError | MissingPeerError)
    words = str(error) if is_sentence else f"{type(error).__name__}: {error}"
    return words.strip().split("\n", 1)[0].rstrip(".")


def _refined(bundle: Bundle, picture: Picture, options: ResolvedOptions) -> Picture:
    """Refine a picture, from the host and back to it."""
    pixels = on_device(picture, bundle.device)
    return on_host(refine_canvas(RefineJob(bundle, pixels, pixels, options)))


class Comparison:
    """Runs methods on a job and keeps a row of figures for each."""

    def __init__(self, job: Job, models: Models, methods: list[Method], keep: Keep) -> None:
        self._job = job
        self._models = models
        self._methods = methods
        self._keep = keep
        self.rows: dict[str, Row] = {}
        self.skipped: dict[str, str] = {}

    def run(self, repeats: int, until: float) -> None:
        """Judge and measure every method once, time all in turns, then time stages.

        Args:
            repeats: rounds of timing, of which all but the first begin before ``until``.
            until: by ``time.perf_counter``.
        """
        reference = self._reference()
        runs: dict[str, Callable[[], object]] = {}
        for method in self._methods:
            print(f"  {method.name}", flush=True)
            try:
                runs[method.name] = self._first(method, reference)
            except Exception as error:  # the others shall run all the same
                self.skipped[method.name] = reason_of(error)
                print(f"    skipped: {self.skipped[method.name]}", flush=True)
            self._save()
        interleaved(runs, self._models.device, repeats, until, self._timed)
        for method in self._methods:
            if method.kind == OURS and method.name in runs:
                self.rows[method.name] |= self._watched(method, runs[method.name])
                self._save()

    def _save(self) -> None:
        self._keep({"rows": list(self.rows.values()), "skipped": self.skipped})

    def _timed(self, seconds: dict[str, list[float]]) -> None:
        for name, taken in seconds.items():
            self.rows[name] |= {
                "seconds": [round(each, 4) for each in taken],
                "least": min(taken),
                "median": statistics.median(taken),
            }
        self._save()

    def _reference(self) -> Reference | None:
        """Return the result without tiles, unless it does not fit."""
        upscaler = self._models.plain
        print("  untiled, to compare with", flush=True)
        whole = self._job.resolved(upscaler.bundle.facts, window=self._job.side)
        try:
            untiled = _refined(upscaler.bundle, self._job.picture, whole)
        except TegulaError:
            return None
        return Reference(untiled, upscaler.bundle.facts.window)

    def _first(self, method: Method, reference: Reference | None) -> Callable[[], object]:
        """Run a method for the first time; keep its memory, likeness and work."""
        run = self._runner(method)
        results: list[Any] = []
        if method.load:
            run()
        peak = peak_growth(lambda: results.append(run()), self._models.device)
        row: Row = {
            "name": method.name,
            "kind": method.kind,
            "precision": method.precision,
            "overlap": method.overlap,
            "same_work": method.same_work,
            "peak_mb": peak,
            **self._work(method),
        }
        if reference is not None and method.kind != REFINERS:
            row |= reference.judge(results[0], method.overlap)
        self.rows[method.name] = row
        return run

    def _runner(self, method: Method) -> Callable[[], Any]:
        job, models = self._job, self._models
        if method.kind == REFINERS:
            return refiners_upscale(job, models.device, models.dtype(method.precision))
        if method.kind == OURS:
            return self._refiner(method)
        pipeline = models.pipeline(method.precision)
        if method.kind == WHOLE:
            return lambda: at_once(pipeline, job, job.picture)
        tile = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
        return lambda: by_tiles(pipeline, job, tile, method.overlap)

    def _refiner(self, method: Method) -> Callable[[], Picture]:
        bundle = self._models.upscaler(method).bundle
        options = self._job.resolved(bundle.facts, **method.options)
        picture = self._job.picture
        return lambda: _refined(bundle, picture, options)

    def _work(self, method: Method) -> Row:
        """Count by the plan of tegula, which counts useful work alone."""
        whole = method.kind == WHOLE
        changes = {"window": self._job.side} if whole else {"overlap": method.overlap}
        plan = self._plan(**(changes | dict(method.options)))
        coded = 1.0
        if method.kind == LOOP:
            tile = self._facts_window()
            coded = len(tile_grid(self._job.side, tile, method.overlap)) * (tile / plan.width) ** 2
        return {
            "windows": plan.windows,
            "evaluations": plan.evaluations,
            "tflop": (plan.denoise_flops + coded * plan.autoencoder_flops) / 1e12,
        }

    def _facts_window(self) -> int:
        return self._models.plain.bundle.facts.window

    def _plan(self, **changes: Any) -> Plan:
        upscaler = self._models.plain
        return upscaler.prepare(to_image(self._job.picture), self._job.options(**changes))[2]

    def _watched(self, method: Method, run: Callable[[], object]) -> Row:
        bundle = self._models.upscaler(method).bundle
        watch = Stopwatch(self._models.device)
        with watch.watching(bundle), watch.timing("total"):
            run()
        total = watch.seconds["total"]
        return {
            "stages": {stage: watch.seconds[stage] for stage in _STAGES},
            "outside_nets": max(0.0, 1 - watch.seconds[NETS] / total),
        }
