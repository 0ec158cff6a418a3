"""Trains ``tegula-photo`` on in a second stage that opens all of its blocks.

The first stage (``train.prescaler``) tuned the last layers alone, on features that were made
once. Here every batch is cut from the photographs and damaged afresh, gradients go through all
blocks or the last so many, and what the net learns comes in three parts: by itself first, then
against a U-Net that judges every pixel, at the end at a tenth of the rates.

Where the judge makes the net draw what is not there, the weights' running average is steadier
than they are. So from the judge's first step on there is LDL's loss (Liang et al., "Details or
Artifacts", 2022), and what is exported is the average. In place of plain pixels the result,
shrunk again, is held to the source. Features come from EfficientNet-lite1 alone: VGG16, by which
checkpoints are chosen, is in no loss.

This is work for a graphics card, and none has run it yet: **no file that tegula ships was made by
it**, and its settings are a plan. ``python -m train`` runs it where there is a card and leaves it
out elsewhere; ``python -m train second`` runs it anywhere, for days on a processor. It begins with
the prescaler in the folder of weights, or else with the package's, and takes its place under
the same name; the ranges of 8-bit products have to be measured anew (``python -m train ranges``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bench.quality.features import EarlyFeatures
from bench.quality.recipes import DEGRADATIONS
from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import RRDBNet
from train import losses, photos
from train.config import SecondSettings
from train.discriminator import UNetJudge
from train.distil import (
    FEATURE_STAGES,
    PupilRun,
    descend,
    make_examples,
    new_distil_state,
    of_originals,
    teacher_of,
)
from train.distil_pairs import Teach
from train.pairs import PHOTO, levels
from train.precision import mixed_precision
from train.runner import Stage
from train.state import TrainingState
from train.tail_pairs import FACTOR
from train.twice import CropBatch, CropSource

_LAST_SHARE = 0.1
"""Of the rates, for the last part."""
_PAGE = "README.md"
"""The card of ``tegula-photo``, where the first stage writes it, too."""


def open_last(network: RRDBNet, blocks: int) -> RRDBNet:
    """Return a copy of a network whose last blocks can be trained, and all that follows them.

    Its first convolution stays as it is, as it does when the tail is tuned.
    """
    opened = copy.deepcopy(network).requires_grad_(requires_grad=False)
    closed = len(opened.body) - blocks
    if not 0 <= closed < len(opened.body):
        raise ValueError(f"blocks must be 1 to {len(opened.body)}, not {blocks}.")
    after = [layer for name, layer in opened.named_children() if name not in ("conv_first", "body")]
    for layer in [*list(opened.body)[closed:], *after]:
        layer.requires_grad_(requires_grad=True)
    return opened


def enlarge(network: RRDBNet, small: Tensor) -> Tensor:
    """Return pictures [n, 3, 4h, 4w], not clamped, of [n, 3, h, w]: the numbers of ``network``.

    Of a block that is trained only what goes in is kept for the way back, and the rest is made
    anew there (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016): a third more
    work, and a fraction of the memory.
    """
    shallow: Tensor = network.conv_first(small)
    x = shallow
    for block in network.body:
        if torch.is_grad_enabled() and _is_open(block):
            # Nothing in a block is drawn at random, so there is no state of it to bring back.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x)
    return network.finish(shallow, x)


def _is_open(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def new_second_state(
    start: RRDBNet, settings: SecondSettings, seed: int, device: torch.device
) -> TrainingState:
    """Return the state of a run that begins with a network; that one stays as it is."""
    opened = open_last(start, settings.blocks)
    judge = partial(UNetJudge, settings.judge_width)
    return new_distil_state(opened, settings, seed, device, judge)


def second_step(
    state: TrainingState, settings: SecondSettings, features: EarlyFeatures, batch: CropBatch
) -> dict[str, Tensor]:
    """Take one step of the net, and of the discriminator once it counts; returns the losses."""
    device = next(state.network.parameters()).device
    batch = batch.to(device)
    small, truth = batch.small, batch.truth
    with mixed_precision(device):
        fake = enlarge(cast("RRDBNet", state.network), small)
        seen = features(fake)
        with torch.no_grad():
            goals = features(truth)
    shrunk, true_shrunk = (
        functional.interpolate(x, small.shape[-2:], mode="area") for x in (fake, truth)
    )
    found = {
        **of_originals(fake, truth, seen, goals, small.shape[-2:]),
        "dists": losses.dists(seen, goals).mean(),
        "source": losses.source_kept(shrunk, small, true_shrunk).mean() * 10,
    }
    if state.step >= settings.judges_from:
        with torch.no_grad(), mixed_precision(device):
            average = enlarge(cast("RRDBNet", state.average), small)
        found["artefacts"] = losses.artefacts(fake, average, truth).mean()
    return descend(
        state, settings, found, small, fake, truth, lambda s: set_second_rates(s, settings)
    )


def set_second_rates(state: TrainingState, settings: SecondSettings) -> None:
    """Warm up linearly and hold; both rates are a tenth of that in the last steps.

    The discriminator's falls, too: beside a net that hardly moves it would get far ahead.
    """
    share = min(1.0, (state.step + 1) / settings.warm_up)
    if state.step >= settings.steps - settings.last:
        share *= _LAST_SHARE
    rates = {"network": settings.learning_rate, "judges": settings.discriminator_rate}
    for name, rate in rates.items():
        for group in state.optimisers[name].param_groups:
            group["lr"] = rate * share


def exported_tensors(
    tensors: Mapping[str, Tensor], network: RRDBNet, already_tuned: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors that no longer are x4plus's: those tuned before, and those trained now."""
    trained = {name for name, each in network.named_parameters() if each.requires_grad}
    names = trained | already_tuned.keys()
    return {name: tensor for name, tensor in tensors.items() if name in names}


