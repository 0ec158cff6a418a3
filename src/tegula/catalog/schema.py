"""The inputs of a catalog model as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EXACT, APPROXIMATED, REFUSED = "exact", "approximated", "refused"
STRING, INTEGER, NUMBER, BOOLEAN, FILE = "string", "integer", "number", "boolean", "file"


@dataclass(frozen=True, kw_only=True)
class Field:
    """One input.

    kind: ``string``, ``integer``, ``number``, ``boolean`` or ``file``.
    default: what is used when nothing is given; None leaves it open.
    low, high: inclusive bounds of a number.
    choices: the only values there are; of one type.
    refusals: why some of the choices cannot be had, by choice.
    fidelity: how far tegula does what the model of this name does: ``exact``,
        ``approximated`` or ``refused``.
    remark: what is done instead, or why not.
    """

    name: str
    kind: str
    description: str
    default: object = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str | int, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    fidelity: str = EXACT
    remark: str = ""


def image_field(name: str = "image", description: str = "The picture to enlarge.") -> Field:
    """Return the required picture."""
    return Field(name=name, kind=FILE, description=description, required=True)


def seed_field(default: int | None = None) -> Field:
    """Return the seed; without a default it is random."""
    return Field(
        name="seed",
        kind=INTEGER,
        description="Fixes the noise; random when left out.",
        default=default,
        low=0,
        high=2**63 - 1,
        fidelity=APPROXIMATED,
        remark="the same seed repeats our picture, not that of the other program",
    )
