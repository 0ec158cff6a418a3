"""One batch of windows through the denoiser: in this process, or in that of a helper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from tegula.models.bundle import Bundle, Denoiser, SplitDenoiser, WindowBatch
from tegula.models.device import MOST_WINDOWS
from tegula.models.optimise import default_window_batch
from tegula.models.retry import WINDOW_DOES_NOT_FIT, until_it_fits
from tegula.options import ResolvedOptions
from tegula.pipeline.shards import HelperNets
from tegula.pipeline.steps import Guidance, Step
from tegula.pipeline.windows import balanced_batch
from tegula.progress import Cancel

T = TypeVar("T")


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
class Windows:
    """Windows of one step, and what the denoiser is given beside them, a row for each.

    latents: [n, channels, h, w], scaled for the model.
    text, negative_text: [n, tokens, width].
    control: embedded control windows.
    """

    latents: Tensor
    text: Tensor
    negative_text: Tensor
    control: Tensor

    def batch(self, step: Step) -> WindowBatch:
        """Return what the denoiser takes at a step: the negative rows first where it is guided."""
        count = len(self.latents)
        latents, text, control = self.latents, self.text, self.control
        controlled = slice(0, count)
        if step.guided:
            latents, control = latents.repeat(2, 1, 1, 1), control.repeat(2, 1, 1, 1)
            text = torch.cat([self.negative_text, text])
            guess = step.control is not None and step.control.guess_mode
            controlled = slice(count if guess else 0, len(latents))
        return WindowBatch(latents, step.timestep, text, control, step.control, controlled)


def predict(
    denoiser: Denoiser, guidance: Guidance, span: Sequence[Step], windows: Windows
) -> list[Tensor]:
    """Return the predictions of windows at every step of a span, fp32, each like the latents.

    What the decoder answers depends on the features of the first step's encoder and on the
    timestep, and not on the latents of the step itself. So it is asked for the whole span at
    once, and what has to be remembered is predictions, never features.
    """
    batch, count = windows.batch(span[0]), len(windows.latents)
    if len(span) == 1:
        predictions = [denoiser(batch)]
    else:
        halves = cast("SplitDenoiser", denoiser)
        features = halves.encode(batch)
        everything = slice(0, len(batch.latents))
        positive = slice(everything.stop - count, everything.stop)
        wanted = [(step.timestep, everything if step.guided else positive) for step in span]
        predictions = [
            halves.decode(tuple(part[at] for part in features), timestep, batch.text[at])
            for timestep, at in wanted
        ]
    return [
        guidance.combine(prediction.float()) if step.guided else prediction.float()
        for step, prediction in zip(span, predictions, strict=True)
    ]


@dataclass(frozen=True)
class WindowConstants:
    """What stays the same over the steps of a run.

    text: [prompts, tokens, width]; negative_text: [1, tokens, width].
    """

    guidance: Guidance
    text: Tensor
    negative_text: Tensor


@dataclass
class _Kept:
    """What a helper keeps of a run: its constants, and embedded control windows by their row.

    They stay on the host: a window takes megabytes, and its way to the device no time beside that
    through the nets.
    """

    constants: WindowConstants
    batch: BatchSize
    control: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowTask:
    """Windows of one step for a helper; their predictions at each step of its span come back.

    Constants travel once to each helper, and a control window when it goes there first. No
    features are ever kept between steps, so a window may go to another helper at any step.

    run: the name of the run of the sampler.
    span: the steps, with timesteps on the host.
    latents: [n, channels, h, w].
    prompts, rows: of each window, its text and its control window.
    constants, control: what the helper has not got yet.
    """

    run_name: str
    span: Sequence[Step]
    latents: Tensor
    prompts: Sequence[int]
    rows: Sequence[int]
    constants: WindowConstants | None
    control: Mapping[int, Tensor]

    def run(self, nets: HelperNets, cancel: Cancel) -> Sequence[Tensor]:
        """Return the predictions, [n, channels, h, w] for each step of the span.

        Raises:
            KeyError: the helper has not got the constants any more.
            CancelledError, OutOfMemoryError: as their names say.
        """
        if self.constants is not None:
            nets.kept.clear()
            nets.kept[self.run_name] = _Kept(self.constants, BatchSize(MOST_WINDOWS))
        kept: _Kept = nets.kept[self.run_name]
        kept.control.update(self.control)
        constants, device = kept.constants, nets.bundle.device
        span = [replace(step, timestep=step.timestep.to(device)) for step in self.span]
        negative_text = constants.negative_text.to(device)

        def evaluate(rows: slice) -> list[Tensor]:
            cancel.check()
            latents = self.latents[rows].to(device)
            windows = Windows(
                latents,
                constants.text[self.prompts[rows]].to(device),
                negative_text.expand(len(latents), -1, -1),
                torch.stack([kept.control[row] for row in self.rows[rows]]).to(device),
            )
            return predict(nets.bundle.denoiser, constants.guidance, span, windows)

        parts = [part for _, part in kept.batch.run(evaluate, len(self.latents))]
        return [torch.cat(by_step).cpu() for by_step in zip(*parts, strict=True)]
