"""One canvas sampled with one scheduler through many windows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tegula.models.bundle import ControlScale, WindowBatch
from tegula.pipeline.batches import HalvingBatch, SafeDenoiser
from tegula.pipeline.schedulers import Generators, NoiseSchedule
from tegula.pipeline.windows import WindowGrid
from tegula.progress import Cancel, StageProgress

# Classifier-free guidance, its interval, and the control interval.
#
# Guidance: Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022). Its interval:
# Kynkäänniemi et al., "Applying Guidance in a Limited Interval" (2024).


@dataclass(frozen=True)
class Interval:
    """A share of the steps: ``start`` and ``end`` in 0..1."""

    start: float = 0.0
    end: float = 1.0

    def covers(self, step: int, steps: int) -> bool:
        """Tell whether a step lies wholly inside, as diffusers counts for ControlNets."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


@dataclass(frozen=True)
class Guidance:
    """How the prompt and the control image steer the denoiser.

    scale: guidance scale; at 1 or below only the prompt itself is evaluated.
    interval: the steps that are guided.
    control: conditioning scale of the control path; 0 never runs it.
    control_interval: the steps that are controlled.
    """

    scale: float
    interval: Interval
    control: ControlScale
    control_interval: Interval

    def guided(self, step: int, steps: int) -> bool:
        """Tell whether this step evaluates the negative prompt too."""
        return self.scale > 1 and self.interval.covers(step, steps)

    def control_at(self, step: int, steps: int) -> ControlScale | None:
        """Return the control scale of this step, None where control is off."""
        if self.control.scale == 0 or not self.control_interval.covers(step, steps):
            return None
        return self.control


def combine(prediction: Tensor, scale: float) -> Tensor:
    """Merge [2n, ...] of negative rows before positive ones into n guided rows."""
    negative, positive = prediction.chunk(2)
    return torch.lerp(negative, positive, scale)


# Strength by place: parts of a canvas that may change only from a later noise level on.
#
# Differential diffusion (Levin and Fried, 2023): until its level comes, a part follows the
# noised initial latents, so what is around it sees the picture as it was; from then on it
# is denoised like the rest. Windows that hold still are not evaluated at all.


@dataclass(frozen=True)
class Hold:
    """What keeps the parts of a canvas that may not change yet.

    initial, noise: [canvases, channels, height, width], of the start of the run.
    first: [canvases, 1, height, width], the step at which each latent pixel begins to
        change; the number of steps or more means never.
    """

    initial: Tensor
    noise: Tensor
    first: Tensor
    _firsts: dict[object, int] = field(default_factory=dict, repr=False)

    def moves(self, index: tuple[slice, ...], step: int) -> bool:
        """Tell whether anything in a window may change at a step."""
        key = tuple((part.start, part.stop) for part in index)
        if key not in self._firsts:
            self._firsts[key] = int(self.first[index].min())
        return self._firsts[key] <= step

    def predict(
        self, prediction: Tensor, step: int, timestep: Tensor, schedule: NoiseSchedule
    ) -> Tensor:
        """Put the exact prediction where nothing may change yet."""
        exact = schedule.exact_prediction(self.initial, self.noise, timestep)
        return torch.where(self.first > step, exact, prediction)

    def keep(self, latents: Tensor, step: int, schedule: NoiseSchedule) -> Tensor:
        """Put the initial latents, noised to the level of a step, where it is held."""
        held = schedule.noised(self.initial, self.noise, step)
        return torch.where(self.first >= step, held, latents)


def first_steps(strength: Tensor, steps: int, factor: int) -> Tensor:
    """Return the step at which each latent pixel begins to change.

    Args:
        strength: [canvases, 1, height, width] in 0..1 at image size, as a share of the
            denoise strength; of the pixels of a latent pixel the strongest counts.
        steps: of the run. Where the share is less than one step, the last one runs and
            ``blend_weights`` does the rest.
        factor: image pixels per latent pixel.
    """
    strongest = functional.max_pool2d(strength, factor)
    run = torch.where(strongest > 0, (strongest * steps).round().clamp_min(1), 0.0)
    return (steps - run).to(torch.long)


