"""Networks that torch compiled.

They see batches of a few static sizes only (``static_batches.py``).

ControlNet, the spreading of its residuals and UNet are one compiled function. Were they two,
replayed as CUDA graphs, the second would overwrite the memory in which the first left the
residuals for it. Graphs save the time to start kernels, which full networks hide anyway, so
torch's default mode is used, without them: it is right by construction, and reached 379
TFLOP/s on a card where the same batch ran at 236 without compiling. What was compiled is kept
in the cache folder, where torch writes it, and found again by the next process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tegula.errors import OptionError
from tegula.folders import cache_folder
from tegula.models.bundle import (
    Autoencoder,
    Bundle,
    ControlImage,
    ControlScale,
    Denoiser,
    SplitDenoiser,
    TileableAutoencoder,
    WindowBatch,
)
from tegula.models.device import (
    constant,
    with_shared_weights,
)
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.networks import (
    ResidualDenseBlock,
    RRDBNet,
    SRVGGNetCompact,
    in_strips,
)
from tegula.models.static_batches import MOST_SIZES, StaticDenoiser, StaticSplitDenoiser

_LOG = logging.getLogger(__name__)

COMPILER = "inductor"
"""torch's name of the backend that compiles."""
_INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_MOST_GRAPHS = 128
"""Graphs of one piece of code that torch keeps: shapes times sizes times bundles."""
_COMPILERS = ("g++", "clang++", "c++")
_FAILURES = ("torch._inductor", "torch._dynamo", "triton")
BLOCKS_ALONE = False
"""The one function is what was measured on a card."""
_REPEATED_BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")
"""Classes of diffusers that UNet and ControlNet consist of."""


@runtime_checkable
class CompilableDenoiser(Denoiser, Protocol):
    """A denoiser of networks that can be laid out in memory, compiled and converted."""

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks that every step runs."""
        ...


@dataclass(frozen=True)
class ControlKind:
    """How the control path takes part in a batch: what a compiler makes part of its code.

    second_half: only the second half of the rows is controlled, as in guess mode.
    """

    has_control: bool
    guess_mode: bool
    second_half: bool

    @classmethod
    def of(cls, batch: WindowBatch) -> ControlKind:
        """Return the kind of a batch."""
        scale = batch.control_scale
        return cls(
            scale is not None, scale is not None and scale.guess_mode, bool(batch.controlled.start)
        )


class Evaluation(nn.Module):
    """One whole evaluation of a denoiser as a function of tensors, for compilers."""

    def __init__(self, denoiser: CompilableDenoiser, kind: ControlKind) -> None:
        super().__init__()
        self.networks = nn.ModuleList(denoiser.networks)
        self._denoiser = denoiser
        self._kind = kind

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, control: Tensor, scale: Tensor
    ) -> Tensor:
        """Return the prediction, shaped like ``latents``."""
        # The scale stays a tensor, so that what is compiled takes any number for it.
        number: Any = scale
        control_scale = (
            ControlScale(number, self._kind.guess_mode) if self._kind.has_control else None
        )
        rows = slice(len(latents) // 2 if self._kind.second_half else 0, len(latents))
        batch = WindowBatch(latents, timestep, text, control, control_scale, rows)
        return self._denoiser(batch)


class WholeEvaluation:
    """Compiles ControlNet, the spreading of its residuals and UNet as one function."""

    def __init__(self, denoiser: CompilableDenoiser) -> None:
        self._denoiser = denoiser
        self._compiled: dict[ControlKind, Callable[..., Tensor]] = {}

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction, from a function compiled for this kind and shape of batch."""
        kind, scale = ControlKind.of(batch), batch.control_scale
        if kind not in self._compiled:
            self._compiled[kind] = _compile(Evaluation(self._denoiser, kind))
        number = constant(0.0 if scale is None else scale.scale, batch.latents.device)
        return self._compiled[kind](
            batch.latents, batch.timestep, batch.text, batch.control, number
        )


def with_compiled_blocks(denoiser: CompilableDenoiser) -> CompilableDenoiser:
    """Return a denoiser of the same weights whose repeated blocks are compiled, and no more.

    Blocks that differ in their weights alone share one piece of compiled code. What is between
    them runs as it is, and the residuals of the ControlNet cross from one piece to another.
    """
    # Every weight is shared, so that a LoRA merged into one denoiser is in both.
    twin = with_shared_weights(denoiser, denoiser.networks)
    for network in twin.networks:
        for layer in network.modules():
            if type(layer).__name__ in _REPEATED_BLOCKS:
                layer.compile(backend=COMPILER, fullgraph=True, dynamic=False)
    return twin


