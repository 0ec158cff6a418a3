"""How a loaded bundle is run: as it is, compiled by torch, or converted to OpenVINO.

Compiled networks see batches of a few static sizes only, since they are compiled again for
every new shape.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
from tegula.models.compiler import uncompiled
from tegula.models.device import (
    free_memory,
    lay_out,
    processor_choice,
    windows_that_fit,
)
from tegula.models.retry import WINDOW_DOES_NOT_FIT, until_it_fits

# Batches of static sizes.
#
# However many windows come, they are cut into runs of one to three static sizes, and the last
# run is filled up with copies of its last window, whose results are thrown away. Windows of
# more than a few shapes run without being compiled.

MOST_SHAPES = 3
"""Shapes of windows and texts that are compiled for."""

Bypass = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StaticRun:
    """``count`` rows from ``first`` on, computed as ``size`` rows."""

    first: int
    count: int
    size: int


def static_sizes(window_batch: int) -> tuple[int, ...]:
    """Return the batch sizes for a window batch, the largest first.

    Guidance doubles the rows of a batch, so the largest is twice the window batch; the
    smallest keeps what is filled up below a quarter of a window batch.
    """
    sizes = {2 * window_batch, window_batch, max(1, window_batch // 4)}
    return tuple(sorted(sizes, reverse=True))


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
        sizes: rows of a batch, the largest first; what does not fit into memory is dropped.
        bypass: a context in which the denoiser runs without being compiled, for windows
            of further shapes.
    """

    def __init__(
        self, denoiser: Denoiser, sizes: Sequence[int], bypass: Bypass = contextlib.nullcontext
    ) -> None:
        self._denoiser = denoiser
        self.sizes = tuple(sizes)
        self._bypass = bypass
        self._shapes: set[object] = set()
        self._lock = threading.Lock()

    def embed_control(self, control: ControlImage) -> Tensor:
        """Embed the control windows as they come."""
        return self._denoiser.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction, computed in runs of static sizes."""
        batch = replace(batch, timestep=batch.timesteps())
        if not self._is_static(batch):
            with self._bypass():
                return self._denoiser(batch)
        predict = partial(self._predict, batch)
        prediction, self.sizes = until_it_fits(
            predict, self.sizes, _smaller_sizes, WINDOW_DOES_NOT_FIT
        )
        return prediction

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the plain denoiser in another precision, which takes any batch."""
        return self._denoiser.to_dtype(dtype)

    def _is_static(self, batch: WindowBatch) -> bool:
        """Tell whether windows and texts are of the first few shapes that came."""
        shape = (batch.latents.shape[1:], batch.text.shape[1:])
        with self._lock:
            if len(self._shapes) < MOST_SHAPES:
                self._shapes.add(shape)
            return shape in self._shapes

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
                # A copy: the result lies in memory of the CUDA graph, which overwrites it.
                half.append(prediction[: run.count].clone())
        return torch.cat([prediction for half in predictions for prediction in half])


class StaticSplitDenoiser(StaticDenoiser):
    """A static denoiser in two halves, which take any batch and are not compiled."""

    def __init__(
        self, denoiser: SplitDenoiser, sizes: Sequence[int], bypass: Bypass = contextlib.nullcontext
    ) -> None:
        super().__init__(denoiser, sizes, bypass)
        self._halves = denoiser

    def encode(self, batch: WindowBatch) -> Features:
        """Run the first half."""
        with self._bypass():
            return self._halves.encode(batch)

    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the second half."""
        with self._bypass():
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
# On CUDA the compiled networks are replayed as CUDA graphs, so that starting their kernels
# costs nothing. UNet and ControlNet are compiled apart: each is one graph without breaks,
# and what the ControlNet hands to the UNet stays on the device. What was compiled is kept
# in the cache folder, where torch writes it, and found again by the next process.

_INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_CUDA_MODE = "reduce-overhead"
_MOST_GRAPHS = 128
"""Graphs of one piece of code that torch keeps: shapes times sizes times networks."""
_COMPILERS = ("g++", "clang++", "c++")
_FAILURES = ("torch._inductor", "torch._dynamo", "triton")


@runtime_checkable
class CompilableDenoiser(Denoiser, Protocol):
    """A denoiser whose networks can be compiled or converted."""

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks that every step runs, each compiled for itself."""
        ...