def blend_weights(strength: Tensor, steps: int) -> Tensor:
    """Return how far each pixel of the refined picture replaces the prescaled one.

    It is all the way, except where the strength amounts to less than one step.
    """
    return (strength * steps).clamp(0, 1)


# At which noise levels a denoiser runs whole, and where half of it is enough.
#
# Encoder propagation, "Faster Diffusion" (Li et al., 2023): the features of the encoder and
# of the ControlNet change slowly from level to level, so the levels between two key levels
# run the decoder alone on the features of the key level before them. A ControlNet is part
# of what is saved.
#
# What the decoder answers there depends on those features and on the noise level, and not
# on the latents of the level itself. So it is asked for all levels up to the next key level
# at once, and what has to be remembered is predictions, never features.


def key_levels(guidance: Guidance, levels: int, every: int) -> tuple[bool, ...]:
    """Return for every noise level whether the denoiser runs whole.

    It does at the first two levels, where features change most, at the last one, which
    decides on the finest detail, and at every ``every``-th between; besides wherever
    guidance sets in or control is switched, since older features lack it.

    Args:
        guidance: how prompt and control steer the run.
        levels: of the run.
        every: 1 makes all levels key levels.
    """
    return tuple(
        level in (0, levels - 1)
        or (level - 1) % every == 0
        or _is_steered_anew(guidance, level, levels)
        for level in range(levels)
    )


def _is_steered_anew(guidance: Guidance, level: int, levels: int) -> bool:
    sets_in = guidance.guided(level, levels) and not guidance.guided(level - 1, levels)
    switched = guidance.control_at(level, levels) != guidance.control_at(level - 1, levels)
    return sets_in or switched


@dataclass(frozen=True)
class Rows:
    """Rows of one window over a whole run, for each half of the denoiser.

    Guidance makes two rows of a window. The ControlNet belongs to the encoder.
    """

    encoder: int
    decoder: int


def rows_of(guidance: Guidance, levels: int, every: int) -> Rows:
    """Count what one window takes that changes from the first level on."""
    rows = [2 if guidance.guided(level, levels) else 1 for level in range(levels)]
    keys = key_levels(guidance, levels, every)
    return Rows(sum(n for n, key in zip(rows, keys, strict=True) if key), sum(rows))


# Canvas sampling: one latent canvas, one scheduler, many windows.
#
# Every step gathers all windows into equal batches, evaluates them, and scatters the
# predictions back with weights that sum to one; then the scheduler steps the canvas once.
# No window is ever finished alone, so no seam can form. Averaging predictions of
# overlapping windows is MultiDiffusion (Bar-Tal et al., 2023); feathered weights are
# Mixture of Diffusers (Jiménez, 2023).

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
        progress: StageProgress,
        hold: Hold | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Walk the canvases from their noisy start to clean latents.

        Args:
            latents: [canvases, channels, height, width], noised to the first level, fp32.
            schedule: the levels to run.
            generator: draws the noise of stochastic schedulers: one for the whole stack,
                or one for each canvas.
            progress: counts windows of all steps; its cancel is checked before every batch.
            hold: what stays as it is until a later level; None changes all from the first.
            watch: called after every level but the last.

        Raises:
            CancelledError: the caller wants to stop.
            NumericalError: the model is not finite even in fp32.
            OutOfMemoryError: a single window does not fit into memory.
        """
        steps = self._steps(schedule)
        done, total = 0, sum(len(self._awake(step.number, hold)) for step in steps)
        joined: dict[int, Tensor] = defaultdict(lambda: torch.zeros_like(latents))

        def report(windows: int) -> None:
            nonlocal done
            done += windows
            progress.on_unit(done, total)

        for step in steps:
            scaled = schedule.scale_input(latents, step.timestep)
            due = self._due(step, hold)
            self._join(joined, scaled, _span(steps, step), due, report, progress.cancel)
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
        cancel: Cancel,
    ) -> None:
        """Evaluate windows in batches and add their predictions to the canvas of each level."""

        def evaluate(start: int, end: int) -> None:
            cancel.check()
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
