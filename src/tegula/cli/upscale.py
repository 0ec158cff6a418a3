"""`tegula upscale`: from the command line to the pictures that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from tegula.cli.console import Console, Interruption
from tegula.cli.models import MODEL_OPTIONS, PARTS, Runtime, models_given, models_like
from tegula.cli.options import (
    JSON,
    PROGRESS,
    QUIET,
    SIZES,
    Option,
    SectionedCommand,
    flag,
    given_options,
    options_like,
    path_option,
    read_like,
    upscale_sections,
)
from tegula.cli.pictures import Pictures, Request
from tegula.cli.targets import Naming, SideFiles, Work, find_work
from tegula.errors import OptionError
from tegula.images.formats import FORMATS, format_for
from tegula.options import OPTIONS, PresetValues, UpscaleOptions

_HELP = """Make pictures larger and better.

\b
  tegula upscale photo.jpg                    2x, beside the source
  tegula upscale photo.jpg large.png --scale 4
  tegula upscale a.jpg b.jpg large/           several into a folder
  tegula upscale holiday/ large/              a folder; skips what is done
  tegula upscale 'holiday/**/*.jpg' large/    a pattern; keeps subfolders
  tegula upscale - - < photo.jpg > large.png  a pipe

The last argument is the output, if there is more than one: a file for one picture, a
folder for several. As a picture, `-` is standard input; as an output, standard output.
"""


def _upscale(**parameters: Any) -> None:
    context = click.get_current_context()
    console = Console.open(
        quiet=parameters["quiet"], json=parameters["json"], progress=parameters["progress"]
    )
    interruption = Interruption()
    with interruption.installed():
        request = request_of(parameters, debug=bool(context.find_root().params["debug"]))
        work = work_of(parameters, request)
        if work.jobs[0].target is None:
            for name in ("json", "compare"):
                if parameters[name]:
                    raise OptionError(
                        f"--{name} needs a file for the result, because standard output takes "
                        f"the picture."
                    )
        status = Pictures(request, work, console, interruption).run()
    context.exit(status)


def request_of(parameters: Mapping[str, Any], *, debug: bool) -> Request:
    """Return what the options of the command line ask for."""
    files = {name: parameters[name] for name in SideFiles.__dataclass_fields__}
    return dataclasses.replace(
        request_without_files(parameters),
        side_files=SideFiles(**files),
        quality=parameters["quality"],
        png_level=parameters["png_level"],
        overwrite=parameters["overwrite"],
        debug=debug,
        all_frames=parameters["frames"] == "all",
    )


def request_without_files(parameters: Mapping[str, Any]) -> Request:
    """Return the same for a command that has no options on how results are written."""
    settings = {} if parameters["like"] is None else read_like(parameters["like"])
    parameters = _over_defaults(parameters)
    given = given_options(parameters)
    return Request(
        options=options_like(settings, given) if settings else UpscaleOptions(**given),
        models=models_like(settings, models_given(parameters)),
        runtime=Runtime(**{name: parameters[name] for name in Runtime.__dataclass_fields__}),
        fingerprint=settings.get("fingerprint"),
    )


def _over_defaults(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out defaults of the user's file that what is given takes the place of.

    A result's settings go before them, one size before another, and a preset fills anew.
    """
    context = click.get_current_context()
    by_file = {
        name
        for name in parameters
        if context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP
    }
    left_out: set[str] = set()
    if parameters["like"] is not None:
        left_out |= {*OPTIONS, *PARTS}
    given = {name for name, value in parameters.items() if value not in (None, ())} - by_file
    if given & set(SIZES):
        left_out |= set(SIZES)
    if "preset" in given:
        left_out |= set(PresetValues.model_fields)
    empty = {
        name: () if isinstance(parameters[name], tuple) else None for name in left_out & by_file
    }
    return {**parameters, **empty}


def work_of(parameters: Mapping[str, Any], request: Request) -> Work:
    """Return the pictures that the arguments name, and where their results go."""
    naming = naming_of(parameters, request.options)
    return find_work(parameters["pictures"], parameters["output"], naming, request.side_files)


def naming_of(parameters: Mapping[str, Any], options: UpscaleOptions) -> Naming:
    """Return how the results are named."""
    if options.size is not None:
        size = f"_{options.size[0]}x{options.size[1]}"
    elif options.resolution is not None:
        size = f"_{options.resolution}px"
    else:
        size = f"_x{2 if options.scale is None else options.scale:g}"
    wanted = parameters["format"]
    return Naming(
        format=None if wanted is None else format_for(None, wanted),
        size=size,
        crop="" if options.crop is None else "_crop",
    )


_FILE_OPTIONS: Sequence[click.Option] = (
    Option(
        ["-o", "--output"],
        "Where results go; with it, all arguments are pictures. `-` is standard output.",
        metavar="FILE|FOLDER/",
    ),
    Option(
        ["--format"],
        f"{', '.join(FORMATS)}.",
        "default: that of the output, else of the source, else png",
        metavar="FORMAT",
    ),
    Option(
        ["--quality"],
        "Quality of JPEG, WebP and AVIF; the other formats lose nothing.",
        type=click.IntRange(1, 100),
        default=95,
        metavar="INTEGER",
    ),
    Option(
        ["--png-level"],
        "How hard PNG is compressed: 1 takes half the time of 4, for files up to a third larger.",
        type=click.IntRange(0, 9),
        default=4,
        metavar="INTEGER",
    ),
    flag(["--overwrite"], "Replace results that exist already."),
    path_option(
        ["--like"],
        "Use the settings of a picture that tegula made; options given here win.",
        "RESULT",
    ),
    flag(["--compare"], "Write a before/after picture beside the result, as NAME.compare.png."),
    Option(
        ["--frames"],
        "Of animations and files of several pages: the first picture, or all of them.",
        type=click.Choice(["first", "all"]),
        default="first",
    ),
    path_option(
        ["--preview"],
        "Keep a small picture of the work so far in this file, replaced now and then.",
    ),
    path_option(
        ["--mask"],
        "A picture laid over the source: white is refined, black is only enlarged.",
    ),
    path_option(
        ["--strength-map"],
        "A grey picture laid over the source: white gets all of the creativity, black none.",
    ),
)
PICTURES = click.Argument(["pictures"], nargs=-1, required=True, metavar="PICTURE... [OUTPUT]")
_BY_NAME = upscale_sections()
SECTIONS: Mapping[str, Sequence[click.Option]] = {
    "Files": _FILE_OPTIONS,
    **{name: _BY_NAME[name] for name in ("Size", "Picture", "Faces")},
    "Model": MODEL_OPTIONS,
    **{name: _BY_NAME[name] for name in ("Diffusion", "Redraw mode")},
    "Messages": (JSON, PROGRESS, QUIET),
}
EVERYDAY = (
    *("output", "format", "quality", "overwrite", "like", "compare"),
    *("scale", "resolution", "size", "crop"),
    *("preset", "prompt", "negative_prompt", "creativity", "resemblance", "seed", "faces", "auto"),
    *("bundle", "json", "quiet"),
)
"""What the help shows; ``--help-all`` shows the others, too."""

UPSCALE = SectionedCommand(
    "upscale",
    _upscale,
    [PICTURES],
    SECTIONS,
    help_text=_HELP,
    short_help="Make pictures larger and better.",
    everyday=EVERYDAY,
)
