"""Canvas sampling: one latent canvas, one scheduler, many windows.

Every step gathers all windows into equal batches, evaluates them, and scatters the
predictions back with weights that sum to one; then the scheduler steps the canvas once.
No window is ever finished alone, so no seam can form. Averaging predictions of
overlapping windows is MultiDiffusion (Bar-Tal et al., 2023); feathered weights are
Mixture of Diffusers (Jiménez, 2023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.diffusion.guidance import Guidance, combine
from tegula.diffusion.hold import Hold
from tegula.diffusion.prediction import HalvingBatch, SafeDenoiser
from tegula.diffusion.reuse import key_levels
from tegula.diffusion.schedulers import Generators, NoiseSchedule
from tegula.errors import CancelledError
from tegula.models.bundle import ControlScale, WindowBatch
from tegula.progress import Cancelled, OnUnit
from tegula.tiling.windows import WindowGrid

Index = tuple[slice, slice, slice, slice]
Watch = Callable[[Tensor], object]
"""Shown, while levels are still to come, what the clean latents look like by now."""


@dataclass(frozen=True)
class Conditioning:
    """What every evaluation is told beside the noisy latents.

    text: [prompts, tokens, width]; negative_text: [1, tokens, width].
    control: embedded control windows, as the places number them.
    """

    text: Tensor
    negative_text: Tensor
    control: Tensor


@dataclass(frozen=True)
class Place:
    """One window of one canvas of a stack, told one prompt.

    index: cuts the window out of latents [canvases, channels, height, width].
    weights: [height, width] on the device; those of all places of a canvas sum to one.
    control, prompt: rows of ``Conditioning.control`` and ``Conditioning.text``.
    """

    index: Index
    weights: Tensor
    control: int
    prompt: int = 0


@dataclass(frozen=True)
class Step:
    """One noise level: its number, timestep, and whether guidance and control are on.

    key: the denoiser runs whole here, elsewhere on the features of the key level before.
    """

    number: int
    timestep: Tensor
    guided: bool
    control: ControlScale | None
    key: bool


def places_of(
    grid: WindowGrid,
    device: torch.device,
    shares: Sequence[Sequence[NDArray[np.float32]]],
    canvas: int = 0,
) -> list[Place]:
    """Return the windows of a grid on one canvas of a stack, once for each of their prompts.

    Args:
        grid: in latent pixels.
        device: where the weights will be.
        shares: of every prompt at every pixel of every window, as ``prompt_shares`` makes
            them; a prompt without a share in a window is left out there.
        canvas: which canvas of the stack.
    """
    return [
        Place(
            (slice(canvas, canvas + 1), slice(None), *window.index[1:]),
            torch.from_numpy(grid.weights(index) * share).to(device),
            canvas * len(grid) + index,
            prompt,
        )
        for index, window in enumerate(grid.windows)
        for prompt, share in enumerate(shares[index])
        if share.any()
    ]


class CanvasSampler:
    """Denoises latent canvases of any size through windows of one size.

    ``feature_reuse`` is every how many levels a denoiser that has halves runs whole.
    """

    def __init__(
        self,
        denoiser: SafeDenoiser,
        places: Sequence[Place],
        conditioning: Conditioning,
        guidance: Guidance,
        batch: HalvingBatch,
        feature_reuse: int = 1,
    ) -> None:
        self._denoiser = denoiser
        self._places = places
        self._conditioning = conditioning
        self._guidance = guidance
        self._batch = batch
        self._every = feature_reuse if denoiser.splits else 1

    def __len__(self) -> int:
        """Return how many windows one noise level takes."""
        return len(self._places)

    def sample(
        self,
        latents: Tensor,
        schedule: NoiseSchedule,
        generator: Generators,
        on_unit: OnUnit,
        cancelled: Cancelled,
        hold: Hold | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Walk the canvases from their noisy start to clean latents.

        Args:
            latents: [canvases, channels, height, width], noised to the first level, fp32.
            schedule: the levels to run.
            generator: draws the noise of stochastic schedulers: one for the whole stack,
                or one for each canvas.
            on_unit: told (windows done, windows in all) as they are done.
            cancelled: asked before every batch.
            hold: what stays as it is until a later level; None changes all from the first.
            watch: called after every level but the last.

        Raises:
            CancelledError: ``cancelled`` said so.
            NumericalError: the model is not finite even in fp32.
            OutOfMemoryError: a single window does not fit into memory.
        """
        steps = self._steps(schedule)
        done, total = 0, sum(len(self._awake(step.number, hold)) for step in steps)
        joined: dict[int, Tensor] = defaultdict(lambda: torch.zeros_like(latents))

        def report(windows: int) -> None:
            nonlocal done
            done += windows
            on_unit(done, total)

        for step in steps:
            scaled = schedule.scale_input(latents, step.timestep)
            due = self._due(step, hold)
            self._join(joined, scaled, _span(steps, step), due, report, cancelled)
            prediction = joined.pop(step.number, torch.zeros_like(latents))
            if hold is not None:
                prediction = hold.predict(prediction, step.number, step.timestep, schedule)
            if watch is not None and step is not steps[-1]:
                watch(schedule.clean(prediction, scaled, step.timestep))
            latents = schedule.step(prediction, step.timestep, latents, generator)
            if hold is not None:
                latents = hold.keep(latents, step.number + 1, schedule)
        return latents

    def _join(
        self,
        joined: Mapping[int, Tensor],
        latents: Tensor,
        span: Sequence[Step],
        places: Sequence[Place],
        report: Callable[[int], None],
        cancelled: Cancelled,
    ) -> None:
        """Evaluate windows in batches and add their predictions to the canvas of each level."""

        def evaluate(start: int, end: int) -> None:
            if cancelled():
                raise CancelledError("Cancelled while refining; nothing was written.")
            batch = places[start:end]
            predictions = self._predict(latents, span, batch)
            for step, parts in zip(span, predictions, strict=True):
                for place, part in zip(batch, parts, strict=True):
                    joined[step.number][place.index] += part * place.weights
                report(end - start)

        self._batch.run(evaluate, len(places))

    def _awake(self, number: int, hold: Hold | None) -> Sequence[Place]:
        if hold is None:
            return self._places
        return [place for place in self._places if hold.moves(place.index, number)]

    def _due(self, step: Step, hold: Hold | None) -> Sequence[Place]:
        """Return the windows that nothing is known of at this level yet.

        Between key levels these are the ones that begin to change here.
        """
        awake = self._awake(step.number, hold)
        if step.key:
            return awake
        if hold is None:
            return ()
        return [place for place in awake if not hold.moves(place.index, step.number - 1)]

    def _steps(self, schedule: NoiseSchedule) -> Sequence[Step]:
        steps = len(schedule)
        keys = key_levels(self._guidance, steps, self._every)
        return [
            Step(
                index,
                timestep,
                self._guidance.guided(index, steps),
                self._guidance.control_at(index, steps),
                keys[index],
            )
            for index, timestep in enumerate(schedule.timesteps)
        ]

    def _predict(
        self, latents: Tensor, span: Sequence[Step], places: Sequence[Place]
    ) -> Sequence[Tensor]:
        """Return the predictions of the windows at every level of a span."""
        first, count = span[0], len(places)
        batch = self._window_batch(latents, first, places)
        if len(span) == 1:
            predictions: Sequence[Tensor] = [self._denoiser(batch)]
        else:
            everything = slice(0, len(batch.latents))
            asked = slice(everything.stop - count, everything.stop)
            levels = [(step.timestep, everything if step.guided else asked) for step in span]
            predictions = self._denoiser.ahead(batch, levels)
        return [
            combine(prediction, self._guidance.scale) if step.guided else prediction
            for step, prediction in zip(span, predictions, strict=True)
        ]

    def _window_batch(self, latents: Tensor, step: Step, places: Sequence[Place]) -> WindowBatch:
        count = len(places)
        windows = torch.cat([latents[place.index] for place in places])
        text = self._conditioning.text[[place.prompt for place in places]]
        embedded = self._conditioning.control[[place.control for place in places]]
        control = embedded.to(windows.device)
        controlled = slice(0, count)
        if step.guided:
            negative = self._conditioning.negative_text.expand(count, -1, -1)
            windows, control = windows.repeat(2, 1, 1, 1), control.repeat(2, 1, 1, 1)
            text = torch.cat([negative, text])
            guess = step.control is not None and step.control.guess_mode
            controlled = slice(count if guess else 0, len(windows))
        return WindowBatch(windows, step.timestep, text, control, step.control, controlled)


def _span(steps: Sequence[Step], step: Step) -> Sequence[Step]:
    """Return a level and those after it that need no other run of the encoder."""
    later = takewhile(lambda following: not following.key, steps[step.number + 1 :])
    return [step, *later]
