"""How long upscales take by what enlarges the picture first, beside Real-ESRGAN x4plus.

    python -m bench.prescaling [--picture FILE] [--sides 300 256] [--turns 3] [--precision fp32]

A photograph is shrunk by area until its longer side has so many pixels, so that it is sharp, and
enlarged 2x and 4x with all stages: by the default preset with nothing chosen, by it with
`tegula-photo` and with `realesrgan-x4plus`, and by `fast`. They take turns in one process, and of
each the shortest run counts, in seconds of the processor, which other programs disturb least.
Ratios are to x4plus's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from bench.quality.run import packaged_photographs
from tegula.images.open import Source
from tegula.images.pixels import to_image
from tegula.models import PRECISIONS
from tegula.options import UpscaleOptions
from tegula.upscaler import Upscaler

METHODS = {
    "realesrgan-x4plus": UpscaleOptions(prescaler="realesrgan-x4plus"),
    "tegula-photo": UpscaleOptions(prescaler="tegula-photo"),
    "nothing chosen": UpscaleOptions(),
    "fast": UpscaleOptions(preset="fast"),
}


def seconds_of(upscaler: Upscaler, source: Source, scale: int, turns: int) -> dict[str, float]:
    """Return the shortest run of each method, in seconds of the processor."""
    found = dict.fromkeys(METHODS, float("inf"))
    for _ in range(turns):
        for name, options in METHODS.items():
            began = time.process_time()
            upscaler.upscale(source, options, scale=scale)
            found[name] = min(found[name], time.process_time() - began)
    return found


def report(sizes: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Return the ratios as a table, with the seconds of the baseline."""
    lines = [
        "| | " + " | ".join(METHODS) + " | s of realesrgan-x4plus |",
        "|---|" + "---:|" * (len(METHODS) + 1),
    ]
    for name, seconds in sizes:
        baseline = seconds["realesrgan-x4plus"]
        ratios = " | ".join(f"{seconds[method] / baseline:.2f}" for method in METHODS)
        lines.append(f"| {name} | {ratios} | {baseline:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.prescaling", description=__doc__)
    parser.add_argument("--picture", type=Path, help="a photograph; scikit-image's coffee")
    parser.add_argument("--sides", type=int, nargs=2, default=(300, 256), help="for 2x and for 4x")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    arguments = parser.parse_args()
    if arguments.picture is None:
        picture = to_image(dict(packaged_photographs(1))["coffee"])
    else:
        picture = Image.open(arguments.picture).convert("RGB")
    upscaler = Upscaler.load("mini", device="cpu", precision=arguments.precision)
    rows = []
    for scale, side in zip((2, 4), arguments.sides, strict=True):
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.BOX)
        for options in METHODS.values():  # loads what they need
            upscaler.upscale(small.resize((48, 48)), options, scale=scale)
        seconds = seconds_of(upscaler, small, scale, arguments.turns)
        rows.append((f"{small.width}x{small.height}, {scale}x", seconds))
    about = f"{upscaler.bundle.dtype}, 8-bit products: {'yes' if upscaler.bundle.int8 else 'no'}"
    print(f"{report(rows)}\n\n{about}")


if __name__ == "__main__":
    main()
