"""The networks that judge, what training saw of them, and the distances that they give.

A network that a loss was made of must not be what decides: what was trained on its features has
learnt what it overlooks. So every judge has a family, and every method says which networks its
training looked through; the tables set one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.quality.features import (
    EarlyFeatures,
    MobileNetV2Features,
    Vgg16Features,
    read_dists_weights,
)
from bench.quality.recipes import Picture

_DISTS_STABILITY = 1e-6


@dataclass(frozen=True)
class JudgeFacts:
    """A network that judges.

    title: as tables name it. family: relatives share it; their features are alike. load: reads
    it; images in 0..1 become feature maps, fine to coarse. statistics: how many of the maps,
    the finest first, the Fréchet distance takes; those left out have too few positions.
    """

    title: str
    family: str
    load: Callable[[], nn.Module]
    statistics: int


JUDGES: Mapping[str, JudgeFacts] = {
    "vgg16": JudgeFacts("VGG16", "VGG", Vgg16Features, statistics=4),
    "mobilenet": JudgeFacts("MobileNetV2", "MobileNet", MobileNetV2Features, statistics=4),
    "lite0": JudgeFacts(
        "EfficientNet-lite0", "EfficientNet", lambda: EarlyFeatures("lite0", stages=3), statistics=4
    ),
}

# The networks whose features were in the losses of each net, with their families.
# Real-ESRGAN: Wang et al. (2021), "conv1 to conv5 of a pretrained VGG19".
TRAINING_SAW: Mapping[str, Mapping[str, str]] = {
    "realesrgan-x4plus": {"VGG19": "VGG"},
    "realesrgan-x4plus-anime": {"VGG19": "VGG"},
    "realesrgan-animevideov3": {"VGG19": "VGG"},
    "tegula-photo": {"EfficientNet-lite1": "EfficientNet"},
    "tegula-swift": {"EfficientNet-lite1": "EfficientNet"},
    "tegula-swift-jpeg": {"EfficientNet-lite1": "EfficientNet"},
    "tegula-line": {"EfficientNet-lite1": "EfficientNet"},
    "mini": {"EfficientNet-lite1": "EfficientNet"},
}


def relatives(judge: str, nets: Sequence[str]) -> list[str]:
    """Return the networks of the judge's family that the training of ``nets`` saw."""
    family = JUDGES[judge].family
    seen = {
        name for net in nets for name, kind in TRAINING_SAW.get(net, {}).items() if kind == family
    }
    return sorted(seen)


class Judge:
    """A network with its facts; ``load_judge`` makes one."""

    def __init__(self, name: str, network: nn.Module, dtype: torch.dtype) -> None:
        """Take one of ``JUDGES``, its network, and what it computes in."""
        self.name = name
        self.facts = JUDGES[name]
        self.network = network
        self.dtype = dtype

    def look(self, picture: Picture) -> list[Tensor]:
        """Return the feature maps [1, c, h, w], float32, of a picture [h, w, 3], sRGB in 0..1."""
        device = next(self.network.parameters()).device
        lower = self.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(device.type, self.dtype, enabled=lower):
            return [found.float() for found in self.network(_image(picture).to(device))]

    def statistical(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps that a Fréchet distance takes."""
        return list(maps[: self.facts.statistics])


def load_judge(name: str, dtype: torch.dtype = torch.float32) -> Judge:
    """Read a judge's weights.

    dtype: bfloat16 takes a third of the time on a processor that has units for it, and moves
    distances by a thousandth of their value.

    Raises:
        SystemExit: the package that holds them is not installed.
    """
    return Judge(name, JUDGES[name].load(), dtype)


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the mean over the maps of the squared distance of unit features, place by place.

    That is LPIPS (Zhang et al., 2018) without its fitted weights for channels. Maps [1, c, h, w].
    """
    gaps = [float((_unit(x) - _unit(y)).square().sum(1).mean()) for x, y in zip(a, b, strict=True)]
    return sum(gaps) / len(gaps)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


class Dists:
    """DISTS (Ding et al., 2020): 0 for the same picture, about 0.2 to 0.4 for a bad copy.

    It sets the mean (texture) and the covariance (structure) of each channel over the whole
    picture side by side, so texture may lie elsewhere than in the truth.
    """

    def __init__(self) -> None:
        """Read the weights of the maps.

        Raises:
            SystemExit: the package that holds them is not installed.
        """
        self._alpha, self._beta = read_dists_weights()

    def __call__(
        self, picture: Picture, maps: Sequence[Tensor], truth: Picture, truth_maps: Sequence[Tensor]
    ) -> float:
        """Return the distance of a picture [h, w, 3] in 0..1; maps are the VGG16 judge's five."""
        likeness = 0.0
        ours = [_image(picture), *maps]
        theirs = [_image(truth), *truth_maps]
        pairs = zip(ours, theirs, self._alpha, self._beta, strict=True)
        for x, y, alpha, beta in pairs:
            texture, structure = dists_terms(x, y.to(x.device))
            likeness += alpha * float(texture) + beta * float(structure)
        return 1 - likeness


def _image(picture: Picture) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]


def dists_terms(x: Tensor, y: Tensor, stability: float = _DISTS_STABILITY) -> tuple[Tensor, Tensor]:
    """Return DISTS's likeness of texture and of structure, [n] each, of maps [n, c, h, w].

    Both are means over the channels and at most 1. stability: keeps channels that hold next to
    nothing from counting as unlike.
    """
    x, y = x.flatten(2), y.flatten(2)
    mean_x, mean_y = x.mean(2), y.mean(2)
    c = stability
    texture = (2 * mean_x * mean_y + c) / (mean_x.square() + mean_y.square() + c)
    x, y = x - mean_x[..., None], y - mean_y[..., None]
    spread = x.square().mean(2) + y.square().mean(2)
    structure = (2 * (x * y).mean(2) + c) / (spread + c)
    return texture.mean(1), structure.mean(1)
