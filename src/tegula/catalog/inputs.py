"""Models by name: their inputs as pydantic classes, how these are checked and described.

Each version of a model declares its inputs once, as a subclass of ``Inputs``. The checks,
the sentences of errors, the OpenAPI document in Replicate's form, the pages of the docs and
the words of the command line follow from it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from tegula import __version__
from tegula.catalog.violations import InvalidField, InvalidInputsError, violation
from tegula.options import Seed, UpscaleOptions
from tegula.schema import properties_of, shown

EXACT, APPROXIMATED, REFUSED = "exact", "approximated", "refused"
STRING, INTEGER, NUMBER, BOOLEAN, FILE = "string", "integer", "number", "boolean", "file"
SINGLE, ARRAY = "single", "array"

# What a model class is made of.


def approximated(remark: str) -> JsonDict:
    """Return what marks an input that does nearly what it does in the model of this name.

    Args:
        remark: what is done instead.
    """
    return {"fidelity": APPROXIMATED, "remark": remark}


def refused(remark: str) -> JsonDict:
    """Return what marks an input that does nothing, or takes one value only.

    Args:
        remark: why.
    """
    return {"fidelity": REFUSED, "remark": remark}


def _whole(value: Any) -> Any:
    # JSON has one kind of number: clients send 5.0 for 5.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _readable(value: Any) -> Any:
    if isinstance(value, str | Path | bytes) or hasattr(value, "read"):
        return value
    raise PydanticCustomError("file_type", "Input should be a file")


Whole = BeforeValidator(_whole)
"""Takes 5.0 for 5; stands last in an ``Annotated``, so that bounds are part of the schema."""

Integer = Annotated[int, Whole]
File = Annotated[
    Any, AfterValidator(_readable), WithJsonSchema({"type": "string", "format": "uri"})
]
"""A path, bytes, an open file, or text: the address of a picture."""

Image = Annotated[File, Field(description="The picture to enlarge.")]
RandomSeed = Annotated[
    Seed,
    Field(
        description="Fixes the noise; random when left out.",
        json_schema_extra=approximated(
            "the same seed repeats our picture, not that of the other program"
        ),
    ),
    Whole,
]


@dataclass(frozen=True)
class RunContext:
    """What decides beside the inputs how a model is run.

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
class UpscaleRequest:
    """What a model by name asks of the upscaler.

    passes: one upscale each; every one but the first enlarges the result before it.
    format: of the output file.
    mask: name of the file input that restricts the change; white changes.
    mask_keeps_white: white is kept instead.
    strength_map: name of the file input that says how much may change where.
    seamless: the picture is a texture whose opposite edges meet.
    loras: (file, weight) that the bundle should carry.
    notes: sentences for the log on what is done otherwise than asked.
    """

    passes: tuple[UpscaleOptions, ...]
    format: str = "png"
    mask: str | None = None
    mask_keeps_white: bool = False
    strength_map: str | None = None
    seamless: bool = False
    loras: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()


