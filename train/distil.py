"""Distils the prescaler ``tegula-swift``: a small straight net taught by the large one.

The pupil begins as Real-ESRGAN's net for anime video, deepened by convolutions that change
nothing yet (Chen et al., "Net2Net", 2016), with a second head for 2x made of the one for 4x.
The large net made pictures of the same damaged sources; they can be foreseen from the source,
which the original's texture cannot, so most losses that compare place by place compare with
them. What need only be right as a whole is held to the originals: statistics of features, band
energies, flat places, colour, and a discriminator that sees high bands alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.features import EarlyFeatures
from bench.quality.measures import high_bands
from bench.quality.recipes import DEGRADATIONS, degrade
from tegula.models.device import pick_dtype
from tegula.models.mini.network import luma
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.models.prescalers.networks import SRVGGNetCompact
from train import export, losses, photos
from train.config import DistilSettings, LineSettings, PupilSettings
from train.degradation import RECIPES, Picture
from train.diffusion import set_rate
from train.discriminator import PixelJudge, deceive_loss, judge_loss
from train.distil_pairs import (
    FACTOR,
    DistilBatch,
    DistilSource,
    Teach,
    make_distil_shards,
)
from train.held_out import HeldOut, PrescalerRun, Verdict, choose, table
from train.judged import ready_judges, weighted_sum
from train.pairs import PHOTO, SWIFT, enlarge_by_lanczos, run_prescaler, unit
from train.precision import mixed_precision
from train.runner import Source, Stage, run_stage
from train.samples import write_sheet
from train.state import TrainingState

BASE = "realesrgan-animevideov3"
FEATURE_STAGES = 3
_SHOWN = 6
JUDGE = "vgg16"
"""Chooses the checkpoint; no loss is made of its features."""
_IDENTITY_NOISE = 0.003
_SMALL_JUDGE = partial(PixelJudge, 32)


class Pupil(nn.Module):
    """One body with a head for 4x and one for 2x.

    ``four`` and ``two`` hold the same layers but for the last.
    """

    def __init__(self, convolutions: int, features: int = 64) -> None:
        super().__init__()
        self.four = SRVGGNetCompact(convolutions, features, FACTOR)
        self.two = SRVGGNetCompact(convolutions, features, FACTOR // 2)
        for place in range(len(self.four.body) - 1):
            self.two.body[place] = self.four.body[place]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Enlarge [n, 3, h, w] 4x and 2x; the body runs once."""
        hidden = self.four.body[:-1](x.contiguous(memory_format=torch.channels_last))
        four, two = (
            functional.pixel_shuffle(net.body[-1](hidden).float(), net.factor)
            + functional.interpolate(x, scale_factor=net.factor, mode="nearest")
            for net in (self.four, self.two)
        )
        return four, two

    def tensors(self) -> dict[str, Tensor]:
        """Return what is shipped: the net for 4x, and the other's head as ``twice``."""
        head = cast("nn.Conv2d", self.two.body[-1])
        return {
            **self.four.state_dict(),
            "twice.weight": head.weight.detach(),
            "twice.bias": cast("Tensor", head.bias).detach(),
        }