@dataclass(frozen=True)
class SecondProgram(PupilRun):
    """From photographs and ``tegula-photo`` to what takes its place: training, choice, export."""

    def everything(self) -> RRDBNet:
        """Go from photographs to the exported file; returns the whole network."""
        chosen = self.settings.second
        training, held_out = photos.split(self.photographs, self.settings.held_out_every)
        photo = load_prescaler(PHOTO, self.device, torch.float32, self.folder_of(PHOTO))
        start, line = photo.network, photo.line
        assert isinstance(start, RRDBNet)
        assert line is not None
        before = dict.fromkeys(DEGRADATIONS, teacher_of(photo))
        examples = make_examples(held_out, chosen.side, FACTOR, before)
        features = EarlyFeatures("lite1", stages=FEATURE_STAGES).to(self.device)
        stage = Stage(
            "second", chosen.steps, chosen.ema, chosen.batch,
            lambda s, b: second_step(s, chosen, features, b),
        )  # fmt: skip
        source = CropSource(
            [levels(photos.read(p)) for p in training],
            chosen.recipe_shares,
            factor=FACTOR,
            qualities=chosen.qualities,
        )
        state = new_second_state(start, chosen, self.settings.seed, self.device)

        def net_of(tensors: Mapping[str, Tensor]) -> RRDBNet:
            network = copy.deepcopy(start)
            network.load_state_dict(tensors)
            return network

        def judged(tensors: Mapping[str, Tensor]) -> Teach:
            network = net_of(tensors)
            return lambda small: cast("Tensor", network(small.to(self.device)))

        best, tensors = self.run_pupil(stage, state, source, examples, judged)
        # The share stays what it was: what was trained is now what that share of the line
        # gives, so the shares that tegula asks for by the damage go on to mean the same.
        record = {**self.record(state, len(training), best), "share": line.share}
        kept = exported_tensors(tensors, cast("RRDBNet", state.network), line.tuned)
        self.export_pupil(PHOTO, stage.name, chosen, kept, record, _PAGE)
        return net_of(tensors)
