"""Stage two: one step from noise alone must look like a photograph.

The road of adversarial diffusion distillation (Sauer et al., 2023), SinSR and OSEDiff
(2024): the network of stage one becomes a generator that starts where inference starts,
noise alone at some level, and is judged by discriminators, features and energies. Part
of each batch stays ordinary diffusion training, so that more steps, words and damaged
targets keep their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.quality.features import EarlyFeatures
from tegula.models.mini.network import control_channels, luma
from train import losses
from train.batches import Batch
from train.config import AdversarialSettings
from train.diffusion import clean_latents, faded_target, set_rate
from train.discriminator import FEATURE_CHANNELS, Judges, deceive_loss
from train.judged import Judged, likeness, ready_judges, weighted_sum
from train.noise import TIMESTEPS, add_noise, signal_shares
from train.parallel import map_parts, mean_logs, split
from train.precision import mixed_precision
from train.state import TrainingState

_LOWEST_TIMESTEP = 150
_INVENTIVE = 0.15


@dataclass(frozen=True)
class _Draw:
    """A batch at its noise levels.

    judged: rows that start from nothing towards clean truth. plain: all that do not.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    judged: Tensor
    plain: Tensor

    def rows(self, part: slice) -> _Draw:
        return _Draw(
            self.noisy[part], self.target[part], self.timesteps[part],
            self.judged[part], self.plain[part],
        )  # fmt: skip


def judged_share(timesteps: Tensor) -> Tensor:
    """Return the weight of the adversarial loss: 0 up to level 0.4, 1 at 0.7, 1.5 at most.

    This is the other half of the dial: low creativity keeps to what is certain, high
    creativity to what looks real.
    """
    return ((timesteps.float() / TIMESTEPS - 0.4) / 0.3).clamp(0, 1.5)


def adversarial_step(
    state: TrainingState, settings: AdversarialSettings, features: EarlyFeatures, batch: Batch
) -> dict[str, Tensor]:
    """Take one step of the generator and one of the discriminators; returns the losses."""
    device = next(state.network.parameters()).device
    batch = batch.to(device)
    draw = _draw(batch, settings, state)
    parts = split(len(draw.noisy), settings.batch.parts if device.type == "cpu" else 1)
    judges = ready_judges(state.extras["judges"])
    zero_gradients(state)

    def generate(part: slice) -> tuple[_JudgedRows | None, dict[str, Tensor]]:
        return _generate(state, settings, features, batch.rows(part), draw.rows(part), len(parts))

    made = map_parts(generate, parts)
    norm = _update(state, settings)
    seeds = torch.randint(2**62, (len(parts),), generator=state.generator).tolist()
    judged = [(j, seed) for (j, _), seed in zip(made, seeds, strict=True) if j is not None]

    def judge(part: tuple[_JudgedRows, int]) -> dict[str, Tensor]:
        regularise = state.step % settings.regularise_every == 0
        weight = settings.regularisation if regularise else 0.0
        return part[0].judged.train_judges(judges, weight, part[1], len(parts))

    judged_logs = map_parts(judge, judged) if judged else []
    state.optimisers["judges"].step()
    return {**mean_logs([log for _, log in made] + judged_logs), "gradient": norm}


def _generate(
    state: TrainingState,
    settings: AdversarialSettings,
    features: EarlyFeatures,
    batch: Batch,
    draw: _Draw,
    parts: int,
) -> tuple[_JudgedRows | None, dict[str, Tensor]]:
    """Run the generator's losses backward for one part of the batch."""
    predicted = _predict(state, batch, draw)
    plain = losses.rows((predicted - draw.target).square())
    loss = (plain * draw.plain.float()).mean()
    logged, judged = {"plain": loss}, None
    if draw.judged.any():
        judged = _JudgedRows(batch, draw, predicted, features)
        logged |= judged.losses(state.extras["judges"], settings)
        loss = loss + logged.pop("total")
    (loss / parts).backward()  # type: ignore[no-untyped-call]
    return judged, logged


