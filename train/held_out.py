"""Held-out pairs, and the choice of a checkpoint on them.

The pairs come from photographs that are never trained on, damaged by the bench's own
recipes. Evaluation photographs proper play no part in any choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.quality.judges import load_judge
from bench.quality.recipes import DEGRADATIONS, degrade
from bench.quality.scores import Jury, MethodScores, Truth, score
from tegula.models.bundle import ControlImage
from tegula.models.mini.bundle import VOCABULARY_SIZE
from tegula.models.mini.network import (
    CHANNELS,
    BlockAutoencoder,
    MiniNetwork,
    control_channels,
    resemblance_gain,
    room_for_detail,
    take_shares,
)
from tegula.models.prescalers import WEIGHTS
from tegula.options import PresetValues
from train import photos
from train.config import RunSettings
from train.noise import TIMESTEPS, signal_shares
from train.pairs import Prescale, enlarge_by_lanczos, run_prescaler
from train.precision import mixed_precision
from train.state import TrainingState

Picture = NDArray[np.float32]
_PER_PHOTOGRAPH = 3
_FACTOR = 4


def make_held_out(paths: Sequence[Path], prescale: Prescale, side: int, path: Path) -> None:
    """Write pairs of the held-out photographs, enlarged by the default prescaler."""
    rng = np.random.default_rng(5)
    rows = []
    names = list(DEGRADATIONS)
    for number, photograph in enumerate(paths):
        picture = photos.read(photograph)
        for turn in range(_PER_PHOTOGRAPH):
            truth = photos.plain_crop(picture, side, rng)
            recipe = names[(_PER_PHOTOGRAPH * number + turn) % len(names)]
            levels = degrade(truth, _FACTOR, recipe, f"{number} {turn}")
            small = levels.astype(np.float32) / np.float32(255)
            source = enlarge_by_lanczos(small, side)
            row = np.dstack([truth, *run_prescaler(prescale, [small], [source]), source])
            rows.append(np.rint(np.clip(row, 0, 1) * 255).astype(np.uint8))
    np.save(path, np.stack(rows))


def read_held_out(path: Path) -> NDArray[np.float32]:
    """Return the pairs that ``make_held_out`` wrote, in 0..1."""
    return np.load(path).astype(np.float32) / np.float32(255)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Verdict:
    """One checkpoint on the held-out pairs; ratios and differences to the prescaled ones."""

    name: str
    frechet: float
    perceptual: float
    psnr: float
    texture: float
    flat: float

    @property
    def harmless(self) -> bool:
        """True when every guard holds."""
        return self.perceptual <= 1.03 and self.psnr >= -0.5 and self.flat <= 1.2

    @property
    def cost(self) -> float:
        """The Fréchet ratio, and a price on every guard that fails."""
        excess = max(0.0, self.perceptual - 1.03) + max(0.0, -0.5 - self.psnr)
        return self.frechet + excess + 0.2 * max(0.0, self.flat - 1.2)


@dataclass(frozen=True)
class PrescalerRun:
    """What a program reads and writes that trains a prescaler.

    photographs: what is trained on and chosen by. work: folder of pairs and checkpoints.
    weights: folder of the exported file.
    """

    settings: RunSettings
    photographs: list[Path]
    work: Path
    weights: Path
    device: torch.device
    say: Callable[[str], None]

    @property
    def run(self) -> Path:
        """Folder of checkpoints, logs and samples."""
        return self.work / self.settings.name

    def everything(self) -> object:
        """Go from photographs to the exported file; returns what is in it."""
        raise NotImplementedError

    def folder_of(self, name: str) -> Path:
        """Return where a prescaler of ours is read: as this program made it, or the package's."""
        return self.weights if (self.weights / f"{name}.json").exists() else WEIGHTS

    def record(self, state: TrainingState, pairs: int, best: Verdict) -> dict[str, Any]:
        """Return what the exported file says of its training."""
        return {
            "configuration": self.settings.name,
            "device": str(self.device),
            "minutes": round(state.seconds / 60, 1),
            "samples": state.samples,
            "pairs": pairs,
            "checkpoint": best.name,
            "held_out": {k: round(v, 4) for k, v in asdict(best).items() if k != "name"},
        }