def compile_bundle(bundle: Bundle, sizes: Sequence[int]) -> Bundle:
    """Compile the networks of a bundle's denoiser in place and run each size once.

    The first time takes minutes for a full Stable Diffusion, later ones seconds.

    Args:
        bundle: its networks are changed: they are compiled when they are called.
        sizes: rows of a batch, as ``static_sizes`` gives them.

    Returns:
        The bundle with a denoiser that computes in batches of static sizes.

    Raises:
        OptionError: this machine has no compiler, or it failed.
    """
    _check_compiler(bundle.device)
    denoiser = bundle.denoiser
    if not isinstance(denoiser, CompilableDenoiser):
        raise OptionError(f"The networks of {bundle.facts.name} cannot be compiled.")
    os.environ.setdefault(_INDUCTOR_FOLDER, str(cache_folder() / "inductor"))
    _raise_graph_limit()
    mode = _CUDA_MODE if bundle.device.type == "cuda" else None
    for network in denoiser.networks:
        network.compile(fullgraph=True, dynamic=False, mode=mode)
    static: StaticDenoiser = (
        StaticSplitDenoiser(denoiser, sizes, uncompiled)
        if isinstance(denoiser, SplitDenoiser)
        else StaticDenoiser(denoiser, sizes, uncompiled)
    )
    compiled = replace(bundle, denoiser=static)
    try:
        warm_up(compiled, sizes)
    except Exception as error:
        if type(error).__module__.startswith(_FAILURES):
            raise OptionError(
                "torch could not compile the model: a C++ compiler and the headers of Python "
                "are needed; leave compile out to go without."
            ) from error
        raise
    return compiled


@torch.inference_mode()
def warm_up(bundle: Bundle, sizes: Sequence[int]) -> None:
    """Run the denoiser once at every batch size, on black windows of the default side."""
    facts, device = bundle.facts, bundle.device
    pixels = torch.zeros(1, 3, facts.window, facts.window, device=device)
    control = bundle.denoiser.embed_control(ControlImage(pixels, pixels))
    text = bundle.text.encode([""])
    side = facts.window // facts.latent_factor
    for size in sizes:
        latents = torch.zeros(size, facts.latent_channels, side, side, device=device)
        batch = WindowBatch(
            latents,
            torch.tensor(500.0),
            text.expand(size, *text.shape[1:]),
            control.expand(size, *control.shape[1:]),
            ControlScale(1.0),
            slice(0, size),
        )
        bundle.denoiser(batch)


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

    On a processor threads and memory layout are set; on CUDA it is measured what a window
    takes of the memory.

    Args:
        bundle: as it was loaded; its networks may be changed.
        backend: one of ``BACKENDS``.
        compiled: compile the networks and warm them up.

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
    _set_layout(bundle)
    if bundle.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bundle.device)
        before = torch.cuda.memory_allocated(bundle.device)
        warm_up(bundle, (2,))  # one window with both rows of guidance
        peak = torch.cuda.max_memory_allocated(bundle.device)
        bundle = replace(bundle, window_bytes=peak - before)
    if not compiled:
        return bundle
    return compile_bundle(bundle, static_sizes(default_window_batch(bundle)))


def _set_layout(bundle: Bundle) -> None:
    """Set threads and layout on a processor; on a GPU, channels last is fastest.

    mini comes in the layout that was measured to be fastest for it.
    """
    channels_last = bundle.device.type == "cuda"
    if bundle.device.type == "cpu":
        choice = processor_choice(bundle.dtype)
        torch.set_num_threads(choice.threads)
        channels_last = choice.channels_last
    if bundle.facts.family == "mini" or not isinstance(bundle.denoiser, CompilableDenoiser):
        return
    networks = [*bundle.denoiser.networks]
    if isinstance(bundle.autoencoder, TileableAutoencoder):
        networks += [bundle.autoencoder.encoder, bundle.autoencoder.decoder]
    for network in networks:
        lay_out(network, channels_last=channels_last)


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
