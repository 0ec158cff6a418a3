"""`tegula run`: a model of the API by its name, with its own inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula.cli.console import Console, Interruption, show_progress
from tegula.cli.models import DEVICE, LIBRARY, MODEL, PRECISION, Runtime, load_upscaler
from tegula.cli.options import JSON, QUIET, Option
from tegula.cli.targets import refuse_address
from tegula.errors import OptionError, PathError
from tegula.models import DEFAULT_BUNDLE, BundleSettings

if TYPE_CHECKING:
    from tegula.catalog import Version
    from tegula.catalog.run import Provider
    from tegula.upscaler import Upscaler

_HELP = """Run a model by the name that it has in the API.

\b
  tegula run                                    list the models
  tegula run philz1337x/clarity-upscaler        list the inputs of one
  tegula run tegula/upscale image=@photo.jpg scale=4
  tegula run fewjative/ultimate-sd-upscale image=@photo.jpg denoise=0.4 mode_type=Chess

`@` stands before the name of a file. A version may follow the model after a colon.
"""


def _run(
    model: str | None,
    inputs: tuple[str, ...],
    output: Path,
    bundle: str | None,
    device: str,
    precision: str,
    *,
    json: bool,
    quiet: bool,
) -> None:
    from tegula.catalog import find

    console = Console.open(quiet=quiet, json=json)
    if model is None:
        _list_models(console)
        return
    version = find(model)
    if not inputs:
        _list_inputs(version, console)
        return
    interruption = Interruption()

    def load(loras: Sequence[tuple[str, float]]) -> Upscaler:
        models = BundleSettings(bundle=bundle or DEFAULT_BUNDLE, loras=tuple(loras))
        with interruption.unpolled():
            return load_upscaler(console, models, Runtime(device, precision))

    with interruption.installed():
        _run_version(version, inputs, output, load, console, interruption)


def _run_version(
    version: Version,
    arguments: Sequence[str],
    folder: Path,
    load: Provider,
    console: Console,
    interruption: Interruption,
) -> None:
    """Run a model and write its pictures into a folder, where they replace no others.

    Raises:
        TegulaError: an input is wrong, or as ``Upscaler.load`` and ``Upscaler.upscale``.
    """
    from tegula.catalog import run, validate
    from tegula.folders import write_atomically

    inputs = validate(version, _parse_inputs(version, arguments))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(f"{folder} cannot be created: {error.strerror}.") from error
    image = getattr(inputs.values, version.image)
    source = image.stem if isinstance(image, Path) else "out"
    with show_progress(console, source, source) as on_progress, interruption.polled():
        outputs = list(
            run(
                version,
                inputs,
                load,
                on_progress=on_progress,
                on_log=console.message,
                cancelled=interruption.requested,
            )
        )
    stem, numbers = f"{source}-{version.name.split('/')[1]}", itertools.count()
    for output in outputs:
        names = (f"{stem}-{number}{Path(output.name).suffix}" for number in numbers)
        path = next(folder / name for name in names if not (folder / name).exists())
        write_atomically(path, output.data)
        console.message(str(path))
        console.record({"output": str(path), "width": output.width, "height": output.height})


def _parse_inputs(version: Version, arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``name=value`` and ``name=@file``.

    Raises:
        OptionError: an argument has no equals sign, or a name comes twice.
        InputError: an address stands where a file is taken.
    """
    from tegula.catalog import from_text
    from tegula.catalog.inputs import FILE

    texts: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise OptionError(f"Inputs are name=value or name=@file, which {argument!r} is not.")
        if name in texts:
            raise OptionError(f"The input {name} is given twice.")
        texts[name] = value
    for field in version.fields:
        if field.kind == FILE:
            refuse_address(texts.get(field.name, "").removeprefix("@"))
    files = {name: Path(value[1:]) for name, value in texts.items() if value.startswith("@")}
    return {**from_text(version, texts), **files}


def _list_models(console: Console) -> None:
    from tegula.catalog import models

    for model in models():
        for version in model.versions:
            console.record({"model": model.reference, "version": version.id})
        console.text(f"{model.reference:48} {model.description}")


def _list_inputs(version: Version, console: Console) -> None:
    from tegula.catalog import openapi_schema

    console.record(openapi_schema(version))
    console.text(f"{version.name}:{version.id}\n")
    for field in version.fields:
        if field.required:
            default = "required"
        elif field.default is None:
            default = "optional"
        else:
            default = f"default: {field.default}"
        console.text(f"  {field.name:24} {field.description} [{default}]")


RUN = click.Command(
    "run",
    callback=_run,
    help=_HELP,
    short_help="Run a model by its name in the API.",
    params=[
        click.Argument(["model"], required=False, metavar="[OWNER/NAME[:VERSION]]"),
        click.Argument(["inputs"], nargs=-1, metavar="[NAME=VALUE]..."),
        Option(
            ["-o", "--output"],
            "Folder for the results, which are numbered and replace no other file.",
            "default: the current folder",
            type=click.Path(path_type=Path),
            default=Path(),
            metavar="FOLDER",
        ),
        MODEL,
        LIBRARY,
        DEVICE,
        PRECISION,
        JSON,
        QUIET,
    ],
)
