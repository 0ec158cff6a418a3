"""``python -m bench.quality``: measures the pictures that tegula makes."""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import torch

from bench.quality import report
from bench.quality.methods import METHODS
from bench.quality.recipes import DEGRADATIONS
from bench.quality.run import packaged_photographs, read_photographs, run

_MULTIPLE = 16


def main() -> None:
    """Parse the command line, run, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    default = os.environ.get("TEGULA_PHOTOS")
    where = "folder of photographs; TEGULA_PHOTOS, else scikit-image's"
    parser.add_argument("--photos", type=Path, default=default and Path(default), help=where)
    parser.add_argument("--limit", type=int, help="use only the first photographs")
    parser.add_argument("--scales", type=int, nargs="+", default=[4, 2], choices=(2, 4))
    parser.add_argument(
        "--degradations", nargs="+", default=list(DEGRADATIONS), choices=DEGRADATIONS
    )
    parser.add_argument("--methods", nargs="+", help="only names that contain one of these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.photos:
        photographs = read_photographs(arguments.photos, arguments.limit, _MULTIPLE)
    else:
        photographs = packaged_photographs(_MULTIPLE)[: arguments.limit]
    wanted = arguments.methods
    methods = [m for m in METHODS if not wanted or any(w in m.name for w in wanted)]
    began = time.perf_counter()
    outcome = run(photographs, arguments.scales, arguments.degradations, methods,
                  lambda line: print(f"\r{line:40}", end="", flush=True))  # fmt: skip
    about = {
        "photographs": len(photographs),
        "degradations": {name: DEGRADATIONS[name] for name in arguments.degradations},
        "seconds": round(time.perf_counter() - began),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    report.write(outcome, arguments.out, about)
    print(f"\r{report.markdown(outcome)}\nWritten to {arguments.out}.")


if __name__ == "__main__":
    main()
