"""One latent canvas, one scheduler, many windows: the life of a window.

Every step gathers the windows into equal batches, evaluates them, and scatters the
predictions back with weights that sum to one; then the scheduler steps the canvas once.
No window is ever finished alone, so no seam can form. Averaging predictions of
overlapping windows is MultiDiffusion (Bar-Tal et al., 2023); feathered weights are
Mixture of Diffusers (Jiménez, 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, takewhile
from operator import itemgetter
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from tegula.models.bundle import (
    Bundle,
    ControlImage,
    Denoiser,
    SplitDenoiser,
)
from tegula.models.device import home_of
from tegula.models.prompt import PromptStyle, split_tags
from tegula.models.retry import first_finite
from tegula.options import ResolvedOptions
from tegula.pipeline.evaluate import BatchSize, WindowConstants, Windows, WindowTask, predict
from tegula.pipeline.schedulers import Generators, NoiseSchedule
from tegula.pipeline.shards import Helper, Shards, for_sending
from tegula.pipeline.steps import Guidance, MaskSchedule, Step, plan_steps
from tegula.pipeline.windows import Piece, Window, balanced_batch, prompt_shares
from tegula.progress import Cancel, Cancelled, StageProgress
from tegula.regions import PlacedRegion

Index = tuple[slice | Tensor, ...]
Chosen = slice | Tensor
"""Picks rows of tensors on the device."""
Report = Callable[[int], object]
"""Is given how many windows were evaluated."""
Watch = Callable[[Tensor], object]
"""Shown, while steps are still to come, what the clean latents look like by now."""


@dataclass(frozen=True)
class Conditioning:
    """What every evaluation is given beside the noisy latents.

    text: [prompts, tokens, width]; negative_text: [1, tokens, width].
    control: embedded control windows, in the order of ``Places.windows``.
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
class Places:
    """The windows of a stack of canvases, once for each prompt that has a share there.

    They lie on the device from the start, since a copy from the host in the middle of a step
    would wait until the device has done everything before it.

    windows: in pixels, each once, in the order in which their control image is embedded.
    canvases, tops, lefts: int64 [n], where in latents [canvases, channels, height, width].
    weights: [n, 1, height, width]; those of all places of a canvas sum to one.
    prompts: int64 [n], rows of ``Conditioning.text``.
    control: rows of ``Conditioning.control``; None where every window has one place.
    layers: by place, ascending; no two windows of one layer overlap.
    """

    windows: Sequence[Window]
    canvases: Tensor
    tops: Tensor
    lefts: Tensor
    weights: Tensor
    prompts: Tensor
    control: Tensor | None
    layers: Sequence[int]

    def __len__(self) -> int:
        return len(self.layers)

    def cut(self, latents: Tensor, chosen: Chosen) -> Tensor:
        """Return the windows of latents at some places, [n, channels, height, width]."""
        return self._spread(latents)[self._index(chosen)]

    def add(self, latents: Tensor, parts: Tensor, chosen: Chosen) -> None:
        """Add parts [n, channels, height, width] to latents at places of one layer.

        Where windows overlap only one of them would be added. torch could add all of them at
        once, but on a GPU it would wait for the device to check the index, or add in an order
        that differs from run to run.
        """
        self._spread(latents)[self._index(chosen)] += parts

    def _index(self, chosen: Chosen) -> Index:
        return self.canvases[chosen], slice(None), self.tops[chosen], self.lefts[chosen]

    def _spread(self, latents: Tensor) -> Tensor:
        """Return a view with every window: [canvases, channels, tops, lefts, height, width]."""
        height, width = self.weights.shape[-2:]
        return latents.unfold(2, height, 1).unfold(3, width, 1)


