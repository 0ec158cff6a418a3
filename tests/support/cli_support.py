"""Running the command line inside a test, and programs around it in processes."""

import io
import os
import subprocess
import sys
import textwrap

import numpy as np
from click.testing import CliRunner
from PIL import Image
from support import photograph

from tegula.cli.program import PROGRAM

PLAIN = ("--prescaler", "lanczos", "--creativity", "0", "--seed", "7")

FAKE = """
import sys, time, types
from tegula.errors import CancelledError
fake = types.ModuleType("tegula.upscaler")

class Upscaler:
    @classmethod
    def load(cls, *args, **named):
        {load}
        return cls()

    def upscale(
        self, source, options, *, mask, strength_map, on_progress, on_preview, on_plan, cancelled
    ):
        {upscale}

fake.Upscaler = Upscaler
sys.modules["tegula.upscaler"] = fake
from tegula.cli import main
main()
"""
"""A program whose upscaler runs the given code, and no torch."""


def run(*words, stdin=None):
    return CliRunner().invoke(PROGRAM, [str(word) for word in words], input=stdin)


def upscale(*words, stdin=None):
    return run("upscale", *words, *PLAIN, stdin=stdin)


def picture(width=12, height=8):
    return Image.fromarray((photograph(width, height) * 255).round().astype(np.uint8))


def picture_bytes(file_format="PNG", **size):
    buffer = io.BytesIO()
    picture(**size).save(buffer, file_format)
    return buffer.getvalue()


def put(path, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(**size).save(path)
    return path


def size_of(path):
    with Image.open(path) as image:
        return image.size


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def start_fake(*words, command="upscale", load="pass", upscale="pass", stderr=subprocess.PIPE):
    program = FAKE.format(load=load, upscale=textwrap.indent(upscale, " " * 8).strip())
    return subprocess.Popen(
        [sys.executable, "-c", program, command, *(str(word) for word in words)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    )
