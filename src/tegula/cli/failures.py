"""What went wrong, as a sentence for people, a code for programs, a status for the shell."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import click

from tegula.cli.report import print_json
from tegula.errors import CancelledError, OutOfMemoryError, PathError, TegulaError

_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


@dataclass(frozen=True)
class Failure:
    """An error as it is told; ``message`` is one line."""

    code: str
    message: str
    exit_status: int

    def told(self) -> dict[str, str]:
        """Return what ``--json`` prints of it."""
        return {"code": self.code, "message": self.message}


def tell_failure(failure: Failure, *, as_json: bool) -> None:
    """Print one line, or one JSON object to standard output."""
    if as_json:
        print_json({"error": failure.told()})
    else:
        click.echo(f"tegula: {failure.message}", err=True)


def failure_of(error: BaseException) -> Failure:
    """Return how an exception of any kind is told."""
    if isinstance(error, KeyboardInterrupt):
        return failure_of(CancelledError("Cancelled; nothing half-written is left."))
    if isinstance(error, MemoryError):
        return failure_of(OutOfMemoryError("Memory ran out; ask for a smaller result."))
    words = " ".join(str(error).split())
    if isinstance(error, TegulaError):
        return Failure(error.code, words, error.exit_status)
    if isinstance(error, OSError) and error.filename is not None:
        return failure_of(PathError(f"{error.filename} cannot be used: {error.strerror}."))
    hint = "run `tegula --debug` with the same arguments to see where it came from."
    return Failure("internal", f"Unexpected {type(error).__name__}: {words or '-'}; {hint}", 1)


def quieten_libraries() -> None:
    """Keep what libraries tell their developers out of the messages to the user."""
    warnings.simplefilter("ignore")
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
