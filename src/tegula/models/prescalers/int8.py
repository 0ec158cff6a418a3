"""The dense blocks of an RRDBNet with 8-bit products, twice as many of which a processor does.

Processors with VNNI or AMX multiply 8-bit integers twice as fast as bfloat16 and four times as
fast as float32. Every number that goes into a convolution is rounded to 8 bits by a scale of its
channel, which was measured beforehand (``python -m train ranges``), and every kernel by the
largest weight of its output channel (Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", 2018). What is added up stays wide: sums are 32-bit integers, and what the
blocks hand on has the precision of the rest of the network.

The convolutions after the blocks are not rounded: their features are the picture nearly, and 8
bits of them would be seen as grain in flat places. Neither are the last blocks, which have no
ranges in the file.

torch offers such a convolution to its own compiler alone, so what is used of it is here, and
``multiplies_int8`` runs it before anything relies on it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tegula.models.device import with_shared_weights
from tegula.models.prescalers.networks import (
    NEGATIVE_SLOPE,
    RESIDUAL_SCALE,
    ResidualDenseBlock,
    in_strips,
)

_MOST = 127
"""Largest level of a number beside the middle, and of a weight."""
_MIDDLE = 128
"""What zero is stored as, so that both signs fit into an unsigned byte: oneDNN takes no other."""
_SMALLEST = 1e-6
"""Range of a channel that is always zero."""
_PROBE_CHANNELS = 16


class Int8Convolution(nn.Module):
    """A 3 x 3 convolution of [n, inputs, h, w] bytes; its result is of floating point.

    weight: int8 [outputs, inputs, 3, 3], laid out as oneDNN wants it.
    """

    def __init__(
        self,
        convolution: nn.Conv2d,
        scales: Tensor,
        unit: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Round the weights of a convolution.

        Args:
            convolution: of float32.
            scales: [inputs], what one level of each channel is worth.
            unit: [outputs], what the results are measured in; None leaves them as they are.
            dtype: of the result.
        """
        super().__init__()
        kernels = convolution.weight.detach() * scales[:, None, None]
        bias = cast("Tensor", convolution.bias).detach()
        if unit is not None:
            kernels, bias = kernels / unit[:, None, None, None], bias / unit
        self.dtype, self.bias = dtype, bias
        self.steps = kernels.abs().amax((1, 2, 3)).clamp_min(_SMALLEST) / _MOST
        levels = (kernels / self.steps[:, None, None, None]).round().to(torch.int8)
        side = [1, 1]
        self.weight: Tensor = torch.ops.onednn.qconv_prepack(
            levels, self.steps, 1.0, _MIDDLE, side, side, side, 1, None
        )
        self.zeros = torch.zeros(len(bias), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve uint8 [n, inputs, h, w], in channels-last layout."""
        side = [1, 1]
        return cast(
            "Tensor",
            torch.ops.onednn.qconv2d_pointwise(
                x, 1.0, _MIDDLE, self.weight, self.steps, self.zeros, self.bias,
                side, side, side, 1, 1.0, 0, self.dtype, "none", [], None,
            ),
        )  # fmt: skip


class Int8DenseBlock(nn.Module):
    """What a ``ResidualDenseBlock`` computes, with 8-bit products."""

    def __init__(self, block: ResidualDenseBlock, ranges: Tensor, dtype: torch.dtype) -> None:
        """Round the weights of a block.

        Args:
            block: of float32.
            ranges: [features + 4 * growth], the most that each channel which the last
                convolution sees differs from zero by.
            dtype: of what goes in and comes out.
        """
        super().__init__()
        scales = ranges.float().clamp_min(_SMALLEST) / _MOST
        growing = (block.conv1, block.conv2, block.conv3, block.conv4)
        features = block.conv1.in_channels
        self.per_level = 1 / scales[:features, None, None]
        self.growing = nn.ModuleList()
        for conv in growing:
            seen = conv.in_channels
            unit = scales[seen : seen + conv.out_channels]
            self.growing.append(Int8Convolution(conv, scales[:seen], unit))
        self.last = Int8Convolution(block.conv5, scales, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, features, h, w] to the same shape."""
        return in_strips(self.convolve, x)

    def convolve(self, x: Tensor) -> Tensor:
        """Do so all at once."""
        features = _to_bytes(x * self.per_level)
        for conv in self.growing:
            new = functional.leaky_relu_(conv(features), NEGATIVE_SLOPE)
            features = torch.cat((features, _to_bytes(new)), dim=1)
        return torch.add(x, self.last(features), alpha=RESIDUAL_SCALE)


def _to_bytes(levels: Tensor) -> Tensor:
    """Round float32 levels around zero, in place; what does not fit is cut."""
    return levels.add_(_MIDDLE + 0.5).clamp_(0, 255).to(torch.uint8)


def with_int8_blocks(
    network: nn.Module, full: nn.Module, ranges: Mapping[str, Tensor]
) -> nn.Module:
    """Return a network whose dense blocks multiply 8-bit numbers, where their ranges are known.

    Args:
        network: an ``RRDBNet``, which shares its other layers with the result.
        full: the same in float32, whose weights are rounded.
        ranges: of dense blocks by their names, as ``Int8DenseBlock`` takes them.
    """
    dtype = next(network.parameters()).dtype
    placed: dict[nn.Module, nn.Module] = {
        network.get_submodule(name): Int8DenseBlock(
            cast("ResidualDenseBlock", full.get_submodule(name)), each, dtype
        )
        for name, each in ranges.items()
    }
    return with_shared_weights(network, [network], placed)


@lru_cache(maxsize=1)
def multiplies_int8() -> bool:
    """Tell whether this processor multiplies 8-bit integers fast, by the right result of a few.

    x86 processors without VNNI add up pairs of products in 16 bits, where those of large numbers
    do not fit: their results are wrong, which is how they are told. Others have no such
    kernels. What torch keeps private may also be gone or changed: that is a no, too.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    convolution = nn.Conv2d(_PROBE_CHANNELS, _PROBE_CHANNELS, 3, padding=1)
    with torch.inference_mode():
        convolution.weight.fill_(_MOST)
        cast("Tensor", convolution.bias).fill_(1)
        try:
            found = Int8Convolution(convolution, torch.ones(_PROBE_CHANNELS))
            levels = torch.full((1, _PROBE_CHANNELS, 8, 8), 255, dtype=torch.uint8)
            result = found(levels.contiguous(memory_format=torch.channels_last))
        except (AttributeError, RuntimeError, TypeError, NotImplementedError):
            return False
    inside = result[..., 1:-1, 1:-1]
    edge = result[..., 0, 1:-1]  # a third of the products is with what lies around a picture: 0
    of_a_row = 3 * _PROBE_CHANNELS * _MOST**2
    return bool((inside == 3 * of_a_row + 1).all() and (edge == 2 * of_a_row + 1).all())
