"""Models and their inputs: declared, checked, described."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tegula import __version__
from tegula.errors import OptionError
from tegula.options import UpscaleOptions

# The inputs of a catalog model as data.

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


# Models, their versions, and what a version makes of its inputs.

SINGLE, ARRAY = "single", "array"
_PACKAGED_CONFIG = Path(__file__).parents[1] / "models" / "mini" / "weights" / "config.json"


@dataclass(frozen=True)
class Situation:
    """What a recipe may look at beside the inputs.

    width, height: of the source in pixels, upright.
    family: of the bundle that will run, such as ``mini`` or ``sd15``.
    window_multiple, minimum_window: what windows the bundle takes, in pixels.
    """

    width: int
    height: int
    family: str
    window_multiple: int = 64
    minimum_window: int = 256


@dataclass(frozen=True)
class Recipe:
    """How one run is carried out.

    passes: one upscale each; every one but the first enlarges the result before it.
    format: of the output file.
    mask: name of the file input that restricts the change; white changes.
    mask_keeps_white: white is kept instead.
    seamless: the picture is a pattern that repeats.
    loras: (file, weight) that the bundle should carry.
    notes: sentences for the log on what is done otherwise than asked.
    """

    passes: tuple[UpscaleOptions, ...]
    format: str = "png"
    mask: str | None = None
    mask_keeps_white: bool = False
    seamless: bool = False
    loras: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()


Values = Mapping[str, Any]
Plan = Callable[[Values, Situation], Recipe]


@dataclass(frozen=True)
class Version:
    """One fixed schema of a model and what becomes of its inputs.

    name: of the model, ``owner/name``.
    label: tells the versions of a model apart for people.
    output: ``single`` or ``array`` of pictures.
    image: the file input that is enlarged.
    """

    name: str
    label: str
    fields: tuple[Field, ...]
    plan: Plan = field(repr=False, compare=False)
    output: str = SINGLE
    image: str = "image"
    weights: str = ""

    @cached_property
    def id(self) -> str:
        """A hash over the schema, this version of tegula and the weights, 64 hex digits."""
        content = [self.name, self.output, __version__, self.weights, *map(_identity, self.fields)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def field(self, name: str) -> Field | None:
        """Return the input of that name."""
        return next((known for known in self.fields if known.name == name), None)


@dataclass(frozen=True)
class Model:
    """A model as people call it; the newest version comes first."""

    owner: str
    name: str
    description: str
    versions: tuple[Version, ...]
    remark: str = ""

    @property
    def reference(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"

    @property
    def latest(self) -> Version:
        """The newest version."""
        return self.versions[0]


def packaged_fingerprint() -> str:
    """Return the hash over the packaged weights; empty where they are missing."""
    try:
        return str(json.loads(_PACKAGED_CONFIG.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError):
        return ""


def one_pass(options: UpscaleOptions, notes: Sequence[str] = (), **others: Any) -> Recipe:
    """Return a recipe of a single upscale."""
    return Recipe((options,), notes=tuple(notes), **others)


def _identity(known: Field) -> list[object]:
    limits = [known.required, known.default, known.low, known.high]
    return [known.name, known.kind, known.description, *limits, *known.choices]


# Checking inputs against a version, all of them at once, in Replicate's words.

_SHOWN = 80


@dataclass(frozen=True)
class InvalidField:
    """One violation.

    type: the keyword of the schema that is violated, as Replicate calls it.
    field: ``input.scale``, or ``input`` where an input is missing.
    description: what is right.
    given: what was given, shortened; empty where nothing was.
    """

    type: str
    field: str
    description: str
    given: str = ""


class InvalidInputsError(OptionError):
    """Inputs that violate the schema of a version; ``fields`` lists every violation."""

    code = "invalid_inputs"

    def __init__(self, fields: tuple[InvalidField, ...]) -> None:
        self.fields = fields
        super().__init__("; ".join(_told(field) for field in fields) + ".")

    @property
    def detail(self) -> str:
        """One line per violation, as in the ``detail`` of Replicate's problems."""
        return "".join(f"- {field.field}: {field.description}\n" for field in self.fields)


