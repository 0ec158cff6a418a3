"""How far prescale is: the work of its nets, counted before and while they run."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator
from functools import partial
from typing import cast

from torch import Tensor, nn

from tegula.images.pixels import Size
from tegula.models.compiled import CompiledLayers
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.networks import layers_with_sizes
from tegula.pipeline.prescale_plan import DEFAULT_TILE, padding, plan_sizes, plan_tiles
from tegula.progress import StageProgress, ignore_share

_ACTIVATION = 64
"""Multiplications that take as long as one number of an activation, which waits for memory."""


def _work_of_a_place(layer: nn.Module) -> float:
    """Return the multiplications by which a layer makes all channels of one pixel."""
    if isinstance(layer, CompiledLayers):
        return sum(_work_of_a_place(each) for each in layer.layers[0].modules())
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.PReLU):
        return float(_ACTIVATION * layer.num_parameters)
    return float(weight.numel()) if isinstance(weight, Tensor) and weight.ndim > 1 else 0.0


def work_of_a_pixel(prescaler: Prescaler) -> float:
    """Return the multiplications of a net for each pixel of the source; 1 where none are known."""
    layers = () if prescaler.network is None else layers_with_sizes(prescaler.network)
    return sum(_work_of_a_place(layer) * size for layer, size in layers) or 1.0


def tile_work(
    prescaler: Prescaler, source: Size, size: Size, tile: int = DEFAULT_TILE
) -> list[float]:
    """Return the work of every tile of one pass."""
    head = prescaler.reaching(source, size)
    each = work_of_a_pixel(head)
    return [
        each * math.prod(s.stop - s.start + 2 * padding(s.stop - s.start, head.facts) for s in pair)
        for pair in plan_tiles(source, size, head.facts, tile)
    ]


def work_of_passes(prescaler: Prescaler, source: Size, target: Size) -> float:
    """Return the work of all passes from one size to another."""
    sizes = [source, *plan_sizes(source, target, prescaler.facts.factor)]
    return sum(sum(tile_work(prescaler, *pair)) for pair in itertools.pairwise(sizes))


@contextlib.contextmanager
def watched(network: nn.Module, total: float, progress: StageProgress) -> Iterator[None]:
    """Check for cancel before every layer and report after it, as one tile may take minutes.

    Threads may share a network; each watches itself alone.

    Args:
        network: what runs inside.
        total: the work of the run.
        progress: receives the share of it that is done.
    """
    caller, done = threading.get_ident(), 0.0

    def check(*_: object) -> None:
        if threading.get_ident() == caller:
            progress.cancel.check()

    def count(work: float, layer: nn.Module, _given: object, result: Tensor) -> None:
        nonlocal done
        if threading.get_ident() == caller:
            is_compiled = isinstance(layer, CompiledLayers)
            channels = result.shape[1] if is_compiled else cast("Tensor", layer.weight).shape[0]
            done += work * result.numel() / channels
            progress.on_share(min(1.0, done / total))

    handles = [layer.register_forward_pre_hook(check) for layer in network.modules()]
    if progress.on_share is not ignore_share:
        works = ((layer, _work_of_a_place(layer)) for layer in network.modules())
        handles += [
            each.register_forward_hook(partial(count, work)) for each, work in works if work
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