class HeldOut:
    """Held-out pairs with their truth measured once."""

    def __init__(self, pairs: NDArray[np.float32], judge: str = "lite0") -> None:
        """Take truth, prescaled and source of each pair, [n, side, side, 9] in 0..1.

        judge: a name of ``bench.quality.judges.JUDGES``; its network gives both distances.
        """
        self.pairs = pairs
        self._judge = judge
        jury = Jury([load_judge(judge)])
        self._truths = [Truth(str(i), row[..., :3], jury) for i, row in enumerate(pairs)]
        self._measured = MethodScores()
        for truth in self._truths:
            self._measured.add(score(truth.picture, truth, None))
        self._prescaled = self._summary([row[..., 3:6] for row in pairs])

    def judge(self, name: str, network: MiniNetwork, preset: PresetValues) -> Verdict:
        """Return how one step of a network compares with the prescaled pictures."""
        return self.compare(name, self.refine(network, preset.creativity, preset.resemblance))

    def compare(self, name: str, pictures: Sequence[Picture]) -> Verdict:
        """Return how pictures compare with the prescaled ones."""
        found, before = self._summary(pictures), self._prescaled
        return Verdict(
            name,
            frechet=found[f"frechet_{self._judge}"] / before[f"frechet_{self._judge}"],
            perceptual=found[f"distance_{self._judge}"] / before[f"distance_{self._judge}"],
            psnr=found["psnr"] - before["psnr"],
            texture=found["texture_middle"],
            flat=found["flat"],
        )

    def refine(
        self,
        network: MiniNetwork,
        creativity: float,
        resemblance: float = 1.0,
        rows: int | None = None,
    ) -> list[Picture]:
        """Return the pairs' prescaled pictures after one step from noise alone."""
        generator = torch.Generator().manual_seed(0)
        gain = resemblance_gain(resemblance)
        return [_refine(row, network, creativity, gain, generator) for row in self.pairs[:rows]]

    def _summary(self, pictures: Sequence[Picture]) -> Mapping[str, float]:
        scores = MethodScores()
        for picture, truth in zip(pictures, self._truths, strict=True):
            scores.add(score(np.clip(picture, 0, 1), truth, None))
        return scores.summary(self._measured)


def _refine(
    row: Picture,
    network: MiniNetwork,
    creativity: float,
    gain: float,
    generator: torch.Generator,
) -> Picture:
    images = torch.from_numpy(row).permute(2, 0, 1)[None]
    control = ControlImage(images[:, 3:6], images[:, 6:9])
    shape = (1, CHANNELS, images.shape[2] // 4, images.shape[3] // 4)
    timestep = min(TIMESTEPS - 1, round(creativity * TIMESTEPS))
    noise = torch.randn(shape, generator=generator) * (1 - signal_shares()[timestep]).sqrt()
    with torch.inference_mode(), mixed_precision(images.device):
        level = torch.tensor([timestep / TIMESTEPS])
        words = torch.zeros(1, VOCABULARY_SIZE)
        channels = control_channels(control)
        latents = network(noise, level, channels, words)
    latents = take_shares(latents, channels, room_for_detail(control), gain)
    picture: Picture = BlockAutoencoder().decode(latents, control)[0].permute(1, 2, 0).numpy()
    return np.clip(picture, 0, 1)


def choose(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the harmless checkpoint of the least Fréchet distance, else the least harmful."""
    return min([v for v in verdicts if v.harmless] or verdicts, key=lambda v: v.cost)


def table(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as lines of text."""
    lines = []
    for verdict in verdicts:
        values = asdict(verdict)
        name = values.pop("name")
        lines.append(f"{name:28}" + "  ".join(f"{k} {v:+.3f}" for k, v in values.items()))
    return "\n".join(lines)
