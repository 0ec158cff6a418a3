"""Canvas and redraw mode beside each other: `python -m bench.modes [PHOTOGRAPH]`.

The same picture, steps, strength and tile size in both; redraw without and with each seam
fix. Seams are measured as gradient energy on the borders of redraw's tiles over that on
lines near by, divided by what the same lines of the canvas picture have.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.seams import seam_score
from tegula.options import UpscaleOptions
from tegula.upscaler import Upscaler, UpscaleResult

TILE = 256
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photograph", nargs="?", type=Path, default=Path("examples/cat.jpg"))
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--scheduler", default="ddim")
    asked = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    upscaler = Upscaler.load(asked.model, device=asked.device)
    base = UpscaleOptions(
        scale=2,
        seed=1,
        creativity=0.5,
        steps=asked.steps,
        scheduler=asked.scheduler,
        prescaler=PRESCALER,
        window=TILE,
        tile_width=TILE,
        tile_height=TILE,
        seam_fix_denoise=0.5,
    )
    source = Image.open(asked.photograph).convert("RGB")
    upscaler.upscale(source.resize((64, 64)), base)
    print("| mode | windows | evaluations | TFLOP | seconds | seams |")
    print("|---|---:|---:|---:|---:|---:|")
    canvas: float | None = None
    for name, changes in CASES.items():
        start = time.perf_counter()
        result = upscaler.upscale(source, dataclasses.replace(base, **changes))
        spent = result.timings.get("refine", time.perf_counter() - start)
        score = _seams(result)
        canvas = score if canvas is None else canvas
        plan = result.plan
        print(
            f"| {name} | {plan.windows} | {plan.evaluations} | {plan.refine_flops / 1e12:.2f} "
            f"| {spent:.1f} | {score / canvas:.3f} |"
        )


def _seams(result: UpscaleResult) -> float:
    picture = np.asarray(result.image.convert("RGB"), np.float32) / 255
    height, width = picture.shape[:2]
    return seam_score(picture, range(TILE, width, TILE), range(TILE, height, TILE))


if __name__ == "__main__":
    main()
