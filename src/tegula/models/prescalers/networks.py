"""The two networks behind Real-ESRGAN, and which of them the tensors of a file fit.

Parameter names are those of the checkpoints people share, so a file's tensors load as they
are. Both networks take and return [n, 3, height, width] in 0..1; the result is not clamped.
Inputs are float32 whatever the precision of the weights, and so are the outputs: what
is added to the picture last is added in full precision.

spandrel has both networks too, but brings torchvision along; these also run in strips of
rows, which takes 0.6 of the time on a processor and a fraction of the memory anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows it by)
from torch import Tensor, nn

from tegula.errors import BrokenWeightsError

# Both are ESRGAN's, and every file of its family was trained with them.
RESIDUAL_SCALE = 0.2
NEGATIVE_SLOPE = 0.2

STRIP = 64
"""Rows of features that are enlarged at once."""
STRIP_CONTEXT = 2
"""Rows of features beside a strip that its result depends on."""

DENSE_CONTEXT = 5
"""Rows beside a strip that its result depends on: one for each convolution of a dense block."""
CACHED_PIXELS = 32_768
"""Pixels of a strip of a dense block; by trying on pictures of 512 px."""


def layers_with_sizes(network: nn.Module) -> Iterator[tuple[nn.Module, float]]:
    """Yield every layer of a prescaler's network, and its pixels for each pixel of the source.

    A network from spandrel is taken to work at the size of the source throughout.
    """
    sizes = network.sizes() if isinstance(network, RRDBNet) else {}
    for name, layer in network.named_modules():
        yield layer, sizes.get(name.partition(".")[0], 1.0)


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
        """Map [n, features, h, w] to the same shape."""
        return in_strips(self.convolve, x)

    def convolve(self, x: Tensor) -> Tensor:
        """Do so all at once."""
        features = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            features = torch.cat((features, _leaky(conv(features))), dim=1)
        return torch.add(x, self.conv5(features), alpha=RESIDUAL_SCALE)


def in_strips(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a dense block over [n, features, h, w]: on a processor one strip of rows after another.

    What one convolution leaves for the next then stays in the cache, which takes 0.6 of the
    time; with their context the strips give the same numbers as the whole.
    """
    height, width = x.shape[-2:]
    rows = max(DENSE_CONTEXT, CACHED_PIXELS // width)
    if x.device.type != "cpu" or height <= rows:
        return block(x)
    result = torch.empty_like(x)
    for top in range(0, height, rows):
        above = min(top, DENSE_CONTEXT)
        strip = block(x[..., top - above : top + rows + DENSE_CONTEXT, :])
        result[..., top : top + rows, :] = strip[..., above : above + rows, :]
    return result


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
        self.description = f"RRDBNet, {blocks} blocks"
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

    def sizes(self) -> Mapping[str, float]:
        """Return how many pixels each part convolves, for each pixel of the source."""
        folded = self.unshuffle**-2
        sizes = dict.fromkeys(("conv_first", "body", "conv_body"), folded)
        sizes |= {name: folded * 4 ** (n + 1) for n, name in enumerate(self.up_names)}
        return sizes | dict.fromkeys(("conv_hr", "conv_last"), float(self.factor**2))

    def finish(self, shallow: Tensor, body: Tensor) -> Tensor:
        """Return the picture, from the features before and after the residual blocks."""
        deep = shallow + self.conv_body(body)
        strips = [self._enlarge_rows(deep, top) for top in range(0, deep.shape[-2], STRIP)]
        return torch.cat(strips, dim=-2)

    def _enlarge_rows(self, deep: Tensor, top: int) -> Tensor:
        """Enlarge one strip of rows from ``top`` on.

        These convolutions reach no further than STRIP_CONTEXT, so strips leave the result as
        it is, and save most of the memory, whose peak is at this size.
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
        self.description = f"SRVGGNetCompact, {convolutions} convolutions"
        layers: list[nn.Module] = [_conv(3, features), nn.PReLU(features)]
        for _ in range(convolutions):
            layers += [_conv(features, features), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, _conv(features, 3 * factor**2))

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge [n, 3, h, w] to [n, 3, h * factor, w * factor], float32."""
        first = cast("nn.Conv2d", self.body[0])
        detail = F.pixel_shuffle(self.body(x.to(first.weight.dtype)).float(), self.factor)
        return detail + F.interpolate(x, scale_factor=self.factor, mode="nearest")


# Which of the networks the tensors of a file fit.
#
# ESRGAN-family files are recognised by their parameter names alone, in the three
# spellings that circulate: Real-ESRGAN's (``conv_first``, ``body.0.rdb1``...), that of
# ESRGAN's first repository (``RRDB_trunk.0.RDB1``...) and that of the numbered
# "old architecture" (``model.1.sub.0.RDB1``...), which most community models use.

Tensors = Mapping[str, Tensor]
"""Tensors by the name of their parameter."""

_FIRST_SPELLING = (
    (r"^RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"^trunk_conv\.", "conv_body."),
    (r"^upconv(\d+)\.", r"conv_up\1."),
    (r"^HRconv\.", "conv_hr."),
)
_NUMBERED_SPELLING = (
    (r"^model\.0\.", "conv_first."),
    (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"^model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1"),
)
_UNSHUFFLES = {3: 1, 12: 2, 48: 4}
"""How often a picture is folded, by the input channels of the first convolution."""


def network_of(tensors: Tensors, where: str) -> RRDBNet | SRVGGNetCompact | None:
    """Return the network that these tensors belong to, filled; None if it is neither.

    Raises:
        BrokenWeightsError: they are those of one of the two, and do not fit it.
    """
    if any(".conv1x1." in name or name.startswith("de_net.") for name in tensors):
        return None  # ESRGAN+ has a branch more in its blocks, MM-RealSR a net beside them
    tensors = _unify_names(tensors)
    if "conv_first.weight" in tensors and "conv_body.weight" in tensors:
        network: RRDBNet | SRVGGNetCompact = _rrdb_of(tensors, where)
    elif "body.0.weight" in tensors and "body.1.weight" in tensors:
        network = _compact_of(tensors, where)
    else:
        return None
    fill(network, tensors, where)
    return network


def _rrdb_of(tensors: Tensors, where: str) -> RRDBNet:
    first = tensors["conv_first.weight"]
    features, channels = first.shape[:2] if first.dim() == 4 else (0, 0)
    blocks, upsamples = _count(tensors, r"^body\.(\d+)\."), _count(tensors, r"^conv_up(\d+)\.")
    unshuffle = _UNSHUFFLES.get(channels)
    growth = tensors.get("body.0.rdb1.conv1.weight")
    if unshuffle is None or growth is None or growth.dim() != 4 or unshuffle > 2**upsamples:
        raise BrokenWeightsError(
            f"{where} cannot be used as a prescaler: an ESRGAN network with {channels} input "
            f"channels does not fit."
        )
    return RRDBNet(blocks, features, growth.shape[0], unshuffle, upsamples)


def _compact_of(tensors: Tensors, where: str) -> SRVGGNetCompact:
    last = max(int(name.split(".")[1]) for name in tensors if re.match(r"^body\.\d+\.", name))
    first, final = tensors["body.0.weight"], tensors.get(f"body.{last}.weight")
    factor = math.isqrt(final.shape[0] // 3) if final is not None and final.dim() == 4 else 0
    if factor < 1 or last % 2 or first.dim() != 4:
        raise BrokenWeightsError(
            f"{where} cannot be used as a prescaler: its layers are not those of a SRVGGNetCompact."
        )
    if first.shape[1] != 3 or final is None or final.shape[0] != 3 * factor**2:
        raise BrokenWeightsError(
            f"{where} cannot be used as a prescaler: its network takes {first.shape[1]} channels; "
            f"give one for colour pictures."
        )
    return SRVGGNetCompact(last // 2 - 1, first.shape[0], factor)


def fill(network: nn.Module, tensors: Tensors, where: str) -> None:
    """Load tensors into a network; every one is used, and every parameter gets one.

    Raises:
        BrokenWeightsError: a name is missing or left over, a shape differs, or a number
            is not finite.
    """
    own = network.state_dict()
    wrong = (
        sorted(own.keys() ^ tensors.keys())
        or [name for name, parameter in own.items() if parameter.shape != tensors[name].shape]
        or [name for name in own if not bool(tensors[name].isfinite().all())]
    )
    if wrong:
        raise BrokenWeightsError(
            f"{where} does not fit its network: {len(wrong)} tensors are missing, left over, "
            f"of another shape or not finite ({wrong[0]}); get the file again."
        )
    network.load_state_dict({n: tensor.float() for n, tensor in tensors.items()}, assign=True)


def _unify_names(tensors: Tensors) -> Tensors:
    """Rename the parameters of an ESRGAN file to those of ``RRDBNet``; leave others alone."""
    if "model.0.weight" not in tensors:
        return _rename(tensors, _FIRST_SPELLING)
    renamed = _rename(tensors, _NUMBERED_SPELLING)
    # What is left are the convolutions after the body: their numbers skip activations and
    # resampling, and differ with the factor, but their order is always this.
    tail = sorted({int(n.split(".")[1]) for n in renamed if re.match(r"^model\.\d+\.", n)})
    if len(tail) < 2:
        return tensors
    ups = [f"conv_up{n + 1}" for n in range(len(tail) - 2)]
    new = dict(zip(tail, [*ups, "conv_hr", "conv_last"], strict=True))
    return _rename(renamed, [(rf"^model\.{number}\.", f"{new[number]}.") for number in tail])


def _rename(tensors: Tensors, rules: Iterable[tuple[str, str]]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed


def _count(tensors: Tensors, pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})
