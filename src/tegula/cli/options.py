"""Options of the command line, made from the knobs."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tegula.errors import InputError
from tegula.options import KNOBS, Knob, PresetValues, RedrawOptions, UpscaleOptions, plain

# Knobs of ``UpscaleOptions`` as options of the command line.
#
# Help, choices and defaults come from ``KNOBS``; bounds are checked by ``UpscaleOptions``
# itself. An option that is not given is None, so that ``--like`` and presets can tell.

SIZE, PICTURE, REDRAW, MESSAGES = "Size", "Picture", "Redraw mode", "Messages"
_SIZE_KNOBS = ("scale", "resolution", "size", "crop", "max_pixels")
_REDRAW_KNOBS = ("mode", *(field.name for field in dataclasses.fields(RedrawOptions)))
_METAVARS = {"size": "WxH", "crop": "X,Y,W,H", "regions": "X,Y,W,H:PROMPT"}
_SINGULAR = {"regions": "region"}
_HINTS = typing.get_type_hints(UpscaleOptions)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(UpscaleOptions)}


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


def kind_of(name: str) -> Any:
    """Return the type of a knob when it is set: float, int, str, bool or a tuple of these."""
    hint = _HINTS[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def is_repeated(name: str) -> bool:
    """Tell whether a knob takes any number of values."""
    return typing.get_args(kind_of(name))[-1:] == (Ellipsis,)


def knob_options() -> list[click.Parameter]:
    """Return an option for every knob, in the order of the sections of the help."""
    options = [_option(name, knob) for name, knob in KNOBS.items()]
    sections = (SIZE, PICTURE, REDRAW)
    return [option for section in sections for option in options if option.section == section]


def given_knobs(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs that the command line sets."""
    return {name: parameters[name] for name in KNOBS if parameters[name] not in (None, ())}


def word(name: str) -> str:
    """Return how the command line calls a knob: ``--guidance-scale``, ``--region``."""
    return "--" + _SINGULAR.get(name, name).replace("_", "-")


def _option(name: str, knob: Knob) -> SectionedOption:
    kind = kind_of(name)
    words = f"{word(name)}/--no-{word(name)[2:]}" if kind is bool else word(name)
    return SectionedOption(
        [words, name],
        _section(name),
        default=None,
        multiple=is_repeated(name),
        type=_type(name, knob, kind),
        metavar=_METAVARS.get(name),
        help=_help(knob, _facts(name, knob, kind)),
    )


def _help(knob: Knob, facts: Iterable[str]) -> str:
    effect = knob.effect.removeprefix(f"{REDRAW}: ")
    brackets = "; ".join(facts)
    return effect[0].upper() + effect[1:] + (f" [{brackets}]" if brackets else "")


def _section(name: str) -> str:
    if name in _SIZE_KNOBS:
        return SIZE
    return REDRAW if name in _REDRAW_KNOBS else PICTURE


def _type(name: str, knob: Knob, kind: Any) -> Any:
    if knob.choices:
        return click.Choice(knob.choices)
    if is_repeated(name):
        return typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        return Numbers(len(typing.get_args(kind)), _METAVARS[name])
    return kind


def _facts(name: str, knob: Knob, kind: Any) -> Iterable[str]:
    unit = f" {knob.unit}" if knob.unit else ""
    if knob.low is not None and knob.high is not None:
        yield f"{plain(knob.low)} to {plain(knob.high)}{unit}"
    default = _DEFAULTS[name]
    if knob.preset:
        yield "by preset"
    elif kind is bool:
        yield f"default: {'on' if default else 'off'}"
    elif is_repeated(name):
        yield "may be repeated"
    elif default not in (None, ""):
        yield f"default: {default}"


# The settings of a result, for another picture.

_SIZES = ("scale", "resolution", "size")
_LEFT_BEHIND = ("crop", "max_pixels", "window_batch")
_FILLED_BY_PRESET = frozenset(field.name for field in dataclasses.fields(PresetValues))


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
    machine, the crop and the limits, stays behind. A given preset fills its knobs anew.

    Raises:
        OptionError: a value is out of bounds.
        InputError: the settings are damaged.
    """
    asked = _mapping(settings, "asked")
    as_asked = {name: asked.get(name) for name in KNOBS if name in _SIZES or is_repeated(name)}
    found = {**settings, **_mapping(settings, "redraw"), **as_asked}
    if "preset" in given:
        found |= {name: asked.get(name) for name in _FILLED_BY_PRESET}
    values = {name: _fitted(name, found.get(name)) for name in KNOBS if name not in _LEFT_BEHIND}
    if any(name in given for name in _SIZES):
        values |= dict.fromkeys(_SIZES)
    kept = {name: value for name, value in values.items() if value is not None}
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


def _fitted(name: str, value: Any) -> Any:
    """Return a value from JSON in the type of its knob."""
    if value is None:
        return None
    kind = kind_of(name)
    if typing.get_origin(kind) is tuple:
        items, item = (value if isinstance(value, list) else [None]), typing.get_args(kind)[0]
        complete = is_repeated(name) or len(items) == len(typing.get_args(kind))
        if complete and all(type(each) is item for each in items):
            return tuple(items)
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    raise InputError(f"The settings of the result are damaged: {name} is {value!r}.")
