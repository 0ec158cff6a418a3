"""The stages of a whole run, in order; each takes up where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.quality.features import EarlyFeatures
from tegula.models.device import pick_dtype
from tegula.models.mini.network import MiniNetwork
from tegula.models.prescalers.load import load_prescaler
from train import export as exporting
from train import photos
from train.adversarial import add_judges, adversarial_step
from train.batches import PairSource
from train.card import card
from train.config import RunSettings
from train.diffusion import diffusion_step
from train.distil import DistilProgram
from train.held_out import (
    HeldOut,
    PrescalerRun,
    Verdict,
    choose,
    make_held_out,
    read_held_out,
    table,
)
from train.line import LineProgram
from train.pairs import Prescale, make_shards
from train.prescaler import PrescalerProgram
from train.presets import PRESETS
from train.ranges import RangesProgram
from train.runner import Stage, new_state, run_stage
from train.samples import write_samples
from train.second import SecondProgram
from train.state import TrainingState
from train.twice import CompressedProgram, FourProgram, SharpenedProgram, TwiceProgram

FEATURE_STAGES = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """Where a run reads and writes, and with what settings.

    weights: folder of mini's bundle. tuned: folder of the prescaler below it.
    """

    settings: RunSettings
    photographs: tuple[Path, ...]
    work: Path
    weights: Path
    tuned: Path
    device: torch.device
    say: Say

    @property
    def pairs(self) -> Path:
        """Folder of the pair shards."""
        return self.work / "pairs"

    @property
    def run(self) -> Path:
        """Folder of checkpoints, logs and samples."""
        return self.work / self.settings.name

    def tune_prescaler(self) -> None:
        """Tune the prescaler that mini builds on, where that is not done yet."""
        self._train(PrescalerProgram)

    def train_second(self) -> None:
        """Train the tuned prescaler on, all of it; a graphics card's work."""
        self._train(SecondProgram)

    def measure_ranges(self) -> None:
        """Measure what the tuned prescaler rounds by where it multiplies 8-bit numbers."""
        self._train(RangesProgram)

    def distil_prescaler(self) -> None:
        """Distil the small prescaler, which the large one teaches."""
        self._train(DistilProgram)

    def train_twice(self) -> None:
        """Train the small prescaler on for what it is run for up to 2x."""
        self._train(TwiceProgram)

    def train_sharpened(self) -> None:
        """Train that net on for what is sharpened before it."""
        self._train(SharpenedProgram)

    def train_four(self) -> None:
        """Train the small prescaler on for 4x."""
        self._train(FourProgram)

    def train_compressed(self) -> None:
        """Make a net for JPEG files of that net."""
        self._train(CompressedProgram)

    def train_line(self) -> None:
        """Train the small prescaler for what is drawn."""
        self._train(LineProgram)

    def _train(self, kind: type[PrescalerRun]) -> None:
        kind(
            self.settings, self._found(), self.work, self.tuned, self.device, self.say
        ).everything()

    def _found(self) -> list[Path]:
        found = photos.find_photographs(self.photographs)
        if not found:
            raise SystemExit(
                "No photographs found; name folders with --photos or TEGULA_TRAIN_PHOTOS."
            )
        return found

    def make_pairs(self) -> None:
        """Make the training pairs and the held-out ones."""
        training, held_out = photos.split(self._found(), self.settings.held_out_every)
        self.say(f"{len(training)} photographs to train on, {len(held_out)} held out")
        prescalers = {
            name: self._prescale(name)
            for name, _ in self.settings.pairs.prescale_shares
            if name not in ("lanczos", "mixed")
        }
        make_shards(
            training, self.pairs, self.settings.pairs, prescalers,
            lambda done, total: self.say(f"pairs: shard {done} of {total}"),
            self.settings.workers,
        )  # fmt: skip
        path = self.work / "held-out.npy"
        if not path.exists():
            default = prescalers[PRESETS["balanced"].prescaler]
            make_held_out(held_out, default, self.settings.pairs.side, path)

    def train_diffusion(self) -> TrainingState:
        """Run stage one; returns its state."""
        chosen = self.settings.diffusion
        state = new_state(self.settings, self.device, chosen.learning_rate)
        stage = Stage(
            "diffusion", chosen.steps, chosen.ema, chosen.batch,
            lambda s, b: diffusion_step(s, chosen, b),
        )  # fmt: skip
        self._run_stage(stage, state)
        return state

    def train_adversarial(self) -> TrainingState:
        """Run stage two from the average of stage one; returns its state."""
        chosen = self.settings.adversarial
        before = self.train_diffusion()
        state = new_state(self.settings, self.device, chosen.learning_rate)
        for network in (state.network, state.average):
            network.load_state_dict(before.average.state_dict())
        add_judges(state, chosen)
        features = EarlyFeatures("lite1", stages=FEATURE_STAGES).to(self.device)
        stage = Stage(
            "adversarial", chosen.steps, chosen.ema, chosen.batch,
            lambda s, b: adversarial_step(s, chosen, features, b),
        )  # fmt: skip
        self._run_stage(stage, state)
        state.seconds += before.seconds
        state.samples += before.samples
        return state

    def _run_stage(self, stage: Stage, state: TrainingState) -> None:
        held_out = self._held_out()

        def sample(state: TrainingState, path: Path) -> None:
            network = self._network(state.average.state_dict())
            write_samples(network, held_out, path)
            self.say(f"{stage.name}: step {state.step} of {stage.steps}, {state.seconds:.0f} s")

        run_stage(stage, state, PairSource(self.pairs), self.run, self.settings, sample)

    def evaluate(self) -> Verdict:
        """Judge every average of stage two on the held-out pairs; returns the choice."""
        held_out = self._held_out()
        verdicts = []
        for path in sorted(self.run.glob("adversarial-*.average.pt")):
            network = self._network(torch.load(path, weights_only=True))
            verdicts.append(held_out.judge(path.name, network, PRESETS["balanced"]))
        best = choose(verdicts)
        self.say(f"{table(verdicts)}\nchosen: {best.name}")
        (self.run / "evaluation.json").write_text(
            json.dumps([asdict(v) for v in verdicts], indent=1)
        )
        return best

    def export(self, seconds: float, samples: int) -> str:
        """Write weights, configuration and card; returns the hash of the weights."""
        best = self.evaluate()
        tensors = torch.load(self.run / best.name, weights_only=True)
        shares = self.settings.pairs
        training = {
            "configuration": self.settings.name,
            "device": str(self.device),
            "minutes": round(seconds / 60, 1),
            "samples": samples,
            "pairs": shares.count,
            "checkpoint": best.name,
            "held_out": {k: round(v, 4) for k, v in asdict(best).items() if k != "name"},
        }
        digest = exporting.export(tensors, self.settings.shape, PRESETS, training, self.weights)
        exporting.replace(
            self.weights / "README.md", card(digest, self.settings, training).encode()
        )
        return digest

    def everything(self) -> None:
        """Go from photographs to the bundle's folder, the prescalers first."""
        self.tune_prescaler()
        if self.device.type == "cuda":
            self.train_second()
        self.measure_ranges()
        self.distil_prescaler()
        self.train_four()
        self.train_twice()
        self.train_sharpened()
        self.train_compressed()
        self.train_line()
        self.make_pairs()
        state = self.train_adversarial()
        digest = self.export(state.seconds, state.samples)
        self.say(
            f"{self.weights}: {digest}; training took {state.seconds / 60:.0f} min on "
            f"{self.device} for {state.samples} samples"
        )

    def _held_out(self) -> HeldOut:
        return HeldOut(read_held_out(self.work / "held-out.npy"))

    def _network(self, tensors: dict[str, torch.Tensor]) -> MiniNetwork:
        network = MiniNetwork(self.settings.shape)
        network.load_state_dict(tensors)
        return network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]

    def _prescale(self, name: str) -> Prescale:
        network = load_prescaler(name, self.device, pick_dtype(self.device), self.tuned).network
        assert network is not None

        def prescale(batch: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = network(batch.to(self.device)).float().cpu()
            return result

        return prescale
