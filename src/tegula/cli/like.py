"""The settings of a result, for another picture."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tegula.cli.options import is_repeated, kind_of
from tegula.errors import InputError
from tegula.options import KNOBS, PresetValues, UpscaleOptions

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
