"""Measures what the dense blocks of ``tegula-photo`` hold, for products of 8 bits.

Nothing is trained: the net runs over damaged crops of photographs and over drawings, and of
every channel that goes into a convolution it is kept how far from zero it goes. All shares of
the tuning get the same ranges, which must hold whatever share a source asks for.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tegula.models.device import pick_dtype
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.models.prescalers.networks import ResidualDenseBlock, RRDBNet
from train import export, photos
from train.degradation import RECIPES, degrade
from train.drawings import draw
from train.held_out import PrescalerRun
from train.line_pairs import damage, shrink
from train.pairs import PHOTO, levels, to_image
from train.sketch import find_faces

NAME = f"{PHOTO}-ranges"
_FACTOR = 4


@dataclass(frozen=True)
class RangesProgram(PrescalerRun):
    """From photographs to the ranges of ``tegula-photo``, measured and exported."""

    def everything(self) -> dict[str, Tensor]:
        """Go from photographs to the exported file; returns what is in it."""
        chosen = self.settings.ranges
        training, _ = photos.split(self.photographs, self.settings.held_out_every)
        small: Tensor = self._small_pictures(training).to(self.device)
        photo = load_prescaler(PHOTO, self.device, pick_dtype(self.device), self.folder_of(PHOTO))
        found: dict[str, Tensor] = {}
        for share in chosen.shares:
            network = cast("RRDBNet", with_share(photo, share).network)
            ranges = measure_ranges(network, small, chosen.blocks, chosen.covered)
            found = {n: torch.maximum(each, found.get(n, each)) for n, each in ranges.items()}
            self.say(f"ranges: {share:g} of the tuning done")
        record = {
            "crops": len(small), "side": chosen.side, "shares": list(chosen.shares),
            "covered": chosen.covered, "device": str(self.device),
        }  # fmt: skip
        digest = export.export_tensors(found, record, self.weights, NAME)
        text = Path(__file__).with_name("ranges.md").read_text(encoding="utf-8")
        text = text.format(digest=digest, settings=chosen, **record)
        export.replace(self.weights / f"{NAME}.md", text.encode())
        self.say(f"{self.weights}: {NAME}, {digest}")
        return found

    def _small_pictures(self, paths: list[Path]) -> Tensor:
        """Return damaged photographs and drawings, [n, 3, side, side] in 0..1."""
        chosen, rng = self.settings.ranges, np.random.default_rng(self.settings.seed)
        rows = []
        for number in range(chosen.photographs):
            picture = photos.read(paths[int(rng.integers(len(paths)))])
            crop = photos.plain_crop(picture, chosen.side * _FACTOR, rng)
            rows.append(levels(degrade(crop, _FACTOR, RECIPES[number % len(RECIPES)], rng)))
        faces = find_faces()
        rows += [
            damage(shrink(draw(chosen.side, rng, faces), _FACTOR, rng), rng)
            for _ in range(chosen.drawings)
        ]
        return to_image(np.stack(rows))


@torch.inference_mode()
def measure_ranges(
    network: RRDBNet, pictures: Tensor, blocks: int, covered: float
) -> dict[str, Tensor]:
    """Return the ranges of the dense blocks in the first so many blocks, by their names.

    Args:
        network: runs over the pictures, one by one.
        pictures: [n, 3, h, w] in 0..1.
        blocks: those after them keep their precision.
        covered: share of the pictures that a range covers whole. The few that go furthest would
            make every level coarser for all others.

    Returns:
        Of each dense block [features + 4 * growth]: how far from zero every channel goes that
        its last convolution sees, which are all that go into any of them.
    """
    most: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, _layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        most[name].append(given[0].float().abs().amax((0, 2, 3)).cpu())

    handles = [
        layer.conv5.register_forward_pre_hook(partial(note, name))
        for name, layer in network.named_modules()
        if isinstance(layer, ResidualDenseBlock) and int(name.split(".")[1]) < blocks
    ]
    try:
        for picture in pictures:
            network(picture[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(each).quantile(covered, dim=0) for name, each in most.items()}
