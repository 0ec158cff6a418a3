"""Models, their versions, and what a version makes of its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tegula import __version__
from tegula.catalog.schema import Field
from tegula.options import UpscaleOptions

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
