"""Options of the command line, made from the options of an upscale."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tegula.errors import InputError, OptionError
from tegula.options import OPTIONS, REDRAW_OPTIONS, PresetValues, UpscaleOptions
from tegula.schema import span

# Help, choices and defaults come from ``OPTIONS``; bounds are checked by ``UpscaleOptions``
# itself. An option that is not given is None, so that ``--like`` and presets can tell.

SIZE, PICTURE, REDRAW, MESSAGES = "Size", "Picture", "Redraw mode", "Messages"
_SIZE_OPTIONS = ("scale", "resolution", "size", "crop", "max_pixels")
_METAVARS = {"size": "WxH", "crop": "X,Y,W,H", "regions": "X,Y,W,H:PROMPT"}
_SINGULAR = {"regions": "region"}
_TYPES = {"number": float, "integer": int, "string": str, "boolean": bool}


class SectionedOption(click.Option):
    """An option that the help lists under a heading."""

    def __init__(self, declarations: list[str], section: str, **settings: Any) -> None:
        super().__init__(declarations, **settings)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help lists options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list per section, in the order of the parameters."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                section = getattr(parameter, "section", MESSAGES)
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records, col_max=28)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers in one word, such as 640x480 or 10,20,64,64."""

    def __init__(self, count: int, form: str) -> None:
        self.name = form
        self._count = count
        self._separator = "x" if "x" in form else ","

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers of the word."""
        if isinstance(value, tuple):
            return value
        words = re.split(rf"[{self._separator},]", str(value).strip().lower())
        if len(words) != self._count or not all(re.fullmatch(r"\d{1,9}", w) for w in words):
            self.fail(f"{value!r} is not of the form {self.name}.", param, ctx)
        return tuple(int(word) for word in words)


def is_repeated(name: str) -> bool:
    """Tell whether an option takes any number of values."""
    return "items" in OPTIONS[name]


def upscale_options() -> list[click.Parameter]:
    """Return every option of an upscale, in the order of the sections of the help."""
    options = [_option(name, schema) for name, schema in OPTIONS.items()]
    sections = (SIZE, PICTURE, REDRAW)
    return [option for section in sections for option in options if option.section == section]


def given_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an upscale that the command line sets."""
    return {name: parameters[name] for name in OPTIONS if parameters[name] not in (None, ())}


def word(name: str) -> str:
    """Return how the command line calls an option: ``--guidance-scale``, ``--region``."""
    return "--" + _SINGULAR.get(name, name).replace("_", "-")


def _option(name: str, schema: Mapping[str, Any]) -> SectionedOption:
    words = f"{word(name)}/--no-{word(name)[2:]}" if schema["type"] == "boolean" else word(name)
    return SectionedOption(
        [words, name],
        _section(name),
        default=None,
        multiple=is_repeated(name),
        type=_type(name, schema),
        metavar=_METAVARS.get(name),
        help=_help(schema["description"], _facts(name, schema)),
    )


def _help(description: str, facts: Iterable[str]) -> str:
    effect = description.removeprefix(f"{REDRAW}: ")
    brackets = "; ".join(facts)
    return effect[0].upper() + effect[1:] + (f" [{brackets}]" if brackets else "")


def _section(name: str) -> str:
    if name in _SIZE_OPTIONS:
        return SIZE
    return REDRAW if name in ("mode", *REDRAW_OPTIONS) else PICTURE


def _type(name: str, schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return click.Choice(schema["enum"])
    if "prefixItems" in schema:
        return Numbers(len(schema["prefixItems"]), _METAVARS[name])
    return str if is_repeated(name) else _TYPES[schema["type"]]


def _facts(name: str, schema: Mapping[str, Any]) -> Iterable[str]:
    if bounds := span(schema):
        yield bounds
    default = schema["default"]
    if name in PresetValues.model_fields:
        yield "by preset"
    elif schema["type"] == "boolean":
        yield f"default: {'on' if default else 'off'}"
    elif is_repeated(name):
        yield "may be repeated"
    elif default not in (None, ""):
        yield f"default: {default}"


# The settings of a result, for another picture.

_SIZES = ("scale", "resolution", "size")
_LEFT_BEHIND = ("crop", "max_pixels", "window_batch")


@dataclass(frozen=True)
class Models:
    """What ``Upscaler.load`` is asked for; None and nothing stand for the defaults."""

    bundle: str | None = None
    controlnet: str | None = None
    vae: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[str, ...] = ()
    few_step: str | None = None

    def asked(self) -> dict[str, Any]:
        """Return what is not left to the defaults, for the metadata of a result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


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

    The size is taken as it was asked for, so that a picture of another size is enlarged
    by the same factor or to the same resolution. What belongs to the one picture or
    machine, the crop and the limits, stays behind. A given preset fills its options anew.

    Raises:
        OptionError: what is given is out of bounds, or contradicts the settings.
        InputError: the settings are damaged.
    """
    asked = _mapping(settings, "asked")
    as_asked = {name: asked.get(name) for name in OPTIONS if name in _SIZES or is_repeated(name)}
    found = {**settings, **_mapping(settings, "redraw"), **as_asked}
    if "preset" in given:
        found |= {name: asked.get(name) for name in PresetValues.model_fields}
    values = {name: found.get(name) for name in OPTIONS if name not in _LEFT_BEHIND}
    if any(name in given for name in _SIZES):
        values |= dict.fromkeys(_SIZES)
    kept = {name: value for name, value in values.items() if value is not None}
    try:
        kept = UpscaleOptions(**kept).changed()
    except OptionError as error:
        raise InputError(f"The settings of the result are damaged: {error}") from error
    return UpscaleOptions(**{**kept, **given})


def models_like(settings: Mapping[str, Any], given: Models) -> Models:
    """Return the models of a result; another bundle leaves the parts of its own behind.

    Raises:
        InputError: the settings are damaged.
    """
    if given.bundle is not None:
        return given
    found = _mapping(settings, "models")
    try:
        before = Models(
            found.get("bundle"),
            found.get("controlnet"),
            found.get("vae"),
            tuple((str(file), float(weight)) for file, weight in found.get("loras", ())),
            tuple(str(file) for file in found.get("embeddings", ())),
            found.get("few_step"),
        )
    except (TypeError, ValueError) as error:
        raise InputError("The settings of the result are damaged: models.") from error
    return dataclasses.replace(before, **given.asked())


def _mapping(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}
