"""One latent canvas, one scheduler, many windows: the whole life of a window.

Every step gathers the windows into equal batches, evaluates them, and scatters the
predictions back with weights that sum to one; then the scheduler steps the canvas once.
No window is ever finished alone, so no seam can form. Averaging predictions of
overlapping windows is MultiDiffusion (Bar-Tal et al., 2023); feathered weights are
Mixture of Diffusers (Jiménez, 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar, cast

import torch
from torch import Tensor

from tegula.models.bundle import (
    Bundle,
    ControlImage,
    Denoiser,
    SplitDenoiser,
    WindowBatch,
)
from tegula.models.compiled import default_window_batch
from tegula.models.device import home_of
from tegula.models.prompt import PromptStyle, split_tags
from tegula.models.retry import WINDOW_DOES_NOT_FIT, first_finite, until_it_fits
from tegula.options import ResolvedOptions
from tegula.pipeline.schedulers import Generators, NoiseSchedule
from tegula.pipeline.steps import Guidance, MaskSchedule, Step, plan_steps
from tegula.pipeline.windows import Piece, Window, balanced_batch, prompt_shares
from tegula.progress import StageProgress
from tegula.regions import PlacedRegion

T = TypeVar("T")
Index = tuple[slice, slice, slice, slice]
Watch = Callable[[Tensor], object]
"""Shown, while steps are still to come, what the clean latents look like by now."""


class BatchSize:
    """How many windows go through a net at once; halved, for good, when memory runs out."""

    def __init__(self, windows: int) -> None:
        self.windows = windows

    @classmethod
    def of(cls, bundle: Bundle, options: ResolvedOptions) -> BatchSize:
        """Return what the options ask for, or else what suits the device."""
        return cls(options.window_batch or default_window_batch(bundle, options.window))

    def run(self, evaluate: Callable[[slice], T], count: int) -> Iterator[tuple[slice, T]]:
        """Yield runs of ``count`` windows and what ``evaluate`` makes of each.

        A run that does not fit into memory is evaluated again as a shorter one, so
        ``evaluate`` must not change anything; what it returns is yielded only once.

        Raises:
            OutOfMemoryError: a single window does not fit.
        """
        start = 0

        def attempt(windows: int) -> T:
            return evaluate(slice(start, start + windows))

        while start < count:
            wanted = balanced_batch(count - start, self.windows)
            result, fitting = until_it_fits(
                attempt,
                wanted,
                lambda windows: windows // 2 or None,
                WINDOW_DOES_NOT_FIT,
            )
            if fitting < wanted:
                self.windows = fitting
            yield slice(start, start + fitting), result
            start += fitting


@dataclass(frozen=True)
class Conditioning:
    """What every evaluation is given beside the noisy latents.

    text: [prompts, tokens, width]; negative_text: [1, tokens, width].
    control: embedded control windows, as the places number them.
    """

    text: Tensor
    negative_text: Tensor
    control: Tensor


def encode_prompts(bundle: Bundle, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    """Return ``text`` and ``negative_text`` of ``Conditioning``."""
    positive, negative = prompts_of(options)
    text = bundle.text.encode([negative, *positive], PromptStyle.of(options))
    return text[1:], text[:1]


def prompts_of(options: ResolvedOptions) -> tuple[list[str], str]:
    """Return the common prompt and the common one with each region's, and the negative one."""
    common, *own = (
        split_tags(prompt, options.prompt_weighting)[0].strip()
        for prompt in (options.prompt, *(region.prompt for region in options.placed_regions))
    )
    regional = [", ".join(filter(None, (common, prompt))) for prompt in own]
    return [common, *regional], options.negative_prompt


def embed_windows(
    bundle: Bundle, control: ControlImage, windows: Sequence[Window], batch: BatchSize
) -> Tensor:
    """Encode the control image of every window, given in pixels, one row each.

    They are kept on the host where they would take too much of the device.
    """

    def embed(rows: slice) -> Tensor:
        crops = [crop_control(control, window) for window in windows[rows]]
        weights = [crop.weight for crop in crops if crop.weight is not None]
        together = ControlImage(
            torch.cat([crop.prescaled for crop in crops]).to(bundle.device).contiguous(),
            torch.cat([crop.source for crop in crops]).to(bundle.device).contiguous(),
            torch.cat(weights).to(bundle.device).contiguous() if weights else None,
        )
        return bundle.denoiser.embed_control(together)

    embedded = torch.empty(0)
    for rows, part in batch.run(embed, len(windows)):
        if rows.start == 0:
            home = home_of(part[0].nbytes * len(windows), bundle.device)
            embedded = torch.empty(len(windows), *part.shape[1:], dtype=part.dtype, device=home)
        embedded[rows] = part
    return embedded


