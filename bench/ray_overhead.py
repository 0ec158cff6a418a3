"""What the ray engine costs over the local one, for one prediction at a time.

    python -m bench.ray_overhead [--pairs 5] [--side 512]

Starts a cluster on this machine and runs the same prediction with the packaged model in an actor
and in a local process by turns, both with as many threads. Prints one JSON object: the seconds of
each run and of processor time, and how the medians compare. Processor time is that of the engine's
process and this one; beside other work it says more than the time on the clock. What Ray's own
processes take is there as a share of a processor: they do so also while nothing runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil

from tegula.catalog import find
from tegula.catalog.lookup import packaged_fingerprint
from tegula.models import BundleSettings
from tegula.server.engine import Done, Job
from tegula.server.ray_engine import Place, RayEngine, connect
from tegula.server.runner import LocalEngine, Timeouts, WorkerEngine
from tegula.server.settings import ServerSettings
from tegula.server.upscaling import RunnerOptions, upscaling_spec

_MODEL = "tegula/upscale"
_PATIENT = Timeouts(load=1800.0, run=3600.0, cancel=60.0)


class Run(NamedTuple):
    """One prediction.

    seconds: by the clock.
    engine, here: processor time of the engine's process, and of this one.
    ray: of Ray's own processes, for each second by the clock.
    """

    seconds: float
    engine: float
    here: float
    ray: float


def picture(side: int) -> bytes:
    """Return a PNG with something on every scale."""
    noise = np.random.default_rng(7)
    layers = [noise.random((max(2, side // cut), max(2, side // cut), 3)) for cut in (4, 16, 64)]
    shown = sum(cv2.resize(layer, (side, side), interpolation=cv2.INTER_CUBIC) for layer in layers)
    _, encoded = cv2.imencode(".png", np.clip(np.asarray(shown) * 85, 0, 255).astype(np.uint8))
    return encoded.tobytes()


def processor_seconds(engine: int | None, other: int | None) -> tuple[float, float, float]:
    """Return the processor time so far of an engine, of this process, and of Ray's own.

    Args:
        engine: the process of the engine.
        other: that of the other engine, which is not counted.
    """
    here = psutil.Process()
    times = {"engine": 0.0, "here": 0.0, "ray": 0.0}
    names = {engine: "engine", here.pid: "here"}
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended
            spent = process.cpu_times()
            if process.pid != other:
                times[names.get(process.pid, "ray")] += spent.user + spent.system
    return times["engine"], times["here"], times["ray"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", type=int, default=512, help="of the source, in pixels")
    given = parser.parse_args()
    os.environ |= {"RAY_worker_niceness": "0"}  # both have the same right to processors
    threads = os.environ.setdefault("TEGULA_THREADS", "1")
    settings = ServerSettings(engine="ray")
    connect(settings)
    spec = upscaling_spec(RunnerOptions(BundleSettings(), packaged_fingerprint(), 10**9))
    place = Place("cpu", {"CPU": float(threads), "GPU": 0.0}, "", 1)
    on_ray = RayEngine(0, spec, place, _PATIENT, silence=1800.0)
    local = LocalEngine(spec, "cpu", _PATIENT)
    engines: tuple[tuple[str, WorkerEngine], ...] = (("local", local), ("ray", on_ray))
    found: dict[str, list[Run]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.png"
        source.write_bytes(picture(given.side))

        def job(number: int) -> Job:
            inputs: dict[str, Any] = {"image": source, "seed": 7, "preset": "creative"}
            return Job(f"job-{number}", 1, _MODEL, find(_MODEL).id, inputs, Path(folder))

        for number in range(given.pairs + 1):
            for name, engine in engines:
                other = (local if engine is on_ray else on_ray).pid
                before = processor_seconds(engine.pid, other)
                began = time.perf_counter()
                *_, last = engine.run(job(number), lambda: False)
                if not isinstance(last, Done):
                    raise SystemExit(f"A prediction ended with {last}.")
                seconds = time.perf_counter() - began
                after = processor_seconds(engine.pid, other)
                spent = [round(then - now, 2) for then, now in zip(after, before, strict=True)]
                result = Run(round(seconds, 2), spent[0], spent[1], round(spent[2] / seconds, 4))
                if number:  # the first one loads
                    found[name].append(result)
    local.close()
    on_ray.close()
    print(json.dumps(report(found), indent=1))


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def report(found: dict[str, list[Run]]) -> dict[str, Any]:
    """Return what is printed."""
    seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    spent = {
        name: statistics.median(run.engine + run.here for run in runs)
        for name, runs in found.items()
    }
    return {
        "runs": {name: [run._asdict() for run in runs] for name, runs in found.items()},
        "seconds": seconds,
        "processor_seconds": spent,
        "ray_over_local": seconds["ray"] / seconds["local"],
        "ray_over_local_processor": spent["ray"] / spent["local"],
        "processors_of_ray_itself": statistics.median(run.ray for run in found["ray"]),
    }


if __name__ == "__main__":
    main()
