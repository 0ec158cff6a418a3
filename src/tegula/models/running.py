"""How a loaded bundle is run: as it is, compiled by torch, or converted to OpenVINO."""

from __future__ import annotations

from dataclasses import replace

import torch

from tegula.errors import OptionError
from tegula.models.bundle import Bundle, TileableAutoencoder
from tegula.models.compiling import CompilableDenoiser, compile_bundle, warm_up
from tegula.models.memory import free_memory, windows_that_fit
from tegula.models.processor import lay_out, processor_choice
from tegula.models.static import static_sizes

BACKENDS = ("torch", "openvino")
CPU_WINDOW_BATCH = 4
GPU_WINDOW_BATCH = 16


def made_ready(bundle: Bundle, backend: str, *, compiled: bool) -> Bundle:
    """Return a bundle that runs as wanted; on CUDA it knows what a window takes.

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
    _settle_layout(bundle)
    if bundle.device.type == "cuda":
        bundle = replace(bundle, window_bytes=_measured_window(bundle))
    return compile_bundle(bundle, static_sizes(usual_batch(bundle))) if compiled else bundle


def _settle_layout(bundle: Bundle) -> None:
    """Set threads and layout on a processor; on a GPU, channels last is what is fastest.

    mini brings the layout that it was measured to be fastest in.
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


def usual_batch(bundle: Bundle, window: int | None = None) -> int:
    """Return the windows of one forward pass where nobody asked for a number.

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


def _measured_window(bundle: Bundle) -> int:
    """Return the bytes that one window with both rows of guidance takes at most."""
    torch.cuda.reset_peak_memory_stats(bundle.device)
    before = torch.cuda.memory_allocated(bundle.device)
    warm_up(bundle, (2,))
    return torch.cuda.max_memory_allocated(bundle.device) - before