def crop_control(control: ControlImage, window: Window) -> ControlImage:
    """Cut a window, given in pixels, out of a control image."""
    weight = None if control.weight is None else control.weight[window.index]
    return ControlImage(control.prescaled[window.index], control.source[window.index], weight)


@dataclass(frozen=True)
class Place:
    """One window of one canvas of a stack, under one prompt.

    index: cuts the window out of latents [canvases, channels, height, width].
    weights: [height, width] on the device; those of all places of a canvas sum to one.
    control, prompt: rows of ``Conditioning.control`` and ``Conditioning.text``.
    """

    index: Index
    weights: Tensor
    control: int
    prompt: int = 0


def places_of(
    pieces: Sequence[Piece], factor: int, regions: Sequence[PlacedRegion], device: torch.device
) -> list[Place]:
    """Return the windows of a stack of canvases, once for each prompt that has a share there.

    Args:
        pieces: one for each canvas of the stack.
        factor: image pixels per latent pixel.
        regions: with prompts of their own.
        device: where the weights will be.
    """
    places, control = [], 0
    for canvas, piece in enumerate(pieces):
        pixels = piece.windows(factor)
        for number, window in enumerate(piece.grid.windows):
            index = slice(canvas, canvas + 1), slice(None), *window.index[1:]
            weights = piece.grid.weights(number)
            places += [
                Place(index, torch.from_numpy(weights * share).to(device), control, prompt)
                for prompt, share in enumerate(prompt_shares(regions, pixels[number], factor))
                if share.any()
            ]
            control += 1
    return places


class SafeDenoiser:
    """A denoiser that answers in finite fp32 numbers or raises.

    Raises:
        NumericalError: NaN or infinity in fp32 too.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        self._denoiser = denoiser
        self._dtype = dtype

    @property
    def splits(self) -> bool:
        """Tell whether ``ahead`` can be called."""
        return isinstance(self._denoiser, SplitDenoiser)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction for a batch, fp32, shaped like its latents."""
        return self._finite(lambda denoiser: [denoiser(batch)])[0]

    def ahead(self, batch: WindowBatch, steps: Sequence[tuple[Tensor, slice]]) -> Sequence[Tensor]:
        """Return the predictions at several steps from one run of the encoder.

        Args:
            batch: at the first of the steps.
            steps: timestep and the rows of the batch that are wanted there.
        """

        def run(denoiser: Denoiser) -> list[Tensor]:
            split = cast("SplitDenoiser", denoiser)
            features = split.encode(batch)
            return [
                split.decode(tuple(part[rows] for part in features), timestep, batch.text[rows])
                for timestep, rows in steps
            ]

        return self._finite(run)

    def _finite(self, run: Callable[[Denoiser], list[Tensor]]) -> list[Tensor]:
        attempts = [lambda: run(self._denoiser)]
        if self._dtype != torch.float32:
            attempts.append(lambda: run(self._denoiser.to_dtype(torch.float32)))
        return first_finite(
            attempts,
            "The model returned NaN or infinity even in fp32; its weights are damaged, or a "
            "LoRA or the guidance scale is far too strong.",
        )


