"""The two networks behind Real-ESRGAN, as plain torch modules.

Parameter names are those of the checkpoints people share, so a file's state dict loads
as it is. Both take and return [n, 3, height, width] in 0..1; the result is not clamped.
Inputs are float32 whatever the precision of the weights, and so are the outputs: what
is added to the picture last is added in full precision.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows it by)
from torch import Tensor, nn

RESIDUAL_SCALE = 0.2
NEGATIVE_SLOPE = 0.2
STRIP = 64
"""Rows of features that are enlarged at once."""
STRIP_CONTEXT = 2
"""Rows of features beside a strip that its result depends on."""

DENSE_CONTEXT = 5
"""Rows beside a strip that the five convolutions of a dense block depend on."""
CACHED_PIXELS = 32_768
"""Pixels of a strip of a dense block: 0.6 of the time of a whole picture of 512 px."""


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, NEGATIVE_SLOPE, inplace=True)


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each of which sees the outputs of all before it."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = _conv(features, growth)
        self.conv2 = _conv(features + growth, growth)
        self.conv3 = _conv(features + 2 * growth, growth)
        self.conv4 = _conv(features + 3 * growth, growth)
        self.conv5 = _conv(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, features, h, w] to the same shape.

        On a processor strips of rows go through it one after the other: what the
        convolutions hand on then stays in its cache, and the result is the same.
        """
        height, width = x.shape[-2:]
        rows = max(DENSE_CONTEXT, CACHED_PIXELS // width)
        if x.device.type != "cpu" or height <= rows:
            return self._run(x)
        result = torch.empty_like(x)
        for top in range(0, height, rows):
            above = min(top, DENSE_CONTEXT)
            strip = self._run(x[..., top - above : top + rows + DENSE_CONTEXT, :])
            result[..., top : top + rows, :] = strip[..., above : above + rows, :]
        return result

    def _run(self, x: Tensor) -> Tensor:
        seen = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat((seen, _leaky(conv(seen))), dim=1)
        return torch.add(x, self.conv5(seen), alpha=RESIDUAL_SCALE)


class ResidualInResidualBlock(nn.Module):
    """Three dense blocks inside one more residual connection."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(features, growth)
        self.rdb2 = ResidualDenseBlock(features, growth)
        self.rdb3 = ResidualDenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, features, h, w] to the same shape."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=RESIDUAL_SCALE)


class RRDBNet(nn.Module):
    """The generator of ESRGAN (Wang et al., 2018) and Real-ESRGAN (Wang et al., 2021).

    blocks: residual-in-residual blocks in the trunk (23, or 6 in the small one).
    features, growth: channels of the trunk and of each dense convolution.
    unshuffle: the input is first folded this many times into channels (2 in the x2
        and 4 in the x1 models of Real-ESRGAN, else 1).
    upsamples: doublings at the end; the factor is 2**upsamples / unshuffle.
    """

    def __init__(
        self,
        blocks: int = 23,
        features: int = 64,
        growth: int = 32,
        unshuffle: int = 1,
        upsamples: int = 2,
    ) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.factor = 2**upsamples // unshuffle
        self.conv_first = _conv(3 * unshuffle**2, features)
        self.body = nn.Sequential(
            *(ResidualInResidualBlock(features, growth) for _ in range(blocks))
        )
        self.conv_body = _conv(features, features)
        self.up_names = [f"conv_up{n + 1}" for n in range(upsamples)]
        for name in self.up_names:
            self.add_module(name, _conv(features, features))
        self.conv_hr = _conv(features, features)
        self.conv_last = _conv(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge [n, 3, h, w] to [n, 3, h * factor, w * factor], float32."""
        height, width = x.shape[-2:]
        shallow = self.conv_first(self._fold(x).to(self.conv_first.weight.dtype))
        picture = self.finish(shallow, self.body(shallow))
        return picture[..., : height * self.factor, : width * self.factor]

    def finish(self, shallow: Tensor, seen: Tensor) -> Tensor:
        """Make the picture of the features before and after the residual blocks."""
        deep = shallow + self.conv_body(seen)
        strips = [self._enlarge_rows(deep, top) for top in range(0, deep.shape[-2], STRIP)]
        return torch.cat(strips, dim=-2)

    def _enlarge_rows(self, deep: Tensor, top: int) -> Tensor:
        """Enlarge one strip of rows from ``top`` on.

        The convolutions here reach no further than STRIP_CONTEXT, so strips change nothing
        of the result, and the memory by a factor.
        """
        above = min(top, STRIP_CONTEXT)
        x = deep[..., top - above : top + STRIP + STRIP_CONTEXT, :]
        for name in self.up_names:
            larger = F.interpolate(x, scale_factor=2, mode="nearest")
            x = _leaky(cast("nn.Conv2d", self.get_submodule(name))(larger))
        picture = self.conv_last(_leaky(self.conv_hr(x))).float()
        ratio = 2 ** len(self.up_names)
        return cast("Tensor", picture[..., above * ratio : (above + STRIP) * ratio, :])

    def _fold(self, x: Tensor) -> Tensor:
        if self.unshuffle == 1:
            return x
        down, right = -x.shape[-2] % self.unshuffle, -x.shape[-1] % self.unshuffle
        return F.pixel_unshuffle(F.pad(x, (0, right, 0, down), "replicate"), self.unshuffle)


class SRVGGNetCompact(nn.Module):
    """The small, straight net of Real-ESRGAN's video models (Wang et al., 2021).

    convolutions: hidden convolutions between the first and the last (16 or 32).
    """

    def __init__(self, convolutions: int = 16, features: int = 64, factor: int = 4) -> None:
        super().__init__()
        self.factor = factor
        layers: list[nn.Module] = [_conv(3, features), nn.PReLU(features)]
        for _ in range(convolutions):
            layers += [_conv(features, features), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, _conv(features, 3 * factor**2))

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge [n, 3, h, w] to [n, 3, h * factor, w * factor], float32."""
        first = cast("nn.Conv2d", self.body[0])
        detail = F.pixel_shuffle(self.body(x.to(first.weight.dtype)).float(), self.factor)
        return detail + F.interpolate(x, scale_factor=self.factor, mode="nearest")
