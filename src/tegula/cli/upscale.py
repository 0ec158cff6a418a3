"""`tegula upscale`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tegula.cli.batch import Batch, Request
from tegula.cli.console import Console, Interruption, wants_json
from tegula.cli.options import (
    MESSAGES,
    Models,
    SectionedCommand,
    SectionedOption,
    given_options,
    models_like,
    options_like,
    read_like,
    upscale_options,
)
from tegula.cli.targets import Naming, Work, find_work
from tegula.errors import OptionError
from tegula.images.formats import FORMATS, format_for
from tegula.options import UpscaleOptions

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BACKENDS = ("torch", "openvino")
_HELP = """Make pictures larger and better.

\b
  tegula upscale photo.jpg                    2x, beside the source
  tegula upscale photo.jpg large.png --scale 4
  tegula upscale a.jpg b.jpg large/           several into a folder
  tegula upscale holiday/ large/              a folder; skips what is done
  tegula upscale 'holiday/**/*.jpg' large/    a pattern; keeps subfolders
  tegula upscale - - < photo.jpg > large.png  a pipe

The last word is the output, where there is more than one: a file for one picture, a
folder for several. As a picture, `-` is standard input; as an output, standard output.
"""


class _Lora(click.ParamType[tuple[str, float]]):
    """A LoRA and its weight."""

    name = "FILE[:WEIGHT]"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,  # noqa: ARG002
        ctx: click.Context | None,  # noqa: ARG002
    ) -> tuple[str, float]:
        """Split the weight off; without one it is 1."""
        if isinstance(value, tuple):
            return value
        file, colon, weight = str(value).rpartition(":")
        try:
            return (file, float(weight)) if colon else (weight, 1.0)
        except ValueError:
            return str(value), 1.0


def _run(**parameters: Any) -> None:
    ctx = click.get_current_context()
    console = Console(quiet=parameters["quiet"], json=parameters["json"])
    wants_json(ctx, json=console.json)
    interruption = Interruption()
    with interruption.installed():
        request = request_of(parameters, debug=bool(ctx.find_root().params["debug"]))
        work = work_of(parameters, request.options)
        _check_streams(work, parameters)
        status = Batch(request, work, console, interruption).run()
    ctx.exit(status)


def request_of(parameters: Mapping[str, Any], *, debug: bool) -> Request:
    """Return what the options ask for."""
    given = given_options(parameters)
    models = Models(**{name: parameters[name] for name in Models.__dataclass_fields__})
    settings = {} if parameters["like"] is None else read_like(parameters["like"])
    return Request(
        options=options_like(settings, given) if settings else UpscaleOptions(**given),
        models=models_like(settings, models),
        fingerprint=settings.get("fingerprint"),
        debug=debug,
        **{name: parameters[name] for name in _PASSED_ON},
    )


_PASSED_ON = (
    "device",
    "precision",
    "backend",
    "compile",
    "quality",
    "overwrite",
    "compare",
    "mask",
    "strength_map",
    "preview",
)


def work_of(parameters: Mapping[str, Any], options: UpscaleOptions) -> Work:
    """Return the pictures that the words name, and where their results go."""
    naming = Naming(
        format=parameters["format"],
        size=_size_in_name(options),
        crop="" if options.crop is None else "_crop",
    )
    return find_work(parameters["words"], parameters["output"], naming)


def _size_in_name(options: UpscaleOptions) -> str:
    if options.size is not None:
        return f"_{options.size[0]}x{options.size[1]}"
    if options.resolution is not None:
        return f"_{options.resolution}px"
    return f"_x{2 if options.scale is None else options.scale:g}"


def _check_streams(work: Work, parameters: Mapping[str, Any]) -> None:
    if work.jobs[0].target is not None:
        return
    for name in ("json", "compare"):
        if parameters[name]:
            raise OptionError(
                f"--{name} needs a file for the result, because standard output takes the picture."
            )


def _format(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001
    return None if value is None else format_for(None, value)


def _preview(
    ctx: click.Context,  # noqa: ARG001
    parameter: click.Parameter,  # noqa: ARG001
    value: Path | None,
) -> Path | None:
    if value is not None:
        format_for(value, None)
    return value


def _file_options() -> list[click.Parameter]:
    section = "Files"
    return [
        SectionedOption(
            ["-o", "--output"],
            section,
            metavar="FILE|FOLDER/",
            help="Where results go; all other words are pictures then. `-` is standard output.",
        ),
        SectionedOption(
            ["--format"],
            section,
            callback=_format,
            metavar="FORMAT",
            help=f"{', '.join(FORMATS)}. [that of the output, or of the source, or png]",
        ),
        SectionedOption(
            ["--quality"],
            section,
            type=click.IntRange(1, 100),
            metavar="INTEGER",
            default=95,
            help="Of JPEG, WebP and AVIF; the others lose nothing. [1 to 100; default: 95]",
        ),
    ]


def _result_options() -> list[click.Parameter]:
    section = "Files"
    return [
        SectionedOption(
            ["--overwrite"], section, is_flag=True, help="Make results again that are there."
        ),
        SectionedOption(
            ["--compare"],
            section,
            is_flag=True,
            help="Write a before/after picture beside the result, as NAME.compare.png.",
        ),
        SectionedOption(
            ["--preview"],
            section,
            callback=_preview,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Keep a small picture of the work so far in this file, replaced now and then.",
        ),
        SectionedOption(
            ["--mask"],
            section,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A picture laid over the source: white is refined, black is only enlarged.",
        ),
        SectionedOption(
            ["--strength-map"],
            section,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A grey picture laid over the source: what share of creativity each place gets.",
        ),
        SectionedOption(
            ["--like"],
            section,
            type=click.Path(path_type=Path),
            metavar="RESULT",
            help="Take the settings of a result of tegula; options given here win.",
        ),
    ]


def _model_options() -> list[click.Parameter]:
    section = "Model"
    return [
        SectionedOption(
            ["--model", "--bundle", "bundle"],
            section,
            metavar="NAME|PATH",
            help="A name from `tegula models`, a hub id, a folder or a checkpoint. "
            "[default: the packaged one]",
        ),
        SectionedOption(["--controlnet"], section, metavar="PATH", help="Another tile ControlNet."),
        SectionedOption(["--vae"], section, metavar="PATH", help="Another autoencoder."),
        SectionedOption(
            ["--lora", "loras"],
            section,
            type=_Lora(),
            metavar="FILE[:WEIGHT]",
            multiple=True,
            help="A LoRA and its weight, 1 if left out; may be repeated.",
        ),
        SectionedOption(
            ["--few-step"],
            section,
            metavar="NAME|FILE",
            help="A LoRA for few steps, run as it wants: hyper-4, tcd, lcm, a file, auto or none. "
            "[default: auto with --preset fast]",
        ),
        SectionedOption(
            ["--embedding", "embeddings"],
            section,
            metavar="FILE",
            multiple=True,
            help="A textual inversion; may be repeated.",
        ),
    ]


def _machine_options() -> list[click.Parameter]:
    section = "Model"
    return [
        SectionedOption(
            ["--device"],
            section,
            default="auto",
            help="auto, cpu, cuda, cuda:N or mps. [default: auto]",
        ),
        SectionedOption(
            ["--precision"],
            section,
            type=click.Choice(PRECISIONS),
            default="auto",
            help="What to compute in; `tegula doctor` tells what auto is. [default: auto]",
        ),
        SectionedOption(
            ["--backend"],
            section,
            type=click.Choice(BACKENDS),
            default="torch",
            help="What runs the denoiser; openvino is for processors. [default: torch]",
        ),
        SectionedOption(
            ["--compile"],
            section,
            is_flag=True,
            help="Compile the model first: minutes once, then kept; pays off for many pictures.",
        ),
    ]


def _message_options() -> list[click.Parameter]:
    return [
        SectionedOption(
            ["--json"], MESSAGES, is_flag=True, help="Print one JSON object per result."
        ),
        SectionedOption(["-q", "--quiet"], MESSAGES, is_flag=True, help="Print errors only."),
    ]


UPSCALE = SectionedCommand(
    "upscale",
    callback=_run,
    help=_HELP,
    short_help="Make pictures larger and better.",
    params=[
        click.Argument(["words"], nargs=-1, required=True, metavar="IN... [OUT]"),
        *_file_options(),
        *_result_options(),
        *upscale_options(),
        *_model_options(),
        *_machine_options(),
        *_message_options(),
    ],
)