@dataclass
class CompiledPart:
    """A part of a model that is compiled, until the compiler fails: that is logged once."""

    name: str
    failed: bool = False

    def run(self, compiled: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
        """Return what the compiled part answers, or the plain one where it cannot be compiled."""
        if self.failed:
            return plain()
        try:
            return compiled()
        except Exception as error:
            if not type(error).__module__.startswith(_FAILURES):
                raise
            _LOG.warning("torch could not compile %s, which runs uncompiled: %s", self.name, error)
            self.failed = True
        return plain()


class CompiledDenoiser:
    """A denoiser that torch compiles, for each shape that comes.

    Args:
        denoiser: runs what cannot be compiled.
        evaluate: the same, compiled: a ``WholeEvaluation`` or one ``with_compiled_blocks``.
    """

    def __init__(
        self, denoiser: CompilableDenoiser, evaluate: Callable[[WindowBatch], Tensor]
    ) -> None:
        self._plain = denoiser
        self._evaluate = evaluate
        self._part = CompiledPart("the model")

    def embed_control(self, control: ControlImage) -> Tensor:
        """Embed the control windows."""
        return self._plain.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction."""
        return self._part.run(lambda: self._evaluate(batch), lambda: self._plain(batch))

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the plain denoiser in another precision."""
        return self._plain.to_dtype(dtype)


class CompiledAutoencoder:
    """An autoencoder that torch compiles once, for canvases and tiles of every size."""

    def __init__(self, autoencoder: TileableAutoencoder, part: CompiledPart) -> None:
        self._plain = autoencoder
        self._part = part

    @property
    def encoder(self) -> nn.Module:
        """The network that makes moments, not compiled."""
        return self._plain.encoder

    @property
    def decoder(self) -> nn.Module:
        """The network that makes pictures, not compiled."""
        return self._plain.decoder

    def encode(
        self,
        image: Tensor,
        control: ControlImage,  # noqa: ARG002
        generator: torch.Generator,
    ) -> Tensor:
        """Return latents drawn from the posterior of an image."""
        return self.draw(self.encode_moments(image), generator)

    def encode_moments(self, image: Tensor) -> Tensor:
        """Return the moments of the posterior."""
        plain = self._plain
        return self._part.run(
            lambda: _compile_for_all_sizes(_moments)(plain, image),
            lambda: plain.encode_moments(image),
        )

    def draw(self, moments: Tensor, generator: torch.Generator) -> Tensor:
        """Return latents drawn from the posterior that the moments describe."""
        return self._plain.draw(moments, generator)

    def decode(self, latents: Tensor, control: ControlImage) -> Tensor:
        """Return the picture, not clamped."""
        plain = self._plain
        return self._part.run(
            lambda: _compile_for_all_sizes(_picture)(plain, latents),
            lambda: plain.decode(latents, control),
        )

    def with_norms(self, norms: Mapping[nn.Module, nn.Module]) -> CompiledAutoencoder:
        """Return the same with other layers in place of its norms, compiled too."""
        return CompiledAutoencoder(self._plain.with_norms(norms), self._part)

    def to_dtype(self, dtype: torch.dtype) -> Autoencoder:
        """Return the plain autoencoder in another precision."""
        return self._plain.to_dtype(dtype)


def _moments(autoencoder: TileableAutoencoder, image: Tensor) -> Tensor:
    return autoencoder.encode_moments(image)


def _picture(autoencoder: TileableAutoencoder, latents: Tensor) -> Tensor:
    # The control image has no part in it; that of a canvas would bring another size along.
    return autoencoder.decode(latents, ControlImage(latents, latents))


class CompiledLayers(nn.Module):
    """Layers of a prescaler as one compiled function, for tiles of every size.

    layers: the plain ones; in a tuple, where no hook on each layer of the network finds them.
    """

    def __init__(self, layers: nn.Module, part: CompiledPart) -> None:
        super().__init__()
        self.layers = (layers,)
        self._part = part

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels, height, width] as the layers do."""
        (layers,) = self.layers
        if isinstance(layers, ResidualDenseBlock):
            return in_strips(lambda strip: self._run(layers, strip), x)
        return self._run(layers, x)

    def _run(self, layers: nn.Module, x: Tensor) -> Tensor:
        return self._part.run(
            lambda: _compile_for_all_sizes(_through)(layers, x), lambda: _through(layers, x)
        )


def _through(layers: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layers.convolve(x) if isinstance(layers, ResidualDenseBlock) else layers(x)
    return result


def compile_prescaler(prescaler: Prescaler) -> Prescaler:
    """Return a prescaler whose blocks are compiled as they run; one of another kind as it is.

    All blocks of a network have the same layers, so that they share one piece of compiled code.
    """
    network, part = prescaler.network, CompiledPart(f"the prescaler {prescaler.facts.name}")
    smaller = prescaler.smaller and compile_prescaler(prescaler.smaller)
    placed: dict[nn.Module, nn.Module] = {}
    if isinstance(network, RRDBNet):
        blocks = (each for each in network.modules() if isinstance(each, ResidualDenseBlock))
        placed = {block: CompiledLayers(block, part) for block in blocks}
    elif isinstance(network, SRVGGNetCompact):
        first, *_, last = body = network.body
        placed = {body: nn.Sequential(first, CompiledLayers(body[1:-1], part), last)}
    if network is None or not placed:
        return replace(prescaler, smaller=smaller)
    compiled = with_shared_weights(network, [network], placed)
    return replace(prescaler, compiled=compiled, smaller=smaller)


def compile_bundle(bundle: Bundle, *, blocks: bool = BLOCKS_ALONE) -> Bundle:
    """Return a bundle whose nets are compiled as they run, and the prescalers beside them.

    The denoiser is compiled for the batches that come. The first picture of a full Stable
    Diffusion waits a minute for it, those of later processes for seconds. mini's own nets stay
    as they are: compiled they were no faster on a card and on a processor, and took 20 seconds
    more.

    Args:
        bundle: as it was loaded.
        blocks: compile the repeated blocks of the denoiser alone, in place of one function.

    Raises:
        OptionError: the networks cannot be compiled, or this machine has no compiler.
    """
    denoiser, autoencoder = bundle.denoiser, bundle.autoencoder
    is_mini = bundle.facts.family == "mini"
    if not is_mini and not isinstance(denoiser, CompilableDenoiser):
        raise OptionError(f"The networks of {bundle.facts.name} cannot be compiled.")
    lacking = what_compiling_lacks(bundle.device)
    if lacking is not None:
        raise OptionError(lacking)
    os.environ.setdefault(_INDUCTOR_FOLDER, str(cache_folder() / "inductor"))
    _set_up_compiler()
    _try_compiler(bundle.device)
    bundle = replace(bundle, compiles=True)
    if is_mini or not isinstance(denoiser, CompilableDenoiser):
        return bundle
    if isinstance(autoencoder, TileableAutoencoder):
        autoencoder = CompiledAutoencoder(autoencoder, CompiledPart("the autoencoder"))
    evaluate = with_compiled_blocks(denoiser) if blocks else WholeEvaluation(denoiser)
    compiled = CompiledDenoiser(denoiser, evaluate)
    static: StaticDenoiser = (
        StaticSplitDenoiser(compiled, denoiser, grows_to=MOST_SIZES)
        if isinstance(denoiser, SplitDenoiser)
        else StaticDenoiser(compiled, denoiser, grows_to=MOST_SIZES)
    )
    return replace(bundle, denoiser=static, autoencoder=autoencoder)


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(
        function, backend=COMPILER, fullgraph=True, dynamic=False
    )
    return compiled


def _compile_for_all_sizes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(
        function, backend=COMPILER, fullgraph=True, dynamic=True
    )
    return compiled


def _try_compiler(device: torch.device) -> None:
    """Compile a trivial function, so that a compiler that fails is reported while loading."""
    try:
        _compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:
        if type(error).__module__.startswith(_FAILURES):
            raise OptionError(
                "torch could not compile anything here: a C++ compiler and the headers of Python "
                "are needed; leave compile out to go without."
            ) from error
        raise


def what_compiling_lacks(device: torch.device) -> str | None:
    """Return a sentence on what must be installed before anything is compiled; None if nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "compile needs triton on a GPU: pip install triton, or leave it out."
    wanted = os.environ.get("CXX", "")
    if device.type == "cpu" and not any(map(shutil.which, (*_COMPILERS, *wanted.split()[:1]))):
        return "compile needs a C++ compiler such as g++; install one or leave it out."
    return None


def _set_up_compiler() -> None:
    """Raise torch's limit of graphs, which counts those of all networks, and free its sizes."""
    import torch._dynamo as dynamo
    import torch.fx.experimental._config as sizes

    config: Any = dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(_MOST_GRAPHS, getattr(config, name)))
    # Otherwise what is compiled for a square tile is compiled again for one that is not.
    sizes.use_duck_shape = False
