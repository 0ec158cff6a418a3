"""Nothing waits for the device within a step, whatever is asked for.

The nets run on torch's meta device, which has shapes and no numbers: like a GPU it can be told
from the host, so every copy between the two is seen, and every number that the host asks for.
"""

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support import options
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tegula.models.bundle import ControlScale, WindowBatch
from tegula.models.device import constant
from tegula.models.mini.bundle import load_mini
from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.networks import move
from tegula.models.static_batches import StaticDenoiser
from tegula.pipeline.evaluate import BatchSize
from tegula.pipeline.sampler import CanvasSampler, Conditioning, places_of
from tegula.pipeline.schedulers import schedule_of
from tegula.pipeline.steps import Guidance, MaskSchedule
from tegula.pipeline.windows import Piece, Window, grid_windows
from tegula.progress import SILENT
from tegula.regions import PlacedRegion
from tests.tiny.networks import tiny_bundle

META = torch.device("meta")
GUIDED: dict[str, Any] = {"guidance_scale": 3.0}
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts the numbers that the host asks the device for, and the copies either way.

    Operations take numbers of the host, tensors without dimensions, along without a copy.
    """

    def __init__(self):
        super().__init__()
        self.asked, self.copied = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, func.overloadpacket
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_device = any(each.is_meta for each in given)
        if on_device and kind in (aten._local_scalar_dense, aten.item, aten.is_nonzero):
            self.asked += 1
            return True  # what is asked for is whether all is finite
        if on_device and torch.device("cpu") in tree_leaves((args, kwargs)):
            self.copied += 1
            return torch.zeros(given[0].shape, dtype=given[0].dtype)
        made = func(*args, **kwargs)
        copies = kind in (aten._to_copy, aten.to, aten.copy_)
        tensors = [*given, *(each for each in tree_leaves(made) if isinstance(each, torch.Tensor))]
        places = {each.is_meta for each in tensors if each.ndim or copies}
        self.copied += len(places) > 1
        return made


class Makes(TorchFunctionMode):
    """Counts what is made on the device of numbers of the host, which is a copy too."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            self.waits.copied += kwargs.get("device") == META
        return func(*args, **kwargs)


@contextmanager
def counted():
    with Waits() as waits, Makes(waits):
        yield waits


class Halves:
    """A denoiser of two halves that takes all that it is given and computes next to nothing."""

    def embed_control(self, control):
        return control.prescaled

    def __call__(self, batch):
        return self.decode(self.encode(batch), batch.timestep, batch.text)

    def encode(self, batch):
        seen = batch.latents[batch.controlled] + batch.control[batch.controlled]
        return (torch.cat([batch.latents[: batch.controlled.start], seen]),)

    def decode(self, features, timestep, text):
        level = timestep[:, None, None, None] if timestep.ndim else timestep
        return features[0] * level + text.mean()

    def to_dtype(self, dtype):
        return self


def waits_of(denoiser, *, steps=5, batch=4, mask=False, **changes):
    chosen = options(steps=steps, creativity=1.0, **changes)
    grid = grid_windows(20, 14, 8, 8, 0.25)
    pieces, regions = [Piece(Window(0, 0, 160, 112), grid)] * 2, chosen.placed_regions
    places = places_of(pieces, 8, regions, META)
    latents = torch.zeros(2, 4, 14, 20, device=META)
    conditioning = Conditioning(
        torch.zeros(1 + len(regions), 1, 16, device=META),
        torch.zeros(1, 1, 16, device=META),
        torch.zeros(len(places.windows), 4, 8, 8, device=META),
    )
    schedule = schedule_of(SCHEDULER, chosen, 1.0)
    guidance, size = Guidance.of(chosen), BatchSize(batch)
    sampler = CanvasSampler(
        denoiser, torch.float16, places, conditioning, guidance, size, chosen.feature_reuse
    )
    kept = MaskSchedule(latents, latents, torch.ones_like(latents[:, :1]).long()) if mask else None
    with torch.inference_mode(), counted() as waits:
        sampler.sample(latents, schedule, torch.Generator().manual_seed(0), SILENT, kept)
    return waits, len(schedule)


