"""From photographs to the prescaler ``tegula-photo``: pairs, tuning, choice, export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.quality.features import EarlyFeatures
from tegula.models.prescalers.load import load_prescaler
from tegula.models.prescalers.networks import RRDBNet
from train import export, photos
from train.config import TailSettings
from train.held_out import PrescalerRun, choose, table
from train.pairs import PHOTO
from train.runner import Stage, run_stage
from train.samples import write_sheet
from train.state import TrainingState
from train.tail import (
    cut_tail,
    interpolate,
    new_tail_state,
    tail_step,
    tuned_tensors,
    with_tail,
)
from train.tail_held_out import TailHeldOut, make_tail_held_out
from train.tail_pairs import TailSource, features_before, make_tail_shards

BASE = "realesrgan-x4plus"
BLOCKS = 23
FEATURE_STAGES = 3
_SHOWN = 6
_TEMPLATE = Path(__file__).with_name("prescaler.md")


@dataclass(frozen=True)
class PrescalerProgram(PrescalerRun):
    """From photographs to ``tegula-photo``: pairs, tuning, choice, export."""

    def everything(self) -> RRDBNet:
        """Go from photographs to the exported file; returns the whole tuned network."""
        base = base_network(self.device)
        self._make_pairs(base)
        state = self._tune(base)
        return self._export(base, state)

    def _make_pairs(self, base: RRDBNet) -> None:
        chosen = self.settings.tail
        training, held_out = photos.split(self.photographs, self.settings.held_out_every)

        def see(small: torch.Tensor) -> torch.Tensor:
            return features_before(base, small.to(self.device), chosen.blocks)

        make_tail_shards(
            training, self.work / "tail-pairs", chosen.pairs, see,
            lambda done, total: self.say(f"prescaler's pairs: shard {done} of {total}"),
            self.settings.workers,
        )  # fmt: skip
        if not self._held_out_path.exists():
            make_tail_held_out(held_out, see, chosen.pairs.side, self._held_out_path)

    def _tune(self, base: RRDBNet) -> TrainingState:
        chosen = self.settings.tail
        tail = cut_tail(base, chosen.blocks)
        held_out = self._held_out(base)
        features = EarlyFeatures("lite1", stages=FEATURE_STAGES).to(self.device)
        stage = Stage(
            "tail", chosen.steps, chosen.ema, chosen.batch,
            lambda state, batch: tail_step(state, chosen, features, batch),
        )  # fmt: skip

        def sample(state: TrainingState, path: Path) -> None:
            average = self._tail(base, state.average.state_dict())
            write_sheet(held_out.columns(average, _SHOWN), path)
            self.say(f"prescaler: step {state.step} of {stage.steps}, {state.seconds:.0f} s")

        state = new_tail_state(tail, chosen, self.settings.seed, self.device)
        source = TailSource(self.work / "tail-pairs")
        run_stage(stage, state, source, self.run, self.settings, sample)
        return state

    def _export(self, base: RRDBNet, state: TrainingState) -> RRDBNet:
        held_out, verdicts = self._held_out(base), []
        for path in sorted(self.run.glob("tail-*.average.pt")):
            tail = self._tail(base, self._interpolated(base, path))
            verdicts.append(held_out.judge(path.name, tail))
        best = choose(verdicts)
        self.say(f"{table(verdicts)}\nchosen: {best.name}")
        tensors = self._interpolated(base, self.run / best.name)
        chosen = self.settings.tail
        training = {**self.record(state, chosen.pairs.count, best), "share": chosen.share}
        tuned = tuned_tensors(tensors, BLOCKS - chosen.blocks)
        digest = export.export_tensors(tuned, training, self.weights, PHOTO)
        text = card(tuned, digest, chosen, training)
        export.replace(self.weights / "README.md", text.encode())
        self.say(f"{self.weights}: {PHOTO}, {digest}")
        return with_tail(base, tensors, chosen.blocks)

    def _interpolated(self, base: RRDBNet, path: Path) -> dict[str, torch.Tensor]:
        """Return the share of a checkpoint's tail that the settings take."""
        chosen = self.settings.tail
        untuned = cut_tail(base, chosen.blocks).state_dict()
        tuned = torch.load(path, map_location="cpu", weights_only=True)
        return interpolate(untuned, tuned, chosen.share)

    def _tail(self, base: RRDBNet, tensors: dict[str, torch.Tensor]) -> RRDBNet:
        tail = cut_tail(base, self.settings.tail.blocks)
        tail.load_state_dict(tensors)
        return tail.eval()

    @property
    def _held_out_path(self) -> Path:
        return self.work / "tail-held-out.npz"

    def _held_out(self, base: RRDBNet) -> TailHeldOut:
        return TailHeldOut(self._held_out_path, cut_tail(base, self.settings.tail.blocks).eval())


def card(
    tuned: Mapping[str, torch.Tensor],
    digest: str,
    settings: TailSettings,
    training: Mapping[str, Any],
) -> str:
    """Return the prescaler's card as Markdown."""
    return _TEMPLATE.read_text(encoding="utf-8").format(
        digest=digest,
        crop=settings.batch.crop,
        blocks=settings.blocks,
        kept=BLOCKS - settings.blocks,
        tuned=sum(t.numel() for t in tuned.values()) / 1e6,
        **{"history": "", **training},
    )


def base_network(device: torch.device) -> RRDBNet:
    """Return the network whose tail is tuned, in float32."""
    network = load_prescaler(BASE, device, torch.float32).network
    assert isinstance(network, RRDBNet)
    return network
