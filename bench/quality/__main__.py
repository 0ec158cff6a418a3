"""``python -m bench.quality``: measures the pictures that tegula makes."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import torch

from bench.quality import report
from bench.quality.brisque import read_brisque
from bench.quality.cache import Cache
from bench.quality.drawings import DRAWINGS
from bench.quality.judges import JUDGES, Dists, load_judge
from bench.quality.methods import METHODS, Runner, find_method
from bench.quality.recipes import DEGRADATIONS, JPEGS
from bench.quality.run import Bench, middle_square, packaged_photographs, read_photographs
from bench.quality.scores import Jury
from tegula.folders import cache_folder
from tegula.models.device import pick_device, pick_dtype

_MULTIPLE = 16
DRAWING_DAMAGES = ("clean", "jpeg")
"""Drawings are seldom noisy or out of focus."""


def main() -> None:
    """Parse the command line, run, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    default = os.environ.get("TEGULA_PHOTOS")
    where = "folder of photographs; TEGULA_PHOTOS, else scikit-image's"
    parser.add_argument("--folder", type=Path, default=default and Path(default), help=where)
    parser.add_argument("--photos", type=int, metavar="N", help="use only the first N photographs")
    parser.add_argument("--drawings", type=int, metavar="N", help="use only the first N drawings")
    parser.add_argument(
        "--side", type=int, metavar="PX", help="use only the middle square of each photograph"
    )
    parser.add_argument("--scales", type=int, nargs="+", default=[4, 2], choices=(2, 4))
    known = (*DEGRADATIONS, *JPEGS)
    parser.add_argument("--damages", nargs="+", default=list(DEGRADATIONS), choices=known)
    only = (
        "methods by name: bicubic, auto, presets, and prescalers such as tegula-photo@0.35+colours"
    )
    parser.add_argument("--only", nargs="+", default=METHODS, metavar="METHOD", help=only)
    extras = "over how many photographs seams and the spread over seeds are measured"
    parser.add_argument("--seams", type=int, default=0, metavar="N", help=extras)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="take nothing from earlier runs")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.folder:
        photographs = read_photographs(arguments.folder, arguments.photos, _MULTIPLE)
    else:
        photographs = packaged_photographs(_MULTIPLE)[: arguments.photos]
    photographs = [(name, middle_square(picture, arguments.side)) for name, picture in photographs]
    methods = [find_method(name) for name in arguments.only]
    cache = Cache(None if arguments.fresh else cache_folder() / "bench")
    dtype = pick_dtype(pick_device("cpu"), "auto")
    jury = Jury([load_judge(name, dtype) for name in JUDGES], read_brisque(), Dists())
    bench = Bench(Runner(cache), jury, cache, _show)
    began = time.perf_counter()
    scales, outcomes, texts = arguments.scales, {}, []
    if photographs:
        outcomes["photographs"] = bench.run(
            photographs, scales, arguments.damages, methods, extras=arguments.seams
        )
        texts.append(report.markdown(outcomes["photographs"]))
    drawings = DRAWINGS[: arguments.drawings]
    damages = [name for name in DRAWING_DAMAGES if name in arguments.damages]
    if drawings and damages:
        outcomes["drawings"] = bench.run_drawings(drawings, scales, damages, methods)
        texts.append(report.drawings_markdown(outcomes["drawings"]))
    about = {
        "photographs": len(photographs),
        "drawings": len(drawings),
        "side": arguments.side,
        "degradations": {name: DEGRADATIONS.get(name, name) for name in arguments.damages},
        "judges_in": str(dtype),
        "seconds": round(time.perf_counter() - began),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    text = "\n".join(texts)
    report.write(outcomes, arguments.out, about, text)
    print(f"{text}\nWritten to {arguments.out}.")


def _show(line: str) -> None:
    """Say on one line how far the run is."""
    print(f"\r{line:100.100}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