@pytest.mark.parametrize(
    "changes",
    [
        {**GUIDED, "guidance_start": 0.2, "guidance_end": 0.7, "control_end": 0.5},
        {**GUIDED, "guess_mode": True},
        {**GUIDED, "feature_reuse": 3},
        {**GUIDED, "placed_regions": (PlacedRegion(0, 0, 60, 60, 4, "a dog"),)},
        {"mask": True},
        {"mask": True, "feature_reuse": 2, **GUIDED},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_host_looks_once_a_step_at_what_the_device_has(changes):
    one, steps = waits_of(Halves(), **changes)
    more, more_steps = waits_of(Halves(), steps=9, batch=1, **changes)
    assert 0 < one.asked <= steps
    assert one.asked < more.asked <= more_steps
    # What is copied does not grow with the steps, and not with the batches; where a mask says
    # which windows are due, that is copied for each step before the first one.
    due = more_steps - steps if changes.get("mask") else 0
    assert more.copied <= one.copied + due


def test_static_batches_wait_no_more():
    static = StaticDenoiser(Halves(), Halves(), (6,))
    (one, _), (more, steps) = (waits_of(static, steps=count, **GUIDED) for count in (3, 5))
    assert more.asked == steps
    assert more.copied == one.copied


@pytest.mark.parametrize("family", ["sd15", "mini"])
def test_nets_copy_nothing_while_they_run(family):
    if family == "mini":
        bundle, width, embedded = load_mini(torch.device("cpu"), torch.float32), 28, 37
    else:
        bundle, width, embedded = tiny_bundle(flat=True), 16, 9
    for network in bundle.denoiser.networks:
        move(network, device=META)
    batch = WindowBatch(
        torch.zeros(2, bundle.facts.latent_channels, 8, 8, device=META),
        torch.zeros((), device=META),
        torch.zeros(2, 1, width, device=META),
        torch.zeros(2, embedded, 8, 8, device=META),
        ControlScale(0.7),
        slice(0, 2),
    )
    with torch.inference_mode(), counted() as waits:
        bundle.denoiser(batch)
        first = waits.copied
        bundle.denoiser(batch)
    assert waits.asked == 0
    assert waits.copied == first  # constants alone, the first time


def test_a_constant_is_copied_once():
    constant.cache_clear()
    with counted() as waits:
        first, second = constant((1.0, 2.0), META), constant((1.0, 2.0), META)
    assert first is second
    assert waits.copied == 1
    assert not constant(0.5, torch.device("cpu")).is_inference()


def test_windows_are_cut_and_added_as_one_by_one():
    grid = grid_windows(37, 23, 8, 8, 0.6)
    pieces = [Piece(Window(0, 0, 37 * 8, 23 * 8), grid)] * 2
    region = PlacedRegion(40, 30, 200, 90, 4, "a dog")
    places = places_of(pieces, 8, (region,), torch.device("cpu"))
    latents = torch.randn(2, 4, 23, 37, generator=torch.Generator().manual_seed(0))
    cut = places.cut(latents, slice(None))
    assert cut.is_contiguous()
    got, expected = torch.zeros_like(latents), torch.zeros_like(latents)
    layers = np.array(places.layers)
    for number in range(len(places)):
        canvas, top, left = (
            int(part[number]) for part in (places.canvases, places.tops, places.lefts)
        )
        window = latents[canvas, :, top : top + 8, left : left + 8]
        assert torch.equal(cut[number], window)
        expected[canvas, :, top : top + 8, left : left + 8] += window * places.weights[number]
    for layer in range(layers.max() + 1):
        chosen = torch.from_numpy(np.flatnonzero(layers == layer))
        places.add(got, cut[chosen] * places.weights[chosen], chosen)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(got, latents, atol=1e-5, rtol=0)  # the weights sum to one
