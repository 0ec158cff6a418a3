"""Speed and memory of the engine: `python -m bench.engine` (or `make bench`).

Everything is a ratio within this one run, because machines differ and are noisy:

* how much of refine is spent outside the nets, against plain forward passes;
* how much faster canvas mode is than the usual loop that runs diffusers' pipeline on one
  tile after the other, over overlaps, with the seam score and the distance to the untiled
  result beside;
* how peak memory grows with the canvas.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetImg2ImgPipeline
from numpy.typing import NDArray
from skimage import data

from bench.networks import WINDOW, SmallSd, small_sd
from bench.seams import seam_score
from tegula.images.resize import enlarge_lanczos
from tegula.models.bundle import ControlImage, ControlScale, WindowBatch
from tegula.models.sd15.facts import PRESETS, SCHEDULER
from tegula.options import ResolvedOptions, UpscaleOptions, resolve
from tegula.stages.refine_canvas import refine_canvas
from tegula.tiling.windows import WindowGrid, grid_windows

Picture = NDArray[np.float32]
SEAMLESS = 0.02
CANVAS_OVERLAPS = (0.0, 0.125, 0.25)
LOOP_OVERLAPS = (0.125, 0.25, 0.5)
PROMPT, NEGATIVE = "a photo of a cat", "blurry"
STEPS, STRENGTH, GUIDANCE, SEED = 8, 0.5, 4.0, 0


def main() -> None:
    """Run the bench, print its table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--side", type=int, default=1024, help="side of the result in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/engine.json"))
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of)))
        return
    torch.set_grad_enabled(False)
    sd = small_sd()
    picture = enlarge_lanczos(
        data.chelsea()[:256, :256].astype(np.float32) / 255, (arguments.side,) * 2
    )
    figures = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "overhead": overhead(sd, picture, arguments.repeats),
        "against_loop": against_loop(sd, picture, arguments.repeats),
        "memory": memory(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    report(figures)


def options_for(picture: Picture, **changes: Any) -> ResolvedOptions:
    """Return the settings that every part of the bench runs with."""
    height, width = picture.shape[:2]
    asked = UpscaleOptions(
        size=(width, height),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        creativity=STRENGTH,
        resemblance=1.0,
        guidance_scale=GUIDANCE,
        steps=STEPS,
        scheduler="ddim",
        seed=SEED,
        prescaler="lanczos",
        **changes,
    )
    return resolve(asked, PRESETS, WINDOW, (width, height))


def overhead(sd: SmallSd, picture: Picture, repeats: int) -> dict[str, float]:
    """Compare refine with as many plain forwards of the same nets on the same shapes."""
    options = options_for(picture, window_batch=4)
    grid = canvas_grid(picture, options.overlap)
    levels = int(STEPS * STRENGTH)
    side = WINDOW // 8
    rows = 4 * 2
    batch = WindowBatch(
        torch.randn(rows, 4, side, side),
        torch.tensor(500),
        sd.bundle.text.encode([NEGATIVE, PROMPT]).repeat(rows // 2, 1, 1),
        sd.bundle.denoiser.embed_control(_control(torch.rand(rows, 3, WINDOW, WINDOW))),
        ControlScale(1.0),
        slice(0, rows),
    )
    image = torch.rand(1, 3, *picture.shape[:2])

    def nets() -> None:
        latents = sd.bundle.autoencoder.encode(image, _control(image), torch.Generator())
        for _ in range(levels * len(grid) // 4):
            sd.bundle.denoiser(batch)
        for start in range(levels * len(grid) % 4):
            sd.bundle.denoiser(_rows(batch, 2 * (start + 1) - 2, 2 * (start + 1)))
        sd.bundle.autoencoder.decode(latents, _control(image))

    def refine() -> None:
        refine_canvas(sd.bundle, picture, picture, options)

    plain, ours = interleaved([nets, refine], repeats)
    return {
        "windows": len(grid),
        "evaluations": levels * len(grid) * 2,
        "seconds_nets": plain,
        "seconds_refine": ours,
        "share_outside_nets": max(0.0, 1 - plain / ours),
    }


def _control(image: torch.Tensor) -> ControlImage:
    return ControlImage(image, image)


def _rows(batch: WindowBatch, start: int, end: int) -> WindowBatch:
    return dataclasses.replace(
        batch,
        latents=batch.latents[start:end],
        text=batch.text[start:end],
        control=batch.control[start:end],
        controlled=slice(0, end - start),
    )


def canvas_grid(picture: Picture, overlap: float) -> WindowGrid:
    """Return the windows of canvas mode in latent pixels."""
    height, width = picture.shape[:2]
    return grid_windows(width // 8, height // 8, WINDOW // 8, WINDOW // 8, overlap)


def against_loop(sd: SmallSd, picture: Picture, repeats: int) -> dict[str, Any]:
    """Time canvas mode and the per-tile loop over overlaps, against the untiled result."""
    untiled = refine_canvas(
        sd.bundle, picture, picture, options_for(picture, window=picture.shape[0])
    )

    def canvas(overlap: float) -> Picture:
        return refine_canvas(sd.bundle, picture, picture, options_for(picture, overlap=overlap))

    def loop(overlap: float) -> Picture:
        return per_tile_loop(sd, picture, overlap)

    ways = [Way("canvas", overlap, partial(canvas, overlap)) for overlap in CANVAS_OVERLAPS]
    ways += [Way("loop", overlap, partial(loop, overlap)) for overlap in LOOP_OVERLAPS]
    rows = [way.measured(untiled) for way in ways]
    for row, seconds in zip(rows, interleaved([way.run for way in ways], repeats), strict=True):
        row["seconds"] = seconds
    ours, theirs = ([r for r in rows if r["way"] == way] for way in ("canvas", "loop"))
    return {
        "rows": rows,
        "times_faster": seamless(theirs)["seconds"] / seamless(ours)["seconds"],
        "times_faster_than_half_overlap": theirs[-1]["seconds"] / seamless(ours)["seconds"],
    }


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of tiling at one overlap."""

    name: str
    overlap: float
    run: Callable[[], Picture]

    def measured(self, untiled: Picture) -> dict[str, Any]:
        """Return what its result is like beside the untiled one."""
        result = self.run()
        grid = canvas_grid(untiled, self.overlap)
        borders = [
            [edge * 8 for start in starts for edge in (start, start + WINDOW // 8)]
            for starts in (grid.columns, grid.rows)
        ]
        inside = [[b for b in axis if 0 < b < untiled.shape[0]] for axis in borders]
        return {
            "way": self.name,
            "overlap": self.overlap,
            "windows": len(grid),
            "seam": seam_score(result, *inside) / seam_score(untiled, *inside),
            "distance_to_untiled": float(np.abs(result - untiled).mean()),
        }


def seamless(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of least overlap that shows no seam, or else the last."""
    return next((row for row in rows if abs(row["seam"] - 1) <= SEAMLESS), rows[-1])


def per_tile_loop(sd: SmallSd, picture: Picture, overlap: float) -> Picture:
    """Do what most tile upscalers do: the whole pipeline per tile, then blend pixels."""
    networks = sd.networks
    pipeline = StableDiffusionControlNetImg2ImgPipeline(
        vae=networks.autoencoder,
        text_encoder=networks.text_model,
        tokenizer=networks.tokenizer,
        unet=networks.unet,
        controlnet=networks.controlnet,
        scheduler=DDIMScheduler.from_config(dict(SCHEDULER)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    grid = canvas_grid(picture, overlap)
    pixels = grid_windows(picture.shape[1], picture.shape[0], WINDOW, WINDOW, overlap)
    result = np.zeros_like(picture)
    for index, window in enumerate(grid.windows):
        tile = torch.tensor(picture[window.scaled(8).index[1:]].transpose(2, 0, 1)[None])
        painted = pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=tile,
            control_image=tile,
            strength=STRENGTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
        ).images[0]
        place = window.scaled(8).index[1:]
        result[place] += painted * pixels.weights(index)[..., None]
    return result


def interleaved(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the least seconds of each run, run in turns so that noise meets all alike."""
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for at, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[at] = min(best[at], time.perf_counter() - start)
    return best


def memory() -> dict[str, Any]:
    """Measure the peak of whole processes that enlarge 512x512 to 2048 and 4096."""
    rows = {}
    for scale in (4, 8):
        command = [sys.executable, "-m", "bench.engine", "--memory-of", str(scale)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[f"512 to {512 * scale}"] = json.loads(done.stdout.splitlines()[-1])
    small, large = (row["peak_mb"] - row["loaded_mb"] for row in rows.values())
    return rows | {"growth": large / small}


def peak_memory(scale: int) -> dict[str, float]:
    """Enlarge 512x512 in this process and return its peak, in MB."""
    from tegula import Upscaler

    upscaler = Upscaler.load()
    picture = data.astronaut()
    before = _resident_mb()
    options = UpscaleOptions(scale=scale, prescaler="realesrgan-animevideov3", seed=SEED)
    from PIL import Image

    result = upscaler.upscale(Image.fromarray(picture), options)
    return {"loaded_mb": before, "peak_mb": _peak_mb(), "windows": result.plan.windows}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    part = figures["overhead"]
    print(f"\nrefine: {part['windows']} windows, {part['evaluations']} evaluations")
    print(f"  outside the nets: {part['share_outside_nets']:.1%} of the time (bound: 10%)")
    part = figures["against_loop"]
    print("\n| way | overlap | windows | seam | distance to untiled | seconds |")
    print("|---|---|---|---|---|---|")
    for row in part["rows"]:
        print(
            f"| {row['way']} | {row['overlap']:.1%} | {row['windows']} | {row['seam']:.3f} "
            f"| {row['distance_to_untiled']:.4f} | {row['seconds']:.2f} |"
        )
    print(
        f"canvas is {part['times_faster']:.2f} times as fast, each at the least overlap without "
        f"a seam, and {part['times_faster_than_half_overlap']:.2f} times as fast as the loop at "
        "half overlap"
    )
    print("\n| upscale | windows | loaded MB | peak MB |")
    print("|---|---|---|---|")
    for name, row in figures["memory"].items():
        if isinstance(row, dict):
            print(f"| {name} | {row['windows']} | {row['loaded_mb']:.0f} | {row['peak_mb']:.0f} |")


if __name__ == "__main__":
    main()
