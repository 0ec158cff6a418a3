"""Runs one stage: batches, steps, average, log, checkpoints, sample pictures."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tegula.models.mini.network import MiniNetwork
from train.batches import BatchSettings
from train.config import RunSettings
from train.processes import made_ahead
from train.state import Log, TrainingState

Step = Callable[[TrainingState, Any], dict[str, Tensor]]
"""One step on a batch of its source."""


class Source(Protocol):
    """Where batches come from."""

    def draw(self, settings: BatchSettings, rng: np.random.Generator) -> object:
        """Return a batch; the same state of ``rng`` gives the same one."""
        ...


def step_rng(settings: RunSettings, stage: str, step: int) -> np.random.Generator:
    """Return what draws the batch of one step."""
    return np.random.default_rng([settings.seed, zlib.crc32(stage.encode()), step])


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its name, length, batches, and what a step does."""

    name: str
    steps: int
    ema: float
    batch: BatchSettings
    step: Step


def new_state(settings: RunSettings, device: torch.device, rate: float) -> TrainingState:
    """Return a freshly initialised network with its optimiser."""
    torch.manual_seed(settings.seed)
    network = MiniNetwork(settings.shape).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network).requires_grad_(requires_grad=False)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3
    )
    return TrainingState(
        network,
        average,
        {"network": optimiser},
        generator=torch.Generator().manual_seed(settings.seed),
    )


def run_stage(
    stage: Stage,
    state: TrainingState,
    source: Source,
    folder: Path,
    settings: RunSettings,
    on_samples: Callable[[TrainingState, Path], None] = lambda _state, _path: None,
) -> None:
    """Run a stage to its end, from its checkpoint where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{stage.name}.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    log = Log(folder / f"{stage.name}.jsonl")

    def draw(step: int) -> object:
        return source.draw(stage.batch, step_rng(settings, stage.name, step))

    batches = made_ahead(draw, range(state.step, stage.steps), settings.workers)
    while state.step < stage.steps:
        began = time.monotonic()
        losses = stage.step(state, next(batches))
        state.step += 1
        state.samples += stage.batch.size
        state.update_average(stage.ema)
        state.seconds += time.monotonic() - began
        log.add(state, losses)
        ended = state.step == stage.steps
        if ended or state.step % settings.samples_every == 0:
            on_samples(state, folder / f"{stage.name}-{state.step:06d}.png")
        if ended or state.step % settings.checkpoint_every == 0:
            state.save(checkpoint)
            torch.save(
                state.average.state_dict(), folder / f"{stage.name}-{state.step:06d}.average.pt"
            )
