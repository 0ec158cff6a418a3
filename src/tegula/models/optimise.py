"""How a loaded bundle is run on its device: threads, layouts, windows at a time, and by what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tegula.errors import OptionError
from tegula.models import BACKENDS
from tegula.models.bundle import (
    Bundle,
    ControlImage,
    ControlScale,
    TileableAutoencoder,
    WindowBatch,
)
from tegula.models.compiled import CompilableDenoiser, compile_bundle
from tegula.models.device import (
    fastest_layout,
    free_memory,
    lay_out,
    processor_choice,
    seconds_on_gpu,
    windows_that_fit,
)

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
