"""The options of `tegula upscale`, made from ``UpscaleOptions``, and the settings of ``--like``.

Help, choices and defaults come from ``OPTIONS``; bounds are checked by ``UpscaleOptions``
itself. An option that is not given is None, so that ``--like`` and presets can fill it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from tegula.errors import InputError, OptionError
from tegula.options import OPTIONS, REDRAW_OPTIONS, PresetValues, UpscaleOptions
from tegula.schema import plain, span

_REDRAW = "Redraw mode"
_DIFFUSION = "Diffusion"
_SECTIONS: Mapping[str, Sequence[str]] = {
    "Size": ("scale", "resolution", "size", "crop", "max_pixels"),
    "Picture": (
        "preset",
        "prompt",
        "source_prompt",
        "negative_prompt",
        "creativity",
        "resemblance",
        "seed",
        "hdr",
        "detail",
        "sharpen",
        "colour_lock",
        "auto",
        "prescaler",
        "drawing_prescaler",
        "drawing_share",
        "hold_drawings",
        "keep_grey",
        "tuning",
        "mend_jpeg",
        "mend_chroma",
        "mend_blur",
        "mend_flat",
        "regions",
        "keep_hidden_colour",
    ),
    "Faces": ("likeness", "faces", "face_fidelity", "face_upsample"),
    _REDRAW: ("mode", *REDRAW_OPTIONS),
}
"""What is in none of them belongs to the section of diffusion."""

_METAVARS = {"size": "WxH", "crop": "X,Y,W,H", "regions": "X,Y,W,H:PROMPT"}
_SINGULAR = {"regions": "region"}
_TYPES = {"number": float, "integer": int, "string": str, "boolean": bool}


class Option(click.Option):
    """An option whose help ends in facts: ``Sharpens the result. [0 to 10; default: 0]``.

    The facts are, unless given, the bounds and the default of the option.
    """

    def __init__(self, names: Sequence[str], effect: str, facts: str = "", **settings: Any) -> None:
        kind, default = settings.get("type"), settings.get("default")
        if not facts and default is not None:
            facts = f"{kind.min} to {kind.max}; " if isinstance(kind, click.IntRange) else ""
            facts += f"default: {_written(default)}"
        super().__init__(names, help=f"{effect} [{facts}]" if facts else effect, **settings)

    def get_help_extra(self, ctx: click.Context) -> Any:  # noqa: ARG002
        """Leave out click's own list of facts, which would repeat ours."""
        return {}


def flag(names: Sequence[str], effect: str) -> Option:
    """Return an option without a value."""
    return Option(names, effect, is_flag=True)


def path_option(names: Sequence[str], effect: str, metavar: str = "FILE") -> Option:
    """Return an option that takes the path of a file or folder."""
    return Option(names, effect, type=click.Path(path_type=Path), metavar=metavar)


JSON = flag(["--json"], "Print JSON for programs, one object per line.")
PROGRESS = flag(["--progress"], "With --json, print a line for every hundredth of the work, too.")
QUIET = flag(["-q", "--quiet"], "Print errors only.")


_HELP_ALL = "tegula.cli.options.help_all"


class SectionedCommand(click.Command):
    """A command whose help lists options under headings, and the rarer ones on demand.

    Args:
        everyday: the parameters that ``--help`` shows; all of them when there are none.
            ``--help-all`` shows the others, too.
    """

    def __init__(
        self,
        name: str,
        callback: Callable[..., None],
        arguments: Sequence[click.Argument],
        sections: Mapping[str, Sequence[click.Option]],
        *,
        help_text: str,
        short_help: str,
        everyday: Sequence[str] = (),
    ) -> None:
        options = [option for section in sections.values() for option in section]
        self._help_all = Option(
            ["--help-all"],
            f"Show all {len(options)} options and exit.",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=self._show_all,
        )
        super().__init__(
            name,
            callback=callback,
            params=[*arguments, *options, *([self._help_all] if everyday else [])],
            help=help_text,
            short_help=short_help,
        )
        self._sections = sections
        self._everyday = frozenset(everyday)

    def _show_all(self, ctx: click.Context, _: click.Parameter, wanted: Any) -> None:
        if wanted and not ctx.resilient_parsing:
            ctx.meta[_HELP_ALL] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list per section; the last one has ``--help``, too."""
        help_option = self.get_help_option(ctx)
        *_, last = self._sections
        shows_all = not self._everyday or ctx.meta.get(_HELP_ALL, False)
        for name, options in self._sections.items():
            shown = [each for each in options if shows_all or each.name in self._everyday]
            if name == last:
                ways = (help_option, self._help_all if self._help_all in self.params else None)
                shown += [option for option in ways if option is not None]
            records = [option.get_help_record(ctx) for option in shown]
            if records:
                with formatter.section(name):
                    formatter.write_dl([record for record in records if record], col_max=28)


def upscale_sections() -> Mapping[str, Sequence[click.Option]]:
    """Return the options of an upscale by the sections of the help."""
    named = {name for names in _SECTIONS.values() for name in names}
    others = [name for name in OPTIONS if name not in named]
    return {
        section: [_option(name, OPTIONS[name]) for name in names]
        for section, names in {**_SECTIONS, _DIFFUSION: others}.items()
    }


def given_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an upscale that the command line sets."""
    return {name: parameters[name] for name in OPTIONS if parameters[name] not in (None, ())}


