"""What several test files need: small pictures, full options, and arrays in place of tensors."""

import dataclasses
from functools import cache, wraps

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
        return of_arrays(prescale.prescale)(*given, **named)


def of_arrays(function):
    """Let a function of tensors take and return arrays, which on the host share their memory.

    Tensors within dataclasses, such as the job of refine, are taken as arrays, too; one array
    that is given twice becomes one tensor, and comes back itself where its tensor does.
    """

    @wraps(function)
    def call(*given, **named):
        known = {}
        result = function(
            *(_as_tensor(each, known) for each in given),
            **{name: _as_tensor(each, known) for name, each in named.items()},
        )
        return _as_array(result, {id(tensor): array for array, tensor in known.values()})

    return call


def _as_tensor(value, known):
    import torch

    from tegula.pipeline.pictures import on_device

    if isinstance(value, np.ndarray):
        pair = known.setdefault(id(value), (value, on_device(value, torch.device("cpu"))))
        return pair[1]
    if type(value).__name__ in ("RefineJob", "Layers"):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        tensors = {name: _as_tensor(each, known) for name, each in fields.items()}
        return dataclasses.replace(value, **tensors)
    return value


def _as_array(value, given):
    import torch

    if isinstance(value, torch.Tensor):
        return given[id(value)] if id(value) in given else value.numpy()
    return tuple(_as_array(each, given) for each in value) if type(value) is tuple else value


def finish_arrays(refined, prescaled, prepared, options, guard=None, **layers):
    """Finish arrays on the host."""
    import torch

    from tegula.pipeline.finish import Layers, finish
    from tegula.pipeline.prepare import Placed

    placed = Placed.on(torch.device("cpu"), prepared)
    return of_arrays(finish)(refined, prescaled, placed, options, Layers(**layers), guard)


def refine_canvas(job, *given):
    """Refine arrays on the host."""
    from tegula.pipeline.refine import refine_canvas

    return of_arrays(refine_canvas)(job, *given)


def refine_redraw(job, *given, **named):
    """Refine arrays on the host, tile by tile."""
    from tegula.pipeline.redraw import refine_redraw

    return of_arrays(refine_redraw)(job, *given, **named)