class CanvasSampler:
    """Denoises latent canvases of any size through windows of one size.

    ``feature_reuse`` is every how many steps a denoiser that has halves runs whole.
    """

    def __init__(
        self,
        denoiser: SafeDenoiser,
        places: Sequence[Place],
        conditioning: Conditioning,
        guidance: Guidance,
        batch: BatchSize,
        feature_reuse: int = 1,
    ) -> None:
        self._denoiser = denoiser
        self._places = places
        self._conditioning = conditioning
        self._guidance = guidance
        self._batch = batch
        self._every = feature_reuse if denoiser.splits else 1

    def __len__(self) -> int:
        """Return how many windows one step takes."""
        return len(self._places)

    def sample(
        self,
        latents: Tensor,
        schedule: NoiseSchedule,
        generator: Generators,
        progress: StageProgress,
        mask: MaskSchedule | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Walk the canvases from their noisy start to clean latents.

        Args:
            latents: [canvases, channels, height, width], noised for the first step, fp32.
            schedule: the steps to run.
            generator: draws the noise of stochastic schedulers: one for the whole stack,
                or one for each canvas.
            progress: counts windows of all steps, and as work the rows that the denoiser
                sees of them; its cancel is checked before every batch.
            mask: what may change only from a later step on; None changes all from the first.
            watch: called after every step but the last.

        Raises:
            CancelledError: the caller wants to stop.
            NumericalError: the model is not finite even in fp32.
            OutOfMemoryError: a single window does not fit into memory.
        """
        steps = plan_steps(self._guidance, schedule.timesteps, self._every)
        due = [len(self._due(step, mask)) for step in steps]
        works = [_work(_span(steps, step)) for step in steps]
        done, total, worked = 0, sum(due), 0.0
        whole = sum(count * work for count, work in zip(due, works, strict=True))
        # By the number of a step, what is known of its prediction: that of a step between two
        # key steps is made in parts, as windows begin to change.
        predictions: dict[int, Tensor] = {}
        for step in steps:
            scaled = schedule.scale_input(latents, step.number)
            span = _span(steps, step)
            for each in span:
                if each.number not in predictions:
                    predictions[each.number] = torch.zeros_like(latents)
            for windows in self._scatter(
                predictions, scaled, span, self._due(step, mask), progress
            ):
                done += windows
                worked += windows * works[step.number]
                progress.on_share(worked / whole)
                progress.on_unit(done, total)
            prediction = predictions.pop(step.number)
            if mask is not None:
                prediction = mask.predict(prediction, step.number, schedule)
            if watch is not None and step is not steps[-1]:
                watch(schedule.clean(prediction, scaled, step.number))
            latents = schedule.step(prediction, step.number, latents, generator)
            if mask is not None:
                latents = mask.keep(latents, step.number + 1, schedule)
        return latents

    def _scatter(
        self,
        predictions: dict[int, Tensor],
        latents: Tensor,
        span: Sequence[Step],
        places: Sequence[Place],
        progress: StageProgress,
    ) -> Iterator[int]:
        """Evaluate windows in batches and add their predictions to the canvas of each step.

        Adding needs no memory and happens outside of what is run again when there is too
        little: a window that was added twice would show in the picture.

        Yields:
            How many windows were added.
        """

        def weighted(rows: slice) -> list[list[Tensor]]:
            progress.cancel.check()
            batch = places[rows]
            return [
                [part * place.weights for place, part in zip(batch, parts, strict=True)]
                for parts in self._predict(latents, span, batch)
            ]

        for rows, by_step in self._batch.run(weighted, len(places)):
            for step, parts in zip(span, by_step, strict=True):
                for place, part in zip(places[rows], parts, strict=True):
                    predictions[step.number][place.index] += part
            yield rows.stop - rows.start

    def _changing(self, number: int, mask: MaskSchedule | None) -> Sequence[Place]:
        """Return the windows of which something may change at a step."""
        if mask is None:
            return self._places
        return [place for place in self._places if mask.changes(place.index, number)]

    def _due(self, step: Step, mask: MaskSchedule | None) -> Sequence[Place]:
        """Return the windows of which nothing is known yet at this step.

        Between key steps these are the ones that begin to change here.
        """
        changing = self._changing(step.number, mask)
        if step.key:
            return changing
        if mask is None:
            return ()
        return [place for place in changing if not mask.changes(place.index, step.number - 1)]

    def _predict(
        self, latents: Tensor, span: Sequence[Step], places: Sequence[Place]
    ) -> Sequence[Tensor]:
        """Return the predictions of the windows at every step of a span."""
        first, count = span[0], len(places)
        batch = self._window_batch(latents, first, places)
        if len(span) == 1:
            predictions: Sequence[Tensor] = [self._denoiser(batch)]
        else:
            everything = slice(0, len(batch.latents))
            positive = slice(everything.stop - count, everything.stop)
            wanted = [(step.timestep, everything if step.guided else positive) for step in span]
            predictions = self._denoiser.ahead(batch, wanted)
        return [
            self._guidance.combine(prediction) if step.guided else prediction
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
    """Return a step and those after it that take the features of its encoder.

    What the decoder answers depends on those features and on the timestep, and not on the
    latents of the step itself. So it is asked for the whole span at once, and what has to
    be remembered is predictions, never features.
    """
    return [step, *takewhile(lambda later: not later.key, steps[step.number + 1 :])]


_SECOND_HALF = 0.5
"""Work of the decoder of a denoiser alone, as a share of all of it."""


def _work(span: Sequence[Step]) -> float:
    """Return the work of one window over a span, in rows that a denoiser sees whole."""
    first, *later = (2 if step.guided else 1 for step in span)
    return first + _SECOND_HALF * sum(later)
