"""Trains the net that ``tegula-swift`` runs for up to 2x on from what its teacher left.

At 2x a photograph's own pixels can be foreseen from a clean source, so there is no teacher here:
pictures are held to the originals, place by place and on the whole. Nothing is made beforehand
either; every batch is cut from the photographs and damaged afresh, mostly lightly, since what is
heavily damaged gets the large net. The net for 4x stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.quality.features import EarlyFeatures
from tegula.models.device import pick_dtype
from tegula.models.prescalers import find_packaged
from tegula.models.prescalers.load import load_prescaler, read_own, two_heads
from tegula.models.prescalers.networks import SRVGGNetCompact
from train import photos
from train.batches import BatchSettings
from train.config import TwiceSettings
from train.degradation import RECIPES, degrade
from train.distil import (
    FEATURE_STAGES,
    PupilRun,
    descend,
    make_examples,
    new_distil_state,
    of_originals,
    teacher_of,
)
from train.line import edges
from train.pairs import PHOTO, SWIFT, TWICE, levels, to_image, unit
from train.precision import mixed_precision
from train.runner import Stage
from train.state import TrainingState

FACTOR = 2
_DAMAGES = ("clean", "jpeg90")
"""By what a checkpoint is chosen: what is damaged more than that gets the large net."""
_EDGE = 8
"""Pixels of a truth around what is used of it, so that damage at its edge is as inside."""
_WINDOW = 3
"""A crop is chosen from a window of so many times its side."""


@dataclass(frozen=True)
class TwiceBatch:
    """Crops: small [n, 3, h, w], truth [n, 3, 2h, 2w]."""

    small: Tensor
    truth: Tensor

    def to(self, device: torch.device) -> TwiceBatch:
        """Return the batch on another device."""
        return TwiceBatch(self.small.to(device), self.truth.to(device))


class CropSource:
    """Photographs in memory, 8-bit [h, w, 3] each, from which crops are cut as they are asked for.

    shares: of ``RECIPES``.
    """

    def __init__(self, pictures: Sequence[NDArray[np.uint8]], shares: Sequence[float]) -> None:
        self._photographs = photos.Photographs(pictures)
        self._shares = shares

    def draw(self, settings: BatchSettings, rng: np.random.Generator) -> TwiceBatch:
        """Return random crops, damaged; the same state of ``rng`` gives the same."""
        rows = [self._row(settings.crop, rng) for _ in range(settings.size)]
        small, truth = zip(*rows, strict=True)
        return TwiceBatch(to_image(np.stack(small)), to_image(np.stack(truth)))

    def _row(
        self, side: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        picture = self._photographs.draw(rng)
        side += 2 * _EDGE
        height, width = (min(_WINDOW * side, length) for length in picture.shape[:2])
        top = int(rng.integers(0, picture.shape[0] - height + 1))
        left = int(rng.integers(0, picture.shape[1] - width + 1))
        window = unit(picture[top : top + height, left : left + width])
        crop = photos.random_crop(window, side, rng)
        recipe = RECIPES[int(rng.choice(len(RECIPES), p=self._shares))]
        small, inside = degrade(crop, FACTOR, recipe, rng), slice(_EDGE, -_EDGE)
        edge = slice(_EDGE // FACTOR, -_EDGE // FACTOR)
        return levels(small)[edge, edge], levels(crop)[inside, inside]


def twice_step(
    state: TrainingState, settings: TwiceSettings, features: EarlyFeatures, batch: TwiceBatch
) -> dict[str, Tensor]:
    """Take one step of the net, and of the discriminator once it counts."""
    device = next(state.network.parameters()).device
    batch = batch.to(device)
    with mixed_precision(device):
        fake = state.network(batch.small.contiguous(memory_format=torch.channels_last))
        seen = features(fake)
        with torch.no_grad():
            goals = features(batch.truth)
    found = {
        "pixel": (fake - batch.truth).abs().mean() * 10,
        "edges": edges(fake, batch.truth) * 10,
        **of_originals(fake, batch.truth, seen, goals, batch.small.shape[-2:]),
    }
    return descend(state, settings, found, batch.small, fake, batch.truth)


@dataclass(frozen=True)
class TwiceProgram(PupilRun):
    """From photographs and the head for 2x of ``tegula-swift`` to a net of its own for 2x."""

    def everything(self) -> SRVGGNetCompact:
        """Go from photographs to the exported file; returns what is in it."""
        chosen = self.settings.twice
        training, held_out = photos.split(self.photographs, self.settings.held_out_every)
        photo = load_prescaler(PHOTO, self.device, pick_dtype(self.device), self.folder_of(PHOTO))
        examples = make_examples(
            held_out, chosen.side, FACTOR, dict.fromkeys(_DAMAGES, teacher_of(photo))
        )
        features = EarlyFeatures("lite1", stages=FEATURE_STAGES).to(self.device)
        stage = Stage(
            "twice", chosen.steps, chosen.ema, chosen.batch,
            lambda s, b: twice_step(s, chosen, features, b),
        )  # fmt: skip
        source = CropSource([levels(photos.read(p)) for p in training], chosen.recipe_shares)
        start = self._start()
        state = new_distil_state(start, chosen, self.settings.seed, self.device)

        def net_of(tensors: Mapping[str, Tensor]) -> SRVGGNetCompact:
            network = copy.deepcopy(start).eval()
            network.load_state_dict(tensors)
            return network

        best, tensors = self.run_pupil(stage, state, source, examples, net_of)
        self.export_pupil(
            TWICE, stage.name, chosen, tensors, self.record(state, len(training), best)
        )
        return net_of(tensors)

    def _start(self) -> SRVGGNetCompact:
        """Return the net for 2x as the teacher left it: that for 4x with the head for 2x."""
        tensors, _ = read_own(SWIFT, self.folder_of(SWIFT))
        entry = find_packaged(SWIFT)
        assert entry is not None
        return two_heads(entry, tensors)[1]
