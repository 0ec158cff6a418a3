"""What is chosen for a picture by what was found in it, where the caller leaves it open.

Every choice is the value of an ordinary option, so that a result's settings give it again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tegula.images.look import Look
from tegula.options import ResolvedOptions, UpscaleOptions

CLEAN_SHARE = 0.8
"""Of tegula-photo's tuning for a clean photograph; docs/decisions/0005 has how all were found."""
UNSEEN_SHARE = 0.65
"""Without a look, as every picture took it before there was one: what the file of weights holds."""
_BY_QUALITY = ((50, 80, 95), (0.35, 0.5, CLEAN_SHARE))
"""Qualities of JPEG, and the shares of photographs that have them."""
_BY_NOISE = ((1.5, 4.0), (CLEAN_SHARE, 0.65))
"""Levels of 255, and the shares of photographs with that noise."""
_DRAWING_SHARE = 0.35
"""Letters are read right the most often, and are the most like their originals."""


def share_of_tuning(look: Look) -> float:
    """Return the share of the prescaler's tuning for a source, in steps of a twentieth.

    Tuning keeps texture that x4plus removes; with it noise and the traces of compression.
    """
    quality = 100 if look.damage.jpeg_quality is None else look.damage.jpeg_quality
    noise = look.damage.noise
    shares = [float(np.interp(quality, *_BY_QUALITY)), float(np.interp(noise, *_BY_NOISE))]
    if look.kind != "photograph":
        shares.append(_DRAWING_SHARE)
    return round(min(shares) * 20) / 20


_DRAWING_PRESCALER = "tegula-swift"
_MIXED_WITH = "tegula-photo"
"""The two make mistakes of different kinds on letters: half of each, held to the source, is read
as well as the better one at 4x and better than either at 2x."""
_HALF = 0.5


def choose(look: Look, options: UpscaleOptions, prescaler: str) -> dict[str, Any]:
    """Return values for options that the caller leaves open, by the look of the source.

    Args:
        look: of the whole source.
        options: as the caller gave them.
        prescaler: the one that the preset begins from.
    """
    if not options.auto:
        return {"tuning": UNSEEN_SHARE}
    chosen: dict[str, Any] = {"tuning": share_of_tuning(look)}
    # A net that was named runs alone, as its author meant it.
    if options.prescaler is None and look.kind != "photograph":
        chosen["hold_drawings"] = True
        if prescaler == _MIXED_WITH and options.drawing_prescaler is None:
            chosen |= {"drawing_prescaler": _DRAWING_PRESCALER, "drawing_share": _HALF}
    return chosen


_GOOD, _NOISY = 90, 2.5
"""Quality of JPEG below which, and levels of noise from which, they are spoken of."""
_KINDS = {
    "photograph": "photograph",
    "drawing": "drawing or text",
    "mixed": "photograph with drawing or text",
}


def describe(look: Look, resolved: ResolvedOptions) -> str:
    """Say in one line what was found and what is done about it."""
    found = [_KINDS[look.kind]]
    if look.damage.jpeg_quality is not None and look.damage.jpeg_quality < _GOOD:
        mended = ", mended" if resolved.mend_jpeg else ""
        found.append(f"JPEG quality about {look.damage.jpeg_quality}{mended}")
    # Small letters are noise to its measure.
    if look.kind == "photograph" and look.damage.noise >= _NOISY:
        found.append(f"noise of about {look.damage.noise:.0f} levels")
    net = f"net {resolved.prescaler}"
    if resolved.tuning is not None:
        net += f", {resolved.tuning:g} of its tuning"
    if resolved.drawing_prescaler:
        share = "" if resolved.drawing_share == 1 else f"{resolved.drawing_share:g} of "
        net += f"; {share}{resolved.drawing_prescaler} where it is drawn"
    if resolved.hold_drawings:
        what = "" if resolved.drawing_prescaler else "; drawn parts"
        net += f"{what or ','} held to the source"
    return f"{', '.join(found)}; {net}"