class Inputs(BaseModel, ABC):
    """The inputs of one version of a model; a value of the wrong type is refused, not converted."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @abstractmethod
    def request(self, context: RunContext) -> UpscaleRequest:
        """Return what the upscaler is to do with these inputs.

        Raises:
            ModelError: the model needs weights or an extra that are not here.
        """


@dataclass(frozen=True, kw_only=True)
class InputField:
    """One input as forms, docs and schemas show it.

    kind: ``string``, ``integer``, ``number``, ``boolean`` or ``file``.
    default: what is used when nothing is given; None leaves it open.
    low, high: inclusive bounds of a number.
    choices: the only values there are; of one type.
    fidelity: how far tegula does what the model of this name does: ``exact``,
        ``approximated`` or ``refused``.
    remark: what is done instead, or why not.
    """

    name: str
    kind: str
    description: str
    default: Any = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str | int, ...] = ()
    fidelity: str = EXACT
    remark: str = ""


@dataclass(frozen=True)
class Version:
    """One fixed schema of a model, and what becomes of its inputs.

    name: of the model, ``owner/name``.
    label: tells the versions of a model apart, and stays when weights or programs change.
    inputs: the class that declares and interprets them.
    output: ``single`` or ``array`` of pictures.
    image: the file input that is enlarged.
    weights: a fingerprint of the bundle in use; part of ``id`` alone.
    """

    name: str
    label: str
    inputs: type[Inputs]
    output: str = SINGLE
    image: str = "image"
    weights: str = ""

    @property
    def reference(self) -> str:
        """``owner/name:label``: what to keep of a version in order to find it again."""
        return f"{self.name}:{self.label}"

    @cached_property
    def id(self) -> str:
        """A hash over the schema, this release of tegula and the weights, 64 hex digits.

        It shows that nothing has changed, and so is another one after every release.
        """
        fields = (
            [f.name, f.kind, f.description, f.required, f.default, f.low, f.high, *f.choices]
            for f in self.fields
        )
        content = [self.name, self.output, __version__, self.weights, *fields]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def fields(self) -> tuple[InputField, ...]:
        """The inputs, in the order of their declaration."""
        return tuple(
            InputField(
                name=name,
                kind=FILE if schema.get("format") == "uri" else schema["type"],
                description=schema["description"],
                default=schema.get("default"),
                required="default" not in schema,
                low=schema.get("minimum"),
                high=schema.get("maximum"),
                choices=tuple(schema.get("enum", ())),
                fidelity=schema.get("fidelity", EXACT),
                remark=schema.get("remark", ""),
            )
            for name, schema in properties_of(self.inputs).items()
        )

    def field(self, name: str) -> InputField | None:
        """Return the input of that name."""
        return next((field for field in self.fields if field.name == name), None)


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


# Checking what is given for the inputs, with all faults at once, in Replicate's words.


@dataclass(frozen=True)
class ValidInputs:
    """Inputs that fit their version.

    values: every input of the schema, with defaults where nothing was given.
    warnings: sentences on inputs that the version does not know.
    """

    values: Inputs
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
    known = {field.name: field for field in version.fields}
    try:
        values = version.inputs(**{name: value for name, value in given.items() if name in known})
    except ValidationError as error:
        wrong = [_violation(known[str(each["loc"][0])], each) for each in error.errors()]
        wrong.sort(key=lambda field: field.type != "required")
        raise InvalidInputsError(wrong) from None
    warnings = (
        f"{version.name} has no input {name}; it is ignored." for name in given if name not in known
    )
    return ValidInputs(values, tuple(warnings))


def _violation(field: InputField, error: Mapping[str, Any]) -> InvalidField:
    choices = ", ".join(json.dumps(choice, ensure_ascii=False) for choice in field.choices)
    listed = {**error, "ctx": {**error.get("ctx", {}), "expected": choices}}
    kind = STRING if field.kind == FILE else field.kind
    keyword, description = violation(listed, field.name, kind)
    if error["type"] == "missing":
        return InvalidField(keyword, "input", description)
    if error["type"] == "value_error":
        keyword = "enum"  # validators of a model refuse single choices
    return InvalidField(keyword, f"input.{field.name}", description, shown(error["input"]))


def from_text(version: Version, words: Mapping[str, str]) -> dict[str, Any]:
    """Turn the words of a command line into values of the kinds that the version asks for.

    What cannot be turned stays text, so that ``validate`` can tell what is wrong with it.
    """
    kinds = {field.name: field.kind for field in version.fields}
    return {name: _from_word(kinds.get(name, STRING), word) for name, word in words.items()}


def _from_word(kind: str, word: str) -> Any:
    if kind == BOOLEAN:
        return {"true": True, "1": True, "false": False, "0": False}.get(word.lower(), word)
    try:
        return {INTEGER: int, NUMBER: float}.get(kind, str)(word)
    except ValueError:
        return word


# A version's schema as an OpenAPI document in the form that Replicate's models have.

_URI: Mapping[str, str] = {"type": "string", "format": "uri"}


def openapi_schema(version: Version) -> dict[str, Any]:
    """Return the document; ``components.schemas`` holds Input, Output and the enums."""
    output: dict[str, Any] = {**_URI, "title": "Output"}
    if version.output == ARRAY:
        output = {"type": "array", "items": dict(_URI), "title": "Output"}
    inputs: dict[str, Any] = {
        "type": "object",
        "title": "Input",
        "properties": {
            field.name: _property(field, order) for order, field in enumerate(version.fields)
        },
    }
    if required := [field.name for field in version.fields if field.required]:
        inputs["required"] = required
    enums = {
        field.name: {
            "type": field.kind,
            "title": field.name,
            "enum": list(field.choices),
            "description": "An enumeration.",
        }
        for field in version.fields
        if field.choices
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {},
        "components": {"schemas": {"Input": inputs, "Output": output, **enums}},
    }


def _property(field: InputField, order: int) -> dict[str, Any]:
    schema: dict[str, Any] = {
        **(_URI if field.kind == FILE else {"type": field.kind}),
        "title": field.name.replace("_", " ").capitalize(),
    }
    if field.choices:
        schema = {"allOf": [{"$ref": f"#/components/schemas/{field.name}"}]}
    optional = {"default": field.default, "minimum": field.low, "maximum": field.high}
    schema |= {key: value for key, value in optional.items() if value is not None}
    return {**schema, "x-order": order, "description": field.description}
