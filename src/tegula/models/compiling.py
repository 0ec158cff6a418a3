"""Bundles whose networks are compiled by torch, each for a few static shapes.

On CUDA the compiled networks are replayed as CUDA graphs, so that starting their kernels
costs nothing. UNet and ControlNet are compiled apart: each is one graph without breaks,
and what the ControlNet hands to the UNet stays on the device. What was compiled is kept
in the cache folder and found again by the next process.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from tegula.errors import OptionError
from tegula.models.bundle import Bundle, ControlImage, ControlScale, Denoiser, WindowBatch
from tegula.models.places import cache_folder
from tegula.models.quick_diffusers import uncompiled
from tegula.models.static import made_static

_INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_CUDA_MODE = "reduce-overhead"
_MOST_GRAPHS = 128
"""Graphs of one piece of code that torch keeps: shapes times sizes times networks."""
_COMPILERS = ("g++", "clang++", "c++")
_FAILURES = ("torch._inductor", "torch._dynamo", "triton")


@runtime_checkable
class CompilableDenoiser(Denoiser, Protocol):
    """A denoiser that says what it runs."""

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
    os.environ.setdefault(_INDUCTOR_FOLDER, str(cache_folder() / "inductor"))
    _allow_graphs()
    mode = _CUDA_MODE if bundle.device.type == "cuda" else None
    denoiser = bundle.denoiser
    if not isinstance(denoiser, CompilableDenoiser):
        raise OptionError(f"The networks of {bundle.facts.name} cannot be compiled.")
    for network in denoiser.networks:
        network.compile(fullgraph=True, dynamic=False, mode=mode)
    compiled = replace(bundle, denoiser=made_static(denoiser, sizes, uncompiled))
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
    """Run the denoiser once at every batch size, on default windows of nothing."""
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


def _allow_graphs() -> None:
    """Raise torch's limit, which counts the graphs of all networks together."""
    import torch._dynamo as dynamo

    config: Any = dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(_MOST_GRAPHS, getattr(config, name)))
