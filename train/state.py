"""What a run carries from step to step, and its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class TrainingState:
    """Network, its running average, optimisers, and the generator of noise and its levels.

    The generator is on the CPU, so that a run does not depend on the device; what a batch
    holds is drawn for its step.
    """

    network: nn.Module
    average: nn.Module
    optimisers: dict[str, Optimizer]
    extras: dict[str, nn.Module] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))
    step: int = 0
    seconds: float = 0.0
    samples: int = 0

    def update_average(self, decay: float) -> None:
        """Move the running average; the first steps count more."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages: list[Tensor] = list(self.average.parameters())
            currents: list[Tensor] = list(self.network.parameters())
            torch._foreach_lerp_(averages, currents, 1 - decay)

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interrupted write leaves the one before."""
        modules = {"network": self.network, "average": self.average, **self.extras}
        content: dict[str, Any] = {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
            "generator": self.generator.get_state(),
            "counters": [self.step, self.seconds, self.samples],
        }
        part = path.with_suffix(".part")
        torch.save(content, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, bit for bit."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in {
            "network": self.network,
            "average": self.average,
            **self.extras,
        }.items():
            module.load_state_dict(content["modules"][name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(content["optimisers"][name])
        self.generator.set_state(content["generator"])
        self.step, self.seconds, self.samples = content["counters"]


class Log:
    """One JSON object a line: means of the losses since the line before."""

    def __init__(self, path: Path, every: int = 25) -> None:
        self._path = path
        self._every = every
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._since = time.monotonic()

    def add(self, state: TrainingState, losses: Mapping[str, Tensor]) -> None:
        """Take the losses of one step; write a line every so many."""
        self._count += 1
        for name, value in losses.items():
            # Sums stay on their device: reading one would wait for it.
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        if self._count < self._every:
            return
        now = time.monotonic()
        line: dict[str, float] = {"step": state.step, "samples": state.samples}
        line["steps_per_second"] = round(self._count / (now - self._since), 3)
        line |= {name: round(float(total) / self._count, 5) for name, total in self._sums.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._sums, self._count, self._since = {}, 0, now
