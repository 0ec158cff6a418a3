"""Sample pictures of a run, to be looked at: truth, source, prescaled, and three strengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tegula.models.mini.network import MiniNetwork
from train.held_out import HeldOut

STRENGTHS = (0.4, 0.6, 0.9)


def write_samples(network: MiniNetwork, held_out: HeldOut, path: Path, rows: int = 6) -> None:
    """Write a sheet of the first held-out pairs."""
    first = held_out.pairs[:rows]
    columns = [first[..., :3], first[..., 6:9], first[..., 3:6]]
    columns += [np.stack(held_out.refine(network, s, rows=rows)) for s in STRENGTHS]
    sheet = np.concatenate([np.concatenate(list(c), axis=0) for c in columns], axis=1)
    Image.fromarray(np.rint(np.clip(sheet, 0, 1) * 255).astype(np.uint8)).save(path)
