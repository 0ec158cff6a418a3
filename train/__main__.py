"""``python -m train``: makes mini's weights, and its prescalers', from photographs."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from tegula.models.mini import WEIGHTS
from tegula.models.prescalers import WEIGHTS as TUNED
from train.config import CONFIGURATIONS
from train.program import Program

COMMANDS = (
    "all", "prescaler", "second", "ranges", "distil", "four", "twice", "sharpened", "compressed",
    "line", "pairs", "diffusion", "adversarial", "evaluate", "export",
)  # fmt: skip


def main() -> None:
    """Parse the command line and run what it names."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("command", nargs="?", default="all", choices=COMMANDS)
    where = "folders of photographs; TEGULA_TRAIN_PHOTOS, else photos/train"
    parser.add_argument("--photos", type=Path, nargs="+", default=_folders(), help=where)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mini"), help="pairs and checkpoints"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the bundle goes")
    parser.add_argument("--tuned", type=Path, default=TUNED, help="where the prescalers go")
    parser.add_argument("--config", choices=CONFIGURATIONS, default=None,
                        help="by default cpu or gpu, as this machine has")  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a batch is spread over threads of its own
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = CONFIGURATIONS[arguments.config or ("gpu" if device.type == "cuda" else "cpu")]
    program = Program(
        settings, tuple(arguments.photos), arguments.work, arguments.weights, arguments.tuned,
        device, print,
    )  # fmt: skip
    began = time.monotonic()
    _run(program, arguments.command)
    print(f"{arguments.command}: {(time.monotonic() - began) / 60:.1f} min on {device}")


def _run(program: Program, command: str) -> None:
    if command == "export":
        state = program.train_adversarial()
        program.export(state.seconds, state.samples)
        return
    steps = {
        "all": program.everything,
        "prescaler": program.tune_prescaler,
        "second": program.train_second,
        "ranges": program.measure_ranges,
        "distil": program.distil_prescaler,
        "four": program.train_four,
        "twice": program.train_twice,
        "sharpened": program.train_sharpened,
        "compressed": program.train_compressed,
        "line": program.train_line,
        "pairs": program.make_pairs,
        "diffusion": program.train_diffusion,
        "adversarial": program.train_adversarial,
        "evaluate": program.evaluate,
    }
    steps[command]()


def _folders() -> list[Path]:
    named = os.environ.get("TEGULA_TRAIN_PHOTOS")
    return [Path(p) for p in named.split(os.pathsep)] if named else [Path("photos/train")]


if __name__ == "__main__":
    main()