def places_of(
    pieces: Sequence[Piece], factor: int, regions: Sequence[PlacedRegion], device: torch.device
) -> Places:
    """Return the windows of a stack of canvases, once for each prompt that has a share there.

    Args:
        pieces: of one size, one for each canvas of the stack.
        factor: image pixels per latent pixel.
        regions: with prompts of their own.
        device: where the latents will be.
    """
    found = []
    for canvas, piece in enumerate(pieces):
        pixels, layers = piece.windows(factor), piece.grid.layers
        for number, window in enumerate(piece.grid.windows):
            weights = piece.grid.weights(number)
            found += [
                (prompt, layers[number], canvas, window, pixels[number], weights * share)
                for prompt, share in enumerate(prompt_shares(regions, pixels[number], factor))
                if share.any()
            ]
    # Batches of neighbours in this order are of few layers, so they are added in few steps.
    found.sort(key=itemgetter(0, 1))
    prompts, layers_of, canvases, windows, pixels_of, weights_of = zip(*found, strict=True)
    rows = {
        key: row for row, key in enumerate(dict.fromkeys(zip(canvases, pixels_of, strict=True)))
    }
    control = [rows[key] for key in zip(canvases, pixels_of, strict=True)]
    numbers = {
        pair: n for n, pair in enumerate(dict.fromkeys(zip(prompts, layers_of, strict=True)))
    }

    def laid_out(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device)

    return Places(
        [pixels for _, pixels in rows],
        laid_out(canvases),
        laid_out([window.y for window in windows]),
        laid_out([window.x for window in windows]),
        torch.from_numpy(np.stack(weights_of)[:, None]).to(device),
        laid_out(prompts),
        None if len(rows) == len(found) else laid_out(control),
        [numbers[pair] for pair in zip(prompts, layers_of, strict=True)],
    )


@dataclass(frozen=True)
class _Due:
    """Places that are evaluated at a step.

    numbers: ascending. index: the same on the device; None where it is all of them.
    """

    numbers: Sequence[int]
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def chosen(self, rows: slice) -> Chosen:
        """Return what picks some of them out of all places."""
        return rows if self.index is None else self.index[rows]


