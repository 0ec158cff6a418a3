"""Knobs of ``UpscaleOptions`` as options of the command line.

Help, choices and defaults come from ``KNOBS``; bounds are checked by ``UpscaleOptions``
itself. An option that is not given is None, so that ``--like`` and presets can tell.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import click

from tegula.knobs import Knob, plain
from tegula.options import KNOBS, RedrawOptions, UpscaleOptions

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
