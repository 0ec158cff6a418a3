"""Bundles, prescalers and face models, and how they run on a device.

What may be named when a model is loaded stands here, where it is read without torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from tegula.options import PRESETS, Preset
from tegula.schema import CheckedOptions

DEFAULT_BUNDLE = "mini"

_ALIKE: Mapping[str, Sequence[Preset]] = {"mini": ("faithful", "creative")}
"""Presets of a bundle that nobody tells from balanced: with the same net before it, what they make
differs by less than two levels of 255 on average."""
_ALIKE_ELSEWHERE: Sequence[Preset] = ("best",)
"""Those of all other bundles: their usual net is the best one already."""


def offered_presets(bundle: str) -> tuple[Preset, ...]:
    """Return the presets of a bundle that differ to the eye, by its name; all are accepted."""
    return tuple(preset for preset in PRESETS if preset not in _ALIKE.get(bundle, _ALIKE_ELSEWHERE))


Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BACKENDS = ("torch", "openvino")


def parse_lora(text: str) -> tuple[str, float]:
    """Split ``FILE:WEIGHT``; without a weight it is 1, also where a path has a colon.

    Raises:
        ValueError: the weight is infinite or no number.
    """
    file, _, end = text.rpartition(":")
    try:
        weight = float(end)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {file} is a number, not {end}.")
    return (file, weight) if file else (text, 1.0)


def _loras_of(value: Any) -> Any:
    """Take texts and pairs for LoRAs with their weights."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(parse_lora(each) if isinstance(each, str) else tuple(each) for each in value)


Loras = Annotated[tuple[tuple[str, float], ...], BeforeValidator(_loras_of)]


class BundleSettings(CheckedOptions):
    """A bundle with the parts that it is loaded with, as ``Upscaler.load`` takes them.

    Each LoRA is a text, ``NAME`` or ``NAME:WEIGHT``, or a pair of both.
    """

    bundle: str = DEFAULT_BUNDLE
    controlnet: str | None = None
    vae: str | None = None
    loras: Loras = ()
    few_step: str | None = None
    embeddings: tuple[str, ...] = ()
    precision: Precision = "auto"

    @classmethod
    def from_environment(cls) -> BundleSettings:
        """Return what ``TEGULA_BUNDLE``, ``TEGULA_CONTROLNET`` and so on say.

        Raises:
            OptionError: one of them is wrong.
        """
        given: dict[str, Any] = {}
        for name in cls.model_fields:
            text = os.environ.get(f"TEGULA_{name.upper()}", "").strip()
            is_list = name in ("loras", "embeddings")
            if text:
                given[name] = tuple(each.strip() for each in text.split(",")) if is_list else text
        return cls(**given)

    def given(self) -> dict[str, Any]:
        """Return the bundle and its parts as far as they are not left to the defaults."""
        return self.model_dump(exclude_defaults=True, exclude={"precision"})

    @property
    def identity(self) -> str:
        """The bundle's name, and whatever else is not left to the defaults."""
        others = {name: part for name, part in self.given().items() if name != "bundle"}
        return self.bundle + (json.dumps(others, sort_keys=True) if others else "")