def begin_pupil(base: SRVGGNetCompact, convolutions: int, seed: int) -> Pupil:
    """Return a pupil that enlarges as ``base`` does, with so many hidden convolutions.

    The convolutions that are added pass everything on, spread evenly over the body. A little
    noise on their kernels makes their channels learn different things.
    """
    features = cast("nn.Conv2d", base.body[0]).out_channels
    pupil = Pupil(convolutions, features)
    generator = torch.Generator().manual_seed(seed)
    known = (len(base.body) - 3) // 2
    layers = list(base.body)
    body: list[nn.Module] = layers[:2]
    for place in range(convolutions):
        before, after = (n * known // convolutions for n in (place, place + 1))
        if after > before:
            body += layers[2 + 2 * before : 4 + 2 * before]
        else:
            body += _identity(features, generator)
    body.append(layers[-1])
    pupil.four.load_state_dict(nn.ModuleDict({"body": nn.Sequential(*body)}).state_dict())
    head, twice = (cast("nn.Conv2d", net.body[-1]) for net in (pupil.four, pupil.two))
    with torch.no_grad():
        for name, small in twice.named_parameters():
            large = dict(head.named_parameters())[name]
            # [colour, row of 2, row within, column of 2, column within, ...]: a pixel of
            # the 2x picture is the mean of four of the 4x one.
            small.copy_(large.view(3, 2, 2, 2, 2, *large.shape[1:]).mean((2, 4)).flatten(0, 2))
    return pupil


def _identity(features: int, generator: torch.Generator) -> list[nn.Module]:
    conv = nn.Conv2d(features, features, 3, padding=1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(cast("Tensor", conv.bias))
    with torch.no_grad():
        conv.weight.add_(_IDENTITY_NOISE * torch.randn(conv.weight.shape, generator=generator))
    return [conv, nn.PReLU(features, init=1.0)]


def new_distil_state(
    network: nn.Module,
    settings: PupilSettings,
    seed: int,
    device: torch.device,
    make_judge: Callable[[], nn.Module] = _SMALL_JUDGE,
) -> TrainingState:
    """Return the state of a run that begins with a net, and with a new discriminator."""
    torch.manual_seed(seed)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    judge = make_judge().to(device)
    return TrainingState(
        network,
        copy.deepcopy(network).requires_grad_(requires_grad=False),
        {
            "network": torch.optim.Adam(
                network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99)
            ),
            "judges": torch.optim.Adam(
                judge.parameters(), lr=settings.discriminator_rate, betas=(0.5, 0.99)
            ),
        },
        {"judges": judge},
    )


def distil_step(
    state: TrainingState, settings: DistilSettings, features: EarlyFeatures, batch: DistilBatch
) -> dict[str, Tensor]:
    """Take one step of the pupil, and of the discriminator once it counts."""
    device = next(state.network.parameters()).device
    batch = batch.to(device)
    with mixed_precision(device):
        four, two = state.network(batch.small)
    found = _compare(four, batch, features)
    halves = _compare(two, batch.twice(), features)
    found = {name: value + settings.twice * halves[name] for name, value in found.items()}
    return descend(state, settings, found, batch.small, four, batch.truth)


def descend(
    state: TrainingState,
    settings: PupilSettings,
    found: dict[str, Tensor],
    small: Tensor,
    large: Tensor,
    truth: Tensor,
    set_rates: Callable[[TrainingState], None] | None = None,
) -> dict[str, Tensor]:
    """Step down the weighted losses, the discriminator's among them once it counts.

    Args:
        state: of the pupil and the discriminator.
        settings: weights of the losses by their names, rates, and when what begins.
        found: the other losses.
        small: what was enlarged.
        large: what the net made of it.
        truth: what it should have been.
        set_rates: sets the optimisers' rates for the step; by default the net's falls at the end.
    """
    for optimiser in state.optimisers.values():
        optimiser.zero_grad(set_to_none=True)
    trust = min(1.0, max(0, state.step - settings.judges_from) / settings.judges_grow)
    judge = ready_judges(state.extras["judges"])
    context = functional.interpolate(small, size=truth.shape[-2:], mode="bicubic")
    context = high_bands(luma(context)).repeat(1, 2, 1, 1)
    fake, real = high_bands(luma(large)), high_bands(luma(truth))
    if state.step >= settings.judges_from:
        with mixed_precision(small.device):
            verdict = judge(fake, context)
        found["adversarial"] = trust * deceive_loss([verdict], torch.ones(len(fake)).to(fake))
    weighted_sum(found, settings.weights).backward()  # type: ignore[no-untyped-call]
    if set_rates is not None:
        set_rates(state)
    else:
        set_rate(
            state.optimisers["network"],
            settings.learning_rate,
            state.step,
            settings.warm_up,
            settings.steps,
        )
    parameters = list(state.network.parameters())
    found["gradient"] = torch.nn.utils.clip_grad_norm_(parameters, settings.most_gradient)
    state.optimisers["network"].step()
    if state.step >= settings.judges_from:
        state.optimisers["judges"].zero_grad(set_to_none=True)
        with mixed_precision(small.device):
            both = judge(torch.cat([real, fake.detach()]), torch.cat([context, context]))
        found["judge"] = judge_loss([both[: len(real)]], [both[len(real) :]])
        found["judge"].backward()  # type: ignore[no-untyped-call]
        state.optimisers["judges"].step()
    return {name: value.detach() for name, value in found.items()}


def _compare(fake: Tensor, batch: DistilBatch, features: EarlyFeatures) -> dict[str, Tensor]:
    """Return how far pictures are from what the teacher made, and from the truth."""
    with mixed_precision(fake.device):
        seen = features(fake)
        with torch.no_grad():
            goals = features(torch.cat([batch.truth, batch.taught]))
    count = len(fake)
    truths, taught = [f[:count] for f in goals], [f[count:] for f in goals]
    return {
        "taught": (fake - batch.taught).abs().mean() * 10,
        "taught_features": losses.perceptual(seen, taught).mean(),
        **of_originals(fake, batch.truth, seen, truths, batch.small.shape[-2:]),
    }


def of_originals(
    fake: Tensor, truth: Tensor, seen: list[Tensor], goals: list[Tensor], size: torch.Size
) -> dict[str, Tensor]:
    """Return how far pictures are from their originals on the whole, a number for each loss.

    Args:
        fake: [n, 3, h, w] in 0..1.
        truth: their originals.
        seen: features of ``fake``.
        goals: features of ``truth``.
        size: height and width of what was enlarged; colours are compared there.
    """
    grey, true_grey = luma(fake), luma(truth)
    colours, true_colours = (functional.interpolate(x, size, mode="area") for x in (fake, truth))
    return {
        "perceptual": losses.perceptual(seen, goals).mean(),
        "statistics": losses.statistics(seen, goals),
        "texture": losses.texture(seen[:3], goals[:3]).mean(),
        "energy": losses.band_energy(grey, true_grey).mean(),
        "flat": losses.flat_excess(grey, true_grey).mean(),
        "colour": (colours - true_colours).abs().mean() * 10,
    }


@dataclass(frozen=True)
class Examples:
    """Damaged pictures that no training saw, and their truths beside what the teacher made."""

    smalls: list[NDArray[np.float32]]
    held_out: HeldOut

    def run(self, network: Teach, count: int | None = None) -> list[NDArray[np.float32]]:
        """Return what a network makes of the first of them, colours held to the source."""
        sources = [row[..., 6:] for row in self.held_out.pairs[:count]]
        return [
            run_prescaler(network, [small], [source])[0]
            for small, source in zip(self.smalls[:count], sources, strict=True)
        ]


def teacher_of(prescaler: Prescaler) -> Teach:
    """Return what enlarges with a prescaler, where that computes."""
    network = cast("nn.Module", prescaler.network)

    def teach(small: Tensor) -> Tensor:
        with torch.inference_mode():
            return cast("Tensor", network(small.to(prescaler.device)))

    return teach


def make_examples(
    held_out: Sequence[Path],
    side: int,
    factor: int,
    teachers: Mapping[str, Teach],
    show: Callable[[Picture, str], Picture] = lambda small, _: small,
) -> Examples:
    """Damage a crop of every held-out photograph in several ways, beside what a teacher makes.

    Args:
        held_out: photographs.
        side: pixels of a truth.
        factor: times that a small picture is enlarged.
        teachers: by the bench's damages.
        show: makes of a damaged picture and the name of its damage what the pupil sees; the
            teacher sees the picture as it is.
    """
    rng = np.random.default_rng(5)
    smalls, rows = [], []
    for number, path in enumerate(held_out):
        picture = photos.read(path)
        for name, teacher in teachers.items():
            truth = photos.plain_crop(picture, side, rng)
            small = unit(degrade(truth, factor, name, f"{number} {name}"))
            source = enlarge_by_lanczos(small, len(truth))
            rows.append(np.dstack([truth, *run_prescaler(teacher, [small], [source]), source]))
            smalls.append(show(small, name))
    return Examples(smalls, HeldOut(np.stack(rows).astype(np.float32), JUDGE))


@dataclass(frozen=True)
class PupilRun(PrescalerRun):
    """What programs do alike that train a small net: its stages, choice and export."""

    def begin(self, chosen: DistilSettings | LineSettings) -> TrainingState:
        """Return the state of a pupil that begins as Real-ESRGAN's net for anime video."""
        base = load_prescaler(BASE, torch.device("cpu"), torch.float32).network
        pupil = begin_pupil(cast("SRVGGNetCompact", base), chosen.convolutions, self.settings.seed)
        return new_distil_state(pupil, chosen, self.settings.seed, self.device)

    def run_pupil(
        self,
        stage: Stage,
        state: TrainingState,
        source: Source,
        examples: Examples,
        judged: Callable[[Mapping[str, Tensor]], Teach],
    ) -> tuple[Verdict, dict[str, Tensor]]:
        """Run a stage to its end, with sheets of samples on the way; returns its best average.

        judged: makes of an average's tensors the network that enlarges the examples.
        """

        def sample(state: TrainingState, path: Path) -> None:
            pairs = examples.held_out.pairs[:_SHOWN]
            columns = [list(pairs[..., at : at + 3]) for at in (0, 6, 3)]
            average = judged(state.average.state_dict())
            write_sheet([*columns, examples.run(average, _SHOWN)], path)
            self.say(f"{stage.name}: step {state.step} of {stage.steps}, {state.seconds:.0f} s")

        run_stage(stage, state, source, self.run, self.settings, sample)
        averages = {
            path.name: torch.load(path, weights_only=True)
            for path in sorted(self.run.glob(f"{stage.name}-*.average.pt"))
        }
        verdicts = [
            examples.held_out.compare(name, examples.run(judged(tensors)))
            for name, tensors in averages.items()
        ]
        best = choose(verdicts)
        self.say(f"{table(verdicts)}\nchosen: {best.name}")
        return best, averages[best.name]

    def export_pupil(
        self,
        name: str,
        stage: str,
        chosen: PupilSettings,
        tensors: Mapping[str, Tensor],
        training: Mapping[str, Any],
        page: str | None = None,
    ) -> None:
        """Write the tensors of a prescaler, with its card, by default named as they are."""
        digest = export.export_tensors(tensors, training, self.weights, name)
        text = card(stage, tensors, digest, chosen, training)
        export.replace(self.weights / (page or f"{name}.md"), text.encode())
        self.say(f"{self.weights}: {name}, {digest}")


def pupil_of(tensors: Mapping[str, Tensor]) -> Pupil:
    """Return the pupil that these tensors are of."""
    last = max(int(name.split(".")[2]) for name in tensors)
    pupil = Pupil(last // 2 - 1, tensors["four.body.0.weight"].shape[0])
    pupil.load_state_dict(tensors)
    return pupil.eval()


@dataclass(frozen=True)
class DistilProgram(PupilRun):
    """From photographs to ``tegula-swift``: pairs, training, choice, export.

    The teacher is of the folder of weights, too, where it was made there.
    """

    def everything(self) -> Pupil:
        """Go from photographs to the exported file; returns what is in it."""
        chosen = self.settings.distil
        training, held_out = photos.split(self.photographs, self.settings.held_out_every)
        teachers = self._teachers()
        folder = self.work / "distil-pairs"
        make_distil_shards(
            training, folder, chosen.pairs, teachers,
            lambda done, total: self.say(f"distil: shard {done} of {total}"),
        )  # fmt: skip
        damages = {n: teachers["clean" if n == "clean" else "light"] for n in DEGRADATIONS}
        examples = make_examples(held_out, chosen.pairs.side, FACTOR, damages)
        features = EarlyFeatures("lite1", stages=FEATURE_STAGES).to(self.device)
        state = self.begin(chosen)
        stage = Stage(
            "distil", chosen.steps, chosen.ema, chosen.batch,
            lambda s, b: distil_step(s, chosen, features, b),
        )  # fmt: skip
        best, tensors = self.run_pupil(
            stage, state, DistilSource(folder), examples, lambda t: pupil_of(t).four
        )
        pupil = pupil_of(tensors)
        record = self.record(state, chosen.pairs.count, best)
        self.export_pupil(SWIFT, stage.name, chosen, pupil.tensors(), record)
        return pupil

    def _teachers(self) -> Mapping[str, Teach]:
        """Return the teacher of each recipe."""
        photo = load_prescaler(PHOTO, self.device, pick_dtype(self.device), self.folder_of(PHOTO))

        shares = self.settings.distil.pairs.teacher_shares
        return {
            name: teacher_of(with_share(photo, share))
            for name, share in zip(RECIPES, shares, strict=True)
        }


def card(
    stage: str,
    tensors: Mapping[str, Tensor],
    digest: str,
    settings: PupilSettings,
    training: Mapping[str, Any],
) -> str:
    """Return the card of what a stage made, as Markdown."""
    return (
        Path(__file__)
        .with_name(f"{stage}.md")
        .read_text(encoding="utf-8")
        .format(
            digest=digest,
            settings=settings,
            parameters=sum(t.numel() for t in tensors.values()) / 1e6,
            **{"history": "", **training},
        )
    )