def option_name(name: str) -> str:
    """Return the option that sets a field: ``--guidance-scale``, ``--region``."""
    return "--" + _SINGULAR.get(name, name).replace("_", "-")


def _is_repeated(name: str) -> bool:
    """Tell whether an option may be given several times."""
    return "items" in OPTIONS[name]


def _option(name: str, schema: Mapping[str, Any]) -> Option:
    spelling = option_name(name)
    if schema["type"] == "boolean":
        spelling = f"{spelling}/--no-{spelling[2:]}"
    effect = schema["description"].removeprefix(f"{_REDRAW}: ")
    return Option(
        [spelling, name],
        effect[0].upper() + effect[1:],
        "; ".join(_facts(name, schema)),
        default=None,
        multiple=_is_repeated(name),
        type=_type(name, schema),
        metavar=_METAVARS.get(name),
        shell_complete=names_of_files("prescaler") if name == "prescaler" else None,
    )


def names_of_files(kind: str) -> Callable[[Any, Any, str], list[CompletionItem]]:
    """Return what completes the names of files of a kind, and paths where none begins so.

    Args:
        kind: a value of ``tegula.models.library.FileKind``.
    """

    def complete(_: Any, __: Any, incomplete: str) -> list[CompletionItem]:
        from tegula.models.library import FileKind, list_files

        names = [each.name for each in list_files(FileKind(kind))]
        if kind == "checkpoint":
            from tegula.models.load import BUNDLES

            names = [*BUNDLES, *names]
        if kind == "prescaler":
            from tegula.models.prescalers import list_prescalers

            names = [*(facts.name for facts in list_prescalers()), *names]
        found = [name for name in names if name.lower().startswith(incomplete.lower())]
        items = [CompletionItem(name) for name in dict.fromkeys(found)]
        return items or [CompletionItem(incomplete, type="file")]

    return complete


def _type(name: str, schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return click.Choice(schema["enum"])
    if "prefixItems" in schema:
        return whole_numbers(_METAVARS[name], len(schema["prefixItems"]))
    return str if _is_repeated(name) else _TYPES[schema["type"]]


def _facts(name: str, schema: Mapping[str, Any]) -> Iterable[str]:
    if bounds := span(schema):
        yield bounds
    default = schema["default"]
    if name in PresetValues.model_fields:
        yield "by preset"
    elif schema["type"] == "boolean":
        yield f"default: {'on' if default else 'off'}"
    elif _is_repeated(name):
        yield "may be repeated"
    elif default not in (None, ""):
        yield f"default: {_written(default)}"


def _written(default: object) -> str:
    return plain(default) if isinstance(default, float) else str(default)


def whole_numbers(form: str, count: int) -> Callable[[str], tuple[int, ...]]:
    """Return what reads whole numbers from one argument, such as 640x480 or 10,20,64,64."""
    separators = "[x,]" if "x" in form else ","

    def parse(text: str) -> tuple[int, ...]:
        parts = re.split(separators, text.strip().lower())
        if len(parts) != count or not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
            raise click.BadParameter(f"{text!r} is not of the form {form}.")
        return tuple(int(part) for part in parts)

    return parse


# ``--like``: the settings of a result, for another picture.

SIZES = ("scale", "resolution", "size")
_LEFT_BEHIND = ("crop", "max_pixels", "window_batch")


def read_like(path: Path) -> dict[str, Any]:
    """Read the settings of a result.

    Raises:
        PathError: the file cannot be read.
        ImageError: it is not an image.
        InputError: it is not a result of tegula.
    """
    from tegula.images.encode import read_settings

    settings = read_settings(path)
    if settings is None:
        raise InputError(f"{path} holds no settings of tegula; --like takes a result of it.")
    return settings


def options_like(settings: Mapping[str, Any], given: Mapping[str, Any]) -> UpscaleOptions:
    """Return the options of a result, with those that are given in their place.

    The size is taken as the caller gave it, so that a picture of another size is enlarged
    by the same factor or to the same resolution. What belongs to the one picture or
    machine, the crop and the limits, stays behind. A given preset fills its options anew.

    Raises:
        OptionError: what is given is out of bounds, or contradicts the settings.
        InputError: the settings are damaged.
    """
    asked = settings_part(settings, "asked")
    as_asked = {name: asked.get(name) for name in OPTIONS if name in SIZES or _is_repeated(name)}
    found = {**settings, **settings_part(settings, "redraw"), **as_asked}
    if "preset" in given:
        found |= {name: asked.get(name) for name in PresetValues.model_fields}
    values = {name: found.get(name) for name in OPTIONS if name not in _LEFT_BEHIND}
    if any(name in given for name in SIZES):
        values |= dict.fromkeys(SIZES)
    kept = {name: value for name, value in values.items() if value is not None}
    try:
        kept = UpscaleOptions(**kept).changed()
    except OptionError as error:
        raise InputError(f"The settings of the result are damaged: {error}") from error
    return UpscaleOptions(**{**kept, **given})


def settings_part(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object within the settings of a result, empty if there is none.

    Raises:
        InputError: it is something else.
    """
    value = settings.get(name, {})
    if not isinstance(value, Mapping):
        raise InputError(f"The settings of the result are damaged: {name} is {value!r}.")
    return value
