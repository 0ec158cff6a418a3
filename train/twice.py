"""Trains the nets that ``tegula-swift`` runs, for 4x and for 2x, on from what their teacher left.

A photograph's own pixels can be foreseen from a clean source at 2x, and in part at 4x, so there is
no teacher here: pictures are held to the originals, place by place and on the whole. Nothing is
made beforehand either; every batch is cut from the photographs and damaged afresh, mostly lightly,
since what is heavily damaged gets the large net.

A second stage for 2x, and that for 4x, have most crops as tegula itself shows them to the net: a
little soft, as lenses and resampling leave a picture, and sharpened by what was measured on them.
So it learns what measuring misses, and to take away the noise that sharpening raises. A third makes
a net of its own of the one for 2x for JPEG files, which are sharpened, too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.quality.features import EarlyFeatures
from bench.quality.measures import grid_excess
from tegula.images.pixels import LUMA
from tegula.images.sharpness import measure_softness, undo_blur
from tegula.models.device import pick_dtype
from tegula.models.mini.network import luma
from tegula.models.prescalers import find_packaged
from tegula.models.prescalers.load import load_prescaler, read_own, two_heads
from tegula.models.prescalers.networks import SRVGGNetCompact, fill
from tegula.options import MOST_MENDED_BLUR
from train import losses, photos
from train.batches import BatchSettings
from train.config import TwiceSettings
from train.degradation import RECIPES, Picture, degrade, soften
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
from train.pairs import COMPRESSED, FOUR, PHOTO, SWIFT, TWICE, levels, unit
from train.precision import mixed_precision
from train.runner import Stage
from train.state import TrainingState

_EDGE = 8
"""Pixels of a truth around what is used of it, so that damage at its edge is as inside."""
_WINDOW = 3
"""A crop is chosen from a window of so many times its side."""
_SURROUNDINGS = 64
"""Pixels of a truth around a crop on which its softness is measured, too."""
_MISSED = 0.08
"""Pixels by which a softness that cannot be measured is off."""


@dataclass(frozen=True)
class CropBatch:
    """Crops: small [n, 3, h, w], truth [n, 3, factor * h, factor * w]."""

    small: Tensor
    truth: Tensor

    def to(self, device: torch.device) -> CropBatch:
        """Return the batch on another device."""
        return CropBatch(self.small.to(device), self.truth.to(device))


def as_image(pictures: Sequence[Picture]) -> Tensor:
    """Return pictures [h, w, 3] as one tensor [n, 3, h, w]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


