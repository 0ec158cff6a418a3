"""Discriminators of stage two: one on pixels, one on frozen features.

Both see the control beside the picture, so that "real" means real for this source. The
heads on pretrained features follow Sauer et al., "Projected GANs Converge Faster" (2021),
the base of adversarial diffusion distillation (2023); the pixel one sees the finest grain, which
features at half resolution miss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

FEATURE_CHANNELS = (16, 24, 40)
"""Channels of the three feature maps that are judged."""


class PixelJudge(nn.Module):
    """Patch discriminator on luma, conditioned on prescaled and source luma."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            ]
        )
        self.verdict = spectral_norm(nn.Conv2d(2 * width, 1, 3, padding=1))

    def forward(self, picture: Tensor, context: Tensor) -> Tensor:
        """Return verdicts [n, 1, h/4, w/4]; luma [n, 1, h, w] and context [n, 2, h, w]."""
        x = (torch.cat([picture, context], dim=1) - 0.5) * 4
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = functional.leaky_relu_(layer(x), 0.2)
        return self.verdict(x)  # type: ignore[no-any-return]


class FeatureJudge(nn.Module):
    """Heads on three maps of frozen features of the picture and of the prescaled one."""

    def __init__(self, channels: tuple[int, ...], width: int = 32) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(2 * c, width, 1)),
                nn.LeakyReLU(0.2, inplace=True),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2, inplace=True),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for c in channels
        )

    def forward(self, picture: list[Tensor], prescaled: list[Tensor]) -> list[Tensor]:
        """Return one map of verdicts per map of features."""
        return [
            head(torch.cat([a, b], dim=1))
            for head, a, b in zip(self.heads, picture, prescaled, strict=True)
        ]


class Judges(nn.Module):
    """Both discriminators; ``forward`` returns all maps of verdicts."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.pixels = PixelJudge()
        self.features = FeatureJudge(channels)

    def forward(
        self, luma: Tensor, context: Tensor, features: list[Tensor], prescaled: list[Tensor]
    ) -> list[Tensor]:
        """Return maps of verdicts, positive for real."""
        return [self.pixels(luma, context), *self.features(features, prescaled)]


def judge_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Return the hinge loss of the discriminators."""
    terms = [
        functional.relu(1 - r.float()).mean() + functional.relu(1 + f.float()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def deceive_loss(fake: list[Tensor], weights: Tensor) -> Tensor:
    """Return the generator's side, rows weighted by ``weights`` [n]."""
    terms = [(-f.float().flatten(1).mean(1) * weights).mean() for f in fake]
    return torch.stack(terms).mean()
