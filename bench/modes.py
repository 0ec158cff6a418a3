"""Canvas and redraw mode beside each other: `python -m bench.modes [PHOTOGRAPH...]`.

The same pictures, steps and strength in both; redraw without and with each seam fix. Seams
are gradient energy on the borders of redraw's tiles over that on lines of the same latent
phase near by, divided by what the same lines of the canvas picture have: 1 is seamless. What
lies on a border by chance moves this number too: "chance" is the standard deviation of the
same number on lines where there is no border.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.seams import border_gradient
from tegula.options import UpscaleOptions
from tegula.result import UpscaleResult
from tegula.upscaler import Upscaler

WINDOW = 256
PRESCALER = "realesrgan-animevideov3"
CASES: Mapping[str, Mapping[str, Any]] = {
    "canvas": {},
    "redraw": {"mode": "redraw"},
    "redraw, chess": {"mode": "redraw", "tile_order": "chess"},
    "redraw, no padding, no blur": {"mode": "redraw", "tile_padding": 0, "tile_blur": 0},
    "redraw + band": {"mode": "redraw", "seam_fix": "band"},
    "redraw + half-tile": {"mode": "redraw", "seam_fix": "half-tile"},
    "redraw + half-tile+intersections": {
        "mode": "redraw",
        "seam_fix": "half-tile+intersections",
    },
}
Picture = NDArray[np.float32]


def main() -> None:
    """Print the table."""
    arguments = _arguments()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    upscaler = Upscaler.load(arguments.model, device=arguments.device)
    base = UpscaleOptions(
        scale=2,
        seed=arguments.seed,
        creativity=0.5,
        steps=arguments.steps,
        scheduler=arguments.scheduler,
        prescaler=PRESCALER,
        window=WINDOW,
        tile_width=arguments.tile,
        tile_height=arguments.tile,
        seam_fix_denoise=0.5,
    )
    sources = [Image.open(path).convert("RGB") for path in arguments.photographs]
    upscaler.upscale(sources[0].resize((64, 64)), base)
    print(f"Photographs: {', '.join(path.name for path in arguments.photographs)}\n")
    print("| mode | windows | evaluations | TFLOP | seconds | seams | chance |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    canvas: list[Picture] = []
    for name, changes in CASES.items():
        start = time.perf_counter()
        results = [upscaler.upscale(each, base.replaced(**changes)) for each in sources]
        spent = sum(each.timings["refine"] for each in results) or time.perf_counter() - start
        pictures = [_pixels(each) for each in results]
        canvas = canvas or pictures
        print(_row(name, results, spent, _seams(pictures, canvas, arguments.tile)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", nargs="*", type=Path, default=[Path("examples/cat.jpg")])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tile", type=int, default=128, help="side; smaller has more borders")
    return parser.parse_args()


def _row(
    name: str, results: Sequence[UpscaleResult], spent: float, seams: Sequence[tuple[float, float]]
) -> str:
    plans = [each.plan for each in results]
    flops = sum(plan.refine_flops for plan in plans) / 1e12
    numbers = (
        f"{sum(plan.windows for plan in plans)} | {sum(plan.evaluations for plan in plans)} "
        f"| {flops:.2f} | {spent:.1f}"
    )
    measured = ", ".join(f"{seam:.3f}" for seam, _ in seams)
    chance = ", ".join(f"{chance:.3f}" for _, chance in seams)
    return f"| {name} | {numbers} | {measured} | {chance} |"


def _seams(
    pictures: Sequence[Picture], canvas: Sequence[Picture], tile: int
) -> list[tuple[float, float]]:
    """Return the seams of each picture, and how far chance moves them."""
    return [
        (_ratio(picture, plain, tile, 0), float(np.std(_elsewhere(picture, plain, tile))))
        for picture, plain in zip(pictures, canvas, strict=True)
    ]


def _elsewhere(picture: Picture, plain: Picture, tile: int) -> list[float]:
    """Measure lines away from the borders of tiles and of those that lie half a tile off."""
    shifts = range(20, tile - 16, 4)
    away = [shift for shift in shifts if abs(shift - tile // 2) > 8]
    return [_ratio(picture, plain, tile, shift) for shift in away]


def _ratio(picture: Picture, plain: Picture, tile: int, shift: int) -> float:
    return border_gradient(picture, tile, shift=shift) / border_gradient(plain, tile, shift=shift)


def _pixels(result: UpscaleResult) -> Picture:
    pixels: Picture = np.asarray(result.image.convert("RGB"), np.float32) / np.float32(255)
    return pixels


if __name__ == "__main__":
    main()
