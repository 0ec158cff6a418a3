"""Discriminators: one on pixels, one on frozen features, and a U-Net for the prescaler alone.

All see the control beside the picture, so that "real" means real for this source. The
heads on pretrained features follow Sauer et al., "Projected GANs Converge Faster" (2021),
the base of adversarial diffusion distillation (2023); the pixel one sees the finest grain, which
features at half resolution miss.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

FEATURE_CHANNELS = (16, 24, 40)
"""Channels of the three feature maps that are judged."""
_HIGH_BANDS_GAIN = 8
"""Brings high bands, which deviate by a twentieth or so, to order one."""


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


class UNetJudge(nn.Module):
    """A verdict for every pixel, from what is around it at several sizes.

    The discriminator of Wang et al., "Real-ESRGAN" (2021): a U-Net whose way up adds what the way
    down had at the same size, with the spectral norm on all but the first convolution and the
    last. It sees high bands of luma here, beside those of the source, as ``PixelJudge`` does.
    """

    def __init__(self, width: int = 64, levels: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        pairs = list(pairwise(widths))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(_normed(a, b, 4, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_normed(b, a, 3) for a, b in reversed(pairs))
        self.last = nn.ModuleList(_normed(width, width, 3) for _ in range(2))
        self.verdict = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, picture: Tensor, context: Tensor) -> Tensor:
        """Return verdicts [n, 1, h, w]; high bands [n, 1, h, w] and context [n, 2, h, w]."""
        x = torch.cat([picture, context], dim=1) * _HIGH_BANDS_GAIN
        x = functional.leaky_relu(self.first(x), 0.2)
        seen = []
        for layer in self.down:
            seen.append(x)
            x = functional.leaky_relu(layer(x), 0.2)
        for layer in self.up:
            skipped = seen.pop()
            x = functional.interpolate(x, skipped.shape[-2:], mode="bilinear")
            x = functional.leaky_relu(layer(x), 0.2) + skipped
        for layer in self.last:
            x = functional.leaky_relu(layer(x), 0.2)
        return self.verdict(x)  # type: ignore[no-any-return]


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return spectral_norm(layer)


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
