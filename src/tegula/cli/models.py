"""`tegula models`: what there is, and fetching it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from tegula.cli.console import Console, Interruption, wants_json


def bundle_rows() -> list[dict[str, Any]]:
    """Return every bundle that has a name, as ``--json`` tells it."""
    from tegula.models.load import list_bundles

    return [
        {
            "name": entry.name,
            "family": entry.family,
            "installed": entry.installed,
            "size": entry.size,
            "licence": entry.licence,
            "description": entry.description,
        }
        for entry in list_bundles()
    ]


def prescaler_rows() -> list[dict[str, Any]]:
    """Return every prescaler that has a name, as ``--json`` tells it."""
    from tegula.models.prescalers import is_installed, list_prescalers

    return [
        {**dataclasses.asdict(facts), "installed": is_installed(facts.name)}
        for facts in list_prescalers()
    ]


def face_rows() -> list[dict[str, Any]]:
    """Return every face model that has a name, as ``--json`` tells it."""
    from tegula.models.faces.catalogue import is_here, list_face_models

    return [
        {**dataclasses.asdict(model), "installed": is_here(model.name)}
        for model in list_face_models()
    ]


def in_words(size: float) -> str:
    """Return a number of bytes as people say it."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def _list(ctx: click.Context, *, json: bool) -> None:
    wants_json(ctx, json=json)
    if ctx.invoked_subcommand is not None:
        return
    bundles, prescalers, faces = bundle_rows(), prescaler_rows(), face_rows()
    if json:
        Console(json=True).data({"bundles": bundles, "prescalers": prescalers, "faces": faces})
        return
    click.echo("Bundles, for --model:")
    _print_rows(bundles, lambda row: in_words(row["size"]))
    click.echo("\nPrescalers, for --prescaler:")
    _print_rows(prescalers, lambda row: f"{row['factor']}x" if row["factor"] else "any")
    click.echo("\nFace models, for --faces; you put their files into faces/ of the models folder:")
    _print_rows(faces, lambda row: ", ".join(row["also"]))
    click.echo("\n`tegula models pull NAME` fetches a bundle that is not here.")


def _print_rows(rows: Iterable[dict[str, Any]], fact: Callable[[dict[str, Any]], str]) -> None:
    for row in rows:
        here = "here" if row["installed"] else "not here"
        click.echo(f"  {row['name']:<24} {here:<9} {fact(row):>8}  {row['description']}")


def _pull(ctx: click.Context, *, name: str, quiet: bool) -> None:
    wants_json(ctx, json=False)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console(quiet=quiet)
    with Interruption().installed():
        from tegula.models.load import pull

        folders = pull(name, lambda done, total: console.tell(_progress(name, done, total)))
    for folder in folders:
        console.tell(f"{folder} is complete.")
    if not folders:
        console.tell(f"All that {name} needs is here already.")


def _progress(name: str, done: int, total: int) -> str:
    return f"{name}: {in_words(done)} of {in_words(total)}"


MODELS = click.Group(
    "models",
    callback=click.pass_context(_list),
    invoke_without_command=True,
    help="List bundles, prescalers and face models; `pull` fetches a bundle.",
    params=[click.Option(["--json"], is_flag=True, help="Print one JSON object.")],
    commands=[
        click.Command(
            "pull",
            callback=click.pass_context(_pull),
            help="Fetch and verify the weights of a bundle, by its name or hub id.",
            params=[
                click.Argument(["name"]),
                click.Option(["-q", "--quiet"], is_flag=True, help="Print errors only."),
            ],
        )
    ],
)