class CanvasSampler:
    """Denoises latent canvases of any size through windows of one size.

    Nothing within a step waits for the device but one look at whether all of its predictions
    are finite. Where they are not, the step is evaluated again in fp32.

    Args:
        denoiser: computes in ``dtype``.
        dtype: in fp32 nothing is evaluated again.
        places: the windows, and where they lie.
        conditioning: what the denoiser is given beside them.
        guidance: how it is steered.
        batch: how many windows it is given at once.
        feature_reuse: every how many steps a denoiser that has halves runs whole.
        shards: spreads the windows of every step; None evaluates all of them here.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        dtype: torch.dtype,
        places: Places,
        conditioning: Conditioning,
        guidance: Guidance,
        batch: BatchSize,
        feature_reuse: int = 1,
        shards: Shards | None = None,
    ) -> None:
        self._denoiser = denoiser
        self._dtype = dtype
        self._places = places
        text, negative = self._prompts = conditioning.text, conditioning.negative_text
        self._text = text[places.prompts] if len(text) > 1 else text.expand(len(places), -1, -1)
        self._negative_text = negative.expand(len(places), -1, -1)
        self._control = conditioning.control
        self._guidance = guidance
        self._batch = batch
        self._every = feature_reuse if isinstance(denoiser, SplitDenoiser) else 1
        self._shards = shards
        self._name = uuid4().hex
        # By helper, the control windows that it has got.
        self._sent_before: dict[str, set[int]] = {}

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
        steps = plan_steps(self._guidance, schedule.timesteps.to(latents.device), self._every)
        due = self._due_at(steps, mask, latents.device)
        works = [_work(_span(steps, step)) for step in steps]
        done, total, worked = 0, sum(map(len, due)), 0.0
        whole = sum(len(places) * work for places, work in zip(due, works, strict=True))

        def report(number: int, windows: int) -> None:
            nonlocal done, worked
            done += windows
            worked += windows * works[number]
            progress.on_share(worked / whole)
            progress.on_unit(done, total)

        # By the number of a step, what is known of its prediction: that of a step between two
        # key steps is made in parts, as windows begin to change.
        predictions: dict[int, Tensor] = {}
        for step, places in zip(steps, due, strict=True):
            scaled = schedule.scale_input(latents, step.number)
            if places:
                span = _span(steps, step)
                evaluate = partial(self._evaluate, scaled, span, places, progress.cancel)
                # Windows are counted as they are evaluated first.
                parts = self._finite(evaluate, partial(report, step.number))
                for each, part in zip(span, parts, strict=True):
                    known = predictions.get(each.number)
                    predictions[each.number] = part if known is None else known.add_(part)
                del parts
            prediction = predictions.pop(step.number, None)
            if prediction is None:
                prediction = torch.zeros_like(latents)
            if mask is not None:
                prediction = mask.predict(prediction, step.number, schedule)
            if watch is not None and step is not steps[-1]:
                watch(schedule.clean(prediction, scaled, step.number))
            latents = schedule.step(prediction, step.number, latents, generator)
            if mask is not None:
                latents = mask.keep(latents, step.number + 1, schedule)
        return latents

    def _finite(
        self, evaluate: Callable[[Denoiser, Report], list[Tensor]], report: Report
    ) -> list[Tensor]:
        """Evaluate a step, in fp32 where half precision overflowed; the sampler's one wait."""
        attempts = [lambda: evaluate(self._denoiser, report)]
        if self._dtype != torch.float32:
            attempts.append(
                lambda: evaluate(self._denoiser.to_dtype(torch.float32), lambda _windows: None)
            )
        return first_finite(
            attempts,
            "The model returned NaN or infinity even in fp32; its weights are damaged, or a "
            "LoRA or the guidance scale is far too strong.",
        )

    def _evaluate(
        self,
        latents: Tensor,
        span: Sequence[Step],
        due: _Due,
        cancel: Cancel,
        denoiser: Denoiser,
        report: Report,
    ) -> list[Tensor]:
        """Return the predictions of windows at every step of a span, on canvases of zeros.

        Adding happens outside of what is run again when there is too little memory: a window
        that was added twice would show in the picture. It takes no more than what the
        evaluation of the batch has just given back.
        """
        canvases = [torch.zeros_like(latents) for _ in span]

        def weighted(rows: slice) -> list[Tensor]:
            cancel.check()
            weights = self._places.weights[due.chosen(rows)]
            windows = self._windows(latents, due, rows)
            return [part * weights for part in predict(denoiser, self._guidance, span, windows)]

        # Nothing is spread again in fp32, which is rare: helpers have no such denoiser.
        if self._shards is None or denoiser is not self._denoiser:
            batches = self._batch.run(weighted, len(due))
        else:
            batches = self._spread(self._shards, weighted, latents, span, due, cancel)
        for rows, by_step in batches:
            layers = [self._places.layers[number] for number in due.numbers[rows]]
            first = 0
            for _, layer in groupby(layers):
                part = slice(first, first + len(list(layer)))
                chosen = due.chosen(slice(rows.start + part.start, rows.start + part.stop))
                for canvas, prediction in zip(canvases, by_step, strict=True):
                    self._places.add(canvas, prediction[part], chosen)
                first = part.stop
            report(len(layers))
        return canvases

    def _spread(
        self,
        shards: Shards,
        weighted: Callable[[slice], list[Tensor]],
        latents: Tensor,
        span: Sequence[Step],
        due: _Due,
        cancel: Cancel,
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield batches of the due windows as ``BatchSize.run`` does, evaluated here and elsewhere.

        There is a batch for everybody at least. They are in the order of the windows, so that
        they are added in the same order whoever evaluated them.
        """
        count = len(due)
        size = balanced_batch(count, min(self._batch.windows, -(-count // shards.width)))
        batches = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        sent_span = [replace(step, timestep=for_sending(step.timestep)) for step in span]

        def here(number: int) -> list[Tensor]:
            first, stop = batches[number].start, batches[number].stop

            def part(rows: slice) -> list[Tensor]:
                return weighted(slice(first + rows.start, first + rows.stop))

            parts = [by_step for _, by_step in self._batch.run(part, stop - first)]
            return [torch.cat(each) for each in zip(*parts, strict=True)]

        def away(number: int, helper: Helper, given_up: Cancelled) -> list[Tensor]:
            rows = batches[number]
            chosen = due.chosen(rows)
            cut = for_sending(self._places.cut(latents, chosen))
            predictions = self._sent(due.numbers[rows], cut, sent_span, helper, given_up)
            weights = self._places.weights[chosen]
            return [prediction.to(latents.device) * weights for prediction in predictions]

        keys = [tuple(due.numbers[rows]) for rows in batches]
        yield from zip(batches, shards.run(keys, here, away, cancel), strict=True)

    def _sent(
        self,
        numbers: Sequence[int],
        latents: Tensor,
        span: Sequence[Step],
        helper: Helper,
        given_up: Cancelled,
    ) -> Sequence[Tensor]:
        """Return the predictions of a helper, which is sent the constants that it lacks."""
        known = self._sent_before.setdefault(helper.name, set())
        prompts, control_rows = self._numbers_on_host
        rows = [control_rows[number] for number in numbers]
        constants = None
        if not known:
            text, negative_text = map(for_sending, self._prompts)
            constants = WindowConstants(self._guidance, text, negative_text)
        new = {row: for_sending(self._control[row]) for row in rows if row not in known}
        task = WindowTask(
            self._name,
            span,
            latents,
            [prompts[number] for number in numbers],
            rows,
            constants,
            new,
        )
        try:
            predictions = helper.run(task, given_up)
        except Exception:
            known.clear()  # it may have forgotten them, or never have got them
            raise
        known.update(new)
        return predictions

    @cached_property
    def _numbers_on_host(self) -> tuple[list[int], list[int]]:
        """Of every place, the row of its text and that of its control window."""
        prompts, control = self._places.prompts.tolist(), self._places.control
        return prompts, list(range(len(self))) if control is None else control.tolist()

    def _due_at(
        self, steps: Sequence[Step], mask: MaskSchedule | None, device: torch.device
    ) -> list[_Due]:
        """Return for every step the windows of which nothing is known yet.

        Windows in which nothing may change yet are left out. Between key steps only those are
        due that begin to change there.
        """
        everything = range(len(self))
        if mask is None:
            return [_Due(everything if step.key else ()) for step in steps]
        # Copied to the host here, once for the whole run.
        firsts = self._places.cut(mask.first, slice(None)).amin((1, 2, 3)).tolist()
        due = []
        for step in steps:
            numbers = [
                number
                for number, first in enumerate(firsts)
                if (first <= step.number if step.key else first == step.number)
            ]
            index = None if len(numbers) == len(self) else torch.tensor(numbers, device=device)
            due.append(_Due(numbers, index))
        return due

    def _windows(self, latents: Tensor, due: _Due, rows: slice) -> Windows:
        """Return some of the due windows, with what the denoiser is given beside them."""
        chosen = due.chosen(rows)
        return Windows(
            self._places.cut(latents, chosen),
            self._text[chosen],
            self._negative_text[: rows.stop - rows.start],
            self._control_of(due, rows, latents.device),
        )

    def _control_of(self, due: _Due, rows: slice, device: torch.device) -> Tensor:
        """Return embedded control windows on the device, which waits if they are kept elsewhere."""
        chosen, control = due.chosen(rows), self._places.control
        if control is not None:
            chosen = control[chosen]
        if isinstance(chosen, Tensor):
            chosen = chosen.to(self._control.device)
        return self._control[chosen].to(device)


def _span(steps: Sequence[Step], step: Step) -> Sequence[Step]:
    """Return a step and those after it that take the features of its encoder."""
    return [step, *takewhile(lambda later: not later.key, steps[step.number + 1 :])]


_SECOND_HALF = 0.5
"""Work of the decoder of a denoiser alone, as a share of all of it."""


def _work(span: Sequence[Step]) -> float:
    """Return the work of one window over a span, in rows that a denoiser sees whole."""
    first, *later = (2 if step.guided else 1 for step in span)
    return first + _SECOND_HALF * sum(later)
