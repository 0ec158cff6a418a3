"""mini's network: a small convolutional UNet without normalisation.

No layer looks at a whole window, so a pixel's prediction depends on its surroundings
alone and windows agree wherever they see the same ones. Noise level and words enter as
a bias inside every residual block; the second convolution of a block starts at zero,
which keeps training stable without normalisation (Zhang et al., "Fixup Initialization",
2019). The control path is a concatenation at the input.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tegula.models.bundle import ControlImage, WindowBatch
from tegula.models.device import constant

# Latents: a block transform of the luma difference to the prescaled picture.
#
# Each 4x4 block of the difference becomes 16 coefficients of the orthonormal DCT-II
# (Ahmed, Natarajan and Rao, 1974), one channel each, divided by that channel's deviation
# over the training pairs. The transform is exact, so an unchanged latent is an unchanged
# picture, and colour is the prescaler's own: only luma can change.

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
        self._dtype = dtype

    def encode(
        self, image: Tensor, control: ControlImage, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return [n, 16, h/4, w/4]; nothing is drawn, so ``generator`` is not used."""
        del generator
        difference = luma(image.float()) - luma(control.prescaled.float())
        scaled = to_blocks(difference) / _column(DEVIATIONS, image)
        return scaled.to(self._dtype)

    def to_dtype(self, dtype: torch.dtype) -> BlockAutoencoder:
        """Return the same autoencoder with latents in another precision."""
        return BlockAutoencoder(dtype)

    def decode(self, latents: Tensor, control: ControlImage) -> Tensor:
        """Return [n, 3, h, w]: the prescaled picture with its luma changed, not clamped."""
        difference = from_blocks(latents.float() * _column(DEVIATIONS, latents))
        return control.prescaled.float() + difference.to(control.prescaled.device)


# The network.

CONTROL_CHANNELS = 2 * CHANNELS + 3
"""Prescaled luma, what the source's luma has beside it, two chroma means, and a flag."""

# Root mean squares over training crops, as those of the latents.
_TONE_DEVIATIONS = (
    1.03, 0.123, 0.117, 0.055, 0.049, 0.051, 0.026, 0.027, 0.026, 0.024, 0.015, 0.017, 0.014,
    0.011, 0.011, 0.008,
)  # fmt: skip
_DETAIL_DEVIATIONS = (
    0.140, 0.077, 0.075, 0.049, 0.042, 0.044, 0.026, 0.026, 0.025, 0.023, 0.015, 0.017, 0.014,
    0.011, 0.011, 0.008,
)  # fmt: skip
_CHROMA_DEVIATION = 0.1
_TEXTURED = 3.5 / 255
"""Deviation of luma within blocks from which a place counts as textured."""
_BAND_GAINS = (0.3, 0.1, 0.1, 0.15, 0.3, 0.4, 0.4)
"""Share of each predicted band that is taken, by the sum of both its frequencies."""
_USUAL_LEVEL = 0.7
"""The creativity of all presets."""
_SILENCE = 1e-8
_FREQUENCIES = 16


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of the network.

    widths: channels per level, from fine to coarse; each level halves the resolution.
    down, middle, up: residual blocks on the way in (per level but the last), at the
        coarsest level, and on the way out (coarse to fine).
    words: size of the vocabulary. embedding: width of the noise level and word embedding.
    """

    widths: tuple[int, ...] = (96, 128, 192)
    down: tuple[int, ...] = (2, 2)
    middle: int = 3
    up: tuple[int, ...] = (2, 3)
    words: int = 32
    embedding: int = 128

    @property
    def multiple(self) -> int:
        """Window sides are multiples of this many image pixels."""
        return int(BLOCK * 2 ** (len(self.widths) - 1))


class Block(nn.Module):
    """Two convolutions with a conditioning bias between them, around an identity."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.bias = nn.Linear(embedding, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        _start_at_zero(self.bias)
        _start_at_zero(self.second)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return [n, width, h, w]."""
        hidden = self.first(x) + self.bias(embedding)[:, :, None, None]
        return x + self.second(functional.relu(hidden))  # type: ignore[no-any-return]


class MiniNetwork(nn.Module):
    """Predicts the clean latent from a noisy one, its noise level, control and words."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        widths, width = shape.widths, shape.embedding
        self.noise_level = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.words = nn.Linear(shape.words, width)
        self.enter = nn.Conv2d(CHANNELS + CONTROL_CHANNELS, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            _blocks(count, w, width) for count, w in zip(shape.down, widths, strict=False)
        )
        self.shrink = nn.ModuleList(
            nn.Conv2d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths)
        )
        self.middle = _blocks(shape.middle, widths[-1], width)
        outward = widths[::-1]
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in itertools.pairwise(outward)
        )
        self.up = nn.ModuleList(
            _blocks(count, w, width) for count, w in zip(shape.up, outward[1:], strict=True)
        )
        self.leave = nn.Conv2d(widths[0], CHANNELS, 3, padding=1)
        _start_at_zero(self.leave)

    def forward(self, latents: Tensor, level: Tensor, control: Tensor, words: Tensor) -> Tensor:
        """Return the clean latent, shaped like ``latents``.

        latents: [n, 16, h, w]. level: [n], the timestep over 1000. control: what
        ``control_channels`` returns. words: [n, vocabulary].
        """
        embedding = functional.silu(self.noise_level(noise_features(level)) + self.words(words))
        x = self.enter(torch.cat([latents, control], dim=1))
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            x = _run(blocks, x, embedding)
            skips.append(x)
            x = shrink(x)
        x = _run(self.middle, x, embedding)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            x = _run(blocks, grow(x) + skips.pop(), embedding)
        return self.leave(x)  # type: ignore[no-any-return]


