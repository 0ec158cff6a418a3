"""Refine, canvas mode: Stable Diffusion with the tile ControlNet over one canvas."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.diffusion import tiled_autoencoder
from tegula.diffusion.canvas import CanvasSampler, Conditioning
from tegula.diffusion.guidance import Guidance, Interval
from tegula.diffusion.prediction import HalvingBatch, SafeDenoiser
from tegula.diffusion.schedulers import make_schedule
from tegula.errors import OptionError
from tegula.models.bundle import Bundle, BundleFacts, ControlImage, ControlScale
from tegula.options import ResolvedOptions
from tegula.progress import Cancelled, OnUnit, ignore_units, never_cancelled
from tegula.tiling.canvas import CanvasSize, fit_canvas, pad_to_canvas
from tegula.tiling.windows import WindowGrid, grid_windows

CPU_WINDOW_BATCH = 4
GPU_WINDOW_BATCH = 16


@torch.inference_mode()
def refine_canvas(
    bundle: Bundle,
    prescaled: NDArray[np.float32],
    source: NDArray[np.float32],
    options: ResolvedOptions,
    on_unit: OnUnit = ignore_units,
    cancelled: Cancelled = never_cancelled,
) -> NDArray[np.float32]:
    """Add detail to a prescaled picture by tiled diffusion.

    Args:
        bundle: the diffusion model.
        prescaled: [height, width, 3] in 0..1; init image and control image.
        source: the source enlarged by Lanczos to the same size.
        options: creativity must be above 0.
        on_unit: told (windows done, windows in all steps).
        cancelled: asked between batches and autoencoder tiles.

    Returns:
        A picture shaped like ``prescaled``, in 0..1.

    Raises:
        OptionError: the window does not fit the model.
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    height, width = prescaled.shape[:2]
    canvas = canvas_for(bundle.facts, width, height, options.window)
    grid = latent_grid(bundle.facts, canvas, options.overlap)
    generator = torch.Generator("cpu").manual_seed(options.seed)
    control = ControlImage(
        _tensor(pad_to_canvas(prescaled, canvas), bundle),
        _tensor(pad_to_canvas(source, canvas), bundle),
    )
    batch = HalvingBatch(options.window_batch or _window_batch(bundle.device))
    initial = tiled_autoencoder.encode(
        bundle, control.prescaled, control, generator, cancelled=cancelled
    )
    noise = torch.randn(initial.shape, generator=generator).to(bundle.device)
    schedule = make_schedule(options.scheduler, bundle.scheduler, options.steps, options.creativity)
    sampler = CanvasSampler(
        SafeDenoiser(bundle.denoiser, bundle.dtype),
        grid,
        _conditioning(bundle, control, grid, options, batch),
        guidance_of(options),
        batch,
    )
    start = schedule.add_noise(initial, noise)
    latents = sampler.sample(start, schedule, generator, on_unit, cancelled)
    refined = tiled_autoencoder.decode(bundle, latents, control, cancelled=cancelled)
    return _array(refined[..., :height, :width])


def canvas_for(facts: BundleFacts, width: int, height: int, window: int) -> CanvasSize:
    """Return canvas and window sides in pixels for a result of this size.

    Raises:
        OptionError: the window is too small for the model or no multiple of its step.
    """
    multiple = facts.window_multiple
    if window < facts.minimum_window or window % multiple:
        raise OptionError(
            f"A window of {window} px does not fit {facts.name}; it takes multiples of "
            f"{multiple} px from {facts.minimum_window} px up."
        )
    return fit_canvas(
        width,
        height,
        window,
        minimum_window=facts.minimum_window,
        window_multiple=multiple,
        factor=facts.latent_factor,
    )


def latent_grid(facts: BundleFacts, canvas: CanvasSize, overlap: float) -> WindowGrid:
    """Return the windows of a canvas in latent pixels."""
    factor = facts.latent_factor
    return grid_windows(
        canvas.width // factor,
        canvas.height // factor,
        canvas.window_width // factor,
        canvas.window_height // factor,
        overlap,
    )


def guidance_of(options: ResolvedOptions) -> Guidance:
    """Return how prompt and control steer a run with these options."""
    return Guidance(
        options.guidance_scale,
        Interval(options.guidance_start, options.guidance_end),
        ControlScale(options.resemblance, options.guess_mode),
        Interval(options.control_start, options.control_end),
    )


def _conditioning(
    bundle: Bundle,
    control: ControlImage,
    grid: WindowGrid,
    options: ResolvedOptions,
    batch: HalvingBatch,
) -> Conditioning:
    text = bundle.text.encode([options.negative_prompt, options.prompt])
    windows = [window.scaled(bundle.facts.latent_factor).index for window in grid.windows]
    embedded: list[Tensor] = []

    def embed(start: int, end: int) -> None:
        crops = ControlImage(
            torch.cat([control.prescaled[w] for w in windows[start:end]]),
            torch.cat([control.source[w] for w in windows[start:end]]),
        )
        embedded.append(bundle.denoiser.embed_control(crops))

    batch.run(embed, len(windows))
    return Conditioning(text[1:], text[:1], torch.cat(embedded))


def _window_batch(device: torch.device) -> int:
    return GPU_WINDOW_BATCH if device.type == "cuda" else CPU_WINDOW_BATCH


def _tensor(picture: NDArray[np.float32], bundle: Bundle) -> Tensor:
    tensor = torch.tensor(picture.transpose(2, 0, 1)[None])
    return tensor.to(bundle.device)


def _array(image: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = image[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return array
