"""What the commands say: messages on standard error, data on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

_JSON = "tegula.cli.json"


@dataclass(frozen=True)
class Console:
    """Where messages go.

    quiet: only errors are told.
    json: data goes to standard output as JSON, one object a line, and nothing is told.
    """

    quiet: bool = False
    json: bool = False

    @property
    def talks(self) -> bool:
        """Whether anything but errors is told."""
        return not (self.quiet or self.json)

    def tell(self, sentence: str) -> None:
        """Print a message."""
        if self.talks:
            click.echo(sentence, err=True)

    def complain(self, sentence: str) -> None:
        """Print an error, unless it is part of the JSON."""
        if not self.json:
            click.echo(f"tegula: {sentence}", err=True)

    def data(self, value: Mapping[str, Any]) -> None:
        """Print data for programs, if they read it."""
        if self.json:
            print_json(value)


def wants_json(ctx: click.Context, *, json: bool) -> None:
    """Remember that errors, too, are to be JSON."""
    ctx.meta[_JSON] = json


def asks_for_json(ctx: click.Context) -> bool:
    """Return what ``wants_json`` was told."""
    return bool(ctx.meta.get(_JSON))


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str))
    sys.stdout.flush()


def plural(count: int, noun: str) -> str:
    """Return ``1 window`` or ``2 windows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
