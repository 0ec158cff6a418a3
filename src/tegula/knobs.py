"""What is known of one option beside its value: effect, unit, bounds, choices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tegula.errors import OptionError


@dataclass(frozen=True)
class Knob:
    """What the docs, the command line and the validation know of one option."""

    effect: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    preset: bool = False


def knob(
    effect: str,
    default: Any = None,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    preset: bool = False,
) -> Any:
    """Return a dataclass field that knows its knob in its metadata."""
    about = Knob(effect, unit, low, high, choices, preset)
    return dataclasses.field(default=default, metadata={"knob": about})


def check_knob(name: str, knob: Knob, value: Any) -> None:
    """Check a value, or each number of a tuple; None is always right.

    Raises:
        OptionError: it is out of bounds, or not among the choices.
    """
    if value is None:
        return
    if knob.choices and value not in knob.choices:
        raise OptionError(f"{name} is one of {', '.join(knob.choices)}, not {value!r}.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        below = knob.low is not None and number < knob.low
        above = knob.high is not None and number > knob.high
        if below or above or not math.isfinite(number):
            raise OptionError(f"{name} is {_bounds(knob)}, not {number}.")


def _bounds(knob: Knob) -> str:
    unit = f" {knob.unit}" if knob.unit else ""
    if knob.high is None:
        return f"at least {plain(knob.low)}{unit}"
    return f"between {plain(knob.low)} and {plain(knob.high)}{unit}"


def plain(number: float | None) -> str:
    """Return a bound as people write it: no exponent, no needless decimals."""
    return "" if number is None else f"{number:.6f}".rstrip("0").rstrip(".")
