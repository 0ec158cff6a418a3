"""What several test files need: small pictures and options with nothing left open."""

from functools import cache

import numpy as np
import pytest
from skimage import data, transform

from tegula.options import ResolvedOptions

DEFAULTS = ResolvedOptions(
    width=64,
    height=64,
    preset="balanced",
    prompt="",
    negative_prompt="",
    creativity=0.5,
    resemblance=1.0,
    guidance_scale=1.0,
    guidance_start=0.0,
    guidance_end=1.0,
    steps=4,
    scheduler="ddim",
    seed=0,
    hdr=0.0,
    window=64,
    overlap=0.25,
    window_batch=None,
    guess_mode=False,
    control_start=0.0,
    control_end=1.0,
    prescaler="lanczos",
    colour_lock="none",
)


def options(**changes):
    return DEFAULTS.replaced(**changes)


@cache
def photograph(width, height, name="astronaut"):
    """A public-domain photograph, float32 [height, width, 3] in 0..1; not to be written to."""
    picture = getattr(data, name)()[..., :3]
    scale = max(width / picture.shape[1], height / picture.shape[0])
    size = (round(picture.shape[0] * scale), round(picture.shape[1] * scale))
    resized = transform.resize(picture, size, anti_aliasing=True)[:height, :width]
    resized = np.ascontiguousarray(resized, np.float32)
    resized.setflags(write=False)
    return resized


def prescale_in_tiles(side, *given, **named):
    """Prescale in tiles of at most so many source pixels a side, context included."""
    from tegula.pipeline import prescale  # brings torch along

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prescale, "DEFAULT_TILE", side)
        return prescale.prescale(*given, **named)