class _JudgedRows:
    """The judged rows as pictures and features."""

    def __init__(
        self, batch: Batch, draw: _Draw, predicted: Tensor, features: EarlyFeatures
    ) -> None:
        rows = draw.judged
        self.timesteps = draw.timesteps[rows]
        self.predicted, self.target = predicted[rows], draw.target[rows]
        prescaled = batch.control.prescaled[rows]
        base = luma(prescaled)
        fake = losses.pictures_from(self.predicted, base)
        real = losses.pictures_from(self.target, base)
        with mixed_precision(predicted.device):
            fake_features = features(prescaled + (fake - base))
            with torch.no_grad():
                count = len(prescaled)
                both = features(torch.cat([prescaled + (real - base), prescaled]))
        self.judged = Judged(
            fake,
            real,
            fake_features,
            [f[:count] for f in both],
            torch.cat([base, luma(batch.control.source[rows])], dim=1),
            [f[count:] for f in both],
        )

    def losses(self, judges: torch.nn.Module, settings: AdversarialSettings) -> dict[str, Tensor]:
        """Return the generator's losses, ``total`` among them."""
        seen = self.judged
        share = judged_share(self.timesteps)
        certain = 2 - share.clamp(max=1)
        perceptual = losses.perceptual(seen.fake_features, seen.real_features)
        parts = {
            "low_bands": losses.low_bands(self.predicted, self.target).mean(),
            "perceptual": (certain * perceptual).mean(),
            "statistics": self._statistics(),
            "adversarial": deceive_loss(seen.fake_verdicts(judges), share),
            **likeness(seen),
        }
        return {**parts, "total": weighted_sum(parts, settings.weights)}

    def _statistics(self) -> Tensor:
        """Compare statistics over the rows that may invent; low levels keep to the source."""
        rows, seen = judged_share(self.timesteps) > _INVENTIVE, self.judged
        if not rows.any():
            return torch.zeros((), device=seen.fake.device)
        fake, real = ([f[rows] for f in x] for x in (seen.fake_features, seen.real_features))
        return losses.statistics(fake, real)


def _draw(batch: Batch, settings: AdversarialSettings, state: TrainingState) -> _Draw:
    clean = clean_latents(batch)
    device, count = clean.device, len(clean)
    low = torch.full((count,), _LOWEST_TIMESTEP)
    uniform = torch.rand(count, generator=state.generator)
    timesteps = (low + uniform * (TIMESTEPS - 1 - low)).long().to(device)
    noise = torch.randn(clean.shape, generator=state.generator).to(device)
    nothing = (torch.rand(count, generator=state.generator) < settings.from_nothing).to(device)
    keep = (~nothing).float().view(-1, 1, 1, 1)
    noisy = add_noise(clean * keep, noise, timesteps, signal_shares(device=device))
    target = clean * keep + faded_target(clean, timesteps) * (1 - keep)
    fit = nothing & batch.truth_is_clean & (batch.seen.flatten() > 0)
    return _Draw(noisy, target, timesteps, whole_multiple(fit, settings.judged_multiple), ~fit)


def whole_multiple(rows: Tensor, multiple: int) -> Tensor:
    """Return the first of the chosen rows, as many as are a multiple of ``multiple``."""
    most = int(rows.sum()) // multiple * multiple
    return rows & (rows.cumsum(0) <= most)


def _predict(state: TrainingState, batch: Batch, draw: _Draw) -> Tensor:
    control = control_channels(batch.control) * batch.seen
    with mixed_precision(draw.noisy.device):
        predicted = state.network(draw.noisy, draw.timesteps / TIMESTEPS, control, batch.words)
    return predicted.float()  # type: ignore[no-any-return]


def zero_gradients(state: TrainingState) -> None:
    """Forget the gradients of every optimiser."""
    for optimiser in state.optimisers.values():
        optimiser.zero_grad(set_to_none=True)


def _update(state: TrainingState, settings: AdversarialSettings) -> Tensor:
    optimiser = state.optimisers["network"]
    set_rate(optimiser, settings.learning_rate, state.step, settings.warm_up, settings.steps)
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), 2.0)
    optimiser.step()
    # The generator's losses went through the discriminators and left gradients there.
    state.optimisers["judges"].zero_grad(set_to_none=True)
    return norm


def add_judges(state: TrainingState, settings: AdversarialSettings) -> None:
    """Give a trained state its discriminators and both optimisers of this stage."""
    device = next(state.network.parameters()).device
    judges = Judges(FEATURE_CHANNELS).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state.extras["judges"] = judges
    state.optimisers = {
        "network": torch.optim.AdamW(
            state.network.parameters(), lr=settings.learning_rate, betas=(0.5, 0.99), weight_decay=0
        ),
        "judges": torch.optim.AdamW(
            judges.parameters(), lr=settings.discriminator_rate, betas=(0.5, 0.99), weight_decay=0
        ),
    }
