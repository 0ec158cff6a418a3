"""mini's latents: a block transform of the luma difference to the prescaled picture.

Each 4x4 block of the difference becomes 16 coefficients of the orthonormal DCT-II
(Ahmed, Natarajan and Rao, 1974), one channel each, divided by that channel's deviation
over the training pairs. The transform is exact, so an unchanged latent is an unchanged
picture, and colour is the prescaler's own: only luma can change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tegula.models.bundle import ControlImage

BLOCK = 4
CHANNELS = BLOCK * BLOCK
LUMA = (0.299, 0.587, 0.114)
"""Rec. 601 weights, those of JPEG."""

DEVIATIONS = (
    0.162, 0.108, 0.106, 0.075, 0.067, 0.072, 0.046, 0.048, 0.046, 0.044, 0.032, 0.035, 0.030,
    0.025, 0.024, 0.018,
)  # fmt: skip
"""Root mean square of each channel of the difference over 400 training crops."""


def luma(image: Tensor) -> Tensor:
    """Return [n, 1, h, w] from [n, 3, h, w]."""
    weighted = image[:, :1] * LUMA[0]
    for channel, weight in enumerate(LUMA[1:], 1):
        weighted.add_(image[:, channel : channel + 1], alpha=weight)
    return weighted


def band_orders() -> list[int]:
    """Return the sum of both frequencies of each channel, 0..6, ascending."""
    return sorted(row + column for row in range(BLOCK) for column in range(BLOCK))


def dct_filters(*, device: torch.device | None = None) -> Tensor:
    """Return the orthonormal 4x4 DCT basis as [16, 1, 4, 4] filters, low bands first."""
    k = torch.arange(BLOCK, dtype=torch.float64)
    rows = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / (2 * BLOCK))
    rows *= torch.where(k == 0, math.sqrt(1 / BLOCK), math.sqrt(2 / BLOCK))[:, None]
    order = sorted(range(CHANNELS), key=lambda i: (i // BLOCK + i % BLOCK, i))
    basis = [torch.outer(rows[i // BLOCK], rows[i % BLOCK]) for i in order]
    return torch.stack(basis)[:, None].to(device=device, dtype=torch.float32)


def to_blocks(plane: Tensor) -> Tensor:
    """Return the DCT coefficients [n, 16, h/4, w/4] of a plane [n, 1, h, w], in float32."""
    return functional.conv2d(plane.float(), dct_filters(device=plane.device), stride=BLOCK)


def from_blocks(coefficients: Tensor) -> Tensor:
    """Return the plane [n, 1, h, w] of its DCT coefficients, in float32."""
    filters = dct_filters(device=coefficients.device)
    return functional.conv_transpose2d(coefficients.float(), filters, stride=BLOCK)


class BlockAutoencoder:
    """Pictures to latents and back, with the control image as the origin."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Take the precision of the latents; the arithmetic itself is float32."""
        self._deviations = torch.tensor(DEVIATIONS).view(1, CHANNELS, 1, 1)
        self._dtype = dtype

    def encode(
        self, image: Tensor, control: ControlImage, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return [n, 16, h/4, w/4]; nothing is drawn, so ``generator`` is not used."""
        del generator
        difference = luma(image.float()) - luma(control.prescaled.float())
        scaled = to_blocks(difference) / self._deviations.to(image.device)
        return scaled.to(self._dtype)

    def to_dtype(self, dtype: torch.dtype) -> BlockAutoencoder:
        """Return the same autoencoder with latents in another precision."""
        return BlockAutoencoder(dtype)

    def decode(self, latents: Tensor, control: ControlImage) -> Tensor:
        """Return [n, 3, h, w]: the prescaled picture with its luma changed, not clamped."""
        difference = from_blocks(latents.float() * self._deviations.to(latents.device))
        return control.prescaled.float() + difference.to(control.prescaled.device)
