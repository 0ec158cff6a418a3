"""Trains the prescaler ``tegula-line``: a small straight net for text, screens and line art.

The pupil begins as Real-ESRGAN's net for anime video, with a second head for 2x, as
``tegula-swift``'s does. There is no teacher: of what is drawn the original is known, and nothing
but its shape has to be found. So the losses compare place by place, and three of them say what
makes a drawing: edges are as steep as they were, white and black are pure, and no band of detail
is weaker than the truth's, which is what grey letters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.features import EarlyFeatures
from bench.quality.recipes import degrade
from tegula.models.device import pick_dtype
from tegula.models.mini.network import luma
from tegula.models.prescalers.load import load_prescaler
from train import losses, photos
from train.config import LineSettings
from train.distil import FEATURE_STAGES, JUDGE, Examples, Pupil, PupilRun, descend, pupil_of
from train.drawings import draw
from train.held_out import HeldOut
from train.line_pairs import LineBatch, LineSource, make_line_shards
from train.pairs import LINE, enlarge_by_lanczos, run_prescaler, unit
from train.precision import mixed_precision
from train.runner import Stage
from train.sketch import FACTOR, Face, find_faces
from train.state import TrainingState

_BAR = "realesrgan-x4plus-anime"
"""What the pupil has to pass."""
_HELD_OUT = 1_000_000
"""Added to the seeds of what is held out: no shard has that number."""
_TOLERATED = 8 / 255
"""Departure from pure white or black from which it is as bad as any: a hue is seen at once."""
_PURE = 0.5 / 255


def line_step(
    state: TrainingState, settings: LineSettings, features: EarlyFeatures, batch: LineBatch
) -> dict[str, Tensor]:
    """Take one step of the pupil, and of the discriminator once it counts."""
    device = next(state.network.parameters()).device
    batch = batch.to(device)
    with mixed_precision(device):
        four, two = state.network(batch.small)
    found = compare(four, batch.truth, features)
    halves = compare(two, batch.twice().truth, features)
    found = {name: value + settings.twice * halves[name] for name, value in found.items()}
    return descend(state, settings, found, batch.small, four, batch.truth)


def compare(fake: Tensor, truth: Tensor, features: EarlyFeatures) -> dict[str, Tensor]:
    """Return how far pictures [n, 3, h, w] are from their truths."""
    shown = fake.clamp(0, 1)
    with mixed_precision(fake.device):
        seen = features(shown)
        with torch.no_grad():
            goals = features(truth)
    return {
        "pixel": within_range(fake, truth).abs().mean() * 10,
        "edges": edges(fake, truth) * 10,
        "extremes": extremes(fake, truth),
        "perceptual": losses.perceptual(seen, goals).mean(),
        "energy": losses.band_energy(luma(shown), luma(truth)).mean(),
    }


def within_range(fake: Tensor, truth: Tensor) -> Tensor:
    """Return the difference; whiter than white and blacker than black are shown as such."""
    difference = fake - truth
    light, dark = truth >= 1 - _PURE, truth <= _PURE
    outside = (light & (difference > 0)) | (dark & (difference < 0))
    return torch.where(outside, 0.0, difference)


def edges(fake: Tensor, truth: Tensor) -> Tensor:
    """Return how far differences of neighbours are from the truth's."""
    total = torch.zeros((), device=fake.device)
    shown = fake.clamp(-0.05, 1.05)
    for axis in (-1, -2):
        total = total + (shown.diff(dim=axis) - truth.diff(dim=axis)).abs().mean()
    return total


def extremes(fake: Tensor, truth: Tensor) -> Tensor:
    """Return the share of pure white and black that is not, small departures counted in part.

    Pixels count whose neighbours are pure, too: an edge is grey by right.
    """
    total = torch.zeros((), device=fake.device)
    for goal, sign in ((truth, -1.0), (1 - truth, 1.0)):
        pure = (goal.amin(1, keepdim=True) >= 1 - _PURE).float()
        inside = 1 - functional.max_pool2d(1 - pure, 3, stride=1, padding=1)
        edge = 1.0 if sign < 0 else 0.0
        departure = functional.relu(sign * (fake - edge)) / _TOLERATED
        total = total + (departure.clamp(max=1) * inside).mean()
    return total


@dataclass(frozen=True)
class LineProgram(PupilRun):
    """From fonts and photographs to ``tegula-line``: truths, training, choice, export."""

    def everything(self) -> Pupil:
        """Go from fonts and photographs to the exported file; returns what is in it."""
        chosen = self.settings.line
        training, _ = photos.split(self.photographs, self.settings.held_out_every)
        folder, faces = self.work / "line-pairs", find_faces()
        make_line_shards(
            training, folder, chosen.pairs, faces,
            lambda done, total: self.say(f"line: shard {done} of {total}"),
        )  # fmt: skip
        examples = self._examples(faces)
        features = EarlyFeatures("lite1", stages=FEATURE_STAGES).to(self.device)
        state = self.begin(chosen)
        stage = Stage(
            "line", chosen.steps, chosen.ema, chosen.batch,
            lambda s, b: line_step(s, chosen, features, b),
        )  # fmt: skip
        best, tensors = self.run_pupil(
            stage, state, LineSource(folder), examples, lambda t: pupil_of(t).four
        )
        pupil = pupil_of(tensors)
        record = self.record(state, chosen.pairs.count, best)
        self.export_pupil(LINE, stage.name, chosen, pupil.tensors(), record)
        return pupil

    def _examples(self, faces: Sequence[Face]) -> Examples:
        """Draw pictures that are not trained on, beside what the net for drawings makes of them."""
        chosen = self.settings.line.pairs
        anime = load_prescaler(_BAR, self.device, pick_dtype(self.device)).network

        def enlarge(small: Tensor) -> Tensor:
            with torch.inference_mode():
                return cast("Tensor", cast("nn.Module", anime)(small.to(self.device)))

        smalls, rows = [], []
        for number in range(chosen.held_out):
            rng = np.random.default_rng([chosen.seed, _HELD_OUT, number])
            truth = unit(draw(chosen.side // FACTOR, rng, faces))
            name = ("clean", "jpeg")[number % 2]
            small = unit(degrade(truth, FACTOR, name, f"{number}"))
            source = enlarge_by_lanczos(small, len(truth))
            rows.append(np.dstack([truth, *run_prescaler(enlarge, [small], [source]), source]))
            smalls.append(small)
        return Examples(smalls, HeldOut(np.stack(rows).astype(np.float32), JUDGE))
