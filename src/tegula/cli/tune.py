"""`tegula tune`: one part of a picture with several settings, side by side on a sheet."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tegula.cli.console import Console, Interruption, plural
from tegula.cli.models import MODEL_OPTIONS
from tegula.cli.options import (
    JSON,
    QUIET,
    Option,
    SectionedCommand,
    flag,
    option_name,
    path_option,
    upscale_sections,
)
from tegula.cli.progress import show_progress
from tegula.cli.targets import check_place
from tegula.cli.upscale import request_without_files
from tegula.errors import OptionError, PathError
from tegula.images.formats import format_for
from tegula.models import DEFAULT_BUNDLE, offered_presets
from tegula.options import OPTIONS, PRESETS, UpscaleOptions
from tegula.resolve import enlargement, with_context

if TYPE_CHECKING:
    from tegula.images.decode import Picture
    from tegula.result import UpscaleResult
    from tegula.upscaler import Upscaler

_HELP = f"""Show one part of a picture with several settings on a sheet.

\\b
  tegula tune photo.jpg                       the presets
  tegula tune photo.jpg --scale 4 --vary creativity=0.2,0.5,0.8
  tegula tune photo.jpg --vary creativity=0.2,0.5,0.8 --vary resemblance=0.5,1

Every cell is labelled with the command that makes the whole picture so; with --crop it makes the
cell itself. The part is chosen where most is going on and something is flat, unless --crop names
one. Presets that a model's results do not tell apart are left out: those of the packaged model are
{", ".join(offered_presets(DEFAULT_BUNDLE))}.
"""
_SIDE = 256
"""Pixels of the result that a cell shows along a side, about, of a part that is chosen here."""
_SMALLEST_SIDE = 16
_MOST_CELLS = 36
_SEED = 1

_ACROSS = 4
"""Cells in a row where one option is varied."""


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet.

    settings: what is varied, by name, as people write it.
    options: with them.
    command: makes the whole picture so.
    """

    settings: Mapping[str, str]
    options: UpscaleOptions
    command: str


def _tune(**parameters: Any) -> None:
    # They bring numpy and torch along, which `tegula --help` does without.
    from tegula.cli.sheet import contact_sheet, liveliest
    from tegula.images.decode import decode, in_srgb
    from tegula.images.encode import opaque, save

    context = click.get_current_context()
    console = Console.open(quiet=parameters["quiet"], json=parameters["json"])
    interruption = Interruption()
    with interruption.installed():
        source = Path(parameters["picture"])
        sheet = parameters["output"] or source.with_name(f"{source.stem}_tune.png")
        _check_sheet(sheet, source, overwrite=parameters["overwrite"])
        file_format = format_for(sheet, None)
        request = request_without_files(parameters)
        options = request.options
        options = options.replaced(seed=_SEED if options.seed is None else options.seed)
        varied = [_varied(text) for text in parameters["vary"]]
        if len(varied) > 2:
            raise OptionError("A sheet has two sides: give --vary once or twice.")
        if len(varied) == 2 and varied[0][0] == varied[1][0]:
            raise OptionError(f"--vary {varied[0][0]} is there twice; give all its values at once.")
        cells = _cells(context, source, varied, options) if varied else []
        picture = decode(source, max_pixels=options.max_pixels)
        with_context(options, picture.facts.size)  # refuses a crop outside before models load
        crop = options.crop or liveliest(picture.rgb, _side_of(options, picture.facts.size))
        where = ",".join(map(str, crop))

        upscaler = request.load_upscaler(console)
        if not varied:
            varied = [("preset", _presets(console, upscaler.bundle.facts.name))]
            cells = _cells(context, source, varied, options)
        with upscaler.sharing_prescaled():
            results = list(_results(upscaler, picture, cells, crop, console, interruption))
        columns = len(varied[1][1]) if len(varied) == 2 else min(_ACROSS, len(cells))
        pictures = [opaque(in_srgb(result.image, result.metadata)) for result in results]
        labels = [cell.command for cell in cells]
        drawn = contact_sheet(pictures, labels, columns, f"{source.name}, --crop {where}")
        save(drawn, sheet, file_format=file_format)
        for warning in dict.fromkeys(warning for each in results for warning in each.warnings):
            console.message(f"{source}: {warning}")
        console.message(f"{sheet}: {plural(len(cells), 'cell')} of {where}")
        console.record({"input": str(source), "output": str(sheet), "crop": crop})