@dataclass(frozen=True)
class ValidInputs:
    """Inputs that fit their version.

    values: every input of the schema, with defaults where nothing was given.
    warnings: sentences on inputs that the version does not know.
    """

    values: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def validate(version: Version, inputs: Mapping[str, Any]) -> ValidInputs:
    """Check inputs and fill in defaults; None counts as not given.

    Args:
        version: whose schema holds.
        inputs: by name; a file is text (an address), a path, bytes or an open file.

    Raises:
        InvalidInputsError: lists all violations.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    errors = [
        InvalidField("required", "input", f"{known.name} is required")
        for known in version.fields
        if known.required and known.name not in given
    ]
    values: dict[str, Any] = {}
    for known in version.fields:
        values[known.name] = given.get(known.name, known.default)
        if known.name in given:
            error = _violation(known, given[known.name])
            values[known.name] = _plain(known, given[known.name])
            errors += [error] if error else []
    if errors:
        raise InvalidInputsError(tuple(errors))
    unknown = [name for name in given if version.field(name) is None]
    warnings = tuple(f"{version.name} has no input {name}; it is ignored." for name in unknown)
    return ValidInputs(values, warnings)


def from_text(version: Version, words: Mapping[str, str]) -> dict[str, Any]:
    """Turn the words of a command line into values of the kinds that the version asks for.

    What cannot be turned stays text, so that ``validate`` can tell what is wrong with it.
    """
    return {name: _from_word(version.field(name), word) for name, word in words.items()}


def _from_word(known: Field | None, word: str) -> Any:
    kind = known.kind if known else STRING
    if kind == BOOLEAN:
        return {"true": True, "1": True, "false": False, "0": False}.get(word.lower(), word)
    try:
        if kind == INTEGER:
            return int(word)
        if kind == NUMBER:
            return float(word)
    except ValueError:
        pass
    return word


def _violation(known: Field, value: Any) -> InvalidField | None:
    name, given = f"input.{known.name}", _shown(value)
    if not _fits(known.kind, value):
        expected = STRING if known.kind == FILE else known.kind
        description = f"Invalid type. Expected: {expected}, given: {_type_name(value)}"
        return InvalidField("invalid_type", name, description, given)
    if known.choices and value not in known.choices:
        listed = ", ".join(_quoted(choice) for choice in known.choices)
        description = f"{known.name} must be one of the following: {listed}"
        return InvalidField("enum", name, description, given)
    if value in known.refusals if isinstance(value, str) else False:
        return InvalidField("enum", name, known.refusals[value], given)
    if known.low is not None and value < known.low:
        description = f"Must be greater than or equal to {_number(known.low)}"
        return InvalidField("number_gte", name, description, given)
    if known.high is not None and value > known.high:
        description = f"Must be less than or equal to {_number(known.high)}"
        return InvalidField("number_lte", name, description, given)
    return None


def _fits(kind: str, value: Any) -> bool:
    if kind == STRING:
        return isinstance(value, str)
    if kind == BOOLEAN:
        return isinstance(value, bool)
    if kind == FILE:
        return isinstance(value, str | Path | bytes) or hasattr(value, "read")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return kind == NUMBER or value == int(value)


def _plain(known: Field, value: Any) -> Any:
    return int(value) if known.kind == INTEGER and _fits(INTEGER, value) else value


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int):
        return INTEGER
    if isinstance(value, float):
        return NUMBER
    if isinstance(value, Mapping):
        return "object"
    return "array" if isinstance(value, list | tuple) else STRING


def _told(field: InvalidField) -> str:
    given = f", not {field.given}" if field.given else ""
    return f"{field.field}: {field.description[:1].lower()}{field.description[1:]}{given}"


def _quoted(choice: str | int) -> str:
    return f'"{choice}"' if isinstance(choice, str) else str(choice)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


# A version's schema as an OpenAPI document in the form that Replicate's models have.

_URI: dict[str, Any] = {"type": "string", "format": "uri"}


def openapi_schema(version: Version) -> dict[str, Any]:
    """Return the document; ``components.schemas`` holds Input, Output and the enums."""
    enums = {known.name: _enum(known) for known in version.fields if known.choices}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {},
        "components": {"schemas": {"Input": _input(version), "Output": _output(version), **enums}},
    }


def _input(version: Version) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "title": "Input",
        "properties": {
            known.name: _property(known, order) for order, known in enumerate(version.fields)
        },
    }
    required = [known.name for known in version.fields if known.required]
    return {**schema, "required": required} if required else schema


def _property(known: Field, order: int) -> dict[str, Any]:
    schema: dict[str, Any]
    if known.choices:
        schema = {"allOf": [{"$ref": f"#/components/schemas/{known.name}"}]}
    elif known.kind == FILE:
        schema = {**_URI, "title": _title(known.name)}
    else:
        schema = {"type": known.kind, "title": _title(known.name)}
    optional = {"default": known.default, "minimum": known.low, "maximum": known.high}
    schema |= {key: value for key, value in optional.items() if value is not None}
    return {**schema, "x-order": order, "description": known.description}


def _enum(known: Field) -> dict[str, Any]:
    kind = STRING if isinstance(known.choices[0], str) else "integer"
    return {
        "type": kind,
        "title": known.name,
        "enum": list(known.choices),
        "description": "An enumeration.",
    }


def _output(version: Version) -> dict[str, Any]:
    if version.output == ARRAY:
        return {"type": "array", "items": dict(_URI), "title": "Output"}
    return {**_URI, "title": "Output"}


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()
