"""`tegula run`: a model of the catalogue by its name, with its own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula.cli.console import Console, Interruption, showing, waiting, wants_json
from tegula.errors import OptionError, PathError

if TYPE_CHECKING:
    from tegula.catalog import Output, Version
    from tegula.upscaler import Upscaler

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_HELP = """Run a model by the name that the API has for it.

\b
  tegula run tegula/upscale image=@photo.jpg scale=4
  tegula run fewjative/ultimate-sd-upscale image=@photo.jpg denoise=0.4 mode_type=Chess
  tegula run                                    lists the models
  tegula run philz1337x/clarity-upscaler        lists the inputs of one

`@` names a file. A version follows the name after a colon.
"""


def _run(
    model: str | None,
    words: tuple[str, ...],
    output: Path,
    bundle: str | None,
    device: str,
    precision: str,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from tegula.catalog import find

    console = Console(quiet=quiet, json=as_json)
    wants_json(click.get_current_context(), json=as_json)
    if model is None:
        _list_models(console)
        return
    version = find(model)
    if not words:
        _list_inputs(version, console)
        return
    interruption = Interruption()
    with interruption.installed():
        loading = {"bundle": bundle, "device": device, "precision": precision}
        written = _written(version, words, output, loading, console, interruption)
    for path in written:
        console.tell(f"{path}")


def _written(
    version: Version,
    words: Sequence[str],
    folder: Path,
    loading: Mapping[str, Any],
    console: Console,
    interruption: Interruption,
) -> list[Path]:
    from tegula.catalog import run, validate
    from tegula.folders import write_atomically

    inputs = validate(version, _inputs(version, words))
    _make(folder)
    stem = _stem(inputs.values[version.image])
    paths = []
    with showing(console, stem) as on_progress, interruption.polled():
        outputs = run(
            version,
            inputs,
            lambda loras: _load(console, loading, loras),
            on_progress=on_progress,
            on_log=console.tell,
            cancelled=interruption.cancelled,
        )
        for number, output in enumerate(outputs):
            path = folder / f"{stem}-{version.name.split('/')[1]}-{number}{_suffix(output)}"
            write_atomically(path, output.data)
            paths.append(path)
            console.data({"output": str(path), "width": output.width, "height": output.height})
    return paths


def _inputs(version: Version, words: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` and ``key=@file``.

    Raises:
        OptionError: a word has no equals sign, or a key comes twice.
    """
    from tegula.catalog import from_text

    texts: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise OptionError(f"Inputs are name=value or name=@file, which {word!r} is not.")
        if name in texts:
            raise OptionError(f"The input {name} is given twice.")
        texts[name] = value
    files = {name: Path(value[1:]) for name, value in texts.items() if value.startswith("@")}
    return {**from_text(version, texts), **files}


def _load(
    console: Console, loading: Mapping[str, Any], loras: Sequence[tuple[str, float]]
) -> Upscaler:
    from tegula.upscaler import DEFAULT_BUNDLE, Upscaler

    with waiting(console, "Loading the model"):
        return Upscaler.load(
            loading["bundle"] or DEFAULT_BUNDLE,
            loras=loras,
            device=loading["device"],
            precision=loading["precision"],
        )


def _stem(image: object) -> str:
    return image.stem if isinstance(image, Path) else "out"


def _suffix(output: Output) -> str:
    return Path(output.name).suffix


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(f"{folder} cannot be made: {error.strerror}.") from error


def _list_models(console: Console) -> None:
    from tegula.catalog import models

    for model in models():
        for version in model.versions:
            console.data({"model": model.reference, "version": version.id})
        if not console.json:
            click.echo(f"{model.reference:48} {model.description}")


def _list_inputs(version: Version, console: Console) -> None:
    from tegula.catalog import openapi_schema

    console.data(openapi_schema(version))
    if console.json:
        return
    click.echo(f"{version.name}:{version.id}\n")
    for known in version.fields:
        default = "required" if known.required else f"default: {known.default!r}"
        if known.default is None and not known.required:
            default = "optional"
        click.echo(f"  {known.name:24} {known.description} [{default}]")


RUN = click.Command(
    "run",
    callback=_run,
    help=_HELP,
    short_help="Run a model by its name in the API.",
    params=[
        click.Argument(["model"], required=False, metavar="[OWNER/NAME[:VERSION]]"),
        click.Argument(["words"], nargs=-1, metavar="[NAME=VALUE]..."),
        click.Option(
            ["-o", "--output"],
            type=click.Path(path_type=Path),
            default=Path(),
            metavar="FOLDER",
            help="Where results go. [default: here]",
        ),
        click.Option(
            ["--model", "--bundle", "bundle"],
            metavar="NAME|PATH",
            help="The bundle to run on. [default: the packaged one]",
        ),
        click.Option(["--device"], default="auto", help="auto, cpu, cuda, cuda:N or mps."),
        click.Option(
            ["--precision"], type=click.Choice(PRECISIONS), default="auto", help="To compute in."
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON for programs."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print errors only."),
    ],
)
