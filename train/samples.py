"""Sample pictures of a run, to be looked at: truth, source, prescaled, and three strengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tegula.models.mini.network import MiniNetwork
from train.degradation import Picture
from train.held_out import HeldOut

STRENGTHS = (0.4, 0.6, 0.9)


def write_samples(network: MiniNetwork, held_out: HeldOut, path: Path, rows: int = 6) -> None:
    """Write what a network makes of the first held-out pairs."""
    first = held_out.pairs[:rows]
    columns = [list(first[..., channels]) for channels in (slice(3), slice(6, 9), slice(3, 6))]
    columns += [held_out.refine(network, s, rows=rows) for s in STRENGTHS]
    write_sheet(columns, path)


def write_sheet(columns: Sequence[Sequence[Picture]], path: Path) -> None:
    """Write columns of equal pictures, side by side."""
    sheet = np.concatenate([np.concatenate(list(c), axis=0) for c in columns], axis=1)
    Image.fromarray(np.rint(np.clip(sheet, 0, 1) * 255).astype(np.uint8)).save(path)