def _check_sheet(sheet: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse pipes, and a place where the sheet cannot be written, before the work begins.

    Raises:
        OptionError: one of them is ``-``.
        PathError: the sheet would replace the picture, or a file without ``--overwrite``, or
            cannot be written.
    """
    if "-" in (str(sheet), str(source)):
        raise OptionError("tegula tune reads a file and writes a file; give names, not `-`.")
    if sheet.exists() and source.exists() and sheet.samefile(source):
        raise PathError(f"{sheet} is the picture itself; give another --output.")
    if sheet.exists() and not overwrite:
        raise PathError(f"{sheet} exists already; --overwrite replaces it.")
    check_place(sheet, makes_folder=False)


def _presets(console: Console, bundle: str) -> Sequence[str]:
    offered = offered_presets(bundle)
    left_out = ", ".join(name for name in PRESETS if name not in offered)
    if left_out:
        console.message(f"Left out, since with {bundle} they look like balanced: {left_out}.")
    return offered


def _results(
    upscaler: Upscaler,
    picture: Picture,
    cells: Sequence[Cell],
    crop: tuple[int, int, int, int],
    console: Console,
    interruption: Interruption,
) -> Iterator[UpscaleResult]:
    """Yield what each cell shows, and print its command."""
    from tegula.pipeline.prepare import prepare

    for number, cell in enumerate(cells, 1):
        options = cell.options.replaced(crop=crop)
        showing = show_progress(console, f"{number} of {len(cells)}", str(number))
        with showing as on_progress, interruption.polled():
            result = upscaler.upscale(
                prepare(picture, options),
                options,
                on_progress=on_progress,
                cancelled=interruption.requested,
            )
        console.message(f"{number}: {cell.command}")
        console.record(
            {
                "cell": number,
                "command": cell.command,
                "settings": dict(cell.settings),
                "warnings": list(result.warnings),
            }
        )
        yield result


def _varied(text: str) -> tuple[str, Sequence[str]]:
    """Read ``creativity=0.2,0.5``.

    Raises:
        OptionError: it is of another form, or names no option of a single value.
    """
    name, equals, values = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    given = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
    if not equals or not all(given):
        raise OptionError(f"--vary is OPTION=VALUE,VALUE, which {text!r} is not.")
    schema = OPTIONS.get(name)
    if schema is None or "type" not in schema or schema["type"] == "array" or name == "crop":
        raise OptionError(
            f"--vary takes an option of one value, such as creativity or preset, not {name}."
        )
    return name, given


def _cells(
    context: click.Context,
    source: Path,
    varied: Sequence[tuple[str, Sequence[str]]],
    options: UpscaleOptions,
) -> list[Cell]:
    """Return the cells row by row; the option that is varied first changes from row to row.

    Raises:
        OptionError: there are too many, or a value does not fit.
    """
    names = [name for name, _ in varied]
    combinations = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(values for _, values in varied))
    ]
    if len(combinations) > _MOST_CELLS:
        raise OptionError(f"These are {len(combinations)} cells; a sheet has up to {_MOST_CELLS}.")
    given = list(_given_words(context, names))
    if "seed" not in names and context.params["seed"] is None:
        given += ["--seed", str(options.seed)]
    return [
        Cell(
            settings,
            _with_settings(options, settings),
            shlex.join(
                ["tegula", "upscale", str(source), *given, *_words(settings)],
            ),
        )
        for settings in combinations
    ]


def _words(settings: Mapping[str, str]) -> Iterator[str]:
    for name, value in settings.items():
        if OPTIONS[name]["type"] == "boolean":
            spelling = option_name(name)
            yield spelling if _is_on(name, value) else f"--no-{spelling[2:]}"
        else:
            yield from (option_name(name), value)


def _given_words(context: click.Context, varied: Sequence[str]) -> Iterator[str]:
    """Yield what the command line says and `tegula upscale` takes, too, as it was written."""
    own = {"picture", "output", "overwrite", "vary", "crop", "json", "quiet", *varied}
    for parameter in context.command.params:
        name = str(parameter.name)
        by_hand = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not isinstance(parameter, click.Option) or name in own or not by_hand:
            continue
        value = context.params[name]
        if isinstance(value, bool):
            yield (parameter.opts if value else parameter.secondary_opts)[0]
            continue
        for each in value if parameter.multiple else (value,):
            joined = "x".join(map(str, each)) if isinstance(each, tuple) else f"{each}"
            yield from (parameter.opts[0], joined)


def _is_on(name: str, value: str) -> bool:
    if value.lower() not in ("on", "off", "true", "false"):
        raise OptionError(f"{name} is on or off, not {value}.")
    return value.lower() in ("on", "true")


def _with_settings(options: UpscaleOptions, settings: Mapping[str, str]) -> UpscaleOptions:
    """Return the options of a cell.

    Raises:
        OptionError: a value is of another type or out of bounds.
    """
    values: dict[str, Any] = {}
    for name, text in settings.items():
        kind = OPTIONS[name]["type"]
        try:
            if kind == "boolean":
                values[name] = _is_on(name, text)
            else:
                values[name] = {"number": float, "integer": int}.get(kind, str)(text)
        except ValueError as error:
            whole = "a whole number" if kind == "integer" else "a number"
            raise OptionError(f"{name} is {whole}, not {text}.") from error
    return options.replaced(**values)


def _side_of(options: UpscaleOptions, size: tuple[int, int]) -> int:
    """Return the side of a part that a cell shows, in pixels of the source."""
    factor = max(enlargement(options, *size))
    return max(_SMALLEST_SIDE, round(_SIDE / factor))


_BY_NAME = upscale_sections()
_SECTIONS: Mapping[str, Sequence[click.Option]] = {
    "Sheet": (
        path_option(
            ["-o", "--output"], "The sheet; the default is NAME_tune.png beside the picture."
        ),
        Option(
            ["--vary"],
            "An option and its values; twice for rows and columns.",
            "default: preset",
            multiple=True,
            metavar="OPTION=VALUE,VALUE",
        ),
        flag(["--overwrite"], "Replace a sheet that exists already."),
        path_option(
            ["--like"],
            "Use the settings of a picture that tegula made; options given here win.",
            "RESULT",
        ),
    ),
    **{name: _BY_NAME[name] for name in ("Size", "Picture", "Faces")},
    "Model": MODEL_OPTIONS,
    **{name: _BY_NAME[name] for name in ("Diffusion", "Redraw mode")},
    "Messages": (JSON, QUIET),
}

TUNE = SectionedCommand(
    "tune",
    _tune,
    [click.Argument(["picture"], required=True, metavar="PICTURE")],
    _SECTIONS,
    help_text=_HELP,
    short_help="Show part of a picture with several settings on a sheet.",
    everyday=(
        *("output", "vary", "overwrite", "like", "scale", "resolution", "size", "crop"),
        *("preset", "prompt", "creativity", "resemblance", "seed", "bundle", "json", "quiet"),
    ),
)