def _start_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _blocks(count: int, width: int, embedding: int) -> nn.ModuleList:
    return nn.ModuleList(Block(width, embedding) for _ in range(count))


def _run(blocks: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x, embedding)
    return x


def noise_features(level: Tensor) -> Tensor:
    """Return sines and cosines of the noise level 0..1, [n, 32]."""
    octaves = torch.arange(_FREQUENCIES, device=level.device, dtype=torch.float32)
    angles = level.float()[:, None] * (math.pi * 2 ** (octaves / 3))
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(level.dtype)


def control_channels(control: ControlImage) -> Tensor:
    """Return what the network sees of prescaled picture and source, [n, 35, h/4, w/4]."""
    prescaled, source = control.prescaled.float(), control.source.float()
    base = luma(prescaled)
    tone = to_blocks(base - 0.5) / _column(_TONE_DEVIATIONS, base)
    detail = to_blocks(luma(source) - base) / _column(_DETAIL_DEVIATIONS, base)
    blue = functional.avg_pool2d(prescaled[:, 2:] - base, BLOCK) / _CHROMA_DEVIATION
    red = functional.avg_pool2d(prescaled[:, :1] - base, BLOCK) / _CHROMA_DEVIATION
    return torch.cat([tone, detail, blue, red, torch.ones_like(red)], dim=1)


def room_for_detail(control: ControlImage) -> Tensor:
    """Return how far each place may change, [n, 1, h/4, w/4] in 0..1.

    Where the prescaled picture is flat, what the network adds is mostly noise, and noise
    in a sky is seen first; where it has texture, the network has its way.
    """
    blocks = to_blocks(luma(control.prescaled.float()))[:, 1:]
    variance = blocks.square().sum(1, keepdim=True) / CHANNELS
    return _nearby((_nearby(variance).sqrt() / _TEXTURED).clamp(max=1))


def take_shares(predicted: Tensor, control: Tensor, room: Tensor, gain: float | Tensor) -> Tensor:
    """Return the part of the predicted difference that is taken, [n, 16, h/4, w/4].

    Of each band only a share is taken, because a full measure of invented texture in the
    wrong place costs more likeness than it wins. But half of one texture and half of
    another, whose crests lie elsewhere, is weaker than both: so where a band would lose
    energy by the mixture, it is given back. ``docs/quality.md`` has what this
    changed and how the numbers were found.

    Args:
        predicted: clean latents as the network gives them, [n, 16, h/4, w/4].
        control: what ``control_channels`` returned for the same windows.
        room: what ``room_for_detail`` returned for them.
        gain: factor on all shares, a number or [n, 1, h/4, w/4]; none is more than the whole.
    """
    scale, tone_scale = _column(DEVIATIONS, predicted), _column(_TONE_DEVIATIONS, predicted)
    shares = [_BAND_GAINS[order] for order in band_orders()]
    share = (_column(tuple(shares), predicted) * gain).clamp(max=1) * room.float()
    before, change = control[:, :CHANNELS].float() * tone_scale, predicted.float() * scale
    mixed = before + share * change
    mean_energy = torch.lerp(_nearby(before.square()), _nearby((before + change).square()), share)
    lost = (mean_energy + _SILENCE) / (_nearby(mixed.square()) + _SILENCE)
    restored = lost.sqrt().clamp(1, 2)
    # The mean of a block: a tone, and not texture whose crests could differ.
    restored[:, 0].fill_(1)
    return (mixed * restored - before) / scale


