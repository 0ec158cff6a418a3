"""Pictures that are judged beside their truth, whatever made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from train import losses
from train.config import LossWeights
from train.discriminator import judge_loss
from train.precision import mixed_precision

JUDGED_MAPS = slice(1, 4)
"""The feature maps that are judged: those after the first three stages."""
_PIXEL_JITTER = 0.02
_FEATURE_JITTER = 0.2


@dataclass(frozen=True)
class Judged:
    """What discriminators see of some rows.

    fake, real: luma [n, 1, h, w]. fake_features, real_features: all their feature maps.
    context: luma of the control images, [n, 2, h, w]. context_features: of the first.
    """

    fake: Tensor
    real: Tensor
    fake_features: list[Tensor]
    real_features: list[Tensor]
    context: Tensor
    context_features: list[Tensor]

    def fake_verdicts(self, judges: torch.nn.Module) -> list[Tensor]:
        """Return verdicts over the fake pictures, with gradients to what made them."""
        maps = self.fake_features[JUDGED_MAPS], self.context_features[JUDGED_MAPS]
        with mixed_precision(self.fake.device):
            return judges(self.fake, self.context, *maps)  # type: ignore[no-any-return]

    def verdicts(
        self, judges: torch.nn.Module, jitter: Callable[[Tensor, float], Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return verdicts over real and fake pictures, without gradients to the generator.

        ``jitter`` adds noise of a deviation to what is real.
        """
        fake, fakes = self.fake.detach(), [f.detach() for f in self.fake_features[JUDGED_MAPS]]
        real, reals = self.real, self.real_features[JUDGED_MAPS]
        if jitter is not None:
            real = jitter(real, _PIXEL_JITTER)
            reals = [jitter(f, _FEATURE_JITTER) for f in reals]
        pictures = torch.cat([real, fake])
        maps = [torch.cat([a, b]) for a, b in zip(reals, fakes, strict=True)]
        context_maps = [torch.cat([f, f]) for f in self.context_features[JUDGED_MAPS]]
        with mixed_precision(fake.device):
            both = judges(pictures, torch.cat([self.context] * 2), maps, context_maps)
        count = len(real)
        return [v[:count] for v in both], [v[count:] for v in both]

    def train_judges(
        self, judges: torch.nn.Module, regularisation: float, seed: int, parts: int
    ) -> dict[str, Tensor]:
        """Run the discriminators' loss backward: hinge, and now and then a cheap R1.

        Verdicts on real pictures must hardly change under slight noise: R1 by finite
        differences, as in Lin et al., "Diffusion Adversarial Post-Training" (2025).
        """
        real, fake = self.verdicts(judges)
        loss = judge_loss(real, fake)
        logged = {
            "judge": loss,
            "real": torch.stack([r.float().mean() for r in real]).mean(),
            "fake": torch.stack([f.float().mean() for f in fake]).mean(),
        }
        if regularisation:
            generator = torch.Generator().manual_seed(seed)
            jittered, _ = self.verdicts(judges, partial(_jitter, generator))
            pairs = zip(real, jittered, strict=True)
            change = [(a.float() - b.float()).square().mean() for a, b in pairs]
            loss = loss + regularisation * torch.stack(change).mean()
        (loss / parts).backward()  # type: ignore[no-untyped-call]
        return logged


def likeness(seen: Judged) -> dict[str, Tensor]:
    """Return how far fakes are from their truths: pixels, texture, energies, flat areas."""
    fake, real = seen.fake, seen.real
    return {
        "pixel": losses.rows((fake - real).abs()).mean() * 10,
        "texture": losses.texture(seen.fake_features[:3], seen.real_features[:3]).mean(),
        "energy": losses.band_energy(fake, real).mean(),
        "flat": losses.flat_excess(fake, real).mean(),
    }


def weighted_sum(parts: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """Return the sum of losses, each by the weight of its name."""
    return torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()


def _jitter(generator: torch.Generator, x: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x + noise * deviation


def ready_judges(judges: torch.nn.Module) -> torch.nn.Module:
    """Renew the spectral norms once a step, so that parts on threads only read them."""
    judges.train()
    with torch.no_grad():
        for module in judges.modules():
            if isinstance(module, torch.nn.Conv2d):
                _ = module.weight
    return judges.eval()
