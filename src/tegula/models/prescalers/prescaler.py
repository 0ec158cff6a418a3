"""What a prescaler is to the rest of tegula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class PrescalerFacts:
    """What is known of a prescaler before its weights are read.

    name: what the user calls it: a catalogue name or the path of a file.
    net: architecture and size, in words; empty for plain resampling.
    factor: how many times larger one pass makes a side; None: any, by resampling.
    overlap: source pixels around a tile that its result depends on by more than
        1/255; less context makes tiles visible.
    margin: mirrored source pixels that the net sees around what it is given, where it
        would ring at a bare edge.
    grid: tiles begin at multiples of so many source pixels, where the net's attention
        windows begin in the whole picture too.
    """

    name: str
    description: str
    net: str
    factor: int | None
    overlap: int
    licence: str
    margin: int = 0
    grid: int = 1


@dataclass(frozen=True)
class Prescaler:
    """A prescaler ready to run.

    network: maps float32 [n, 3, h, w] in 0..1 to float32, ``factor`` times as large, not
        clamped; computes in ``dtype``. None: resampling alone.
    full_precision: the same network in float32, for tiles that overflow ``dtype``.
    """

    facts: PrescalerFacts
    network: nn.Module | None
    full_precision: nn.Module | None
    device: torch.device
    dtype: torch.dtype