class CropSource:
    """Photographs in memory, 8-bit [h, w, 3] each, from which crops are cut as they are asked for.

    shares: of ``RECIPES``. sharpened: share of the crops that were soft and are sharpened, in
    place of those recipes. factor: times that crops are shrunk. qualities: bounds of JPEG's
    quality, in place of the usual ones.
    """

    def __init__(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        shares: Sequence[float],
        sharpened: float = 0.0,
        factor: int = 2,
        qualities: tuple[int, int] | None = None,
    ) -> None:
        self._photographs = photos.Photographs(pictures)
        self._shares = shares
        self._sharpened = sharpened
        self._factor = factor
        self._qualities = qualities

    def draw(self, settings: BatchSettings, rng: np.random.Generator) -> CropBatch:
        """Return random crops, damaged; the same state of ``rng`` gives the same."""
        rows = [self._row(settings.crop, rng) for _ in range(settings.size)]
        small, truth = zip(*rows, strict=True)
        return CropBatch(as_image(small), as_image(truth))

    def _row(self, side: int, rng: np.random.Generator) -> tuple[Picture, Picture]:
        is_soft = bool(rng.random() < self._sharpened)
        around = _EDGE + (_SURROUNDINGS if is_soft else 0)
        crop = self._crop(side + 2 * around, rng)
        if is_soft:
            small, blur = soften(crop, self._factor, rng, self._qualities)
            small = _sharpen(small, blur, rng)
        else:
            recipe = RECIPES[int(rng.choice(len(RECIPES), p=self._shares))]
            small = degrade(crop, self._factor, recipe, rng, self._qualities)
        edge = slice(around // self._factor, -(around // self._factor))
        return small[edge, edge], crop[around:-around, around:-around]

    def _crop(self, side: int, rng: np.random.Generator) -> Picture:
        picture = self._photographs.draw(rng)
        height, width = (min(_WINDOW * side, length) for length in picture.shape[:2])
        top = int(rng.integers(0, picture.shape[0] - height + 1))
        left = int(rng.integers(0, picture.shape[1] - width + 1))
        window = unit(picture[top : top + height, left : left + width])
        return photos.random_crop(window, side, rng)


def _sharpen(small: Picture, blur: float, rng: np.random.Generator) -> Picture:
    """Return a soft picture as it is shown to the net, by what is measured on it.

    blur: what it was softened by; known about where it cannot be measured.
    """
    found = measure_softness(small @ LUMA * np.float32(255))
    if found is None:
        found = min(MOST_MENDED_BLUR, max(0.0, blur + _MISSED * float(rng.standard_normal())))
    return _undo(small, found)


def _sharpen_as_used(small: Picture) -> Picture:
    """Return a picture as tegula shows it to the net; what cannot be measured is left."""
    return _undo(small, measure_softness(small @ LUMA * np.float32(255)) or 0.0)


def _undo(small: Picture, blur: float) -> Picture:
    return np.clip(undo_blur(small, blur), 0, 1) if blur else small


def twice_step(
    state: TrainingState, settings: TwiceSettings, features: EarlyFeatures, batch: CropBatch
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
    if settings.weights.grid:
        times = batch.truth.shape[-1] // batch.small.shape[-1]
        found["grid"] = grid_excess(luma(fake), luma(batch.truth), times).mean()
    if settings.weights.artefacts:
        with torch.no_grad(), mixed_precision(device):
            average = state.average(batch.small.contiguous(memory_format=torch.channels_last))
        found["artefacts"] = losses.artefacts(fake, average, batch.truth).mean()
    return descend(state, settings, found, batch.small, fake, batch.truth)


@dataclass(frozen=True)
class TwiceProgram(PupilRun):
    """From photographs and the head for 2x of ``tegula-swift`` to a net of its own for 2x."""

    stage: ClassVar[str] = "twice"
    exported: ClassVar[str] = TWICE
    damages: ClassVar[Mapping[str, bool]] = {"clean": True, "blur": True, "jpeg90": False}
    """By what a checkpoint is chosen, and whether tegula sharpens it."""

    @property
    def chosen(self) -> TwiceSettings:
        """Settings of the stage."""
        return self.settings.twice

    def start(self) -> SRVGGNetCompact:
        """Return the net for 2x as the teacher left it: that for 4x with the head for 2x."""
        return self.taught()[1]

    def taught(self) -> tuple[SRVGGNetCompact, SRVGGNetCompact]:
        """Return the nets for 4x and for 2x as the teacher left them."""
        tensors, _ = read_own(SWIFT, self.folder_of(SWIFT))
        entry = find_packaged(SWIFT)
        assert entry is not None
        return two_heads(entry, tensors)

    def everything(self) -> SRVGGNetCompact:
        """Go from photographs to the exported file; returns what is in it."""
        chosen, start = self.chosen, self.start()
        training, held_out = photos.split(self.photographs, self.settings.held_out_every)
        photo = load_prescaler(PHOTO, self.device, pick_dtype(self.device), self.folder_of(PHOTO))
        teachers = dict.fromkeys(self.damages, teacher_of(photo))
        examples = make_examples(
            held_out, chosen.side, start.factor, teachers,
            lambda small, name: _sharpen_as_used(small) if self.damages[name] else small,
        )  # fmt: skip
        features = EarlyFeatures("lite1", stages=FEATURE_STAGES).to(self.device)
        stage = Stage(
            self.stage, chosen.steps, chosen.ema, chosen.batch,
            lambda s, b: twice_step(s, chosen, features, b),
        )  # fmt: skip
        pictures = [levels(photos.read(p)) for p in training]
        source = CropSource(
            pictures, chosen.recipe_shares, chosen.sharpened, start.factor, chosen.qualities
        )
        state = new_distil_state(start, chosen, self.settings.seed, self.device)

        def net_of(tensors: Mapping[str, Tensor]) -> SRVGGNetCompact:
            network = copy.deepcopy(start).eval()
            network.load_state_dict(tensors)
            return network

        best, tensors = self.run_pupil(stage, state, source, examples, net_of)
        self.export_pupil(
            self.exported, stage.name, chosen, tensors, self.record(state, len(training), best)
        )
        return net_of(tensors)


@dataclass(frozen=True)
class SharpenedProgram(TwiceProgram):
    """Trains that net on for what was soft and is sharpened before it."""

    stage: ClassVar[str] = "sharpened"

    @property
    def chosen(self) -> TwiceSettings:
        """Settings of the stage."""
        return self.settings.sharpened

    def start(self) -> SRVGGNetCompact:
        """Return the net for 2x as the stage before exported it."""
        network = super().start()
        fill(network, read_own(TWICE, self.folder_of(TWICE))[0], TWICE)
        return network.float().requires_grad_()


@dataclass(frozen=True)
class CompressedProgram(SharpenedProgram):
    """Makes a net of its own of that net, for JPEG of good quality, which is sharpened, too."""

    stage: ClassVar[str] = "compressed"
    exported: ClassVar[str] = COMPRESSED
    damages: ClassVar[Mapping[str, bool]] = {"jpeg95": True, "jpeg85": True, "jpeg75": True}

    @property
    def chosen(self) -> TwiceSettings:
        """Settings of the stage."""
        return self.settings.compressed


@dataclass(frozen=True)
class FourProgram(TwiceProgram):
    """Trains the net for 4x on, for what is sharpened before it."""

    stage: ClassVar[str] = "four"
    exported: ClassVar[str] = FOUR

    @property
    def chosen(self) -> TwiceSettings:
        """Settings of the stage."""
        return self.settings.four

    def start(self) -> SRVGGNetCompact:
        """Return the net for 4x as the teacher left it."""
        return self.taught()[0].float().requires_grad_()
