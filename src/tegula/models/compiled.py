"""How a loaded bundle is run: as it is, compiled by torch, or converted to OpenVINO.

Compiled networks see batches of a few static sizes only, since they are compiled again for
every new shape.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tegula.errors import OptionError
from tegula.folders import cache_folder
from tegula.models import BACKENDS
from tegula.models.bundle import (
    Bundle,
    ControlImage,
    ControlScale,
    Denoiser,
    Features,
    SplitDenoiser,
    TileableAutoencoder,
    WindowBatch,
)
from tegula.models.device import (
    fastest_layout,
    free_memory,
    lay_out,
    processor_choice,
    seconds_on_gpu,
    windows_that_fit,
)
from tegula.models.retry import WINDOW_DOES_NOT_FIT, until_it_fits

_LOG = logging.getLogger(__name__)

# Batches of static sizes.
#
# However many windows come, they are cut into runs of a few static sizes, and the last
# run is filled up with copies of its last window, whose results are thrown away. Windows of
# more than a few shapes are left to the plain denoiser.

MOST_SHAPES = 3
"""Shapes of windows and texts that are compiled for."""
MOST_SIZES = 4
"""Numbers of rows that are compiled for: guided and unguided steps of two pictures."""
MOST_FILLED_UP = 1 / 8
"""Of a batch; one that would be filled up by more is compiled for itself."""


@dataclass(frozen=True)
class StaticRun:
    """``count`` rows from ``first`` on, computed as ``size`` rows."""

    first: int
    count: int
    size: int


def static_runs(count: int, sizes: Sequence[int]) -> list[StaticRun]:
    """Cut rows into runs of static sizes: as few rows computed as possible, then as few runs.

    Args:
        count: rows, at least 1.
        sizes: the static sizes, each at least 1.
    """
    runs, first = [], 0
    for size in _best_sizes(count, tuple(sizes)):
        runs.append(StaticRun(first, min(size, count - first), size))
        first += size
    return runs


@cache
def _best_sizes(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the runs for a number of rows, in order.

    The largest size is always a good choice at first. Of the last rows, where a smaller one
    may waste less, dynamic programming finds the best: whichever size the next run has, the
    best runs for the rows that it leaves are known by then.
    """
    largest = max(sizes)
    whole_runs = max(0, -(-count // largest) - 4)
    best: list[tuple[int, ...]] = [()]  # by the number of rows that are left
    for left in range(1, count - whole_runs * largest + 1):
        options = [(size, *best[max(0, left - size)]) for size in sizes]
        best.append(min(options, key=lambda runs: (sum(runs), len(runs))))
    return (largest,) * whole_runs + best[-1]


class StaticDenoiser:
    """A denoiser whose networks only ever see batches of static sizes.

    Args:
        denoiser: computes the batches.
        plain: the same, for any batch: it takes windows of further shapes.
        sizes: rows of a batch, the largest first; what does not fit into memory is dropped.
        grows_to: with so many sizes none is added. Below it the rows of a batch become a size
            of their own where the sizes that are there would waste too much.
    """

    def __init__(
        self, denoiser: Denoiser, plain: Denoiser, sizes: Sequence[int] = (), *, grows_to: int = 0
    ) -> None:
        self._denoiser = denoiser
        self._plain = plain
        self.sizes = tuple(sizes)
        self._grows_to = grows_to
        self._most_rows: int | None = None  # once memory ran out
        self._shapes: set[object] = set()
        self._lock = threading.Lock()

    def embed_control(self, control: ControlImage) -> Tensor:
        """Embed the control windows as they come."""
        return self._denoiser.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction, computed in runs of static sizes."""
        batch = replace(batch, timestep=batch.timesteps())
        if not self._is_static(batch):
            return self._plain(batch)
        sizes = self._sizes_for(len(batch.latents))
        prediction, fitting = until_it_fits(
            partial(self._predict, batch), sizes, _smaller_sizes, WINDOW_DOES_NOT_FIT
        )
        if fitting != sizes:
            with self._lock:
                self.sizes, self._most_rows = fitting, fitting[0]
        return prediction

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the plain denoiser in another precision, which takes any batch."""
        return self._plain.to_dtype(dtype)

    def _is_static(self, batch: WindowBatch) -> bool:
        """Tell whether windows and texts are of the first few shapes that came."""
        shape = (batch.latents.shape[1:], batch.text.shape[1:])
        with self._lock:
            if len(self._shapes) < MOST_SHAPES:
                self._shapes.add(shape)
            return shape in self._shapes

    def _sizes_for(self, rows: int) -> tuple[int, ...]:
        """Return the static sizes, with one for these rows where there is room for it."""
        with self._lock:
            own = rows if self._most_rows is None else min(rows, self._most_rows)
            if len(self.sizes) < self._grows_to and self._wastes(own):
                self.sizes = tuple(sorted({*self.sizes, own}, reverse=True))
            return self.sizes

    def _wastes(self, rows: int) -> bool:
        if not self.sizes:
            return True
        computed = sum(run.size for run in static_runs(rows, self.sizes))
        return computed - rows > MOST_FILLED_UP * rows or rows > self.sizes[0]

    def _predict(self, batch: WindowBatch, sizes: Sequence[int]) -> Tensor:
        # In guess mode the first half of the rows is without control, and the second half the
        # same windows with it: every run takes rows of both, so that its halves are alike.
        halves = 2 if batch.controlled.start else 1
        windows = len(batch.latents) // halves
        runs = static_runs(windows, [n // halves for n in sizes if n % halves == 0] or [1])
        predictions: list[list[Tensor]] = [[] for _ in range(halves)]
        for run in runs:
            picked = torch.arange(run.first, run.first + run.size).clamp_max(windows - 1)
            rows = torch.cat([picked + half * windows for half in range(halves)])
            result = self._denoiser(_select(batch, rows, halves))
            for half, prediction in zip(predictions, result.chunk(halves), strict=True):
                # A copy: what is compiled may answer in memory that the next run overwrites.
                half.append(prediction[: run.count].clone())
        return torch.cat([prediction for half in predictions for prediction in half])


class StaticSplitDenoiser(StaticDenoiser):
    """A static denoiser in two halves, which take any batch and are not compiled."""

    def __init__(
        self,
        denoiser: Denoiser,
        plain: SplitDenoiser,
        sizes: Sequence[int] = (),
        *,
        grows_to: int = 0,
    ) -> None:
        super().__init__(denoiser, plain, sizes, grows_to=grows_to)
        self._halves = plain

    def encode(self, batch: WindowBatch) -> Features:
        """Run the first half."""
        return self._halves.encode(batch)

    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the second half."""
        return self._halves.decode(features, timestep, text)


def _smaller_sizes(sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return static sizes without the largest, for what did not fit into memory."""
    return sizes[1:] or ((sizes[0] // 2,) if sizes[0] > 1 else None)


def _select(batch: WindowBatch, rows: Tensor, halves: int) -> WindowBatch:
    rows = rows.to(batch.latents.device)
    return WindowBatch(
        batch.latents[rows],
        batch.timestep[rows],
        batch.text[rows],
        batch.control[rows],
        batch.control_scale,
        slice(len(rows) // 2 if halves == 2 else 0, len(rows)),
    )


# Compiling by torch.
#
# ControlNet, the spreading of its residuals and UNet are one compiled function. Were they two,
# replayed as CUDA graphs, the second would overwrite the memory in which the first left the
# residuals for it. Graphs save the time to start kernels, which full networks hide anyway, so
# torch's default mode is used, without them: it is right by construction, and reached 379
# TFLOP/s on a card where the same batch ran at 236 without compiling. What was compiled is kept
# in the cache folder, where torch writes it, and found again by the next process.

COMPILER = "inductor"
"""torch's name of the backend that compiles."""
_INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_MOST_GRAPHS = 128
"""Graphs of one piece of code that torch keeps: shapes times sizes times bundles."""
_COMPILERS = ("g++", "clang++", "c++")
_FAILURES = ("torch._inductor", "torch._dynamo", "triton")


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


class CompiledDenoiser:
    """A denoiser that torch compiles, for each shape that comes.

    Where the compiler fails, which is said once, it goes on without.
    """

    def __init__(self, denoiser: CompilableDenoiser) -> None:
        self._plain = denoiser
        self._compiled: dict[ControlKind, Callable[..., Tensor]] = {}
        self._failed = False

    def embed_control(self, control: ControlImage) -> Tensor:
        """Embed the control windows."""
        return self._plain.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction."""
        if self._failed:
            return self._plain(batch)
        kind, scale = ControlKind.of(batch), batch.control_scale
        if kind not in self._compiled:
            self._compiled[kind] = _compile(Evaluation(self._plain, kind))
        number = torch.tensor(0.0 if scale is None else scale.scale, device=batch.latents.device)
        try:
            return self._compiled[kind](
                batch.latents, batch.timestep, batch.text, batch.control, number
            )
        except Exception as error:
            if not type(error).__module__.startswith(_FAILURES):
                raise
            _LOG.warning("torch could not compile the model, which runs without: %s", error)
            self._failed = True
        return self._plain(batch)

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the plain denoiser in another precision."""
        return self._plain.to_dtype(dtype)


def compile_bundle(bundle: Bundle) -> Bundle:
    """Return a bundle whose denoiser is compiled as it runs, for the batches that come.

    The first picture of a full Stable Diffusion waits a minute for it, those of later
    processes for seconds. mini stays as it is: compiled it was no faster on a card and on a
    processor, and took 20 seconds more.

    Raises:
        OptionError: the networks cannot be compiled, or this machine has no compiler.
    """
    denoiser = bundle.denoiser
    if bundle.facts.family == "mini":
        return bundle
    if not isinstance(denoiser, CompilableDenoiser):
        raise OptionError(f"The networks of {bundle.facts.name} cannot be compiled.")
    _check_compiler(bundle.device)
    os.environ.setdefault(_INDUCTOR_FOLDER, str(cache_folder() / "inductor"))
    _raise_graph_limit()
    _try_compiler(bundle.device)
    compiled = CompiledDenoiser(denoiser)
    static: StaticDenoiser = (
        StaticSplitDenoiser(compiled, denoiser, grows_to=MOST_SIZES)
        if isinstance(denoiser, SplitDenoiser)
        else StaticDenoiser(compiled, denoiser, grows_to=MOST_SIZES)
    )
    return replace(bundle, denoiser=static)


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(
        function, backend=COMPILER, fullgraph=True, dynamic=False
    )
    return compiled


def _try_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that a compiler that fails is found out at once."""
    try:
        _compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:
        if type(error).__module__.startswith(_FAILURES):
            raise OptionError(
                "torch could not compile anything here: a C++ compiler and the headers of Python "
                "are needed; leave compile out to go without."
            ) from error
        raise


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise OptionError("compile needs triton on a GPU: pip install triton, or leave it out.")
    wanted = os.environ.get("CXX", "")
    if device.type == "cpu" and not any(map(shutil.which, (*_COMPILERS, *wanted.split()[:1]))):
        raise OptionError("compile needs a C++ compiler such as g++; install one or leave it out.")


def _raise_graph_limit() -> None:
    """Raise torch's limit, since it counts the graphs of all networks together."""
    import torch._dynamo as dynamo

    config: Any = dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(_MOST_GRAPHS, getattr(config, name)))


# Choosing how a bundle runs on its device.

CPU_WINDOW_BATCH = 4
GPU_WINDOW_BATCH = 16
"""Where the free memory is unknown."""


def optimise_bundle(bundle: Bundle, backend: str, *, compiled: bool) -> Bundle:
    """Return a bundle that runs as fast as its device lets it, on a backend.

    On a processor threads and memory layout are set; on CUDA it is measured which layout is
    faster and what a window takes of the memory.

    Args:
        bundle: as it was loaded; its networks may be changed.
        backend: one of ``BACKENDS``.
        compiled: let torch compile the denoiser.

    Raises:
        OptionError: no such backend, or it does not go with the device or with compiling.
        MissingExtraError: OpenVINO is not installed.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend is one of {', '.join(BACKENDS)}, not {backend!r}.")
    if backend == "openvino":
        if compiled or bundle.device.type != "cpu":
            raise OptionError("The backend openvino runs on the CPU and is not compiled by torch.")
        from tegula.models.openvino import convert_bundle

        return convert_bundle(bundle)
    if bundle.device.type == "cuda":
        with torch.inference_mode():
            _set_layout_on_gpu(bundle, partial(seconds_on_gpu, device=bundle.device))
            bundle = replace(bundle, window_bytes=_window_bytes(bundle))
    elif bundle.device.type == "cpu":
        _set_up_processor(bundle)
    return compile_bundle(bundle) if compiled else bundle


def _set_up_processor(bundle: Bundle) -> None:
    """Set threads and layout; mini comes in the layout that was measured to be fastest for it."""
    choice = processor_choice(bundle.dtype)
    torch.set_num_threads(choice.threads)
    if bundle.facts.family != "mini":
        for network in (*_denoiser_networks(bundle), *_autoencoder_networks(bundle)):
            lay_out(network, channels_last=choice.channels_last)


def _set_layout_on_gpu(bundle: Bundle, seconds: Callable[[Callable[[], object]], float]) -> None:
    """Lay denoiser and autoencoder out as each runs fastest on one window."""
    batch, control = _one_window(bundle)
    latents = batch.latents[:1]
    card = torch.cuda.get_device_name(bundle.device) if torch.cuda.is_available() else ""
    for networks, run in (
        (_denoiser_networks(bundle), partial(bundle.denoiser, batch)),
        (_autoencoder_networks(bundle), partial(bundle.autoencoder.decode, latents, control)),
    ):
        if networks:
            fastest_layout((card, bundle.dtype, bundle.facts.window), networks, run, seconds)


def _denoiser_networks(bundle: Bundle) -> list[nn.Module]:
    denoiser = bundle.denoiser
    return [*denoiser.networks] if isinstance(denoiser, CompilableDenoiser) else []


def _autoencoder_networks(bundle: Bundle) -> list[nn.Module]:
    autoencoder = bundle.autoencoder
    if not isinstance(autoencoder, TileableAutoencoder):
        return []
    return [autoencoder.encoder, autoencoder.decoder]


def _one_window(bundle: Bundle) -> tuple[WindowBatch, ControlImage]:
    """Return a black window of the default side with both rows of guidance."""
    facts, device, rows = bundle.facts, bundle.device, 2
    pixels = torch.zeros(1, 3, facts.window, facts.window, device=device)
    picture = ControlImage(pixels, pixels)
    control = bundle.denoiser.embed_control(picture)
    text = bundle.text.encode([""])
    side = facts.window // facts.latent_factor
    latents = torch.zeros(rows, facts.latent_channels, side, side, device=device)
    batch = WindowBatch(
        latents,
        torch.tensor(500.0),
        text.expand(rows, *text.shape[1:]),
        control.expand(rows, *control.shape[1:]),
        ControlScale(1.0),
        slice(0, rows),
    )
    return batch, picture


def _window_bytes(bundle: Bundle) -> int:
    """Return what a window takes in a guided forward pass."""
    batch, _ = _one_window(bundle)
    torch.cuda.reset_peak_memory_stats(bundle.device)
    before = torch.cuda.memory_allocated(bundle.device)
    bundle.denoiser(batch)
    return torch.cuda.max_memory_allocated(bundle.device) - before


def default_window_batch(bundle: Bundle, window: int | None = None) -> int:
    """Return how many windows go into one forward pass by default.

    Args:
        bundle: on CUDA, its ``window_bytes`` and the free memory decide.
        window: side in image pixels; None means the default one.
    """
    if bundle.device.type != "cuda":
        return CPU_WINDOW_BATCH
    free = free_memory(bundle.device)
    if free is None or bundle.window_bytes is None:
        return GPU_WINDOW_BATCH
    area = ((window or bundle.facts.window) / bundle.facts.window) ** 2
    return windows_that_fit(free, int(bundle.window_bytes * area))
