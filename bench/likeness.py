"""``python -m bench.likeness``: how like their sources faces stay, with the guard and without.

Of every photograph each face that is found is cut out with what it takes to find it there again,
enlarged at a creativity of 0.6, and compared with its source by dlib: as it comes without
``likeness``, and with it. The place of a face in a result follows from that in its source, and is
not searched for again.

Photographs in subfolders of the folder are groups, such as "glasses", with rows of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tegula.errors import TegulaError
from tegula.images.decode import decode
from tegula.images.pixels import Float
from tegula.models.faces.likeness import load_describer
from tegula.options import MAX_PIXELS, PRESETS, UpscaleOptions
from tegula.pipeline.likeness import SAME_PERSON, FoundFace, LikenessGuard, find_faces
from tegula.upscaler import Upscaler

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def photographs(folder: Path | None) -> Iterator[tuple[str, str, Float]]:
    """Yield group, name and picture of each photograph below a folder, or scikit-image's."""
    if folder is None:
        from skimage import data

        yield "", "astronaut", np.asarray(data.astronaut() / 255, np.float32)
        return
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES):
        group = path.parent.name if path.parent != folder else ""
        with contextlib.suppress(TegulaError):  # a damaged file is no photograph
            yield group, path.stem, decode(path, max_pixels=MAX_PIXELS).rgb


def size_of(side: int) -> str:
    """Return the row of a face of this many pixels."""
    return "under 24 px" if side < 24 else "24 to 31 px" if side < 32 else "32 px and more"


def surroundings(face: FoundFace, picture: Float, most: int) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom of a face with as much around it as it is found in.

    Half of its side is enough for most; small ones are found only with more. None where nothing
    up to ``most`` pixels is enough.
    """
    height, width = picture.shape[:2]
    for share in (0.5, 1, 1.5, 2, 3):
        around = round(share * face.side)
        left, top = max(0, face.left - around), max(0, face.top - around)
        right = min(width, face.left + face.side + around)
        bottom = min(height, face.top + face.side + around)
        if max(right - left, bottom - top) > most:
            break
        found = find_faces(np.ascontiguousarray(picture[top:bottom, left:right]))
        if any(
            max(abs(left + each.left - face.left), abs(top + each.top - face.top)) < face.side / 2
            for each in found
        ):
            return left, top, right, bottom
    return None


def distance(
    upscaler: Upscaler, source: Image.Image, face: FoundFace, options: UpscaleOptions
) -> float:
    """Return dlib's distance of a face of a result from its source."""
    result = upscaler.upscale(source, options)
    rgb = np.asarray(np.asarray(source) / np.float32(255), np.float32)
    done = np.asarray(np.asarray(result.image.convert("RGB")) / np.float32(255), np.float32)
    pixels = torch.from_numpy(done)
    (report,) = LikenessGuard(load_describer(), rgb, (face,), 0.0).hold(pixels, pixels)[1]
    return report.before


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.likeness", description=__doc__)
    default = os.environ.get("TEGULA_PHOTOS")
    where = "folder of photographs; TEGULA_PHOTOS, else scikit-image's"
    parser.add_argument("--folder", type=Path, default=default and Path(default), help=where)
    parser.add_argument("--bundle", default="mini")
    parser.add_argument("--preset", default="balanced", choices=PRESETS)
    parser.add_argument("--prescaler", help="in place of the preset's")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--creativity", type=float, default=0.6)
    parser.add_argument("--likeness", type=float, default=0.5)
    parser.add_argument("--shrink", type=int, default=1, help="shrink photographs by this first")
    parser.add_argument("--most", type=int, default=160, metavar="PX", help="largest cut-out")
    parser.add_argument("--faces", type=int, metavar="N", help="stop after so many")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    upscaler = Upscaler.load(arguments.bundle)
    usual = UpscaleOptions(
        preset=arguments.preset,
        prescaler=arguments.prescaler,
        creativity=arguments.creativity,
        scale=arguments.scale,
        seed=0,
    )
    rows: dict[str, list[tuple[float, ...]]] = {"all": []}
    for group, name, picture in photographs(arguments.folder):
        height, width = (side // arguments.shrink for side in picture.shape[:2])
        whole = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
        if arguments.shrink > 1:
            whole = whole.resize((width, height), Image.Resampling.BOX)
        small = np.asarray(np.asarray(whole) / np.float32(255), np.float32)
        for face in find_faces(small):
            box = surroundings(face, small, arguments.most)
            enough = bool(arguments.faces) and len(rows["all"]) >= arguments.faces
            if box is None or enough:
                continue
            source = whole.crop(box)
            inside = FoundFace(face.left - box[0], face.top - box[1], face.side)
            pair = tuple(
                distance(upscaler, source, inside, usual.replaced(likeness=likeness))
                for likeness in (0.0, arguments.likeness)
            )
            print(f"{group} {name}, {face.side} px: {pair[0]:.3f} {pair[1]:.3f}", flush=True)
            for row in ("all", size_of(face.side), *([group] if group else [])):
                rows.setdefault(row, []).append(pair)
    print("\n| faces | number | median without | largest | median with | largest | over 0.6 |")
    print("|---|---|---|---|---|---|---|")
    for row, pairs in rows.items():
        if pairs:
            without, guarded = np.array(pairs).T
            numbers = (np.median(without), without.max(), np.median(guarded), guarded.max())
            over = f"{(without > SAME_PERSON).sum()}, {(guarded > SAME_PERSON).sum()}"
            print(f"| {row} | {len(pairs)} | {' | '.join(f'{n:.3f}' for n in numbers)} | {over} |")


if __name__ == "__main__":
    main()
