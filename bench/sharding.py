"""What a picture that is spread over actors sends, and what it gains.

    python -m bench.sharding [--side 1536] [--turns 2]

First a count, on paper: the bytes that a window of Stable Diffusion 1.5 takes to a helper and back
at a step, as they are pickled, beside the FLOPs of its evaluation. Then a picture is run with the
packaged model by one actor with one thread, and by two, in turns, on a Ray cluster of this machine;
the ratio of the shortest times is what two gain. Both pictures have to be equal.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.networks import sd15_config
from tegula.catalog import find
from tegula.catalog.lookup import packaged_fingerprint
from tegula.models.bundle import ControlScale, WindowBatch
from tegula.models.sd15.networks import make_denoiser
from tegula.pipeline.evaluate import WindowConstants, WindowTask
from tegula.pipeline.steps import Guidance, Interval, Step
from tegula.server.engine import Done, Job
from tegula.server.ray_engine import Place, RayEngine, connect, introduce
from tegula.server.runner import Timeouts
from tegula.server.settings import ServerSettings
from tegula.server.upscaling import RunnerOptions, upscaling_spec

MIB = 1 << 20
_WINDOW, _TOKENS, _WIDTH = 64, 77, 768
_HINT = 320 + 1
"""Channels of an embedded control window: what the ControlNet makes of it, and its weight."""
_SPEED = 379e12
"""FLOPs a second that one H200 reached in bf16; docs/performance.md says how."""


@dataclass(frozen=True)
class Travel:
    """Bytes of one window: once, at each step out and back; and the FLOPs of a guided step."""

    once: int
    out: int
    back: int
    flops: int


def travel() -> Travel:
    """Count what a window of Stable Diffusion 1.5 takes; nothing is computed."""
    latents = torch.zeros(1, 4, _WINDOW, _WINDOW)
    text = torch.zeros(1, _TOKENS, _WIDTH)
    guidance = Guidance(5.0, Interval(), ControlScale(1.0), Interval())
    step = Step(0, torch.tensor(999.0), guided=True, control=guidance.control, key=True)
    control = torch.zeros(_HINT, _WINDOW, _WINDOW, dtype=torch.bfloat16)

    def size(constants: WindowConstants | None, rows: dict[int, Tensor]) -> int:
        return len(pickle.dumps(WindowTask("run", [step], latents, [0], [0], constants, rows)))

    out = size(None, {})
    once = size(WindowConstants(guidance, text, text), {0: control}) - out
    return Travel(once, out, len(pickle.dumps([latents])), _flops())


def _flops() -> int:
    with torch.device("meta"):
        denoiser = make_denoiser(
            UNet2DConditionModel.from_config(sd15_config("unet")),
            ControlNetModel.from_config(sd15_config("controlnet")),
        )
        batch = WindowBatch(
            torch.zeros(2, 4, _WINDOW, _WINDOW),
            torch.tensor(999.0),
            torch.zeros(2, _TOKENS, _WIDTH),
            torch.zeros(2, _HINT, _WINDOW, _WINDOW),
            ControlScale(1.0),
            slice(0, 2),
        )
        with FlopCounterMode(display=False) as counter:
            denoiser(batch)
    return int(counter.get_total_flops())


def run(engines: Sequence[RayEngine], picture: Path, folder: Path) -> tuple[float, bytes]:
    """Run a picture on the first engine; return the seconds it took and its result."""
    values = {"image": picture, "scale": 1, "preset": "creative", "seed": 1}
    began = time.perf_counter()
    job = Job("name", 1, "tegula/upscale", find().id, values, folder)
    last = list(engines[0].run(job, lambda: False))[-1]
    if last != Done():
        raise SystemExit(f"The picture failed: {last}")
    return time.perf_counter() - began, (folder / "out-0.png").read_bytes()


def gain(side: int, turns: int) -> float:
    """Return how many times as fast two actors are as one, with one thread each."""
    os.environ.update(OMP_NUM_THREADS="1", TEGULA_THREADS="1", RAY_worker_niceness="0")
    place, _ = connect(ServerSettings(engine="ray", ray_shard_above=0.1))
    place = Place("cpu", {"CPU": 0.01, "GPU": 0.0}, place.node, 2)
    models = ServerSettings(precision="fp32").models
    options = RunnerOptions(models, packaged_fingerprint(), 1 << 26, shard_above=0.1)
    spec = upscaling_spec(options)
    engines = [RayEngine(number, spec, place, Timeouts(), 120.0) for number in range(2)]
    times: dict[int, list[float]] = {1: [], 2: []}
    results: set[bytes] = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = folder / "picture.png"
        Image.effect_noise((side, side), 80).convert("RGB").save(picture)
        while not all(engine.ready for engine in engines):
            for engine in engines:
                engine.load()
            time.sleep(0.5)
        for _ in range(turns):
            for actors, taken in times.items():
                for engine in engines:
                    engine.others = ()
                if actors == 2:
                    introduce(engines)
                seconds, result = run(engines, picture, folder)
                taken.append(seconds)
                results.add(result)
                print(f"{actors} actors: {seconds:.1f} s", flush=True)
        for engine in engines:
            engine.close()
    print("equal" if len(results) == 1 else "NOT EQUAL")
    return min(times[1]) / min(times[2])


def main() -> None:
    """Print the count, and what two actors gain."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=1536, help="of the picture, in pixels")
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    window = travel()
    seconds = window.flops / _SPEED
    print(
        f"a window once {window.once / MIB:.2f} MiB, at each step {window.out / 1024:.0f} KiB out "
        f"and {window.back / 1024:.0f} KiB back; {window.flops / 1e12:.2f} TFLOP, which a "
        f"card with {_SPEED / 1e12:.0f} TFLOP/s does in {1000 * seconds:.1f} ms: "
        f"{(window.out + window.back) / seconds / 1e6:.0f} MB/s for each helper"
    )
    print(f"two actors are {gain(given.side, given.turns):.2f} times as fast as one")


if __name__ == "__main__":
    main()
