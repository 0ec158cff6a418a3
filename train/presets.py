"""The numbers behind mini's preset names, chosen on the held-out photographs."""

from __future__ import annotations

from tegula.options import PresetValues
from train.pairs import PHOTO, SWIFT

_LEVEL = 0.7

PRESETS = {
    "faithful": PresetValues(
        creativity=_LEVEL, resemblance=3.0, guidance_scale=1.0, steps=1,
        scheduler="lcm", prescaler=PHOTO,
    ),
    "balanced": PresetValues(
        creativity=_LEVEL, resemblance=1.0, guidance_scale=1.0, steps=1,
        scheduler="lcm", prescaler=PHOTO,
    ),
    "creative": PresetValues(
        creativity=_LEVEL, resemblance=0.3, guidance_scale=1.0, steps=1,
        scheduler="lcm", prescaler=PHOTO,
    ),
    "fast": PresetValues(
        creativity=_LEVEL, resemblance=3.0, guidance_scale=1.0, steps=1,
        scheduler="lcm", prescaler=SWIFT,
    ),
}  # fmt: skip