def _nearby(plane: Tensor) -> Tensor:
    return functional.avg_pool2d(plane, 3, stride=1, padding=1, count_include_pad=False)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return constant(values, like.device).view(1, -1, 1, 1)


_Scale = TypeVar("_Scale", float, Tensor)


def resemblance_gain(scale: _Scale) -> _Scale:
    """Return the factor on the shares that are taken: 4 at scale 0, 1 at 1, 0.4 at 3."""
    return 4 / (1 + 3 * scale)


def creativity_gain(level: Tensor) -> Tensor:
    """Return the factor on the shares by the noise level that a step begins at, 0..1.

    One step from any level predicts much the same, so that creativity alone would hardly show. Up
    to the presets' 0.7 all of its effect is in the prediction; from there more of that is taken: 2
    times at 0.8, as with the resemblance of ``creative``, and 4 times from noise alone.
    """
    return 1 + ((level - _USUAL_LEVEL) / 0.1).clamp(0, 3)


class MiniDenoiser:
    """The network as the denoiser of mini's bundle."""

    def __init__(self, network: MiniNetwork, dtype: torch.dtype) -> None:
        self._network = network
        self._dtype = dtype

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Return the network that every step runs."""
        return (self._network,)

    def embed_control(self, control: ControlImage) -> Tensor:
        """Return control channels, room for detail and weight of control, [n, 37, h/4, w/4]."""
        channels = control_channels(control)
        weight = control.weight_at(channels.shape[-2], channels.shape[-1])
        return torch.cat([channels, room_for_detail(control), weight], 1).to(self._dtype)

    @torch.inference_mode()
    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the predicted clean latent.

        Rows without control see zeros in its place, as a share of training did. The
        control scale shrinks or stretches what is taken of the prediction.
        """
        channels, room, weight = torch.split(batch.control, [CONTROL_CHANNELS, 1, 1], 1)
        rows, scale = batch.controlled, batch.control_scale
        seen = torch.zeros_like(channels)
        if scale is not None:
            seen[rows] = channels[rows]
        level = batch.timesteps() / 1000
        predicted: Tensor = self._network(
            batch.latents.to(self._dtype).contiguous(memory_format=torch.channels_last),
            level.to(self._dtype),
            seen.to(self._dtype).contiguous(memory_format=torch.channels_last),
            batch.text[:, 0].to(self._dtype),
        )
        if scale is None:
            return predicted.to(batch.latents.dtype)
        number = scale.on(weight.device)
        taken = predicted.to(batch.latents.dtype) * resemblance_gain(number).clamp(max=1)
        gain = resemblance_gain(weight[rows].float() * number)
        gain = gain * creativity_gain(level[rows].float()).view(-1, 1, 1, 1)
        taken[rows] = take_shares(predicted[rows], channels[rows], room[rows], gain).to(taken.dtype)
        return taken

    def to_dtype(self, dtype: torch.dtype) -> MiniDenoiser:
        """Return the same denoiser computing in another precision."""
        if dtype == self._dtype:
            return self
        twin = MiniNetwork(self._network.shape)
        twin.load_state_dict(self._network.state_dict())
        device = next(self._network.parameters()).device
        return MiniDenoiser(prepare(twin, device, dtype), dtype)


def prepare(network: MiniNetwork, device: torch.device, dtype: torch.dtype) -> MiniNetwork:
    """Return the network ready for inference, in the layout convolutions run fastest in."""
    network = network.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(requires_grad=False)
