"""Makes the pictures on the page of the models, and those of the README.

``python -m docs.examples [OWNER/NAME]...`` runs these models, or all that can run with the packaged
weights, on a part of a photograph, and writes ``example-OWNER-NAME.webp`` beside the other files of
the pages. ``python -m docs.examples --readme`` enlarges the whole photograph as ``make upscale
SCALE=4`` does, and by Real-ESRGAN alone, for the README.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tegula import Upscaler
from tegula.catalog import Version, models, run, validate
from tegula.catalog.weights import why_it_cannot_run
from tegula.images.encode import side_by_side

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "examples" / "cat.jpg"
ASSETS = ROOT / "src" / "tegula" / "server" / "web" / "assets"
PART = (150, 60, 310, 220)
"""Left, top, right and bottom of the part of the photograph, an eye and fur."""

PICTURES = ROOT / "docs" / "pictures"
DETAIL = (400, 240, 1120, 720)
"""Likewise of the photograph at 4x: an eye and fur."""
_GAP = 4

SIDE = 320
QUALITY = 75


def example(version: Version, upscaler: Upscaler) -> Image.Image:
    """Return the part as it is beside what a model makes of it."""
    with Image.open(SOURCE) as photograph:
        part = photograph.convert("RGB").crop(PART)
    file = io.BytesIO()
    part.save(file, "PNG")
    inputs: dict[str, Any] = {version.image: file.getvalue()}
    if version.field("seed"):
        inputs["seed"] = 1
    (output,) = run(version, validate(version, inputs), lambda _loras: upscaler)
    shown = Image.new("RGB", (2 * SIDE, SIDE))
    with Image.open(io.BytesIO(output.data)) as result:
        shown.paste(part.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (0, 0))
        shown.paste(result.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (SIDE, 0))
    return shown


def readme_pictures(upscaler: Upscaler) -> None:
    """Write the photograph before and after, and a detail beside that of Real-ESRGAN alone."""
    result = upscaler.upscale(SOURCE, scale=4).image
    alone = upscaler.upscale(
        SOURCE, scale=4, prescaler="realesrgan-x4plus", creativity=0, colour_lock="none"
    ).image
    with Image.open(SOURCE) as photograph:
        compared = side_by_side(photograph, result)
    compared.save(PICTURES / "cat-compare.jpg", quality=88)
    left, right = (each.convert("RGB").crop(DETAIL) for each in (alone, result))
    both = Image.new("RGB", (left.width + _GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _GAP, 0))
    both.save(PICTURES / "cat-realesrgan-tegula.jpg", quality=88)


def main(names: Sequence[str]) -> None:
    """Write the pictures of the models of these names, or of all."""
    upscaler = Upscaler.load()
    if "--readme" in names:
        readme_pictures(upscaler)
        return
    for model in models():
        if why_it_cannot_run(model.latest, {}) or (names and model.reference not in names):
            continue
        path = ASSETS / f"example-{model.owner}-{model.name}.webp"
        example(model.latest, upscaler).save(path, quality=QUALITY, method=6)
        print(f"{path.name}: {path.stat().st_size} bytes")  # noqa: T201 - it is a command


if __name__ == "__main__":
    main(sys.argv[1:])
