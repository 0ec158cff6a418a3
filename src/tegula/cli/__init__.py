"""The command line `tegula`: what a person types, what is printed, and what stops the work.

Nothing here imports torch, numpy or Pillow before a command has work for it, so that
`tegula --help` answers at once.
"""

from __future__ import annotations

from tegula.cli.console import prepare_streams
from tegula.cli.program import PROGRAM


def main() -> None:
    """Run the command line and exit with its status."""
    prepare_streams()
    PROGRAM(prog_name="tegula")


__all__ = ["main"]
