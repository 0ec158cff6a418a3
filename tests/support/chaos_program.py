"""`tegula` with a quick model in its worker; everything else is the real program."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HEAD = b"\x89PNG\r\n\x1a\n"
STEP_S = 0.01
SINGLE_MODEL, ARRAY_MODEL = "tegula/upscale", "philz1337x/clarity-upscaler"


def open_runner(_device, _options):
    """A model that takes some steps and gives out what its picture's bytes come to."""
    from tegula.server.engine import Log, OutputFile, Progressed, Started

    def run(job, emit, _cancelled):
        emit(Started())
        data = Path(job.input["image"]).read_bytes()
        for number in range(2 if job.model == ARRAY_MODEL else 1):
            for step in range(4):
                time.sleep(STEP_S)
                emit(Log(f"step {step}"))
                emit(Progressed(step / 4))
            path = job.folder / f"out-{number}.png"
            path.write_bytes(result(data, number))
            emit(OutputFile(path, path.name, "image/png"))

    return run


def result(picture: bytes, number: int) -> bytes:
    return HEAD + hashlib.sha256(picture).digest() + bytes([number])


def run_program() -> None:
    from tegula.cli import main
    from tegula.server import supervisor
    from tegula.server.runner import RunnerSpec

    supervisor.upscaling_spec = lambda *_: RunnerSpec("chaos_program:open_runner", {})
    main()


def run_forked(words: Sequence[str], environment: dict[str, str], log: str) -> None:
    """Run the program in a process that was forked instead of started, in a session of its own."""
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)
    sys.argv = ["tegula", *words]
    run_program()


if __name__ == "__main__":
    run_program()
