"""What is chosen for a picture by what was found in it, where the caller leaves it open.

Every choice is the value of an ordinary option, so that a result's settings give it again.
"""

from __future__ import annotations

import numpy as np

from tegula.images.look import Look
from tegula.options import ResolvedOptions

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
        net += f"; {resolved.drawing_prescaler} where it is drawn"
    return f"{', '.join(found)}; {net}"
